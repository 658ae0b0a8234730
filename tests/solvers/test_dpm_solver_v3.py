"""DPM-Solver-v3 against the published sampler, and its statistics against stored ones, closed forms and networks.

The statistics are an input of the published sampler's rows. They were computed from the mixture's closed form with
4096 samples, since the authors published no code for them.
"""
import math
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import accumulate

import pytest
import torch
from golden_data import SCHEDULES, arrays, deviation, mixture, rows, schedule, start

from s4s_nb.denoise import EpsDenoiser, GaussianMixture, RecordingDenoiser, sample_noise
from s4s_nb.files.checks import import_torchvision
from s4s_nb.grids import time_logsnr
from s4s_nb.models.networks import forward_mode
from s4s_nb.schedule import DiscreteVPSchedule
from s4s_nb.solvers.dpm_solver_v3 import (
    EMS,
    Comoments,
    central_difference,
    dpm_solver_v3,
    in_y,
    model_statistics,
    probe_vectors,
    sample_statistics,
)

TOLERANCE = 1e-9  # |ours - theirs| <= TOLERANCE * max(1, |theirs|), float64
KNOWN = 180, 1440 # rows in the folders we know; all are compared

# ------------------------------------------------------------------------------------------------------------
# The sampler
# ------------------------------------------------------------------------------------------------------------

@cache
def stored(name: str) -> EMS:
    "The statistics the published sampler was given"
    z = arrays("dpm_solver_v3_ems")
    lmbda, *curves = (torch.from_numpy(z[f"{name}__{k}"]) for k in ("lambda", "l", "s", "b"))
    return EMS(lmbda, *(c.reshape(len(lmbda), 4) for c in curves))

def ours(c: dict, t):
    ems = stored(c["sched"])
    return dpm_solver_v3(schedule(c["sched"]), t, ems.degenerate() if c["degenerated"] else ems, c["order"],
                         c["p_pseudo"], c["use_corrector"], c["c_pseudo"], c["lof"])

def mismatch(row, make=ours) -> tuple[str|None, float]:
    "What differs between a stored row and our solver, in words, or None; and the largest deviation"
    solver, recorder, states = make(row.config, row.grid), RecordingDenoiser(mixture(row.sched)), []
    final = solver(recorder, start(row.sched), callback=lambda n, x: states.append(x[:2]))
    if len(recorder.calls) != row.config["nfe"] or solver.nfe != row.config["nfe"]:
        return f"{len(recorder.calls)} network calls, expected {row.config['nfe']}", math.inf
    if solver.meta["ems_index"] != row.config["ems_index"]:
        return f"snapped to {solver.meta['ems_index']}, expected {row.config['ems_index']}", math.inf
    off = {
        "final state": deviation(final, row.final),
        "grid": deviation(solver.t, row.grid),
        "times of the calls": deviation(torch.stack([t for t, _ in recorder.calls]), row.eval_t),
        "inputs of the calls": deviation(torch.stack([x[:2] for _, x in recorder.calls]), row.eval_x),
    }
    if len(row.traj): off["states"] = deviation(torch.stack(states), row.traj)
    bad = [f"{name} off by {d:.1e}" for name, d in off.items() if not d <= TOLERANCE]
    return ", ".join(bad) or None, max(off.values())


GROUPS = defaultdict(list)
for _row in rows("dpm_solver_v3"): GROUPS[f"{_row.sched}-order-{_row.config['order']}"].append(_row)

def test_every_option_is_met():
    "Three schedules and orders, with all options on and off; nothing is left out."
    assert set(GROUPS) == {f"{s}-order-{o}" for s in SCHEDULES for o in (1, 2, 3)}
    for option in ("p_pseudo", "use_corrector", "c_pseudo", "lof", "degenerated"):
        assert {r.config[option] for g in GROUPS.values() for r in g} == {True, False}, option
    assert sum(map(len, GROUPS.values())) in KNOWN

@pytest.mark.parametrize("name", sorted(GROUPS))
def test_rows(name, notes):
    "Every stored row of one order on one schedule: final state, network calls, states in between"
    found = [(str(row), *mismatch(row)) for row in GROUPS[name]]
    notes.append(f"golden dpm_solver_v3 {name}: {len(found)} rows compared, worst deviation "
                 f"{max(d for _, _, d in found):.1e}")
    wrong = [f"{row}: {why}" for row, why, _ in found if why]
    assert not wrong, f"{len(wrong)} of {len(found)} rows differ:\n" + "\n".join(wrong[:10])

def test_the_comparison_notices_a_wrong_option():
    noticed, long = Counter(), [r for r in GROUPS["vp_linear-order-3"] if r.steps > 4]
    for row in long:
        for option in ("p_pseudo", "use_corrector", "lof", "degenerated"):
            wrong = {**row.config, option: not row.config[option]}
            noticed[option] += mismatch(row, lambda c, t, wrong=wrong: ours(wrong, t))[0] is not None
    assert len(long) > 2 and all(n == len(long) for n in noticed.values()), noticed

# ------------------------------------------------------------------------------------------------------------
# The statistics
# ------------------------------------------------------------------------------------------------------------

GROUPS_OF, SAMPLES, STORED = 16, 8192, 4096 # groups for standard errors; our samples; those behind the stored curves

def grouped_moments(name: str, lmbda) -> list[Comoments]:
    "Moments of each group of the same samples and noise, at one half log-SNR"
    gm, g = mixture(name), torch.Generator().manual_seed(1)
    z = torch.randn(SAMPLES, 4, dtype=torch.float64, generator=g)
    values = sample_statistics(in_y(gm), gm.sample(SAMPLES), z, probe_vectors(z[:, None], exact=True), lmbda)
    return [Comoments.of(v) for v in values.chunk(GROUPS_OF, dim=1)]

def on_the_grid(near: list[Comoments], at: int, h: float) -> torch.Tensor:
    "(3, 4) l, s, b at near[at], dk/dlambda from the values of k at three points h apart"
    k = torch.stack([m.mean[3] for m in near])
    weights = torch.tensor([[-3, 4, -1], [-1, 0, 1], [1, -4, 3]], dtype=torch.float64)[at] / (2 * h)
    mean = torch.cat([near[at].mean[:4], (weights @ k)[None]])
    return torch.stack(replace(near[at], mean=mean).statistics())

@pytest.mark.parametrize("name", SCHEDULES)
def test_statistics_of_the_mixture(name, notes):
    """Ours against the stored ones: within four standard errors of the difference, estimated from groups of samples.
    The stored s and b take dl/dlambda from differences on their grid of 121 points; where s is nearly the same for
    all samples (low noise) this shows. So the same differences are taken here; and s with our exact dl/dlambda,
    which is what the package returns, stays within the error of those differences."""
    theirs, z, exact = stored(name), [], 0.
    last = len(theirs.lmbda) - 1
    for i in range(0, last + 1, 12):
        trio = [j + (i == 0) - (i == last) for j in (i - 1, i, i + 1)]
        near, at = [grouped_moments(name, theirs.lmbda[j]) for j in trio], trio.index(i)
        h = float(theirs.lmbda[1] - theirs.lmbda[0])
        each = torch.stack([on_the_grid([n[g] for n in near], at, h) for g in range(GROUPS_OF)])
        error = each.std(0) * (1 / GROUPS_OF + SAMPLES / GROUPS_OF / STORED)**.5
        pooled = [sum(n[1:], n[0]) for n in near]
        want = torch.stack([theirs.l[i], theirs.s[i], theirs.b[i]])
        z.append((on_the_grid(pooled, at, h) - want).abs() / error)
        s = torch.stack(pooled[at].statistics())[1]
        exact = max(exact, ((s - want[1]).abs() - 4 * error[1]).max().item())
    z = torch.stack(z)
    notes.append(f"EMS of the mixture, {name}: {z.numel()} numbers within {z.max():.1f} standard errors, root mean "
                 f"square {z.square().mean().sqrt():.2f}; with exact dl/dlambda s differs by {exact:.3f} more")
    assert z.max() < 4 and exact < .03

@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("probes", [None, 1], ids=["exact", "random"])
def test_statistics_of_a_gaussian(name, probes):
    "l = 1 - k, s = 0, b = 2 k (1 - k) mu, with k = w^2 / (w^2 + e^(-2 lambda))"
    mu, w = torch.tensor([.3, -.7, 1.1]).double(), torch.tensor([.5, .2, 1.]).double()
    gm = GaussianMixture(schedule(name), [1.], mu[None], w[None])
    ems = model_statistics(gm, gm.sample(20), 24, probes, cache=False, progress=False)
    k = w**2 / (w**2 + (-2 * ems.lmbda[:, None]).exp())
    for ours, closed in zip((ems.l, ems.s, ems.b), (1 - k, 0 * k, 2 * k * (1 - k) * mu)):
        assert (ours - closed).abs().max() < 1e-8

# ------------------------------------------------------------------------------------------------------------
# A network of diffusers, with its default attention
# ------------------------------------------------------------------------------------------------------------

class TextUNet(torch.nn.Module):
    "UNet2DConditionModel as net(x, time, text)"
    def __init__(self, unet):
        super().__init__()
        self.unet = unet
    def forward(self, x, time, text): return self.unet(x, time, encoder_hidden_states=text).sample

@pytest.fixture(scope="module")
def text_unet():
    import_torchvision()
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16, attention_head_dim=8)
    betas = torch.linspace(.00085**.5, .012**.5, 1000, dtype=torch.float64)**2
    return EpsDenoiser(TextUNet(net), DiscreteVPSchedule((1 - betas).cumprod(0)), (4, 16, 16), lambda t: 1000 * t - 1)

def measure(net, n, chunk, M=1, **kw):
    x0, text = sample_noise(range(n), (4, 16, 16)), sample_noise(range(n), (5, 16))
    return model_statistics(net, x0, M, chunk=chunk, cond=dict(text=text), cache=False, progress=False, **kw)

def test_statistics_of_a_text_unet(text_unet):
    "Forward mode runs through the default attention, and agrees with differences of plain calls."
    probe, lmbda = [p.clone() for p in text_unet.parameters()], torch.tensor([-1., 1.]).double()
    ems, difference = (measure(text_unet, 4, 2, lmbda, push=push) for push in (forward_mode, central_difference(1e-3)))
    assert ems.l.shape == (2, 4, 16, 16)
    assert (ems.l - difference.l).abs().max() < .02 * ems.l.abs().max()
    assert all(torch.equal(p, q) and q.requires_grad for p, q in zip(probe, text_unet.parameters()))
    solver = dpm_solver_v3(text_unet.schedule, time_logsnr(text_unet.schedule, 2), measure(text_unet, 4, 2, 4))
    with torch.no_grad(): x = solver(text_unet, sample_noise([7], (4, 16, 16)), text=torch.zeros(1, 5, 16))
    assert x.shape == (1, 4, 16, 16) and x.dtype == torch.float32


def peak_memory(run) -> float:
    "What `run` asked of the allocator: the most that tensors held at one time, in MB above what they held before"
    with torch.profiler.profile(profile_memory=True) as profile: run()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(changes)) / 1e6

def test_statistics_need_memory_of_one_chunk(text_unet, notes):
    "Four times the samples: the same peak. Four times the chunk: more."
    lmbda = torch.tensor([-1., 1.]).double()
    measure(text_unet, 2, 2, lmbda) # what is allocated once
    few, many, wide = (peak_memory(lambda n=n, chunk=chunk: measure(text_unet, n, chunk, lmbda))
                       for n, chunk in [(2, 2), (8, 2), (8, 8)])
    notes.append(f"EMS of a text U-Net: peak {few:.0f} MB for 2 samples, {many:.0f} MB for 8 in chunks of 2, "
                 f"{wide:.0f} MB for 8 in one chunk")
    assert many < max(1.5 * few, few + 10) and wide > few


def test_comoments_of_everything_at_once():
    "The union of accumulators is the accumulator of the union, also for images."
    values = sample_noise(range(9), (5, 2, 3, 3)).double().transpose(0, 1)
    a, b = Comoments.of(values), Comoments.of(values[:, :4]) + Comoments.of(values[:, 4:])
    assert a.n == b.n == 9
    for u, v in ((a.mean, b.mean), (a.scatter, b.scatter)): assert torch.allclose(u, v, atol=1e-12)
