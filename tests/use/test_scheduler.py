"""`S4SScheduler` against `Solver`, in pipelines of diffusers as they are: tiny networks with random weights.

The witness is the pipeline itself: it runs as users run it, and its start, its network outputs and its end are noted.
"""
import ast
import json
import os
import pickle
import subprocess
import sys
from functools import cache

import pytest
import test_pipelines as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s4s_nb.denoise import (
    EpsDenoiser,
    FlowDenoiser,
    GaussianMixture,
    VDenoiser,
    X0Denoiser,
    sample_noise,
)
from s4s_nb.files.checks import import_torchvision
from s4s_nb.grids import time_logsnr, time_uniform
from s4s_nb.models.pipelines import read_scheduler, unpack_tokens
from s4s_nb.schedule import DiscreteVPSchedule, EDMSchedule, FlowSchedule
from s4s_nb.solver import exact_solution, tabulate
from s4s_nb.solvers.families import SOLVERS
from s4s_nb.solvers.multistep import ddim, dpm_solver, ipndm, unipc
from s4s_nb.solvers.singlestep import heun
from s4s_nb.use.pack import Pack, pack_to_json

pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

DENOISERS = dict(epsilon=EpsDenoiser, v_prediction=VDenoiser, sample=X0Denoiser, flow_prediction=FlowDenoiser)
FLOWS = "sd3", "flux"


def module():
    import_torchvision()
    from s4s_nb.use import scheduler
    return scheduler

def of(pack, scheduler=None, guidance=None):
    if isinstance(pack, list): pack = pack_of(*pack)
    return module().S4SScheduler.from_pack(pack, scheduler, guidance)

def pack_of(*solvers, guidance=None, **model):
    return Pack({(s.nfe, guidance): s for s in solvers}, "tables", model)

@cache
def vp(): return DiscreteVPSchedule(tiny.diffusers().DDIMScheduler().alphas_cumprod)

def moved(solver, schedule, by=.3):
    "The same table, its network shown times between those of its states."
    t = solver.t
    shown = t[:-1] + by * (t[1:] - t[:-1]).clamp(-.05, 0.)
    return solver.decouple(schedule, shown.clamp(schedule.t_min, schedule.t_max))

def tables_for(schedule):
    "With a corrector; with moved times."
    three, five = (time_uniform(schedule, n) for n in (3, 5))
    return [unipc(schedule, three), moved(dpm_solver(schedule, five, 3), schedule)]

# ------------------------------------------------------------------------------------------------------------
# Unmodified pipelines
# ------------------------------------------------------------------------------------------------------------

class Noted:
    "A pipeline's run: its start, its outputs, its end, its images."
    def __init__(self, pipe, **kw):
        scheduler, step = pipe.scheduler, pipe.scheduler.step
        self.starts, self.outputs, self.ends = [], [], []
        def note(output, t, x, **options):
            result = step(output, t, x, **options)
            self.starts.append(x)
            self.outputs.append(output)
            self.ends.append(result[0])
            return result
        scheduler.step = note
        try: self.images = pipe(**kw)[0]
        finally: del scheduler.step

def arguments(name, guidance, rows, n):
    kw = dict(generator=torch.Generator().manual_seed(0), num_inference_steps=n, output_type="pt")
    if name == "ddpm": return kw | dict(batch_size=len(rows))
    if name == "dit": return kw | dict(class_labels=rows.tolist(), guidance_scale=guidance or 1.)
    kw |= dict(prompt=[tiny.PROMPTS[i] for i in rows], guidance_scale=guidance or 1.)
    if name in FLOWS: kw |= dict(max_sequence_length=8)
    if name == "flux": kw |= dict(height=16, width=16, guidance_scale=3.5, true_cfg_scale=guidance or 1.,
                                  negative_prompt=[""] * len(rows))
    return kw

def with_scheduler(pipe, scheduler):
    "The pipeline built anew, as from_pretrained does, so that its checks of the scheduler's config run."
    d, cls = tiny.diffusers(), type(pipe) # DDIM's pipeline makes a DDIMScheduler of whatever scheduler it is built with
    made = (d.DDPMPipeline if cls is d.DDIMPipeline else cls)(**pipe.components | dict(scheduler=scheduler), **{
        k: v for k, v in pipe.config.items() if k in ("requires_safety_checker",)})
    made.set_progress_bar_config(disable=True)
    return made

@pytest.mark.parametrize("name, guidance", [(name, w) for name in tiny.MAKE for w in (None, 3.)
                                            if (name, w) != ("ddpm", 3.)]) # which has no conditions
def test_a_pipeline_ends_where_the_solver_ends(name, guidance, notes):
    pipe, denoiser = tiny.pipeline(name), tiny.denoiser_of(name, guidance)
    solvers = tables_for(denoiser.schedule)
    scheduler = of(pack_of(*solvers, guidance=guidance), pipe.scheduler)
    before = dict(scheduler.config)
    pipe = with_scheduler(pipe, scheduler)
    assert dict(scheduler.config) == before, "the pipeline has rewritten the config"
    cond = denoiser.conditions(tiny.SEEDS)
    rows = cond.get("condition", torch.zeros(len(tiny.SEEDS), dtype=torch.long))
    state = lambda v: unpack_tokens(v, 8, 8) if name == "flux" else v[:len(rows)]
    for s in solvers:
        run = Noted(pipe, **arguments(name, guidance, rows, s.nfe))
        with torch.no_grad(): end = s(denoiser, state(run.starts[0]), **cond)
        apart = tiny.off(state(run.ends[-1]), end)
        with torch.no_grad(): shown = tiny.off((denoiser.decode(end) / 2 + .5).clamp(0, 1), run.images)
        notes.append(f"S4SScheduler in {name}, guidance {guidance}, {s.nfe} steps: end {apart:.1e}, images {shown:.1e}")
        assert len(run.ends) == s.nfe and apart < 1e-5 and shown < 1e-5
    with pytest.raises(ValueError, match="holds tables of 3, 5 steps"): pipe(**arguments(name, guidance, rows, 4))

def test_ddim_s_pipeline_takes_a_scheduler_that_is_set_afterwards():
    "Built with any scheduler, it makes a DDIMScheduler of it."
    pipe = tiny.make_ddpm()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = of(tables_for(vp()), tiny.diffusers().DDIMScheduler())
    kw = dict(num_inference_steps=3, output_type="pt")
    seed = lambda: torch.Generator().manual_seed(0)
    ends = [Noted(p, generator=seed(), **kw).ends[-1] for p in (
        pipe, tiny.diffusers().DDPMPipeline(pipe.unet, pipe.scheduler))]
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="eta=0.5: learned solvers add no noise"): pipe(eta=.5, **kw)

def make_pixart():
    net = tiny.diffusers().PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=32, norm_num_groups=4, use_additional_conditions=False).eval()
    return tiny.diffusers().PixArtAlphaPipeline(tiny.tokenizer(), tiny.t5(), tiny.autoencoder(), net,
                                               tiny.diffusers().DDIMScheduler(**tiny.SD))

def make_sana():
    d = tiny.diffusers()
    net = d.SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=32, sample_size=16).eval()
    vae = d.AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, encoder_layers_per_block=(1, 1),
        encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2, decoder_layers_per_block=(1, 1),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), downsample_block_type="conv", upsample_block_type="interpolate")
    return d.SanaPipeline(tiny.tokenizer(), tiny.t5(), vae, net, d.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.))

@pytest.mark.parametrize("make", [make_pixart, make_sana])
def test_a_pipeline_whose_network_is_not_read_here_gives_the_table_s_states(make, notes):
    "The solver is given the outputs that the pipeline's network gave."
    torch.manual_seed(0)
    pipe = make()
    wrapper, schedule, N = read_scheduler(pipe.scheduler)
    solvers = tables_for(schedule)
    pipe.scheduler = of(solvers, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompt = dict(prompt_embeds=torch.randn(2, 8, 32), prompt_attention_mask=torch.ones(2, 8))
    null = {f"negative_{k}": v * 0 + (v.dim() == 2) for k, v in prompt.items()}
    sizes = dict(height=pipe.transformer.config.sample_size * pipe.vae_scale_factor,
                 width=pipe.transformer.config.sample_size * pipe.vae_scale_factor)
    for s in solvers:
        run = Noted(pipe, **prompt, **null, **sizes, negative_prompt=None, num_inference_steps=s.nfe,
                    guidance_scale=2., generator=torch.Generator().manual_seed(0), output_type="latent",
                    use_resolution_binning=False)
        script = iter(run.outputs)
        end = s(wrapper(lambda x, t, script=script: next(script).to(x), schedule), run.starts[0])
        apart = tiny.off(run.ends[-1], end)
        notes.append(f"S4SScheduler in {type(pipe).__name__}, {s.nfe} steps: {apart:.1e}")
        assert apart < 1e-5 and next(script, None) is None

# ------------------------------------------------------------------------------------------------------------
# Every table
# ------------------------------------------------------------------------------------------------------------

def replayed(s, kind, N=1000, noise=None, scheduler=None):
    "The end by the scheduler, and by the loop; the network is shown float32 times, as schedulers keep them."
    net = lambda x, t: (x + t.float().double() / 300 / (N / 1000)).cos()
    schedule = s.schedule_of_test
    time = (lambda t: N * t) if kind == "flow_prediction" else (lambda t: N * t - 1)
    noise = sample_noise(range(2), (3, 2)).double() if noise is None else noise
    expected = s(DENOISERS[kind](net, schedule, net_time=time), schedule.prior_std * noise)
    scheduler = scheduler or of(pack_of(s, predicts=kind, train_timesteps=N, prior_std=schedule.prior_std))
    scheduler.set_timesteps(s.nfe)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps: x = scheduler.step(net(x, t), t, x).prev_sample
    assert scheduler.step_index == s.nfe and not scheduler.held
    return x, expected

def on(schedule, solver):
    object.__setattr__(solver, "schedule_of_test", schedule)
    return solver

CLASSICAL = [(name, order, form) for name, f in SOLVERS.items() for order in f.orders for form in f.forms]

@pytest.mark.parametrize("name, order, form", CLASSICAL)
def test_every_classical_solver(name, order, form):
    "Multistep and single-step, noise and data, correctors, stages; on networks of every kind."
    family = SOLVERS[name]
    steps = family.spend(6, order)
    for kind in DENOISERS:
        schedule = FlowSchedule() if kind == "flow_prediction" else vp()
        solver = family.make(schedule, time_uniform(schedule, len(steps)), order, steps, **family.forms[form])
        for s in (solver, moved(solver, schedule)):
            x, expected = replayed(on(schedule, s), kind)
            assert tiny.off(x, expected) < 1e-10, (name, order, form, kind)

def random_table(schedule, prediction, seed, M=5):
    "All that a table can have: factors a, start and end; any base; a corrector; moved times."
    g = torch.Generator().manual_seed(seed)
    rand = lambda *n: torch.rand(*n, generator=g, dtype=torch.float64)
    t = time_uniform(schedule, M)
    base = [int(rand(1) * (n + 1)) for n in range(M)]
    return tabulate(schedule, t, [rand(n + 1) - .3 for n in range(M)], c=[rand(n + 2) - .3 for n in range(M - 1)],
                    base=base, a=.8 + .4 * rand(M), t_eval=t[:-1] - .02 * rand(M) * (t[:-1] - t[1:]),
                    prediction=prediction, start_factor=1.25, end_factor=.75)

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_everything_a_table_can_have(prediction, seed):
    for kind in DENOISERS:
        schedule = FlowSchedule() if kind == "flow_prediction" else vp()
        x, expected = replayed(on(schedule, random_table(schedule, prediction, seed)), kind)
        assert tiny.off(x, expected) < 1e-9
    zero = tabulate(vp(), time_uniform(vp(), 4), torch.rand(4, 4), base=[0] * 4, prediction=prediction)
    x, expected = replayed(on(vp(), zero), "epsilon")
    assert tiny.off(x, expected) < 1e-10

def test_a_flow_from_pure_noise():
    "At t = 1 alpha is 0; data prediction goes on from there, to t = 0."
    schedule = FlowSchedule(0., 1.)
    x, expected = replayed(on(schedule, dpm_solver(schedule, torch.linspace(1, 0, 6), 2)), "flow_prediction")
    assert tiny.off(x, expected) < 1e-10 and torch.isfinite(x).all()

def test_a_start_of_another_size():
    schedule = EDMSchedule()
    s = on(schedule, ipndm(schedule, time_logsnr(schedule, 4), 2))
    x, expected = replayed(s, "sample")
    assert tiny.off(x, expected) < 1e-10 and schedule.prior_std > 1

def test_zero_terminal_snr():
    d = tiny.diffusers()
    own = d.DDIMScheduler(**dict(tiny.SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    for terminal in (False, True):
        _, schedule, N = read_scheduler(own, terminal)
        s = dpm_solver(schedule, time_uniform(schedule, 4), 2)
        scheduler = of([s], own)
        assert scheduler.config.num_train_timesteps == 1000 and (scheduler.config.time_scale or 1000) == N
        x, expected = replayed(on(schedule, s), "v_prediction", N, scheduler=scheduler)
        assert tiny.off(x, expected) < 1e-9

def test_a_start_that_nobody_scaled_is_refused():
    "DDPM's pipeline does not look at init_noise_sigma; Stable Diffusion's does."
    larger = tabulate(vp(), time_uniform(vp(), 3), [[1.]] * 3, start_factor=1.5)
    pipe = with_scheduler(tiny.pipeline("ddpm"), of([larger], tiny.diffusers().DDIMScheduler(clip_sample=False)))
    with pytest.raises(ValueError, match="1.5 times standard normal noise"): pipe(num_inference_steps=3)
    own = tiny.pipeline("sd").scheduler
    _, schedule, _ = read_scheduler(own)
    larger = tabulate(schedule, time_uniform(schedule, 3), [[1.]] * 3, start_factor=1.5)
    pipe = with_scheduler(tiny.pipeline("sd"), of([larger], own))
    latents = sample_noise(range(1), (4, 8, 8))
    run = Noted(pipe, prompt="rain", num_inference_steps=3, latents=latents, output_type="pt")
    assert torch.equal(run.starts[0], 1.5 * latents)

# ------------------------------------------------------------------------------------------------------------
# From an image
# ------------------------------------------------------------------------------------------------------------

def image_to_image(name):
    d = tiny.diffusers()
    cls = dict(sd=d.StableDiffusionImg2ImgPipeline, sdxl=d.StableDiffusionXLImg2ImgPipeline,
               sd3=d.StableDiffusion3Img2ImgPipeline, flux=d.FluxImg2ImgPipeline)[name]
    return cls(**{k: v for k, v in tiny.pipeline(name).components.items() if k not in ("image_encoder",)},
               **dict(requires_safety_checker=False) if name == "sd" else {})

@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_an_image_enters_at_the_state_of_its_strength(name):
    "The rest of DPM-Solver-2M is DPM-Solver-2M on the rest of its grid, made without the scheduler."
    pipe, n, begin = image_to_image(name), 6, 3
    wrapper, schedule, N = read_scheduler(tiny.pipeline(name).scheduler)
    t = time_uniform(schedule, n)
    pipe.scheduler = of([dpm_solver(schedule, t, 2)], tiny.pipeline(name).scheduler)
    pipe.set_progress_bar_config(disable=True)
    kw = arguments(name, None, torch.arange(2), n) | dict(image=torch.rand(2, 3, 16, 16), strength=.5)
    if name == "flux": kw |= dict(true_cfg_scale=1.)
    run = Noted(pipe, **kw)
    assert len(run.ends) == n - begin and pipe.scheduler.begin_index == begin
    script = iter(run.outputs)
    rest = dpm_solver(schedule, t[begin:], 2)
    end = rest(wrapper(lambda x, t: next(script), schedule), run.starts[0])
    assert tiny.off(run.ends[-1], end) < 1e-5

def test_an_inpainted_image_keeps_what_is_not_masked():
    pipe = tiny.diffusers().StableDiffusionInpaintPipeline(
        **{k: v for k, v in tiny.pipeline("sd").components.items()}, requires_safety_checker=False)
    _, schedule, _ = read_scheduler(pipe.scheduler)
    pipe.scheduler = of([unipc(schedule, time_uniform(schedule, 6))], pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    kw = dict(mask_image=mask, num_inference_steps=6, output_type="latent", height=16, width=16,
              image=torch.rand(1, 3, 16, 16))
    for strength, calls in ((1., 6), (.5, 3)):
        runs = [Noted(pipe, prompt=prompt, strength=strength, generator=torch.Generator().manual_seed(0), **kw)
                for prompt in ("rain", "two dogs")]
        assert [len(run.ends) for run in runs] == [calls] * 2
        apart = (runs[0].images - runs[1].images).abs()
        assert apart[..., :4].max() == 0 and apart[..., 4:].min() > 0 and torch.isfinite(runs[0].images).all()

@pytest.mark.parametrize("make", [lambda s: ipndm(s, time_logsnr(s, 8), 3), lambda s: unipc(s, time_logsnr(s, 8)),
                                  lambda s: dpm_solver(s, time_logsnr(s, 8), 3), lambda s: heun(s, time_logsnr(s, 8))])
def test_a_later_start_is_close_to_the_exact_end(make, notes):
    "Closer than DDIM from the same state; a run of the whole table is the measure."
    schedule = vp()
    points = GaussianMixture(schedule, [.3, .7], [[1., .5], [-1., 0.]], [[.2, .3], [.3, .1]])
    x_T = sample_noise(range(100), (2,)).double()
    s, truth = make(schedule), exact_solution(points, x_T)
    scheduler = of(pack_of(s, predicts="sample", train_timesteps=1000))
    rms = lambda x: (x - truth).square().mean().sqrt().item()
    whole = rms(s(points, x_T))
    for begin in (1, 3, 5):
        x = start = exact_solution(points, x_T, t=float(s.t[begin]))
        scheduler.set_timesteps(s.nfe)
        scheduler.set_begin_index(begin)
        for n in range(begin, s.nfe):
            x = scheduler.step(points(x, s.t_eval[n]), scheduler.timesteps[n], x, return_dict=False)[0]
        first = rms(ddim(schedule, s.t[begin:].unique().flip(0))(points, start))
        notes.append(f"{s.name} begun at state {begin}: {rms(x):.3f}, DDIM {first:.3f}, whole table {whole:.3f}")
        assert rms(x) < first and rms(x) < 2 * whole

def test_tables_that_all_start_from_the_noise_are_not_entered():
    zero = tabulate(vp(), time_uniform(vp(), 4), torch.rand(4, 4), base=[0] * 4)
    scheduler = of(pack_of(zero), tiny.diffusers().DDIMScheduler())
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match="all rows of this table start from an earlier state"):
        scheduler.step(torch.zeros(1, 3), scheduler.timesteps[2], torch.zeros(1, 3))

def test_where_a_run_begins_is_known_without_being_told():
    "From the first timestep, as a view, as a copy, as a number."
    s = dpm_solver(vp(), time_uniform(vp(), 5), 2)
    scheduler, x = of([s], tiny.diffusers().DDIMScheduler()), torch.randn(1, 3)
    ends = []
    for first in (lambda t: t, lambda t: t.clone(), float):
        scheduler.set_timesteps(5)
        y = x
        for t in scheduler.timesteps[2:]: y = scheduler.step(y, first(t), y).prev_sample
        ends.append(y)
        assert scheduler.first == 2
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    with pytest.raises(ValueError, match="timestep 500: expected one of 999, "): scheduler.step(x, 500, x)

# ------------------------------------------------------------------------------------------------------------
# What diffusers checks of its own schedulers
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def scheduler():
    return of(tables_for(vp()), tiny.diffusers().DDIMScheduler(steps_offset=0))

def test_saved_and_loaded_to_the_bit(scheduler, tmp_path):
    x, F = torch.randn(2, 2, 3, 4, 4)
    scheduler.save_pretrained(tmp_path)
    cls = module().S4SScheduler
    plain = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert plain["pack"] == json.loads(pack_to_json(pack_of(*tables_for(vp()))))
    for other in (cls.from_pretrained(tmp_path), cls.from_config(scheduler.config), cls.from_config(plain),
                  cls(**{k: v for k, v in scheduler.config.items() if k in ("pack", "own")}),
                  pickle.loads(pickle.dumps(scheduler))):
        assert other.tables == scheduler.tables and other.config.pack == scheduler.config.pack
        for n in (3, 5):
            for s in (scheduler, other): s.set_timesteps(n)
            a, b = x, x
            for t in scheduler.timesteps: a, b = (s.step(F, t, y).prev_sample for s, y in ((scheduler, a), (other, b)))
            assert torch.equal(a, b) and torch.equal(scheduler.timesteps, other.timesteps)

def test_the_own_scheduler_comes_back_and_others_can_be_made(scheduler):
    d = tiny.diffusers()
    own = scheduler.original()
    public = lambda s: {k: v for k, v in s.config.items() if k[0] != "_"}
    assert public(own) == public(d.DDIMScheduler(steps_offset=0)) and own.config.clip_sample is True
    assert (scheduler.config.steps_offset, scheduler.config.clip_sample) == (1, False)
    betas = d.DDIMScheduler(**tiny.SD).betas
    _, schedule, _ = read_scheduler(d.DDIMScheduler(**tiny.SD))
    other = of([ddim(schedule, time_uniform(schedule, 3))], d.DDIMScheduler(**tiny.SD))
    assert torch.equal(d.DPMSolverMultistepScheduler.from_config(other.config).betas, betas)
    assert module().S4SScheduler.from_config(dict(other.config), pack=pack_of(
        ddim(schedule, time_uniform(schedule, 4)))).tables.keys() == {4}
    with pytest.raises(ValueError, match="made from a pack alone"):
        of(pack_of(*tables_for(vp()), predicts="epsilon", train_timesteps=1000)).original()

def test_public_interface(scheduler):
    x, F = torch.randn(2, 2, 3, 4, 4)
    scheduler.set_timesteps(5)
    assert scheduler.init_noise_sigma == 1. and scheduler.order == 1 and len(scheduler) == 1000
    assert scheduler.scale_model_input(x, 3.) is x and hasattr(scheduler.config, "num_train_timesteps")
    assert len(scheduler.timesteps) == 5 == len(scheduler.sigmas) - 1 and scheduler.timesteps.is_floating_point()
    first = scheduler.step(F, scheduler.timesteps[0], x)
    assert scheduler.step_index == 1 and first.prev_sample.shape == x.shape and first[0] is first.prev_sample
    scheduler.set_timesteps(5)
    assert scheduler.step_index is None
    assert torch.equal(scheduler.step(F, scheduler.timesteps[0], x, False)[0], first.prev_sample)
    learned_variance = torch.cat([F, F + 1], 1)
    scheduler.set_begin_index(0)
    assert torch.equal(scheduler.step(learned_variance, scheduler.timesteps[0], x)[0], first.prev_sample)
    with pytest.raises(ValueError, match="model_output of shape"): scheduler.step(F[:1], scheduler.timesteps[1], x)
    new = of(tables_for(vp()), scheduler.original())
    with pytest.raises(ValueError, match="expected set_timesteps"): new.step(F, 3, x)

def test_a_second_run_needs_no_new_timesteps(scheduler):
    x = torch.randn(1, 3, 4, 4)
    scheduler.set_timesteps(5)
    ends = []
    for _ in range(2):
        y = x
        for t in scheduler.timesteps: y = scheduler.step(y, t, y).prev_sample
        ends.append(y)
    assert torch.equal(*ends)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_and_devices(scheduler, dtype):
    scheduler.set_timesteps(3, device="cpu")
    x = torch.randn(2, 3, 4, 4).to(dtype)
    for t in scheduler.timesteps: x = scheduler.step(x, t, x).prev_sample
    assert x.dtype == dtype and torch.isfinite(x).all()
    noised = scheduler.add_noise(x, x, scheduler.timesteps[1:2])
    assert noised.dtype == dtype and scheduler.timesteps.device == x.device == noised.device
    scheduler.set_timesteps(3, device="meta")
    assert scheduler.timesteps.device.type == "meta"

def test_noise_is_added_as_the_states_have_it(scheduler):
    s = tables_for(vp())[1]
    scheduler.set_timesteps(5)
    x, noise = torch.randn(2, 5, 3, 4, 4)
    states = s.alpha[:5].float().reshape(-1, 1, 1, 1) * x + s.sigma[:5].float().reshape(-1, 1, 1, 1) * noise
    assert torch.allclose(scheduler.add_noise(x, noise, scheduler.timesteps), states, atol=1e-6)
    assert torch.allclose(scheduler.scale_noise(x, scheduler.timesteps, noise), states, atol=1e-6)
    scheduler.set_begin_index(2)
    assert torch.allclose(scheduler.add_noise(x, noise, scheduler.timesteps[2:3]), (
        s.alpha[2].float() * x + s.sigma[2].float() * noise), atol=1e-6)
    scheduler.step(x, scheduler.timesteps[2], x)
    assert torch.allclose(scheduler.add_noise(x, noise, scheduler.timesteps[3:4]), (
        s.alpha[3].float() * x + s.sigma[3].float() * noise), atol=1e-6)

def test_trained_betas():
    d = tiny.diffusers()
    own = d.DDIMScheduler(trained_betas=torch.linspace(1e-4, .03, 200).tolist(), num_train_timesteps=200)
    _, schedule, _ = read_scheduler(own)
    scheduler = of([ddim(schedule, time_uniform(schedule, 4))], own)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 199 and json.dumps(scheduler.config.trained_betas)
    assert torch.equal(scheduler.original().betas, own.betas)
    with pytest.raises(ValueError, match="where the model's"): of([ddim(vp(), time_uniform(vp(), 4))], own)

def test_sigmas_count_steps_and_timesteps_must_be_the_table_s(scheduler):
    scheduler.set_timesteps(sigmas=[1., .5, .1], mu=.7)
    assert len(scheduler.timesteps) == 3 == scheduler.num_inference_steps
    scheduler.set_timesteps(timesteps=scheduler.timesteps)
    with pytest.raises(ValueError, match="timesteps with 500: the table of 3 steps has 999, "):
        scheduler.set_timesteps(timesteps=[999, 500, 1])
    for wrong in (dict(num_inference_steps=4), dict(), dict(sigmas=[1.])):
        with pytest.raises(ValueError, match="holds tables of 3, 5 steps"): scheduler.set_timesteps(**wrong)

def test_a_guidance_scale_is_chosen_once():
    first, second = (ddim(vp(), time_uniform(vp(), n)) for n in (3, 4))
    both = Pack({(3, 1.): first, (4, 7.5): second}, "two scales")
    own = tiny.diffusers().DDIMScheduler()
    assert of(both, own, 7.5).tables.keys() == {4} and of(both, own, 7.5).config.guidance == 7.5
    for wrong in (None, 2.):
        with pytest.raises(ValueError, match="was learned for guidance 1, guidance 7.5"): of(both, own, wrong)
    assert of(of(both, own, 7.5).config.pack, own, 1.).tables.keys() == {3}

# ------------------------------------------------------------------------------------------------------------
# What a step costs
# ------------------------------------------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.overloadpacket.__name__)
        return op(*args, **kwargs or {})

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_reads_nothing_back_and_copies_nothing(kind):
    "One pass per summand, and no more than the state, the output and the sum need."
    for s in (*tables_for(vp()), heun(vp(), time_uniform(vp(), 3)), ipndm(vp(), time_uniform(vp(), 4), 4)):
        scheduler = of(pack_of(s, predicts=kind, train_timesteps=1000))
        scheduler.set_timesteps(s.nfe)
        x = F = torch.randn(1, 4, 8, 8)
        timesteps = list(scheduler.timesteps)
        for n, t in enumerate(timesteps):
            with Operations() as seen: x = scheduler.step(F, t, x, return_dict=False)[0]
            assert set(seen.names) <= {"mul", "add", "add_"}
            weights = int(s.w_free[n].sum()) + (0 if s.c is None or n == 0 else 1 + int(s.c_free[n-1].sum()))
            assert len(seen.names) <= 1 + weights + 2

def test_half_precision_is_summed_in_float32(notes):
    "Nearer to the exact sums than the same sums in the type itself."
    s = ipndm(vp(), time_uniform(vp(), 6), 4)
    m = module()
    exact = [torch.randn(1, 4, 16, 16).double() for _ in range(7)]
    for dtype in (torch.float16, torch.bfloat16):
        given = [v.to(dtype) for v in exact]
        error = {}
        for name, cast in (("ours", None), ("in the type", dtype), ("exact", torch.float64)):
            scheduler = of(pack_of(s), tiny.diffusers().DDIMScheduler())
            scheduler.set_timesteps(6)
            x, held = given[6], {}
            for n, t in enumerate(scheduler.timesteps):
                if cast is None: x = scheduler.step(given[n], t, x)[0]
                else:
                    held |= {"F": given[n].to(cast), f"x{n}": x.to(cast)}
                    for k, terms in scheduler.run[n][0] if n else m.written_out(scheduler.table, "epsilon")[0][0]:
                        held[k] = m.weighted_sum(terms, held)
                    x = held[f"x{n+1}"]
            error[name] = x.double()
        ours, same = ((error[k] - error["exact"]).square().mean().sqrt().item() for k in ("ours", "in the type"))
        notes.append(f"six iPNDM-4 steps in {dtype}: error {ours:.1e} summed in float32, {same:.1e} in the type")
        assert ours < same

# ------------------------------------------------------------------------------------------------------------
# A folder that carries its code
# ------------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.modules["s4s_nb"] = None # as if it were not installed
import torch
try: import torchvision
except RuntimeError: # an extension of another torch
    for m in [m for m in sys.modules if m.split(".")[0] == "torchvision"]: del sys.modules[m]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
images = pipe(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
try: type(pipe.scheduler).from_pack("pack.json")
except ImportError as e: print("from_pack:", e)
torch.save(torch.from_numpy(images), sys.argv[2])
"""

def test_a_program_without_this_package_makes_the_same_images(scheduler, tmp_path):
    pipe = with_scheduler(tiny.pipeline("ddpm"), scheduler)
    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    load = tiny.diffusers().DiffusionPipeline.from_pretrained
    loaded = load(folder)
    assert type(loaded.scheduler) is type(scheduler) and loaded.scheduler.tables == scheduler.tables
    module().write_remote_code(folder)
    with pytest.raises(ValueError, match="trust_remote_code"): load(folder)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(HF_MODULES_CACHE=str(tmp_path / "modules"))
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "images.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "from_pack: " in done.stdout and "s4s_nb" in done.stdout
    kw = dict(batch_size=2, num_inference_steps=5, output_type="np")
    expected = pipe(generator=torch.Generator().manual_seed(0), **kw).images
    assert torch.equal(torch.load(tmp_path / "images.pt"), torch.from_numpy(expected))

def test_the_module_stands_alone(tmp_path):
    "It is the file that folders carry, and imports nothing of this package."
    path = module().__file__
    tree = ast.parse(open(path, encoding="utf-8").read())
    found = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert {name.split(".")[0] for name in found} == {"json", "math", "importlib", "pathlib", "torch", "diffusers"}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    with pytest.raises(ValueError, match="expected a folder that pipe.save_pretrained wrote"):
        module().write_remote_code(tmp_path)
    (tmp_path / "model_index.json").write_text('{"scheduler": ["diffusers", "DDIMScheduler"]}')
    with pytest.raises(ValueError, match="its scheduler is DDIMScheduler"): module().write_remote_code(tmp_path)

def test_models_that_a_pack_is_not_for_are_refused():
    d = tiny.diffusers()
    solver = ddim(vp(), time_uniform(vp(), 3))
    with pytest.raises(ValueError, match="where the model's"): of([solver], d.DDIMScheduler(**tiny.SD))
    with pytest.raises(ValueError, match="FlowSchedule"): of([solver], d.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="no alphas_cumprod"): of([solver], d.EDMEulerScheduler())
    with pytest.raises(ValueError, match="does not say what its model is"): of([solver])
    with pytest.raises(ValueError, match="a scheduler of no pack"): module().S4SScheduler()
    with pytest.raises(ValueError, match="prediction_type='x'"):
        module().S4SScheduler(json.loads(pack_to_json(pack_of(solver))), prediction_type="x")
