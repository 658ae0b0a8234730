"""Every deterministic linear scheduler of the installed diffusers as a table, by replay: the table through `Solver`
against the scheduler's own loop on the exact mixture. The others are refused, each with its reason."""
import copy
import logging
import math

import pytest
import torch

from s4s_nb import Solver, from_scheduler
from s4s_nb.denoise import GaussianMixture, kernel_at, sample_noise
from s4s_nb.files.checks import import_torchvision
from s4s_nb.grids import time_edm
from s4s_nb.models.pipelines import SCHEDULERS
from s4s_nb.schedule import CosineVPSchedule, DiscreteVPSchedule, EDMSchedule, FlowSchedule, VPSchedule
from s4s_nb.solver import from_json, to_json
from s4s_nb.solvers.multistep import ddim, unipc

WARNINGS = "DeprecationWarning", "FutureWarning", "UserWarning" # diffusers' own
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in WARNINGS]

SD = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
V, X0 = dict(prediction_type="v_prediction"), dict(prediction_type="sample")
KARRAS, TRAILING = dict(use_karras_sigmas=True), dict(timestep_spacing="trailing")
SIGMA_MIN, UNCLIPPED = dict(final_sigmas_type="sigma_min"), dict(clip_sample=False)
ZERO = dict(rescale_betas_zero_snr=True, **V)
IN_FLOAT32 = ("EulerDiscrete", "DPMSolverMultistep", "FlowMatch", "EDMEuler", "Helios", "LTX") # they cast states

LINEAR = { # class without "Scheduler" -> configurations that are linear
    "DDIM": [SD | UNCLIPPED, SD | UNCLIPPED | V, SD | UNCLIPPED | X0, SD | UNCLIPPED | dict(set_alpha_to_one=False),
             SD | UNCLIPPED | dict(steps_offset=1), SD | UNCLIPPED | TRAILING | ZERO],
    "DDIMParallel": [SD | UNCLIPPED, SD | UNCLIPPED | V], "CogVideoXDDIM": [SD | UNCLIPPED, UNCLIPPED | V | TRAILING],
    "PNDM": [SD | dict(skip_prk_steps=True), SD | dict(skip_prk_steps=True, steps_offset=1), SD | V],
    "DEISMultistep": [SD, SD | V, SD | dict(solver_order=3), FLOW],
    "DPMSolverMultistep": [SD, {}, SD | V, SD | X0, SD | dict(solver_order=3), SD | KARRAS, SD | TRAILING,
                           SD | SIGMA_MIN, SD | SIGMA_MIN | dict(algorithm_type="dpmsolver"),
                           SD | dict(euler_at_final=True), FLOW,
                           SD | dict(lambda_min_clipped=-5.1)],
    "DPMSolverSinglestep": [SD, SD | V, SD | dict(solver_order=3), SD | SIGMA_MIN | dict(algorithm_type="dpmsolver")],
    "EulerDiscrete": [SD, {}, SD | V, SD | KARRAS, SD | SIGMA_MIN, SD | dict(timestep_spacing="leading")],
    "HeunDiscrete": [SD, SD | V, SD | KARRAS], "KDPM2Discrete": [SD, SD | V], "LMSDiscrete": [SD, SD | V, SD | KARRAS],
    "UniPCMultistep": [SD, {}, SD | V, SD | dict(solver_order=3),
                       SD | SIGMA_MIN | dict(solver_type="bh1"),
                       SD | KARRAS, FLOW,
                       SD | SIGMA_MIN | dict(predict_x0=False)],
    "FlowMatchEulerDiscrete": [{}, dict(shift=3.), dict(shift=3., **KARRAS), dict(shift_terminal=.1)],
    "FlowMatchHeunDiscrete": [{}, dict(shift=3.)],
    "EDMEuler": [{}, V, dict(sigma_schedule="exponential")],
    "EDMDPMSolverMultistep": [{}, V, dict(solver_order=3), SIGMA_MIN],
    "IPNDM": [dict(trained_betas=(t := time_edm(EDMSchedule(.05, 20.), 6), (t / (1 + t**2)**.5).tolist())[1] + [0.])],
    "Helios": [dict(stages=1), dict(stages=1, scheduler_type="euler")],
    "LTXEulerAncestralRF": [dict(eta=0.)], "MiniMaxH3": [{}]}
CASES = [(name, config) for name, configs in LINEAR.items() for config in configs]

NOISE, CLIPS, UP = "draws noise", "=True: it cuts images off", "rise"
DISTILLED, UNKNOWN = "distilled", "is not known here"
REFUSED = { # class without "Scheduler" -> (configuration, reason)
    "DDIM": [({}, CLIPS), (dict(thresholding=True, **UNCLIPPED), CLIPS)], "DDIMParallel": [({}, CLIPS)],
    "CogVideoXDDIM": [({}, CLIPS)], "DDIMInverse": [(UNCLIPPED, UP)], "DPMSolverMultistepInverse": [({}, UP)],
    "DDPM": [({}, CLIPS), (UNCLIPPED, NOISE)], "DDPMParallel": [(UNCLIPPED, NOISE)],
    "RePaint": [(UNCLIPPED, "step wants")],
    "CogVideoXDPM": [(UNCLIPPED, "step wants model_output, old_pred")], "UnCLIP": [({}, CLIPS)],
    "DPMSolverMultistep": [(dict(algorithm_type="sde-dpmsolver++"), NOISE), (dict(thresholding=True), CLIPS)],
    "DPMSolverSinglestep": [(dict(thresholding=True), CLIPS)], "DEISMultistep": [(dict(thresholding=True), CLIPS)],
    "UniPCMultistep": [(dict(thresholding=True), CLIPS), (dict(solver_type="bh1"), "not finite")],
    "SASolver": [({}, NOISE)], "DPMSolverSDE": [({}, NOISE)],
    "EulerAncestralDiscrete": [({}, NOISE)], "KDPM2AncestralDiscrete": [({}, NOISE)],
    "FlowMatchEulerDiscrete": [(dict(stochastic_sampling=True), NOISE)], "LTXEulerAncestralRF": [({}, NOISE)],
    "Helios": [({}, "stages")], "CosineDPMSolverMultistep": [({}, UNKNOWN)], "KarrasVe": [({}, UNKNOWN)],
    "ScoreSdeVe": [({}, UNKNOWN)], "ScoreSdeVp": [({}, UNKNOWN)], "DDPMWuerstchen": [({}, UNKNOWN)],
    "LCM": [({}, DISTILLED)], "TCD": [({}, DISTILLED)], "SCM": [({}, DISTILLED)], "FlowMatchLCM": [({}, DISTILLED)],
    "CMStochasticIterative": [({}, DISTILLED)], "ConsistencyDecoder": [({}, DISTILLED)], "Piflow": [({}, DISTILLED)],
    "HeliosDMD": [({}, DISTILLED)], "FlowMapEulerDiscrete": [({}, DISTILLED)], "BlockRefinement": [({}, UNKNOWN)],
    "DiscreteDDIM": [({}, UNKNOWN)], "EntropyBound": [({}, UNKNOWN)]}
NO_STATES = {"Amused", "VQDiffusion", "RFD4Proteina"} # of tokens and of molecules: made with arguments of their own


@pytest.fixture(scope="module")
def schedulers():
    import_torchvision()
    import diffusers
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return diffusers.schedulers

def test_every_scheduler_of_diffusers_is_either(schedulers):
    there = {n.removesuffix("Scheduler") for n in dir(schedulers) if n.endswith("Scheduler")}
    known = set(LINEAR) | set(REFUSED) | NO_STATES
    assert len(LINEAR) == 20 and len(CASES) >= 65 and len(REFUSED) >= 35
    assert {*SCHEDULERS} <= {f"{n}Scheduler" for n in known}
    assert not there - known, "new in this diffusers: a table, or a reason"


def schedule_and_time(name, scheduler):
    "The schedule that the scheduler's models were trained with, and t of a timestep; read by hand."
    config = scheduler.config
    if name.startswith("EDM"): return EDMSchedule(config.sigma_min, config.sigma_max), lambda c: (4 * c).exp()
    if name == "IPNDM": return CosineVPSchedule(s=0.), lambda c: c
    if name == "MiniMaxH3": return FlowSchedule(), lambda c: 1 - c
    N = config.num_train_timesteps
    if config.get("prediction_type", "flow_prediction") == "flow_prediction": return FlowSchedule(), lambda c: c / N
    a = scheduler.alphas_cumprod.double()
    if config.get("rescale_betas_zero_snr"): a = torch.cat([a[:-1], torch.tensor([1e-12])])
    schedule = DiscreteVPSchedule(a, t_min=1 / N)
    lowest = config.get("lambda_min_clipped", -math.inf)
    if lowest > -math.inf: schedule = schedule.between(float(schedule.t(lowest)), 1 / N)
    return schedule, lambda c: (c + 1) / N

def spoken(name, scheduler, mixture, shown, t):
    "What the scheduler's network says, of the mixture"
    kind = scheduler.config.get("prediction_type") or ("v_prediction" if name == "IPNDM" else "flow_prediction")
    if name.startswith("EDM"): # Table 1 of Karras et al. (2022)
        data, sign = scheduler.config.sigma_data, -1 if kind == "v_prediction" else 1
        state = shown * (t**2 + data**2)**.5
        return sign * (mixture(state, t) - data**2 / (t**2 + data**2) * state) / (t * data) * (t**2 + data**2)**.5
    alpha, sigma = kernel_at(mixture.schedule, t, shown)
    x_0 = mixture(shown, t)
    eps = (shown - alpha * x_0) / sigma
    return {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - sigma * x_0,
            "flow_prediction": (x_0 - eps) if name == "MiniMaxH3" else eps - x_0}[kind]

def as_pipelines_do(name, scheduler, n, mixture, time, x):
    scheduler.set_timesteps(n)
    x = x * getattr(scheduler, "init_noise_sigma", 1.)
    for k in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(spoken(name, scheduler, mixture, shown, time(k.double())), k, x).prev_sample
    return x


def rounding(solver):
    "Of float32, where image and noise are read off a state: they divide by alpha or by sigma."
    ratio = solver.sigma_eval / solver.alpha_eval
    size = torch.cat([ratio[ratio.isfinite()], 1 / ratio]).max()
    return 2 * torch.finfo(torch.float32).eps * float(size.clamp_min(4.))

WORST = {}

@pytest.mark.parametrize("name, config", CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_replay(schedulers, name, config):
    scheduler = getattr(schedulers, f"{name}Scheduler")(**config)
    schedule, time = schedule_and_time(name, scheduler)
    mixture = GaussianMixture(schedule, [.5, .3, .2], [[.8, -.5], [-.7, .4], [.1, .9]],
                              [[.3, .45], [.5, .3], [.35, .33]])
    z = sample_noise(range(16), (2,)).double()
    for n in (7,) if name == "IPNDM" else (4, 5, 8):
        before = copy.deepcopy(vars(scheduler))
        solver = from_scheduler(scheduler, n)
        assert str(before) == str(vars(scheduler)), "the scheduler of the pipeline was touched"
        theirs = as_pipelines_do(name, copy.deepcopy(scheduler), n, mixture, time, z)
        ours = solver(mixture, schedule.prior_std * z)
        off = float((ours - theirs).abs().max() / theirs.abs().max())
        WORST[name] = max(WORST.get(name, 0.), off)
        assert off < (rounding(solver) if name.startswith(IN_FLOAT32) else 1e-12), (n, off)
        assert solver.base == (0,) * solver.nfe and solver.meta["replay"] < 2e-5
        again = from_json(to_json(solver))
        assert again == solver and again(mixture, schedule.prior_std * z).equal(ours)

def test_report(notes):
    for name, off in sorted(WORST.items()): notes.append(f"{name}Scheduler as a table: worst deviation {off:.1e}")
    assert set(WORST) == set(LINEAR)

@pytest.mark.parametrize("name", REFUSED)
def test_refused(schedulers, name):
    for config, why in REFUSED[name]:
        try: scheduler = getattr(schedulers, f"{name}Scheduler")(**config)
        except (AttributeError, ImportError): pytest.fail(f"{name} is gone from diffusers")
        with pytest.raises(ValueError, match=why): from_scheduler(scheduler, 5)


# ---- starts and ends -------------------------------------------------------------------------------------------------
def test_where_schedulers_start_and_end(schedulers):
    "Euler's start lacks the image's part of the noise; x/alpha at sigma_min is not scaled back; 0 is the time 0."
    def table(name, **config): return from_scheduler(getattr(schedulers, f"{name}Scheduler")(**SD | config), 5)
    euler = table("EulerDiscrete")
    a = schedulers.EulerDiscreteScheduler(**SD).alphas_cumprod[-1].double()
    assert abs(euler.start_factor - float((1 - a).sqrt())) < 1e-6 and float(euler.t[-1]) == 0 and euler.end_factor == 1
    short = table("EulerDiscrete", **SIGMA_MIN)
    assert abs(float(short.t[-1]) - .001) < 1e-6 and abs(short.end_factor * float(short.alpha[-1]) - 1) < 2e-6
    multi = table("DPMSolverMultistep", **SIGMA_MIN)
    assert abs(float(multi.t[-1]) - .001) < 1e-6 and multi.end_factor == multi.start_factor == 1
    for prediction in ("noise", "data"):
        both = from_scheduler(schedulers.UniPCMultistepScheduler(**SD), 5, prediction=prediction)
        assert both.prediction == prediction and float(both.sigma[-1]) < 2e-6
    edm = from_scheduler(schedulers.EDMEulerScheduler(), 5)
    assert abs(edm.start_factor - (1 + 1 / 80**2)**.5) < 1e-6

def test_sigmas_of_a_pipeline(schedulers):
    "Flux and others send their own."
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = torch.linspace(1, 1 / 4, 4).tolist()
    solver = from_scheduler(scheduler, sigmas=sigmas, mu=.9)
    want = torch.tensor(sigmas, dtype=torch.float64)
    want = math.exp(.9) / (math.exp(.9) + 1 / want - 1)
    assert solver.nfe == 4 and (solver.t_eval - want).abs().max() < 1e-6


# ---- functions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [VPSchedule(), EDMSchedule(), FlowSchedule()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_decoupled_factors_and_correctors_come_back(schedule, prediction):
    from dataclasses import replace
    t = time_edm(schedule, 5)
    shown = t[:-1] * torch.tensor([1., .97, .95, .98, .96], dtype=torch.float64)
    mixture = GaussianMixture(schedule, [.6, .4], [[.8, -.5], [-.7, .4]], [[.3, .4], [.5, .3]])
    x = schedule.prior_std * sample_noise(range(8), (2,)).double()
    own = unipc(schedule, t, 3).decouple(schedule, shown)
    own = replace(own, start_factor=.9, a=torch.linspace(.9, 1.1, 5).double())
    traced = Solver.from_sampler(own.run, schedule, prediction=prediction)
    assert traced.c is None and abs(traced.start_factor - .9) < 1e-12 and traced.t_eval.equal(own.t_eval)
    assert (traced(mixture, x) - own(mixture, x)).abs().max() < 1e-10
    k = Solver.from_sampler(lambda model, x: own.run(model, x) / own.alpha[-1], schedule, prediction=prediction)
    assert (k(mixture, x) - own(mixture, x) / own.alpha[-1]).abs().max() < 1e-10

def test_wrong_samplers_are_refused():
    vp = VPSchedule()
    good = ddim(vp, time_edm(vp, 3)).run
    generator = torch.Generator()
    def seeded(model, x):
        generator.manual_seed(7)
        return good(model, x) + .1 * torch.randn(x.shape, generator=generator)
    def two_times(model, x): return good(lambda x, t: model(x, torch.tensor([1., .5])), x)
    def sees_others(model, x): return good(lambda x, t: (m := model(x, t)) - m.mean(), x)
    def rarely_clips(model, x): return good(lambda x, t: model(x, t).clamp(-20, 20), x)
    for wrong, why in [(seeded, "fixed seed"), (two_times, "one time for all samples"), (sees_others, "not linear"),
                       (rarely_clips, "not linear"), (lambda model, x: good(model, x)[:, :, :2], "shape of its start"),
                       (lambda model, x: good(model, x + 1), "adds a constant"),
                       (lambda model, x: good(model, -x), "positive")]:
        with pytest.raises(ValueError, match=why): Solver.from_sampler(wrong, vp)

def test_random_numbers_of_others_are_left_alone():
    vp = VPSchedule()
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    Solver.from_sampler(ddim(vp, time_edm(vp, 3)).run, vp)
    assert torch.rand(1) == want
