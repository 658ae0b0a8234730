"""The real k-diffusion as a consumer: its model wrappers around an exact mixture, its samplers beside ours.

The package's `__init__` imports its training code and with it a dozen libraries, one of which forbids today's numpy.
So `make setup` installs it with --no-deps, and only the two modules that sampling needs are imported here.
"""
import importlib.util
import inspect
import sys
import types
from dataclasses import replace

import pytest
import torch

from s4s_nb.denoise import EpsDenoiser, GaussianMixture, RecordingDenoiser, kernel_at, sample_noise
from s4s_nb.files.checks import import_torchvision
from s4s_nb.grids import time_edm, time_flow
from s4s_nb.schedule import DiscreteVPSchedule, EDMSchedule, FlowSchedule
from s4s_nb.solvers.multistep import ddim, ipndm, unipc
from s4s_nb.solvers.singlestep import dpm_solver_s, heun
from s4s_nb.use.k_diffusion import from_k_diffusion, k_start, sample_solver, solver_sigmas

N = 1000
ALPHAS = (1 - torch.linspace(.00085**.5, .012**.5, N, dtype=torch.float64)**2).cumprod(0)
VP, FLOW, EDM = DiscreteVPSchedule(ALPHAS, t_min=1 / N), FlowSchedule(), EDMSchedule()


@pytest.fixture(scope="module")
def k():
    "k_diffusion with its modules `sampling` and `external`"
    import_torchvision()
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None, "pip install --no-deps k-diffusion==0.1.1.post1, as make setup does"
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("k_diffusion", package)
    from k_diffusion import external, sampling
    return types.SimpleNamespace(sampling=sampling, external=external)


def mixture(schedule):
    return GaussianMixture(schedule, [.5, .3, .2], [[.8, -.5], [-.7, .4], [.1, .9]], [[.3, .45], [.5, .3], [.35, .33]])

class Predicting(torch.nn.Module):
    "The network behind a mixture, asked at times 0 ... N-1: the noise, or v"
    def __init__(self, denoiser, v=False):
        super().__init__()
        self.denoiser, self.v, self.asked, self.alphas_cumprod = denoiser, v, [], ALPHAS
    def forward(self, x, n, **cond):
        t = (n.double() + 1) / N
        self.asked.append(float(n[0]))
        alpha, sigma = kernel_at(VP, t, x)
        x_0 = self.denoiser(x, t)
        return (alpha * x - x_0) / sigma if self.v else (x - alpha * x_0) / sigma
    apply_model = forward # as the models of CompVis call it

def model_of(k, schedule, v=False):
    "A model as k-diffusion's samplers call it"
    if schedule is not VP: return lambda x, sigma, **cond: mixture(schedule)(x, sigma[0], **cond)
    kind = k.external.DiscreteVDDPMDenoiser if v else k.external.DiscreteEpsDDPMDenoiser
    return kind(Predicting(mixture(VP), v), ALPHAS, quantize=False)

def on_timesteps(n):
    "States and calls at whole timesteps, where k-diffusion's interpolation and ours are one."
    return (torch.linspace(N - 1, 0, n + 1).round().double() + 1) / N

def tables(schedule, prediction):
    t = on_timesteps(6) if schedule is VP else time_edm(schedule, 6) if schedule is EDM else time_flow(schedule, 6)
    shown = t[:-1].clone()
    shown[1:] = (shown[1:] * N * .97).round() / N if schedule is VP else .97 * shown[1:]
    corrected = unipc(schedule, t, 3, prediction=prediction)
    plain = replace(corrected, c=None, c_free=None)
    factors = replace(ipndm(schedule, t, 3), start_factor=.98, end_factor=1.01, a=torch.linspace(.99, 1.01, 6).double())
    single = dpm_solver_s(schedule, t, 2, prediction)
    if schedule is VP: single = single.decouple(schedule, (single.t_eval * N).round() / N) # stages lie between
    return dict(plain=plain, corrected=corrected, decoupled=plain.decouple(schedule, shown),
                both=corrected.decouple(schedule, shown), single=single,
                factors=factors.decouple(schedule, shown))

@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_equal_to_solver(k, schedule, prediction):
    x, checked = schedule.prior_std * sample_noise(range(16), (2,)).double(), 0
    for v in (False, True)[:1 + (schedule is VP)]:
        for name, solver in tables(schedule, prediction).items():
            fn, model = sample_solver(solver), model_of(k, schedule, v)
            ours = fn(model, k_start(solver, x), solver_sigmas(solver), extra_args={}, disable=True)
            want = solver(mixture(schedule), x)
            assert (ours - want).abs().max() < 1e-12 * want.abs().max(), (name, v)
            checked += 1
    assert checked == (12 if schedule is VP else 6)

def test_the_call_is_that_of_their_samplers(k):
    "Same arguments, same callback keys, same steps: DDIM is sample_euler."
    theirs, solver = k.sampling.sample_euler, ddim(VP, on_timesteps(5))
    ours, model = sample_solver(solver), model_of(k, VP)
    names = list(inspect.signature(ours).parameters)
    assert names == list(inspect.signature(theirs).parameters)[:len(names)]
    x, sigmas = k_start(solver, sample_noise(range(4), (2,)).double()), solver.sigma / solver.alpha
    seen, wanted = [], []
    ours(model, x, sigmas, callback=seen.append, disable=True)
    theirs(model, x, sigmas, callback=wanted.append, disable=True)
    assert len(seen) == len(wanted) == 5
    for a, b in zip(seen, wanted):
        assert a.keys() == b.keys() and a["i"] == b["i"] and a["sigma"] == b["sigma"]
        for key in ("x", "sigma_hat", "denoised"): torch.testing.assert_close(a[key], b[key])

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_states_are_kept(k, dtype):
    solver, kept = heun(EDM, time_edm(EDM, 3)), []
    def model(x, sigma):
        kept.append((x.dtype, sigma.dtype, sigma.shape))
        return x / (1 + sigma[:, None]**2)
    start = k_start(solver, torch.ones(3, 2, dtype=dtype))
    out = sample_solver(solver)(model, start, solver_sigmas(solver), disable=True)
    assert out.dtype == dtype and set(kept) == {(dtype, dtype, (3,))}

def test_conditions_are_handed_on():
    solver, got = ddim(EDM, time_edm(EDM, 3)), []
    def model(x, sigma, cond=None, scale=0):
        got.append((cond, scale))
        return 0 * x
    sample_solver(solver)(model, torch.ones(1, 2), solver_sigmas(solver), dict(cond="c", scale=3), None, True)
    assert got == [("c", 3)] * 3

def test_other_sigmas_are_refused():
    solver = ddim(VP, on_timesteps(4))
    fn, x, own = sample_solver(solver), torch.ones(1, 2), solver.sigma / solver.alpha
    fn(lambda x, sigma: x, x, own, disable=True), fn(lambda x, sigma: x, x, solver_sigmas(solver), disable=True)
    for wrong, why in [(own[:-1], "4 sigmas: expected 5"), (1.01 * own, "nowhere else"), (own.flip(0), "nowhere else"),
                       (own * float("nan"), "nowhere else"), (torch.cat([own, own[-1:]]), "6 sigmas"),
                       ("x", "real numbers")]:
        with pytest.raises(ValueError, match=why): fn(lambda x, sigma: x, x, wrong, disable=True)


# ---- what a discrete model does with a time --------------------------------------------------------------------------
@pytest.mark.parametrize("wrapper", ["DiscreteEpsDDPMDenoiser", "CompVisDenoiser"])
def test_rounding_of_times(k, wrapper, notes):
    "Between timesteps: interpolated almost as by us, or rounded to whole ones."
    t = torch.tensor([1., .8123, .5577, .2991, .0687, .001], dtype=torch.float64)
    solver = ipndm(VP, t, 2)
    x, off = sample_noise(range(16), (2,)).double(), {}
    want = solver(recorder := RecordingDenoiser(mixture(VP)), x)
    times = [float(N * t - 1) for t, _ in recorder.calls]
    for quantize in (False, True):
        net = Predicting(mixture(VP))
        args = (net,) if wrapper == "CompVisDenoiser" else (net, ALPHAS)
        model = getattr(k.external, wrapper)(*args, quantize=quantize)
        got = sample_solver(solver)(model, k_start(solver, x), solver_sigmas(solver), disable=True)
        off[quantize] = float((got - want).abs().max()), max(abs(a - b) for a, b in zip(net.asked, times))
        assert len(net.asked) == 5
    assert off[False][1] < .01 and off[False][0] < 1e-4 and all(a == int(a) for a in net.asked)
    assert .2 < off[True][1] <= .51 and 1e-5 < off[True][0] < 1e-2
    notes.append(f"{wrapper}: times off by {off[False][1]:.1e} timesteps (rounded: {off[True][1]:.2f}), samples by "
                 f"{off[False][0]:.1e} ({off[True][0]:.1e})")

def test_a_network_of_ours_is_the_network_of_theirs(k):
    "EpsDenoiser and their wrapper around the same network, at whole timesteps."
    net, x = Predicting(mixture(VP)), sample_noise(range(4), (2,)).double()
    ours = EpsDenoiser(lambda x, n: net(x, n), VP, net_time=lambda t: N * t - 1)
    theirs, solver = k.external.DiscreteEpsDDPMDenoiser(net, ALPHAS, quantize=False), unipc(VP, on_timesteps(5), 3)
    got = sample_solver(solver)(theirs, k_start(solver, x), solver_sigmas(solver), disable=True)
    assert (got - solver(ours, x)).abs().max() < 1e-12


# ---- their samplers as tables ----------------------------------------------------------------------------------------
TRACED = dict(sample_euler={}, sample_heun={}, sample_dpm_2={}, sample_lms={}, sample_dpmpp_2m={},
              sample_dpmpp_2s_ancestral=dict(eta=0.), sample_euler_ancestral=dict(eta=0.))
RANDOM = ["sample_euler_ancestral", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral"]
OTHER = {"sample_dpm_fast", "sample_dpm_adaptive", "sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"}

def test_every_sampler_of_theirs_is_known(k):
    assert {n for n in dir(k.sampling) if n.startswith("sample_")} == set(TRACED) | set(RANDOM) | OTHER

@pytest.mark.parametrize("schedule", [VP, EDM], ids=["vp", "edm"])
@pytest.mark.parametrize("name", TRACED)
def test_their_samplers_are_tables(k, name, schedule):
    "Last step to sigma = 0"
    fn = getattr(k.sampling, name)
    t = on_timesteps(6) if schedule is VP else time_edm(schedule, 6)
    sigmas = torch.cat([(schedule.sigma(t) / schedule.alpha(t))[:-1], torch.zeros(1).double()])
    solver = from_k_diffusion(fn, schedule, sigmas, **TRACED[name])
    x = schedule.prior_std * sample_noise(range(16), (2,)).double()
    def model(x, s):
        t = schedule.t(-s[0].double().log())
        return mixture(schedule)(x * schedule.alpha(t), t)
    theirs = fn(model, k_start(solver, x), sigmas, disable=True, **TRACED[name])
    off = float((solver(mixture(schedule), x) - theirs).abs().max() / theirs.abs().max())
    assert off < 1e-12 and float(solver.t[-1]) < 1e-5 and solver.name == name, off

@pytest.mark.parametrize("name", RANDOM)
def test_their_random_samplers_are_refused(k, name):
    sigmas = torch.tensor([80., 10., 1., 0.])
    with pytest.raises(ValueError, match="draws noise"): from_k_diffusion(getattr(k.sampling, name), EDM, sigmas)
