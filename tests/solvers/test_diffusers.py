"""Our tables against the schedulers of the installed diffusers, on random network outputs.

A scheduler is a table too: fed with the same outputs from the same start, both must call the network at the same
states and end at the same point, to the float32 accuracy in which schedulers keep their noise levels. The grid is
the scheduler's own: its `sigmas` are sigma/alpha, on flow models sigma. Where conventions differ, `DIFFERENCES`
says how, and a test of the same name shows that it is so.
"""
import itertools
import json
import logging
from collections import defaultdict
from functools import cache
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch

from s4s_nb.denoise import (
    EpsDenoiser,
    FlowDenoiser,
    RecordingDenoiser,
    ThresholdedDenoiser,
    VDenoiser,
    X0Denoiser,
)
from s4s_nb.files.checks import import_torchvision
from s4s_nb.grids import time_edm, time_logsnr, time_power
from s4s_nb.schedule import DiscreteVPSchedule, EDMSchedule, FlowSchedule, NoiseSchedule, as_double
from s4s_nb.solver import Solver
from s4s_nb.solvers.multistep import ADAMS_BASHFORTH, ddim, deis, dpm_solver, ipndm, unipc
from s4s_nb.solvers.search import published_steps
from s4s_nb.solvers.singlestep import dpm2, dpm_solver_s, dpm_step, heun

# diffusers passes tensors to numpy in ways that numpy 2 deprecates, and deprecates noise prediction itself
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

# Largest deviation over the largest number in any state; schedulers work in float32, and Heun's divide differences
# by sigmas as small as 0.001.
TOLERANCE = 5e-5
SD = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
WORST = defaultdict(float) # per scheduler

# What an implementer who takes a scheduler's name for its method should know; the solver atlas prints it.
DIFFERENCES = json.loads(files("s4s_nb").joinpath("data/diffusers.json").read_text(encoding="utf-8"))["differences"]


class SigmaTime(NoiseSchedule):
    "Variance preserving, with t = sigma/alpha: the `sigmas` of a VP scheduler, as times"
    def __init__(self): super().__init__(0., 1e3)
    def alpha(self, t): return (1 + as_double(t)**2)**-.5
    def sigma(self, t): return as_double(t) * self.alpha(t)
    def lmbda(self, t): return -as_double(t).log()
    def t(self, lmbda): return as_double(lmbda).neg().exp()

VP, EDM, FLOW = SigmaTime(), EDMSchedule(), FlowSchedule(0., 1.)


@pytest.fixture(scope="module")
def diffusers():
    import_torchvision()
    return _diffusers()

@cache
def _diffusers():
    import diffusers
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return diffusers


def outputs(n: int, seed: int = 0) -> list:
    "n random network outputs and, last, a random start of unit variance"
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(n + 1)]


def run_scheduler(scheduler, n: int, std: float = 1.) -> tuple[list, list]:
    "Network outputs used, and all states: the network's inputs and the end"
    if n: scheduler.set_timesteps(n)
    *model, x = outputs(len(scheduler.timesteps))
    states = [std * x]
    for t, m in zip(scheduler.timesteps, model):
        if hasattr(scheduler, "scale_model_input"): scheduler.scale_model_input(states[-1], t)
        states.append(scheduler.step(m, t, states[-1]).prev_sample)
    return model, states


def run_ours(solver: Solver, denoise, model: list, start, wrap=None) -> list:
    "The same of one of our tables; denoise(net) is the denoiser around a network."
    script = iter(model)
    recorder = RecordingDenoiser(denoise(lambda x, t: next(script).double()))
    end = solver(recorder if wrap is None else wrap(recorder), start.double())
    assert next(script, None) is None, f"{len(recorder.calls)} calls, the scheduler made {len(model)}"
    return [*(x for _, x in recorder.calls), end]


def deviation(ours: list, theirs: list) -> float:
    assert len(ours) == len(theirs)
    scale = max(x.abs().max().item() for x in theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs)) / scale


def compare(scheduler, make, n, schedule=VP, denoise=EpsDenoiser, std=1., wrap=None) -> float:
    "Deviation of our solver make(schedule, t) from the scheduler, on its sigmas (each once)"
    model, theirs = run_scheduler(scheduler, n, std)
    sigmas = scheduler.sigmas.double()
    t = sigmas[torch.cat([torch.tensor([True]), sigmas.diff() != 0])]
    ours = run_ours(make(schedule, t), lambda net: denoise(net, schedule), model, theirs[0], wrap)
    d = deviation(ours, theirs)
    if d < TOLERANCE: WORST[type(scheduler).__name__] = max(WORST[type(scheduler).__name__], d)
    return d

# ------------------------------------------------------------------------------------------------------------
# Where conventions agree
# ------------------------------------------------------------------------------------------------------------

STEPS = 2, 3, 5, 8, 14, 20
GRIDS = {"linspace": {}, "trailing": dict(timestep_spacing="trailing"), "karras": dict(use_karras_sigmas=True),
         "lu": dict(use_lu_lambdas=True)}

@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_dpm_solver_pp(diffusers, order, grid):
    "To sigma = 0: at order 3 and from 15 steps on theirs lowers only the last row, see `dpm_final_order`."
    for n in STEPS:
        if order == 3 and n >= 15: continue
        scheduler = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=order, **GRIDS[grid])
        assert compare(scheduler, lambda s, t: dpm_solver(s, t, order), n) < TOLERANCE, n

@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_dpm_solver_to_sigma_min(diffusers, order, prediction):
    "Both predictions, at any number of steps"
    algorithm = {"data": "dpmsolver++", "noise": "dpmsolver"}[prediction]
    for n in STEPS:
        scheduler = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=order, algorithm_type=algorithm,
                                                          final_sigmas_type="sigma_min")
        make = lambda s, t, n=n: dpm_solver(s, t, order, prediction, lower_order_final=n < 15)
        assert compare(scheduler, make, n) < TOLERANCE, n

@pytest.mark.parametrize("kind, denoise",
                         [("epsilon", EpsDenoiser), ("sample", X0Denoiser), ("v_prediction", VDenoiser)])
def test_what_the_network_predicts(diffusers, kind, denoise):
    for n in (4, 9):
        for name, make in [("DPMSolverMultistepScheduler", lambda s, t: dpm_solver(s, t, 2)),
                           ("UniPCMultistepScheduler", lambda s, t: unipc(s, t, 2, "bh2"))]:
            scheduler = getattr(diffusers, name)(**SD, prediction_type=kind)
            assert compare(scheduler, make, n, denoise=denoise) < TOLERANCE, (name, n)

def test_dynamic_thresholding(diffusers):
    for n in (4, 9):
        scheduler = diffusers.DPMSolverMultistepScheduler(**SD, thresholding=True, sample_max_value=1e3)
        assert compare(scheduler, lambda s, t: dpm_solver(s, t, 2), n, wrap=ThresholdedDenoiser) < TOLERANCE

@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(diffusers, order, variant):
    for n, grid in itertools.product(STEPS, ("linspace", "karras")):
        scheduler = diffusers.UniPCMultistepScheduler(**SD, solver_order=order, solver_type=variant, **GRIDS[grid])
        assert compare(scheduler, lambda s, t: unipc(s, t, order, variant), n) < TOLERANCE, (n, grid)

@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_in_noise_prediction(diffusers, order):
    for n in STEPS:
        scheduler = diffusers.UniPCMultistepScheduler(**SD, solver_order=order, predict_x0=False,
                                                      final_sigmas_type="sigma_min", lower_order_final=n % 2 == 0)
        make = lambda s, t, n=n: unipc(s, t, order, "bh2", "noise", lower_order_final=n % 2 == 0)
        assert compare(scheduler, make, n) < TOLERANCE, n

LOG_RHO = SimpleNamespace(t=lambda lmbda: lmbda) # any linear function of lambda is the same clock

@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(diffusers, order):
    for n in STEPS:
        scheduler = diffusers.DEISMultistepScheduler(**SD, solver_order=order, lower_order_final=False)
        assert compare(scheduler, lambda s, t: deis(s, t, order, LOG_RHO), n) < TOLERANCE, n

def test_ddim(diffusers):
    for n, offset, one in itertools.product((2, 5, 10, 20), (0, 1), (True, False)):
        scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, timestep_spacing="leading", steps_offset=offset,
                                            set_alpha_to_one=one)
        scheduler.set_timesteps(n)
        a = scheduler.alphas_cumprod.double()
        if not one and offset == 0: continue # the last step would start where it ends
        last = as_double([0.]) if one else ((1 - a[:1]) / a[:1]).sqrt()
        scheduler.sigmas = torch.cat([((1 - a) / a).sqrt()[scheduler.timesteps], last])
        assert compare(scheduler, ddim, None) < TOLERANCE, (n, offset, one)

def test_euler(diffusers):
    "Steps in x/alpha: on the EDM schedule"
    for n, karras in itertools.product(STEPS, (False, True)):
        scheduler = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=karras)
        assert compare(scheduler, ddim, n, EDM, std=14.6) < TOLERANCE

def then_euler(make):
    "A single-step method on all but the last step, which is Euler's"
    def both(schedule, t):
        a = make(schedule, t[:-1])
        return Solver.tabulate(schedule, torch.cat([a.t, t[-1:]]), [*a.w, [1.]], base=[*a.base, a.nfe])
    return both

def test_heun(diffusers):
    for n in (2, 3, 5, 10):
        scheduler = diffusers.HeunDiscreteScheduler(**SD, use_karras_sigmas=True)
        assert compare(scheduler, then_euler(heun), n, EDM, std=14.6) < TOLERANCE
        scheduler = diffusers.HeunDiscreteScheduler(**SD, prediction_type="v_prediction")
        v = lambda net, schedule: EDMOfV(net)
        assert compare(scheduler, then_euler(heun), n, EDM, denoise=v, std=14.6) < TOLERANCE

class EDMOfV(X0Denoiser):
    "A v-predicting VP network on states x/alpha"
    def __init__(self, net): super().__init__(net, EDM)
    def forward(self, x_t, t): return VDenoiser(self.net, VP)(x_t * VP.alpha(t), t)

def test_dpm_2(diffusers):
    for n in (2, 3, 5, 10):
        scheduler = diffusers.KDPM2DiscreteScheduler(**SD, use_karras_sigmas=True)
        assert compare(scheduler, then_euler(dpm2), n, EDM, std=14.6) < TOLERANCE

def test_ipndm(diffusers):
    "On any grid, given as `trained_betas`"
    for n in (1, 2, 3, 4, 6, 10):
        t = torch.cat([time_edm(EDMSchedule(.05, 20.), n), torch.zeros(1)])
        scheduler = diffusers.IPNDMScheduler(trained_betas=VP.sigma(t).tolist())
        scheduler.set_timesteps(n + 1)
        scheduler.sigmas = t
        assert compare(scheduler, lambda s, t: ipndm(s, t, 4), None, denoise=VDenoiser) < TOLERANCE

SIGMA_DATA = .5

class EDMOutput(X0Denoiser):
    "x_0 from the output F of a preconditioned network"
    def forward(self, x_t, t):
        v = t**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / v * x_t + t * SIGMA_DATA / v.sqrt() * self.output(x_t, t)

@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_edm(diffusers, kind):
    rule = {"karras": time_edm, "exponential": time_logsnr}[kind]
    for n in (2, 3, 5, 10, 20):
        scheduler = diffusers.EDMEulerScheduler(sigma_schedule=kind)
        assert compare(scheduler, ddim, n, EDM, EDMOutput, 80.) < TOLERANCE
        torch.testing.assert_close(scheduler.sigmas[:-1].double(), rule(EDM, n - 1), rtol=2e-6, atol=0)
        for order in (1, 2, 3):
            if order == 3 and n >= 15: continue # `dpm_final_order`
            scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_schedule=kind, solver_order=order)
            make = lambda s, t, order=order: dpm_solver(s, t, order)
            assert compare(scheduler, make, n, EDM, EDMOutput, 80.) < TOLERANCE, (n, order)

def test_flow(diffusers):
    "From sigma = 1, where alpha = 0: in data prediction"
    for n, shift in itertools.product((1, 2, 5, 10), (1., 3.)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        assert compare(scheduler, lambda s, t: dpm_solver(s, t, 1), n, FLOW, FlowDenoiser) < TOLERANCE
        options = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
        for order in (1, 2, 3):
            dpm = lambda s, t, order=order: dpm_solver(s, t, order)
            scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=order, **options)
            assert compare(scheduler, dpm, n, FLOW, FlowDenoiser) < TOLERANCE
            pc = lambda s, t, order=order: unipc(s, t, order, "bh2")
            scheduler = diffusers.UniPCMultistepScheduler(solver_order=order, **options)
            assert compare(scheduler, pc, n, FLOW, FlowDenoiser) < TOLERANCE

def test_published_steps(diffusers):
    "AYS: the timesteps and, to the digits given, the sigmas in diffusers"
    table = diffusers.schedulers.scheduling_utils.AysSchedules
    betas = torch.linspace(.00085**.5, .012**.5, 1000, dtype=torch.float64)**2
    sd = DiscreteVPSchedule((1 - betas).cumprod(0))
    for name, key in [("ays_sd1", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")]:
        t = published_steps(name, 10, sd)
        assert [round(1000 * v - 1) for v in t.tolist()[:-1]] == table[f"{key}Timesteps"]
        sigma = as_double(table[f"{key}Sigmas"])[:-1]
        torch.testing.assert_close((-sd.lmbda(t)[:-1]).exp(), sigma, rtol=.02, atol=0)
    video = published_steps("ays_svd", 10, EDMSchedule(.002, 700.))
    torch.testing.assert_close(video[:-1], as_double(table["StableDiffusionVideoSigmas"])[:-1])

# ------------------------------------------------------------------------------------------------------------
# Where they do not: one test for every entry of DIFFERENCES
# ------------------------------------------------------------------------------------------------------------

APART = 1e-3 # at least, where a difference is claimed

def test_every_difference_is_shown():
    assert not [name for name in DIFFERENCES if f"test_{name}" not in globals()]

def at_timesteps(scheduler, n, last=0.):
    "Gives a scheduler that keeps no sigmas those of its timesteps."
    scheduler.set_timesteps(n)
    a = scheduler.alphas_cumprod.double()
    scheduler.sigmas = torch.cat([((1 - a) / a).sqrt()[scheduler.timesteps], as_double([last])])
    return scheduler

def test_ddim_grid(diffusers):
    for spacing, n, agree in [("linspace", 5, False), ("trailing", 7, False), ("trailing", 5, True)]:
        scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, timestep_spacing=spacing)
        d = compare(at_timesteps(scheduler, n), ddim, None)
        assert d < TOLERANCE if agree else d > APART, (spacing, n)

def test_ddim_clips(diffusers):
    scheduler = at_timesteps(diffusers.DDIMScheduler(**SD), 4)
    (m, *_), (x, y, *_) = run_scheduler(scheduler, 4)
    (alpha, alpha_next), (sigma, sigma_next) = VP.alpha(scheduler.sigmas[:2]), VP.sigma(scheduler.sigmas[:2])
    image = (x - sigma * m) / alpha
    assert image.abs().max() > 1
    torch.testing.assert_close(y.double(), (alpha_next * image.clamp(-1, 1) + sigma_next * m).double(),
                               rtol=0, atol=1e-5)

def test_threshold_is_a_clip(diffusers):
    class Clipped(RecordingDenoiser):
        def forward(self, x_t, t): return self.denoiser(x_t, t).clamp(-1, 1)
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, thresholding=True)
    assert compare(scheduler, lambda s, t: dpm_solver(s, t, 2), 6, wrap=Clipped) < TOLERANCE
    assert compare(scheduler, lambda s, t: dpm_solver(s, t, 2), 6, wrap=ThresholdedDenoiser) > APART

def test_dpm_final_order(diffusers):
    def only_the_last(schedule, t): # rows of full order, and one of first order to sigma = 0
        a = dpm_solver(schedule, t[:-1], 3, lower_order_final=False)
        rows = [w[:n + 1] for n, w in enumerate(a.w)]
        return Solver.tabulate(schedule, t, [*rows, [1.]], prediction="data")
    for n, agree in [(14, False), (15, True), (20, True)]:
        scheduler = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=3)
        assert (compare(scheduler, only_the_last, n) < TOLERANCE) == agree
        assert (compare(scheduler, lambda s, t: dpm_solver(s, t, 3), n) < TOLERANCE) != agree

def test_dpm_noise_ends_at_sigma_min(diffusers):
    with pytest.raises(ValueError, match="final_sigmas_type"):
        diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type="dpmsolver")

def steps_of(orders: list) -> list:
    "Lengths of the steps in a list of stages 1,2,3,1,2,..."
    starts = [i for i, o in enumerate(orders) if o == 1]
    return [b - a for a, b in zip(starts, [*starts[1:], len(orders)])]

def test_single_step_grid(diffusers):
    for n, order, want in [(6, 3, [1, 2, 3, 1, 2, 1]), (7, 3, [1, 2, 3, 1, 2, 3, 1]), (8, 3, [1, 2, 3, 1, 2, 3, 1, 1]),
                           (4, 2, [1, 2, 1, 1]), (5, 2, [1, 2, 1, 2, 1])]:
        scheduler = diffusers.DPMSolverSinglestepScheduler(**SD, solver_order=order)
        assert not scheduler.config.lower_order_final
        scheduler.set_timesteps(n)
        assert scheduler.config.lower_order_final and scheduler.order_list == want
    for n, end, prediction in itertools.product((4, 5, 10), ("zero", "sigma_min"), ("data", "noise")):
        if (end, prediction) == ("zero", "noise"): continue
        scheduler = diffusers.DPMSolverSinglestepScheduler(
            **SD, solver_order=2, final_sigmas_type=end, lower_order_final=True,
            algorithm_type={"data": "dpmsolver++", "noise": "dpmsolver"}[prediction])
        def make(schedule, t, scheduler=scheduler, prediction=prediction):
            orders = steps_of(scheduler.order_list)
            outer = torch.tensor([0, *orders]).cumsum(0)
            inner = [t[a + 1:b] for a, b in zip(outer, outer[1:])]
            return dpm_solver_s(schedule, t[outer], prediction=prediction, orders=orders, inner=inner)
        assert compare(scheduler, make, n) < TOLERANCE, (n, end, prediction)

def test_single_step_stage(diffusers):
    def make(schedule, t, theirs=True):
        lmbda, rows, base = schedule.lmbda(t), [], []
        for order in steps_of(scheduler.order_list):
            start = len(rows)
            stages = dpm_step(lmbda[start:start + order + 1], "data")
            if theirs and order == 3: stages[1] = dpm_step(lmbda[start:start + 3], "data")[1]
            rows, base = rows + stages, base + [start] * order
        return Solver.tabulate(schedule, t, rows, base=base, prediction="data")
    for n in (6, 7, 12):
        scheduler = diffusers.DPMSolverSinglestepScheduler(**SD, solver_order=3)
        assert compare(scheduler, make, n) < TOLERANCE
        assert compare(scheduler, lambda s, t: make(s, t, False), n) > APART

def test_last_sigma_twice(diffusers):
    for scheduler in [diffusers.DEISMultistepScheduler(**SD, use_karras_sigmas=True),
                      diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True,
                                                            final_sigmas_type="sigma_min")]:
        scheduler.set_timesteps(6)
        assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    _, states = run_scheduler(diffusers.DEISMultistepScheduler(**SD, use_karras_sigmas=True), 6)
    torch.testing.assert_close(states[-1], states[-2])

def test_deis_clock(diffusers):
    for order in (2, 3):
        ours = lambda s, t, order=order: deis(s, t, order, LOG_RHO)
        scheduler = diffusers.DEISMultistepScheduler(**SD, solver_order=order, lower_order_final=False)
        assert compare(scheduler, ours, 8) < TOLERANCE
        assert compare(scheduler, lambda s, t, order=order: deis(s, t, order, EDM), 8) > APART
        assert compare(diffusers.DEISMultistepScheduler(**SD, solver_order=order), ours, 8) > APART

def test_ipndm_first_step(diffusers):
    scheduler = diffusers.IPNDMScheduler()
    ends = []
    for seed in (0, 1):
        scheduler.set_timesteps(5)
        ends.append(scheduler.step(outputs(0, seed)[0], scheduler.timesteps[0], torch.ones(2, 3, 4, 4)).prev_sample)
    assert torch.equal(*ends) and scheduler.alphas[0] == 0
    s = torch.linspace(1, 0, 6)
    torch.testing.assert_close(scheduler.betas, (s * torch.pi / 2).sin()**2)
    torch.testing.assert_close(ends[0], scheduler.betas[1] * torch.ones(2, 3, 4, 4)) # x_0 = 0, noise = x_T

def test_heun_ends_with_euler(diffusers):
    for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(5)
        assert len(scheduler.timesteps) == 9 and scheduler.sigmas[-1] == 0

def test_flow_heun(diffusers):
    def in_sigma(schedule, t):
        pairs = [row for a, b in zip(t, t[1:]) for row in ([1.], [a / (2 * b), 1 - a / (2 * b)])]
        base = [2 * (n // 2) for n in range(len(pairs))]
        return Solver.tabulate(schedule, t.repeat_interleave(2)[1:], pairs, base=base, prediction="data")
    def to_zero(schedule, t):
        a = in_sigma(schedule, t[:-1])
        base = [*a.base, a.nfe]
        return Solver.tabulate(schedule, torch.cat([a.t, t[-1:]]), [*a.w, [1.]], base=base, prediction="data")
    for n in (2, 3, 6):
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        assert compare(scheduler, to_zero, n, FLOW, FlowDenoiser) < TOLERANCE
    model, theirs = run_scheduler(scheduler, 4)
    t = scheduler.sigmas.double().unique().flip(0)[1:-1] # ours starts below alpha = 0
    ends = [run_ours(make(FLOW, t), lambda net: FlowDenoiser(net, FLOW), model[:4], theirs[0])[-1]
            for make in (heun, in_sigma)]
    assert (ends[0] - ends[1]).abs().max() > APART

def test_lms_ends_with_full_order(diffusers):
    for n in (3, 6, 10):
        scheduler = diffusers.LMSDiscreteScheduler(**SD)
        model, theirs = run_scheduler(scheduler, n, 14.6)
        t = scheduler.sigmas.double()
        ours = run_ours(deis(EDM, t[:-1], 4, EDM), lambda net: EpsDenoiser(net, EDM), model[:-1], theirs[0])
        assert deviation(ours, theirs[:-1]) < TOLERANCE, n
        euler = theirs[-2] - t[-2] * model[-1]
        assert (theirs[-1] - euler).abs().max() > APART

def test_plms_calls_twice(diffusers):
    ab = ADAMS_BASHFORTH
    def make(schedule, t):
        rows = [[1.], [.5, .5], [ab[1][0], 0., ab[1][1]], [*ab[2][:2], 0., ab[2][2]], [*ab[3][:3], 0., ab[3][3]]]
        rows += [ab[3]] * (len(t) - 5)
        return Solver.tabulate(schedule, torch.cat([t[:2], t[1:]]), rows[:len(t)], base=[0, 0, *range(2, len(t))])
    for n in (4, 5, 8):
        scheduler = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=True)
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n + 1
        a = scheduler.alphas_cumprod.double()
        t = torch.cat([((1 - a) / a).sqrt()[scheduler.timesteps[[0, *range(2, n + 1)]]], torch.zeros(1)])
        model, theirs = run_scheduler(scheduler, n)
        ours = run_ours(make(VP, t), lambda net: EpsDenoiser(net, VP), model, theirs[0])
        assert deviation(ours, theirs) < TOLERANCE, n

def test_edm_grid(diffusers):
    for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(6)
        torch.testing.assert_close(scheduler.sigmas[:-1].double(), time_edm(EDM, 5), rtol=2e-6, atol=0)
        assert scheduler.sigmas[-1] == 0 and len(scheduler.timesteps) == 6

def test_spacing(diffusers):
    betas = torch.linspace(.00085**.5, .012**.5, 1000, dtype=torch.float64)**2
    sd = DiscreteVPSchedule((1 - betas).cumprod(0))
    ours = lambda scheduler: (-sd.lmbda((scheduler.timesteps.double() + 1) / 1000)).exp()
    whole, between = diffusers.DPMSolverMultistepScheduler(**SD), diffusers.EulerDiscreteScheduler(**SD)
    for scheduler in (whole, between): scheduler.set_timesteps(7)
    torch.testing.assert_close(whole.sigmas[:-1].double(), ours(whole), rtol=2e-5, atol=0)
    off = (between.sigmas[:-1].double() / ours(between) - 1).abs().max()
    assert not (between.timesteps % 1 == 0).all() and 1e-7 < off < 1e-3
    trailing = diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing")
    trailing.set_timesteps(8)
    uniform = time_power(sd, 8, 1.)[:-1]
    assert ((trailing.timesteps + 1) / 1000 - uniform).abs().max() < 1e-3 # rounded to timesteps

# ------------------------------------------------------------------------------------------------------------

def test_report(notes):
    "The worst deviation of every scheduler, where ours is meant to agree"
    for name, d in sorted(WORST.items()): notes.append(f"{name}: worst relative deviation {d:.1e}")
