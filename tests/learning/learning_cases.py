"What the tests of learning share: a model, its pairs, every method and optimiser, and broken networks."
import math
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s4s_nb.denoise import GaussianMixture, WrappedDenoiser
from s4s_nb.grids import time_logsnr
from s4s_nb.judging.distance import L2
from s4s_nb.learning.alternate import ld3, ld3_s4s, s4s_alt, s4s_joint
from s4s_nb.learning.coefficients import S4SConfig, s4s
from s4s_nb.learning.optimise import Adam, GaussNewton
from s4s_nb.learning.pairs import Pairs, teacher_pairs
from s4s_nb.learning.trajectory import match_trajectory
from s4s_nb.schedule import VPSchedule
from s4s_nb.solvers.multistep import ipndm, unipc

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

class Broken(WrappedDenoiser):
    "Answers `value` to the samples for which `where(x, t)` holds, and counts them; asked who it is, it is whole."
    transparent = True
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

def damages(whole: bytes):
    "Truncated files, an empty one, flipped bits everywhere"
    for n in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1): yield whole[:n]
    for i in range(0, len(whole), len(whole) // 40): yield whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i+1:]
    yield whole + b"\0"
    yield bytes(len(whole))

def files(folder):
    "All but what says who a model is, which is there before anything is made with it."
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and "models" not in p.parts)

class SmallNet(nn.Module):
    "Noise from a convolution and attention over positions, near the answer for unit Gaussian data"
    def __init__(self, channels: int = 2, width: int = 16):
        super().__init__()
        self.enter, self.leave = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((channels, width), (width, channels)))
        self.qkv, self.time = nn.Linear(width, 3 * width), nn.Linear(1, width)
    def forward(self, x, t):
        h = F.silu(self.enter(x) + self.time(t[:, None].to(x))[:, :, None, None])
        qkv = self.qkv(h.flatten(2).transpose(1, 2)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2) # (B, positions, width)
        return x + .3 * self.leave(F.silu(h + mixed.transpose(1, 2).reshape(h.shape)))

@cache
def small_net() -> SmallNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallNet()

class Interrupted(WrappedDenoiser):
    "Raises KeyboardInterrupt at its n-th call."
    transparent = True
    def __init__(self, denoiser, n: int):
        super().__init__(denoiser)
        self.left = n
    def forward(self, x_t, t, **cond):
        self.left -= 1
        if self.left == 0: raise KeyboardInterrupt
        return self.denoiser(x_t, t, **cond)
