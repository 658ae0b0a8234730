"""What can go wrong while learning: NaN, damaged files, tiny problems, half precision, other devices, too much memory.
Either learning survives it, or the error says what happened and nothing is lost."""
import copy
import math
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s4s_nb
import s4s_nb.learning.learn as learn_module
from s4s_nb.denoise import (
    CastDenoiser,
    Denoiser,
    EpsDenoiser,
    GaussianMixture,
    GuidedDenoiser,
    RecordingDenoiser,
    WrappedDenoiser,
    X0Denoiser,
    device_of,
    frozen,
)
from s4s_nb.files.checks import import_torchvision
from s4s_nb.grids import time_logsnr
from s4s_nb.judging.distance import L2
from s4s_nb.learning.alternate import BOTH, TIMES, ld3, ld3_s4s, match_trajectory, s4s_alt, s4s_joint
from s4s_nb.learning.learn import (
    Adam,
    GaussNewton,
    S4SConfig,
    conclude,
    derivative_for,
    evaluate,
    first_call,
    forward_products,
    new_run_of,
    normal_equations,
    s4s,
)
from s4s_nb.learning.pairs import Pairs, teacher_pairs
from s4s_nb.learning.student import Learnable, with_corrector
from s4s_nb.schedule import DiscreteVPSchedule, EDMSchedule, FlowSchedule, VPSchedule
from s4s_nb.solvers.multistep import ddim, dpm_solver, ipndm, unipc
from s4s_nb.solvers.singlestep import dpm_solver_s, heun

# torch's own forward derivatives of attention are scripts, which it deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

VP = VPSchedule()
METHODS = dict(s4s=s4s, ld3=ld3, alt=s4s_alt, joint=s4s_joint)
IN_TWO = dict(ld3_s4s=ld3_s4s) # two runs, one after the other
MATCHING = dict(trajectory=match_trajectory, stepwise=match_trajectory)
OPTIMIZERS = dict(gauss_newton=GaussNewton(), adam=Adam(batch=8))
over_methods = pytest.mark.parametrize("method", METHODS)
over_optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def mixture(schedule=VP) -> GaussianMixture:
    "Three clusters in three dimensions"
    means, stds = [[-1., .5, 0.], [1., 0., .5], [0., -1., 1.]], [[.2, .3, .1], [.3, .2, .4], [.1, .1, .2]]
    return GaussianMixture(schedule, [.5, .3, .2], means, stds)

def pairs_of(denoiser, n: int, first: int, steps: int = 20, **kw) -> Pairs:
    "n teacher pairs, uncached"
    teacher = unipc(denoiser.schedule, time_logsnr(denoiser.schedule, steps))
    return teacher_pairs(denoiser, teacher, n, first, progress=False, **dict(cache=False) | kw)

@cache
def data(schedule=VP, n: int = 16) -> tuple:
    "Training and validation pairs of the mixture"
    return tuple(pairs_of(mixture(schedule), n, first) for first in (1, 1_000_001))

def learned_by(method: str, denoiser, parent, train, valid, optimizer="gauss_newton", epochs=3, checkpoint=None, **cfg):
    "What a method makes of a parent, two of its phases short"
    more = dict(rounds=1, turn=1) if method == "alt" else dict(stepwise=True) if method == "stepwise" else {}
    cfg = S4SConfig(epochs=epochs, optimizer=OPTIMIZERS.get(optimizer, optimizer), **cfg)
    learner = (METHODS | MATCHING | IN_TWO)[method]
    return learner(denoiser, parent, train, valid, L2(), cfg, checkpoint=checkpoint, progress=False, **more)

def parent_at(nfe: int, make=ipndm, schedule=VP): return make(schedule, time_logsnr(schedule, nfe))

def assert_whole(out, nfe: int):
    "Numbers everywhere, a table that can be written, and never worse than the parent on validation."
    h = out.history
    assert torch.stack(h["theta"]).isfinite().all() and all(map(math.isfinite, h["train"] + h["valid"][:1]))
    assert out.solver.nfe == out.learned.nfe == nfe
    assert len(h["valid"]) == len(h["theta"]) == 1 + len(h["train"]) == 1 + len(h["phase"])
    assert out.fallback == (not h["valid"][out.epoch] < h["valid"][0])


# ------------------------------------------------------------------------------------------- NaN and infinity

class Broken(WrappedDenoiser):
    "Answers `value` to the samples for which `where(x, t)` holds, and counts them."
    def __init__(self, denoiser, where, value=math.nan):
        super().__init__(denoiser)
        self.where, self.value, self.count = where, value, 0
    def forward(self, x_t, t, **cond):
        bad = self.where(x_t, t).expand(len(x_t))
        self.count += int(bad.sum())
        x0 = self.denoiser(x_t, t, **cond)
        return torch.where(bad.reshape(-1, *[1] * (x0.ndim - 1)), torch.full_like(x0, self.value), x0)

def is_one_of(starts):
    "Holds for the states that are one of these."
    return lambda x, t: (x[:, None] == starts).flatten(2).all(2).any(1)


def assert_refused(message, bad, value, method, optimizer, folder):
    "Learning with a network broken on the starts `bad` raises; the student and the folder stay as they were."
    student = Learnable(parent_at(4), VP, BOTH)
    before = student.theta.detach().clone()
    with pytest.raises(ValueError, match=message):
        learned_by(method, Broken(mixture(), is_one_of(bad), value), student, *data(), optimizer, checkpoint=folder)
    assert torch.equal(student.theta, before) and not any(folder.iterdir())

@over_optimizers
@over_methods
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_in_validation_is_an_error(value, method, optimizer, tmp_path):
    assert_refused("iPNDM-3: the validation loss of the parent", data()[1].x_T[3:4], value, method, optimizer, tmp_path)

@pytest.mark.parametrize("optimizer", ["gauss_newton", "adam"])
@over_methods
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_in_training_is_an_error(value, method, optimizer, tmp_path):
    message = "iPNDM-3: .* loss .* NaN or infinity; check the network"
    assert_refused(message, data()[0].x_T[3:4], value, method, optimizer, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_the_teacher_is_an_error_that_keeps_what_was_made(value, tmp_path):
    "The seeds are named; chunks before the bad one are on disk and used when the network is well again."
    good = pairs_of(mixture(), 12, 1)
    broken = Broken(mixture(), is_one_of(good.x_T[[9]]), value)
    with pytest.raises(ValueError, match=r"NaN or infinity for 1 of 4 seeds, first \[10\]"):
        pairs_of(broken, 12, 1, chunk=4, cache=tmp_path)
    kept = [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    assert kept == ["1_4.safetensors", "5_4.safetensors"]
    well = RecordingDenoiser(mixture())
    assert torch.equal(pairs_of(well, 12, 1, chunk=4, cache=tmp_path).x_0, good.x_0)
    assert len(well.calls) == 20 # the third chunk only


def far_from(parent, pairs, size: float, gap: float):
    "Holds for larger states than `parent` meets, and for log-SNRs away from its grid."
    calls = RecordingDenoiser(mixture())
    for p in pairs: parent(calls, p.x_T)
    limit, lmbda = size * max(x.abs().max() for _, x in calls.calls), VP.lmbda(parent.t)
    return lambda x, t: (x.flatten(1).abs().amax(1) > limit) | ((VP.lmbda(t) - lmbda).abs().min() > gap)

@pytest.mark.parametrize("optimizer", [GaussNewton(), GaussNewton(derivative="forward"), Adam(batch=8, lr=2.)])
@pytest.mark.parametrize("method", [*METHODS, *IN_TWO])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_far_away_is_no_error(value, method, optimizer):
    "A network that fails outside the region it knows: proposals that go there are not taken."
    pairs, parent = data(), parent_at(4)
    network = Broken(mixture(), far_from(parent, pairs, 1.2, 1.), value)
    out = learned_by(method, network, parent, *pairs, optimizer)
    assert network.count > 0
    assert_whole(out, 4)
    assert evaluate(network, out.solver, pairs[1], L2()) <= out.history["valid"][0]

def test_nan_right_beside_the_student_keeps_the_epochs_before():
    "Gauss-Newton has walked up to a border; the next epoch's quotients cross it."
    pairs, parent = data(), parent_at(4)
    out = learned_by("ld3", Broken(mixture(), far_from(parent, pairs, 2., .6)), parent, *pairs)
    assert_whole(out, 4)
    assert not out.fallback

def test_a_step_into_no_solver_at_all_is_taken_back(tmp_path):
    "Steps so long that two times become one: the best epoch so far goes on, killed or not."
    wild = Adam(batch=8, lr=60.)
    def run(): return learned_by("ld3", mixture(), parent_at(4), *data(), wild, checkpoint=tmp_path, radius=0.)
    with pytest.warns(UserWarning, match="times must fall .* goes on from the best epoch"): out = run()
    assert_whole(out, 4)
    assert run().history["valid"] == out.history["valid"]

@over_optimizers
def test_starts_move_at_the_parameters_of_their_losses(optimizer, monkeypatch):
    "What is compared are two starts, not two solvers; so the relaxed loss of no sample rises."
    seen, plain = [], learn_module.move_starts
    def watched(run, idx, losses, grad):
        now = lambda: run.losses(run.theta, run.x_prime[idx], idx).detach().double().cpu()
        before, after = now(), plain(run, idx, losses, grad)
        seen.append((before - losses, after - now(), after - before))
        return after
    monkeypatch.setattr(learn_module, "move_starts", watched)
    learned_by("s4s", mixture(), parent_at(4), *data(), optimizer, radius=.05)
    given, returned, gained = (torch.cat(d) for d in zip(*seen))
    assert given.abs().max() < 1e-7 and returned.abs().max() < 1e-7
    assert gained.max() < 1e-7 and gained.min() < 0

def test_report_leaves_out_nan():
    "One epoch was NaN on validation, the next was not: the one that counts is chosen, and shown."
    run = new_run_of(mixture(), Learnable(parent_at(4)), data()[0], L2(), S4SConfig())
    run.history |= dict(valid=[.3, math.nan, .2], theta=[run.theta] * 3)
    out = conclude(run, "S4S")
    assert out.epoch == 2 and "0.3 -> 0.2" in repr(out) and not out.fallback


# ------------------------------------------------------------------------------------------- damaged files

def damages(whole: bytes):
    "Truncated files, an empty one, flipped bits everywhere"
    for n in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1): yield whole[:n]
    for i in range(0, len(whole), len(whole) // 40): yield whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i+1:]
    yield whole + b"\0"
    yield bytes(len(whole))

def files(folder): return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())

def test_damaged_pairs_are_made_again(tmp_path):
    "Said in a warning; the same pairs, and nothing else left in the folder."
    def get(): return pairs_of(mixture(), 4, 1, steps=5, chunk=2, cache=tmp_path)
    good = get()
    first, second = names = files(tmp_path)
    whole = (tmp_path / second).read_bytes()
    for damaged in damages(whole):
        (tmp_path / second).write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{second.name}: this file is .* will be made again"): again = get()
        assert torch.equal(again.x_0, good.x_0) and torch.equal(again.x_T, good.x_T)
        assert files(tmp_path) == names
        with warnings.catch_warnings(action="error"): get()
    (tmp_path / second).write_bytes((tmp_path / first).read_bytes())
    with pytest.warns(UserWarning, match="another recipe"): assert torch.equal(get().x_0, good.x_0)

@over_methods
def test_damaged_checkpoint_is_made_again(method, tmp_path):
    "A run whose checkpoint is damaged starts afresh, with the same end."
    def run(): return learned_by(method, mixture(), parent_at(3), *data(), epochs=2, checkpoint=tmp_path)
    good = run()
    name, = files(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.warns(UserWarning, match="will be made again"): again = run()
        assert again.history["valid"] == good.history["valid"] and again.solver == good.solver
        assert files(tmp_path) == [name]
    with warnings.catch_warnings(action="error"): assert run().history["valid"] == good.history["valid"]


class Interrupted(WrappedDenoiser):
    "Raises KeyboardInterrupt at its n-th call."
    def __init__(self, denoiser, n: int):
        super().__init__(denoiser)
        self.left = n
    def forward(self, x_t, t, **cond):
        self.left -= 1
        if self.left == 0: raise KeyboardInterrupt
        return self.denoiser(x_t, t, **cond)

@over_methods
def test_an_interrupted_call_can_be_repeated(method, tmp_path):
    "Stopped by hand, in a notebook say, and called again with the same objects: goes on, and ends the same."
    def run(denoiser, student, folder):
        return learned_by(method, denoiser, student, *data(), epochs=2, checkpoint=folder)
    make = lambda: Learnable(parent_at(3), VP, BOTH)
    calls = RecordingDenoiser(mixture())
    whole, student = run(calls, make(), tmp_path / "whole"), make()
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(mixture(), len(calls.calls) * 3 // 4), student, tmp_path / "stopped")
    again = RecordingDenoiser(mixture())
    out = run(again, student, tmp_path / "stopped")
    assert len(again.calls) < len(calls.calls) * 3 // 4
    assert torch.equal(torch.stack(out.history["theta"]), torch.stack(whole.history["theta"]))
    assert out.history["valid"] == whole.history["valid"] and out.solver == whole.solver


# ------------------------------------------------------------------------------------------- tiny problems

@pytest.mark.parametrize("make", [ipndm, unipc])
@over_optimizers
@pytest.mark.parametrize("method", [*METHODS, *IN_TWO])
@pytest.mark.parametrize("nfe", [1, 2])
def test_one_and_two_calls(nfe, method, optimizer, make):
    "Learning gives a solver of as many calls, no worse than its parent."
    train, valid = data()
    out = learned_by(method, mixture(), parent_at(nfe, make), train, valid, optimizer)
    assert_whole(out, nfe)
    calls = RecordingDenoiser(mixture())
    assert out.solver(calls, valid.x_T).isfinite().all() and len(calls.calls) == nfe
    if nfe == 1 and method == "ld3": assert out.fallback # there is no time to move
    elif make is ipndm: assert not out.fallback

def test_one_call_is_a_linear_regression():
    "The only coefficient of one step, learned without moving starts, is that of least squares."
    train, valid = data()
    parent = parent_at(1)
    out = learned_by("s4s", mixture(), parent, train, valid, GaussNewton(promise=0.), epochs=5, radius=0., tol=0.)
    A, B = parent.linear()
    m = B[0] * parent.output(mixture(), train.x_T, 0)
    best = (m * (train.x_0 - A[0] * train.x_T)).sum() / (m * m).sum()
    torch.testing.assert_close(out.learned.w[0, 0], best.double(), rtol=1e-4, atol=0)

@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", MATCHING)
@pytest.mark.parametrize("nfe", [1, 2])
def test_trajectory_of_one_and_two_steps(nfe, method, optimizer):
    "Defined at one step too: there, the trajectory is its end."
    out = learned_by(method, mixture(), parent_at(nfe), *data(), optimizer, radius=0.)
    assert_whole(out, nfe)
    if nfe == 1 and method == "trajectory":
        plain = learned_by("s4s", mixture(), parent_at(nfe), *data(), optimizer, radius=0.)
        torch.testing.assert_close(out.learned.w, plain.learned.w)

@pytest.mark.parametrize("make", [ipndm, unipc])
def test_order_above_the_number_of_calls(make):
    "Order 6 at four calls: every row reaches back to the first output, the parent's weights first."
    train, valid = data()
    student = Learnable(parent_at(4, make), order=6)
    start = student()
    assert start.w.shape == (4, 4) and start.w_free.sum(1).tolist() == [1, 2, 3, 4]
    a, b = start(mixture(), train.x_T), parent_at(4, make)(mixture(), train.x_T)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    out = learned_by("s4s", mixture(), student, train, valid, epochs=10, radius=0.)
    narrow = learned_by("s4s", mixture(), parent_at(4, make), train, valid, epochs=10, radius=0.)
    assert_whole(out, 4)
    assert student.parent.n_free > narrow.parent.n_free and out.learned.w[3, 3] != 0
    assert out.history["train"][-1] < 1.01 * narrow.history["train"][-1] # it can do what the narrow one can

@over_optimizers
@pytest.mark.parametrize("method", METHODS | MATCHING)
def test_one_pair_to_learn_from_and_one_to_select_with(method, optimizer):
    "Few, but enough to fit."
    train, valid = data()
    out = learned_by(method, mixture(), parent_at(4), train[:1], valid[:1], optimizer)
    assert_whole(out, 4)
    if method in METHODS: assert out.history["train"][-1] < .5 * evaluate(mixture(), out.parent, train[:1], L2())

@pytest.mark.parametrize("method", METHODS | MATCHING)
@pytest.mark.parametrize("which", ["training", "validation"])
def test_no_pairs_are_an_error(which, method):
    train, valid = data()
    train, valid = (train[:0], valid) if which == "training" else (train, valid[:0])
    with pytest.raises(ValueError, match=f"no {which} pairs"): learned_by(method, mixture(), parent_at(4), train, valid)

@over_optimizers
@pytest.mark.parametrize("student", [
    lambda: Learnable(parent_at(4, ddim), consistent=True), # a row of one weight whose sum is fixed
    lambda: Learnable(parent_at(4), VP, TIMES), # no coefficients, and S4S learns only those
], ids=["fixed", "times"])
def test_nothing_to_learn_is_an_error(student, optimizer):
    with pytest.raises(ValueError, match="nothing to learn|no parameters"):
        learned_by("s4s", mixture(), student(), *data(), optimizer)

def test_rate_of_adam_falls_in_every_phase():
    "A phase of three epochs, where others have one: the rate falls to the end, it does not stop and rise again."
    out = s4s_alt(mixture(), parent_at(3), *data(), L2(), S4SConfig(epochs=1, optimizer=Adam(batch=16), radius=0.),
                  rounds=1, turn=3, progress=False)
    theta = torch.stack(out.history["theta"])
    steps = theta.diff(dim=0).norm(dim=1)[2:5] # after the two phases of LD3: coefficients
    assert steps[0] > steps[1] > steps[2] > 0


# ------------------------------------------------------------------------------------------- half precision

class SmallNet(nn.Module):
    "Noise from a convolution and attention over positions, near the answer for unit Gaussian data"
    def __init__(self, channels: int = 2, width: int = 16):
        super().__init__()
        self.enter, self.leave = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((channels, width), (width, channels)))
        self.qkv, self.time = nn.Linear(width, 3 * width), nn.Linear(1, width)
    def forward(self, x, t):
        h = F.silu(self.enter(x) + self.time(t[:, None])[:, :, None, None])
        qkv = self.qkv(h.flatten(2).transpose(1, 2)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2) # (B, positions, width)
        return x + .3 * self.leave(F.silu(h + mixed.transpose(1, 2).reshape(h.shape)))

@cache
def small_net() -> SmallNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallNet()

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    "Forward mode is chosen, without a fallback; its equations are those of float32, and learning gains as much."
    full = EpsDenoiser(small_net(), VP, (2, 6, 6))
    half = CastDenoiser(EpsDenoiser(copy.deepcopy(small_net()).to(dtype), VP, (2, 6, 6)), dtype)
    assert derivative_for(full) == "difference" and derivative_for(half) == "forward"
    train, valid = (pairs_of(half, 16, first) for first in (1, 1_000_001))
    for make in (ddim, ipndm):
        parent = parent_at(4, make)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            out = learned_by("s4s", half, parent, train, valid)
        assert not [w for w in said if "difference quotients" in str(w.message)]
        assert_whole(out, 4)
        gain = [evaluate(half, out.learned, p, L2()) / evaluate(half, parent, p, L2()) for p in (train, valid)]
        assert max(gain) < (.7 if make is ddim else .05), gain
    normal = {}
    with frozen(half), frozen(full):
        for name, d in dict(half=half, full=full).items():
            run = new_run_of(d, Learnable(parent), train, L2(), S4SConfig())
            normal[name] = normal_equations(run, torch.arange(8), "forward")[0]
    size = normal["full"].diag().sqrt()
    error = (normal["half"] - normal["full"]).abs() / (size[:, None] * size)
    assert error.max() < (.005 if dtype == torch.float16 else .05), error.max()


# ------------------------------------------------------------------------------------------- latents and text

class Texts(WrappedDenoiser):
    "Conditions like the output of a text encoder, from the seeds"
    def conditions(self, seeds):
        draw = lambda seed: torch.randn(4, 16, generator=torch.Generator().manual_seed(1000 + int(seed)))
        return dict(encoder_hidden_states=torch.stack([draw(seed) for seed in seeds]))

class LatentNet(nn.Module):
    "A small UNet of diffusers with attention to a text, random, near the answer for unit Gaussian data"
    def __init__(self):
        super().__init__()
        import_torchvision()
        from diffusers import UNet2DConditionModel
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.unet = UNet2DConditionModel(
                sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, norm_num_groups=8).eval()
    def forward(self, x, t, encoder_hidden_states): return x + .3 * self.unet(x, t, encoder_hidden_states).sample

@cache
def latent_net() -> LatentNet: return LatentNet()

def guided(scale: float) -> GuidedDenoiser:
    "The latent model under guidance, on the schedule of Stable Diffusion"
    betas = torch.linspace(.00085**.5, .012**.5, 1000, dtype=torch.float64)**2
    schedule = DiscreteVPSchedule((1 - betas).cumprod(0))
    network = EpsDenoiser(latent_net(), schedule, (4, 8, 8), net_time=lambda t: 1000 * t - 1)
    return GuidedDenoiser(Texts(network), scale, dict(encoder_hidden_states=torch.zeros(1, 4, 16)))

@pytest.mark.parametrize("scale", [1, 2, 4])
def test_guided_latent_network_with_attention(scale):
    "Both derivatives give the same equations in float32, and S4S gains without any setting."
    denoiser = guided(scale)
    train, valid = (pairs_of(denoiser, 4, first, steps=8) for first in (1, 1_000_001))
    assert train.cond["encoder_hidden_states"].shape == (4, 4, 16)
    parent = parent_at(4, ipndm, denoiser.schedule)
    run = new_run_of(denoiser, Learnable(parent), train, L2(), S4SConfig())
    with frozen(denoiser), warnings.catch_warnings(action="error", category=UserWarning):
        (H, g), (H_d, g_d) = (normal_equations(run, torch.arange(2), kind) for kind in ("forward", "difference"))
    size = H.diag().sqrt()
    assert ((H - H_d) / (size[:, None] * size)).abs().max() < .01
    assert ((g - g_d) / size).abs().max() < .01 * (g / size).abs().max()
    out = learned_by("s4s", denoiser, parent, train, valid, epochs=1)
    assert_whole(out, 4)
    assert not out.fallback and out.history["valid"][-1] < .5 * out.history["valid"][0]


# ------------------------------------------------------------------------------------------- without any setting

@pytest.mark.parametrize("guidance", [1, 2, 4])
def test_digits_without_a_knob(guidance):
    "Forty pairs are enough at every guidance: better than the parent on a hundred other samples."
    denoiser = s4s_nb.load("digits", guidance=guidance)
    train, valid, held_out = (pairs_of(denoiser, n, first, 12) for n, first in ((40, 1), (40, 10**6), (100, 2 * 10**6)))
    parent = parent_at(5, ipndm, denoiser.schedule)
    out = s4s(denoiser, parent, train, valid, L2(), S4SConfig(epochs=3), progress=False)
    assert not out.fallback
    assert evaluate(denoiser, out.solver, held_out, L2()) < .9 * evaluate(denoiser, parent, held_out, L2())

@pytest.mark.parametrize("method", ["s4s", "ld3", "alt"])
@pytest.mark.parametrize("schedule", [VP, EDMSchedule(), FlowSchedule()], ids=lambda s: type(s).__name__)
def test_mixture_without_a_knob(schedule, method):
    "Every kernel, every method: better than the parent on a hundred other samples."
    train, valid = data(schedule, 60)
    held_out, parent = held_out_of(schedule), parent_at(5, ipndm, schedule)
    out = learned_by(method, mixture(schedule), parent, train, valid)
    assert not out.fallback
    gain = evaluate(mixture(schedule), out.solver, held_out, L2()) / evaluate(mixture(schedule), parent, held_out, L2())
    assert gain < (.9 if method == "s4s" else .3), gain

@cache
def held_out_of(schedule) -> Pairs: return pairs_of(mixture(schedule), 100, 2_000_001)


# ------------------------------------------------------------------------------------------- another device

META = torch.device("meta")
plain = torch._C.DisableTorchFunctionSubclass

class Elsewhere(torch.Tensor):
    "A tensor of a pretended device: it does not mix with tensors of the CPU, except with numbers and indices."
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__: return META
        if func is torch.Tensor.cpu: return cls.brought_back(args[0])
        if func is torch.Tensor.to and isinstance(args[0], cls) and is_cpu(args[1:]):
            return cls.brought_back(args[0].to(args[1].dtype) if torch.is_tensor(args[1]) else args[0])
        if func is torch.autograd.grad: # gradients stay with their inputs
            with plain(): return func(*args, **kwargs)
        if func not in (torch.Tensor.to, torch.Tensor.__getitem__):
            with plain(): mixed = any(type(v) is torch.Tensor and v.ndim for v in tree_leaves((args, kwargs)))
            if mixed: raise RuntimeError(f"Expected all tensors to be on the same device: {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs)
    @staticmethod
    def brought_back(x):
        with plain(): return x.as_subclass(torch.Tensor)

def is_cpu(args) -> bool:
    return any(a == torch.device("cpu") if isinstance(a, torch.device) else type(a) is torch.Tensor for a in args)

class Journey(TorchFunctionMode):
    "Sends to `Elsewhere` what is sent to the pretended device."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and META in [a for a in args if isinstance(a, torch.device)]:
            return args[0].as_subclass(Elsewhere)
        return func(*args, **(kwargs or {}))

class Located(Denoiser):
    "x_0 = tanh(x W + c): one weight, which stays where it is."
    def __init__(self, weight):
        super().__init__(VP, (3,))
        self.register_buffer("weight", weight)
        self.arrived = set()
    def conditions(self, seeds): return dict(c=torch.tensor([[.1 * (int(s) % 5)] * 3 for s in seeds]))
    def forward(self, x_t, t, c):
        self.arrived |= {type(x_t), type(c)}
        return (x_t @ self.weight + c).tanh()

@over_optimizers
@pytest.mark.parametrize("method", METHODS | MATCHING)
def test_inputs_go_to_where_the_weights_are(method, optimizer, tmp_path):
    "States and conditions are moved to the model, never mixed with it; results come back, the same as on the CPU."
    weight, results, parent = torch.tensor([[.9, .3, 0.], [-.3, .8, .2], [.1, 0., .7]]), [], parent_at(3)
    for denoiser in (Located(weight), Located(weight.as_subclass(Elsewhere))):
        away = device_of(denoiser) == META
        with Journey():
            folder = tmp_path / str(away)
            train, valid = (pairs_of(denoiser, 6, first, cache=folder, chunk=4) for first in (1, 101))
            out = learned_by(method, denoiser, parent, train, valid, optimizer, epochs=2, checkpoint=folder)
        assert denoiser.arrived == {Elsewhere if away else torch.Tensor}
        made = (train.x_0, train.cond["c"], out.solver.w, *out.history["theta"])
        assert {type(v) for v in made} == {torch.Tensor}
        results.append((train.x_0, torch.stack(out.history["theta"]), torch.tensor(out.history["valid"])))
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

def test_weights_without_data():
    "A model on the meta device has nothing to compute with: the error says so."
    denoiser, (train, valid) = mixture().to("meta"), data()
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"): pairs_of(denoiser, 2, 1)
    for method in METHODS:
        with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
            learned_by(method, denoiser, parent_at(3), train, valid)

class HalfLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float16)
    def forward(self, x, t): return self.linear(x.to(torch.float16)).to(x)

@pytest.mark.parametrize("times", [False, True])
def test_forward_mode_reaches_another_device(times):
    "A network in half precision elsewhere: its derivatives are not replaced by quotients."
    denoiser = X0Denoiser(HalfLinear().to(META), VP, (3,))
    student, x = Learnable(parent_at(4), VP, TIMES if times else ("phi",)), torch.empty(4, 3, device=META)
    theta = student.theta.detach()
    assert derivative_for(denoiser) == "forward"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        J = forward_products(lambda v: student.at(v)(denoiser, x), theta, torch.eye(len(theta), dtype=theta.dtype))
    assert J.shape == (len(theta), 4, 3) and J.device == META

def test_forward_mode_takes_fewer_directions_when_memory_ends():
    sizes = []
    f, point = lambda v: 2 * v, torch.ones(3, dtype=torch.float64)
    def vmap(g, chunk_size):
        sizes.append(chunk_size)
        if chunk_size > 4: raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.func.vmap(g, chunk_size=chunk_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn_module, "vmap", vmap)
        assert torch.equal(forward_products(f, point, point.diag()), 2 * point.diag()) and sizes == [16, 8, 4]
        patch.setattr(learn_module, "vmap", lambda g, chunk_size: vmap(g, 100))
        with pytest.raises(torch.OutOfMemoryError): forward_products(f, point, point.diag())


# ------------------------------------------------------------------------------------------- memory

class Largest(TorchDispatchMode):
    "The largest tensor made, under all transformations, in numbers"
    def __init__(self):
        super().__init__()
        self.numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(v.numel() for v in tree_leaves(out) if torch.is_tensor(v))])
        return out

@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("derivative", ["forward", "difference"])
def test_memory_of_the_equations_is_bounded(derivative, chunk):
    "At most `chunk` images, in at most sixteen directions, are in the network at once."
    network = X0Denoiser(small_net(), VP, (2, 4, 4))
    x_T, x_0 = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    train = Pairs(x_T, x_0, torch.arange(3))
    student = Learnable(parent_at(17, ddim), VP, ("steps",)) # 17 directions that begin at the same call
    seen = RecordingDenoiser(network)
    run = new_run_of(seen, student, train, L2(), S4SConfig(chunk=chunk))
    with frozen(seen):
        with Largest() as one, sdpa_kernel(SDPBackend.MATH): network(train.x_T[:1], torch.tensor(.5))
        with Largest() as all: H, g = normal_equations(run, torch.arange(3), derivative)
        batches = [len(x) for _, x in seen.calls]
        whole = normal_equations(replace(run, cfg=S4SConfig(chunk=100)), torch.arange(3), derivative)
    assert len(student.theta) == 17 and max(batches) <= chunk
    images, least = (16 * chunk, 16) if derivative == "forward" else (chunk, .5)
    assert one.numel * least <= all.numel <= one.numel * images
    noise = 1e-3 if derivative == "forward" else .05 # float32 rounds differently in another batch
    for a, b in zip((H, g), whole): assert (a - b).abs().max() < noise * b.abs().max()


# ------------------------------------------------------------------------------------------- what is replayed

STUDENTS = dict(
    multistep=lambda: Learnable(parent_at(5), order=4),
    corrector=lambda: Learnable(parent_at(5, unipc)),
    corrector_on_noise=lambda: Learnable(with_corrector(parent_at(4)), VP, BOTH),
    data=lambda: Learnable(parent_at(5, dpm_solver), VP, BOTH),
    shared=lambda: Learnable(parent_at(5), VP, BOTH, shared=True, consistent=True),
    remade=lambda: Learnable(parent_at(5, unipc), VP, BOTH, remake=unipc),
    paper=lambda: Learnable(parent_at(5), VP, ("offsets",), offset="paper"),
    heun=lambda: Learnable(heun(VP, time_logsnr(VP, 3)), VP, ("phi", "steps")),
    single_step=lambda: Learnable(dpm_solver_s(VP, time_logsnr(VP, 2)), VP, ("phi", "stages", "steps", "offsets")))

@pytest.mark.parametrize("kind", STUDENTS)
def test_first_call(kind):
    "A parameter moves nothing before its first call and something at it: the state there, the time, or the end."
    student, x = STUDENTS[kind](), torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    def calls(theta):
        calls = RecordingDenoiser(mixture())
        end = student.at(theta)(calls, x)
        return [torch.cat([t[None], x.flatten()]) for t, x in calls.calls] + [end.flatten()]
    for _ in range(2):
        theta = student.theta.detach()
        theta = theta + .1 * torch.randn(len(theta), dtype=torch.float64, generator=generator)
        before = calls(theta)
        for k, direction in enumerate(torch.eye(len(theta), dtype=torch.float64)):
            first, after = first_call(student, theta, direction), calls(theta + .02 * direction)
            same = [torch.equal(a, b) for a, b in zip(before, after)]
            assert all(same[:first]), (k, first, same)
            assert not all(same[first:]) or (kind == "paper" and first == 0), (k, first, same) # clipped: no effect


# ------------------------------------------------------------------------------------------- constraints

@pytest.mark.parametrize("make", [unipc, lambda s, t: with_corrector(ipndm(s, t))])
@pytest.mark.parametrize("stepwise", [False, True])
def test_trajectory_of_a_corrected_solver_is_refused(stepwise, make):
    with pytest.raises(ValueError, match="has a corrector"):
        match_trajectory(mixture(), parent_at(4, make), *data(), L2(), stepwise=stepwise, progress=False)

@over_optimizers
@pytest.mark.parametrize("first", ["phi", "steps"])
def test_constraints_last(first, optimizer):
    "Shared and consistent rows, learned in either order: sums stay 1, equal rows stay equal, and yet it gains."
    student = Learnable(parent_at(6), VP, BOTH, shared=True, consistent=True)
    cfg = S4SConfig(epochs=2, optimizer=OPTIMIZERS[optimizer])
    out = s4s_alt(mixture(), student, *data(), L2(), cfg, rounds=1, turn=2, first=first, progress=False)
    w = student.at(out.history["theta"][-1]).w
    torch.testing.assert_close(w.sum(1), student.parent.w.sum(1), rtol=0, atol=1e-12)
    assert not torch.equal(w, student.parent.w) and not out.fallback
    for n in (3, 4, 5): torch.testing.assert_close(w[n], w[2], rtol=0, atol=0) # iPNDM-3: all rows from the third on
    which = [p % 2 for p in out.history["phase"]]
    moved = torch.stack(out.history["theta"]).diff(dim=0)[:, student.index(("phi",))].abs().sum(1) > 0
    later = [(w, bool(m)) for w, m, p in zip(which, moved, out.history["phase"]) if p >= 2]
    assert {m for w, m in later if w == (first == "phi")} == {False} # phases of times leave coefficients alone
