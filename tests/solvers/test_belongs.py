"""What belongs together runs, everything else is refused: tables and schedules, pairs and models, files and their
numbers. And a model is what it answers, not only what it weighs."""
import json
import random
from dataclasses import replace

import numpy
import pytest
import torch
from torch import nn

from s4s_nb.denoise import (
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    GaussianMixture,
    RecordingDenoiser,
    VDenoiser,
    X0Denoiser,
    alike,
    answers,
    fingerprint,
    known_model,
)
from s4s_nb.grids import time_edm, time_flow, time_logsnr, time_power, time_quadratic, time_uniform
from s4s_nb.judging.distance import L2
from s4s_nb.learning.coefficients import S4SConfig, s4s
from s4s_nb.learning.pairs import teacher_pairs
from s4s_nb.learning.student import Learnable
from s4s_nb.schedule import CosineVPSchedule, DiscreteVPSchedule, EDMSchedule, FlowSchedule, VPSchedule
from s4s_nb.solver import Solver, from_json, to_json
from s4s_nb.solvers.multistep import ddim, deis, dpm_solver, ipndm, unipc
from s4s_nb.solvers.singlestep import dpm2, dpm_solver_s, heun

SHAPE = (3, 4, 4)


class Net(nn.Module):
    "Small, with everything that changes an answer and no weight."
    scale = 1.                                     # of the class
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("gain", torch.ones(1), persistent=False)
        self.options = dict(b1=1.)
        self.attend = nn.functional.silu
    def forward(self, x, t):
        low = nn.functional.avg_pool2d(self.attend(self.conv(x)), 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
        return self.scale * self.gain * (self.conv(x) + self.options["b1"] * low)

def model(net=None): return EpsDenoiser(net or Net(), VPSchedule(), SHAPE)


# ---- a model is what it answers --------------------------------------------------------------------------------------
def with_hook(net): net.conv.register_forward_hook(lambda m, args, out: out + .05 * args[0])
def with_pre_hook(net): net.conv.register_forward_pre_hook(lambda m, args: (1.05 * args[0],))
def with_patched_forward(net):
    forward = net.forward
    net.forward = lambda x, t: forward(x, t) + .05
def with_another_class(net): net.__class__ = type("Net", (Net,), dict(scale=.9))
def with_another_option(net): net.options["b1"] = 1.2
def with_another_attention(net): net.attend = nn.functional.gelu
def with_another_buffer(net): net.gain.mul_(.95)
def with_a_number(net): net.scale = 1.05

CHANGES = [with_hook, with_pre_hook, with_patched_forward, with_another_class, with_another_option,
           with_another_attention, with_another_buffer, with_a_number]

@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_answers_changes_the_pairs(change, tmp_path):
    "Although the weights are the same: nothing comes out of the cache that another model put in, both ways."
    plain, changed = model(), model()
    change(changed.net)
    assert fingerprint(plain) == fingerprint(changed) and not alike(answers(plain), answers(changed))
    teacher = unipc(plain.schedule, time_logsnr(plain.schedule, 6))
    def pairs(d): return teacher_pairs(d, teacher, 3, 0, cache=tmp_path, progress=False).x_0
    kept = {name: pairs(d) for name, d in dict(plain=plain, changed=changed).items()}
    assert not torch.allclose(kept["plain"], kept["changed"], rtol=1e-3)
    assert torch.equal(pairs(model()), kept["plain"]) and torch.equal(pairs(changed), kept["changed"])

@pytest.mark.parametrize("change", CHANGES[:4], ids=lambda f: f.__name__)
def test_pairs_of_another_model_are_refused(change):
    here, other = model(), model()
    change(other.net)
    teacher = unipc(here.schedule, time_logsnr(here.schedule, 6))
    def pairs(d, seed): return teacher_pairs(d, teacher, 4, seed, cache=False, progress=False)
    learn = lambda train, valid: s4s(here, ipndm(here.schedule, time_logsnr(here.schedule, 3)), train, valid, L2(),
                                     S4SConfig(epochs=1), progress=False)
    own, more = pairs(here, 1), pairs(here, 11)
    for train, valid, name in [(pairs(other, 1), more, "train"), (own, pairs(other, 11), "valid")]:
        with pytest.raises(ValueError, match=f"{name}: these pairs were made with another model"): learn(train, valid)
    learn(own, replace(pairs(other, 11), answers=None))   # said to be meant
    with pytest.raises(ValueError, match="share 4 starts, first seed 1"): learn(own, own)
    with pytest.raises(ValueError, match="share 1 starts, first seed 4"): learn(own, pairs(here, 4))

def test_rounding_is_no_other_model(tmp_path):
    d = model()
    said = answers(d)
    assert known_model(d, tmp_path).name == known_model(model(), tmp_path).name
    assert alike(said * (1 + 1e-6 * torch.randn(said.shape)), said) and not alike(said * 1.001, said)
    assert alike(said * 1.001, said, torch.float16)   # which rounds more coarsely

def test_note_takers_are_not_asked():
    r = RecordingDenoiser(model())
    assert alike(answers(r), answers(model())) and not r.calls


# ---- a table belongs to a schedule -----------------------------------------------------------------------------------
BETAS = torch.linspace(.00085**.5, .012**.5, 1000).double()**2
SCHEDULES = dict(
    edm=EDMSchedule(), vp=VPSchedule(), cosine=CosineVPSchedule(), flow=FlowSchedule(), vp_other=VPSchedule(.1, 19.),
    scaled=DiscreteVPSchedule((1 - BETAS).cumprod(0)),
    linear=DiscreteVPSchedule((1 - torch.linspace(1e-4, .02, 1000).double()).cumprod(0)),
    shorter=DiscreteVPSchedule((1 - torch.linspace(1e-4, .02, 900).double()).cumprod(0)), narrow=EDMSchedule(.002, 40.))
MAKERS = dict(ddim=ddim, ipndm=ipndm, unipc=unipc, deis=deis, dpm=dpm_solver, heun=heun, dpm2=dpm2)

def gaussian(schedule): return GaussianMixture(schedule, [1.], [[.3, -.7]], [[.5, .5]])

@pytest.mark.parametrize("own", SCHEDULES)
def test_a_table_runs_on_its_own_schedule_only(own):
    schedule, x = SCHEDULES[own], torch.ones(2, 2)
    solver = ipndm(schedule, time_logsnr(schedule, 4))
    assert solver(gaussian(schedule), x).isfinite().all()
    assert solver(gaussian(schedule.between(schedule.t_max, schedule.t_min)), x).isfinite().all()
    assert from_json(to_json(solver))(gaussian(schedule), x).equal(solver(gaussian(schedule), x))
    for other in set(SCHEDULES) - {own}:
        if own == "narrow" and other == "edm": continue  # a part of the way
        with pytest.raises(ValueError, match="t_max=|made for alpha, sigma"): solver(gaussian(SCHEDULES[other]), x)

@pytest.mark.parametrize("field", ["t", "alpha", "sigma"])
def test_an_edited_file_is_refused_when_it_runs(field):
    edm = EDMSchedule()
    d = json.loads(to_json(heun(edm, time_edm(edm, 3))))
    d[field][1] *= 1.001
    edited = from_json(json.dumps(d))
    with pytest.raises(ValueError, match="made for alpha, sigma"): edited(gaussian(edm), torch.ones(1, 2))

@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("schedule, t, why", [
    (EDMSchedule(), [999., 10., 1.], "t_max=80"), (VPSchedule(), [999, 666, 333, 1], "t_max=1"),
    (FlowSchedule(), [.9, .9, .1], "strictly decreasing"), (EDMSchedule(), [1.], "at least two times"),
    (VPSchedule(), [[1., .5]], "at least two times"), (EDMSchedule(), 5, "at least two times"),
    (EDMSchedule(), [80., -1.], "none below 0"), (EDMSchedule(), [1., float("nan")], "strictly decreasing"),
    (EDMSchedule(), [80., 1e-4, 0.], "t_min=0.002"), (EDMSchedule(), "80,1", "at least two times"),
    (gaussian(EDMSchedule()), [80., 1.], "which is its .schedule"), (7, [80., 1.], "expected a NoiseSchedule")])
def test_no_solver_is_made_off_the_schedule(maker, schedule, t, why):
    with pytest.raises(ValueError, match=why): MAKERS[maker](schedule, t)

@pytest.mark.parametrize("grid", [time_uniform, time_edm, time_logsnr, time_quadratic, time_power, time_flow])
def test_grids_take_whole_numbers_of_any_kind(grid):
    edm = EDMSchedule()
    assert torch.equal(grid(edm, numpy.int64(4)), grid(edm, 4))
    for n in (0, -1, 2.5, "4", True, None, 10**9):
        with pytest.raises(ValueError, match="n=.*expected a whole number"): grid(edm, n)
    for wrong in (gaussian(edm), "edm", None, Net()):
        with pytest.raises(ValueError, match="expected a NoiseSchedule"): grid(wrong, 4)

@pytest.mark.parametrize("wrapper", [EpsDenoiser, X0Denoiser, VDenoiser, FlowDenoiser, EDMDenoiser])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_times_keep_their_digits(wrapper, dtype):
    schedule, shown = VPSchedule(), []
    wrapper(lambda x, t: shown.append(t) or x, schedule, SHAPE)(torch.zeros(2, *SHAPE, dtype=dtype), .87512)
    want = .87512 if wrapper != EDMDenoiser else float(schedule.sigma(.87512) / schedule.alpha(.87512))
    assert ((shown[0] - want).abs() < 1e-6 * want).all()
    for t in (0., 1.2, float("nan"), torch.tensor([.5, 999.])):
        with pytest.raises(ValueError, match="has times from t_min=0.001"):
            wrapper(lambda x, t: x, schedule)(torch.zeros(2, 3), t)

class Dropping(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x, t): return self.layer(x)

LAYERS = [nn.Dropout(.5), nn.Dropout2d(.5), nn.AlphaDropout(.5), nn.BatchNorm2d(3), nn.RReLU()]

@pytest.mark.parametrize("layer", LAYERS, ids=lambda m: type(m).__name__)
def test_a_network_samples_in_evaluation_mode(layer):
    "Whoever switched it, whole or in part; and finds it as it was."
    d = model(Dropping(layer).eval())
    solver, x = ddim(d.schedule, time_uniform(d.schedule, 2)), torch.randn(2, *SHAPE)
    calm, pairs = solver(d, x), teacher_pairs(d, solver, 2, 0, cache=False, progress=False).x_0
    for part in (d, d.net, layer):
        part.train()
        assert torch.equal(solver(d, x), calm) and layer.training
        assert torch.equal(teacher_pairs(d, solver, 2, 0, cache=False, progress=False).x_0, pairs) and layer.training
        d.eval()

def test_what_has_no_schedule_goes_without_only_if_said():
    edm = EDMSchedule()
    solver, x = heun(edm, time_edm(edm, 2)), torch.ones(1, 2)
    for plain in (lambda x, t: x, nn.Identity(), Net().forward):
        with pytest.raises(ValueError, match="has no noise schedule"): solver(plain, x)
    assert solver(X0Denoiser(lambda x, t: x, None), x).isfinite().all()

@pytest.mark.parametrize("call, why", [
    (lambda d, s, p: s4s(d, s, p, p, "l2", progress=False), "distance=.l2.: expected a Distance"),
    (lambda d, s, p: s4s(d, s, [1], p, L2(), progress=False), "expected (a )?Pairs"),
    (lambda d, s, p: Learnable("ipndm"), "'ipndm': expected a Solver"),
    (lambda d, s, p: teacher_pairs(Net(), s, 4, 0), "Net: expected a Denoiser; from_diffusers"),
    (lambda d, s, p: teacher_pairs(d, "unipc", 4, 0), "'unipc': expected a Solver"),
    (lambda d, s, p: teacher_pairs(d, s, 2.5, 0), "n=2.5: expected a whole number"),
    (lambda d, s, p: teacher_pairs(d, s, 0, 0), "n=0: expected a whole number"),
    (lambda d, s, p: teacher_pairs(EpsDenoiser(Net(), VPSchedule()), s, 4, 0), "pass shape=")])
def test_what_users_mix_up_is_said(call, why):
    d = model()
    solver = ipndm(d.schedule, time_logsnr(d.schedule, 3))
    with pytest.raises(ValueError, match=why):
        call(d, solver, teacher_pairs(d, solver, 2, 0, cache=False, progress=False))


# ---- files -----------------------------------------------------------------------------------------------------------
ODD = ["1e999", "-0", "9" * 400, "true", "null", '"x"', "[]", "{}", "NaN", "[[", "]]", "\u0000", "\ufeff", "1e-320",
       ","]

def mutated(text, rng):
    "Something cut, put in, doubled, replaced, or the end missing."
    i, j = sorted(rng.sample(range(len(text) + 1), 2))
    head, tail = text[:i], text[i:]
    return rng.choice([head + text[min(j, i + 40):], head + rng.choice(ODD) + tail, head + text[i:j][:60] + tail,
                       head + chr(rng.randint(1, 300)) + tail[1:], head]) or "x"

def test_twenty_thousand_mutated_files():
    "A solver, or our error."
    edm, rng, loaded = EDMSchedule(), random.Random(0), 0
    texts = [to_json(replace(f(edm, time_edm(edm, 3)), meta=dict(a=[1, None, "x"]))) for f in (ipndm, unipc, heun)]
    for _ in range(20_000):
        text = rng.choice(texts)
        for _ in range(rng.randint(1, 3)): text = mutated(text, rng)
        try: loaded += isinstance(from_json(text), Solver)
        except ValueError as e: assert str(e).startswith("text: "), e
    assert 0 < loaded < 20_000

def test_files_of_other_editors_load(tmp_path):
    edm = EDMSchedule()
    solver, path = dpm_solver_s(edm, time_edm(edm, 3), 2), tmp_path / "s.json"
    solver.save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Solver.load(path) == solver
