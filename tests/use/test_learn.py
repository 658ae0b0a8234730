"Learning for pipelines of diffusers as they are, and for any denoiser: estimates that hold, packs that help."
import logging

import pytest
import test_pipelines as tiny
import torch

from s4s_nb.denoise import GaussianMixture
from s4s_nb.models.pipelines import from_diffusers
from s4s_nb.schedule import EDMSchedule, FlowSchedule, VPSchedule
from s4s_nb.use.learn import FIRST_SEEDS, LEARNERS, Calls, learn_for_pipeline, learn_pack, teacher_for
from s4s_nb.use.pack import Pack, check_pack_fits

pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]
SMALL = dict(n_train=6, n_valid=4, n_test=5, epochs=1, method="s4s", progress=False)


def mixture(schedule): return GaussianMixture(schedule, [.4, .6], [[1., .2], [-.7, .4]], [[.3, .4], [.2, .3]])


SCHEDULES = EDMSchedule(), VPSchedule(), FlowSchedule()

@pytest.mark.parametrize(("method", "schedule"), [(m, SCHEDULES[i % 3]) for i, m in enumerate(LEARNERS)])
def test_calls_are_told_exactly(method, schedule, tmp_path):
    model, what = mixture(schedule), SMALL | dict(nfe=3, method=method)
    told = learn_pack({None: model}, **what, dry_run=True, checkpoint=tmp_path / "a")
    with Calls(model) as calls:
        pack = learn_pack({None: model}, **what, checkpoint=tmp_path / "b", cache=tmp_path / "c")
    assert told.calls == calls.plain + calls.differentiated
    errors = pack.solver().meta["errors"]
    assert errors["low"] <= errors["ratio"] <= errors["high"] and errors["n"] == 5


def test_a_stopped_run_goes_on_with_equal_results(tmp_path):
    model, what = mixture(EDMSchedule()), SMALL | dict(nfe=(3, 4), epochs=3)
    def learned(folder):
        return learn_pack({None: model}, **what, checkpoint=tmp_path / folder, cache=tmp_path / "pairs")
    learned("pairs") # later runs find them
    seen, last = 0, None
    def stop(*_):
        nonlocal seen
        seen += 1
        if seen == last: raise KeyboardInterrupt
    handle = model.register_forward_pre_hook(stop)
    whole = learned("a")
    seen, last = 0, int(.6 * seen)
    with pytest.raises(KeyboardInterrupt): learned("b")
    handle.remove()
    assert len(list((tmp_path / "b").glob("learn_*"))) == 1
    with Calls(model) as calls: again = learned("b")
    assert again == whole
    with Calls(model) as fresh: learned("d")
    assert calls.plain + calls.differentiated < fresh.plain + fresh.differentiated


@pytest.mark.parametrize("name", ["ddpm", "sd", "sdxl", "sd3", "flux", "dit"])
def test_a_pack_of_a_pipeline(name, tmp_path):
    "Learned with one call, it knows its model and refuses another one's schedule."
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe = tiny.pipeline(name)
    options = dict(tiny.OPTIONS.get(name, {}))
    size = options.pop("size", None)
    guidance = [1.5, 4.] if name in ("sd", "sdxl", "sd3") else None
    given = dict(prompts=tiny.PROMPTS if name in tiny.TEXT else None, size=size, options=options)
    pack = learn_for_pipeline(pipe, 3, guidance, **given, **SMALL, cache=tmp_path, name=name)
    assert pack.nfes == (3,) and pack.guidances == tuple(guidance or [None])
    assert pack.model["predicts"] in ("epsilon", "flow_prediction") and pack.model["train_timesteps"] == 1000
    pack.save(tmp_path / "p.json")
    assert Pack.load(tmp_path / "p.json") == pack
    for w in pack.guidances:
        denoiser = from_diffusers(pipe, given["prompts"], w, size=size, **options)
        check_pack_fits(pack, denoiser, w)
        assert pack.solver(3, w).t[0] == denoiser.schedule.t_max
    other = tiny.pipeline("sd3" if name != "sd3" and name != "flux" else "ddpm")
    with pytest.raises(ValueError, match="made for alpha, sigma"):
        check_pack_fits(Pack({(3, None): pack.solver(3, pack.guidances[0])}),
                        from_diffusers(other, tiny.PROMPTS if other is not tiny.pipeline("ddpm") else None))


def test_half_precision_learns():
    model = tiny.pipeline("ddpm")
    half = type(model)(unet=tiny.unet().to(torch.bfloat16), scheduler=model.scheduler)
    pack = learn_for_pipeline(half, 3, **SMALL | dict(n_train=2, n_valid=2, n_test=2), cache=False)
    assert pack.nfes == (3,)


def test_teacher_ends_where_students_end():
    for schedule in SCHEDULES:
        assert teacher_for(schedule, 20).t[-1] == schedule.t_min
    assert not {*range(FIRST_SEEDS["test"], 1000)} & {FIRST_SEEDS["train"], FIRST_SEEDS["valid"]}


@pytest.mark.parametrize(("wrong", "why"), [
    (dict(nfe=0), "nfe=0"), (dict(nfe="four"), "nfe='four'"), (dict(method="s5s"), "s4s_alt"),
    (dict(guidance="high"), "guidance='high'")])
def test_wrong_words_are_told(wrong, why):
    with pytest.raises(ValueError, match=why): learn_for_pipeline(tiny.pipeline("ddpm"), **dict(nfe=4) | SMALL | wrong)
