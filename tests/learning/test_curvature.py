"Derivatives: of half precision, on other devices, within memory, and only where something changes."
import copy
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from learning_cases import VP, assert_whole, learned_by, mixture, pairs_of, parent_at, small_net
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s4s_nb.denoise import (
    CastDenoiser,
    EpsDenoiser,
    GuidedDenoiser,
    RecordingDenoiser,
    WrappedDenoiser,
    X0Denoiser,
    frozen,
)
from s4s_nb.files.checks import import_torchvision
from s4s_nb.grids import time_logsnr
from s4s_nb.judging.distance import L2
from s4s_nb.learning import curvature
from s4s_nb.learning.alternate import BOTH, TIMES
from s4s_nb.learning.coefficients import S4SConfig
from s4s_nb.learning.curvature import derivative_for, first_call, forward_products, normal_equations
from s4s_nb.learning.pairs import Pairs
from s4s_nb.learning.run import evaluate, new_run
from s4s_nb.learning.student import Learnable, with_corrector
from s4s_nb.schedule import DiscreteVPSchedule
from s4s_nb.solvers.multistep import ddim, dpm_solver, ipndm, unipc
from s4s_nb.solvers.singlestep import dpm_solver_s, heun

# torch's own forward derivatives of attention are scripts, which it deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

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
            run = new_run(d, Learnable(parent), train, L2(), S4SConfig())
            normal[name] = normal_equations(run, torch.arange(8), "forward")[0]
    size = normal["full"].diag().sqrt()
    error = (normal["half"] - normal["full"]).abs() / (size[:, None] * size)
    assert error.max() < (.005 if dtype == torch.float16 else .05), error.max()

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
    run = new_run(denoiser, Learnable(parent), train, L2(), S4SConfig())
    with frozen(denoiser), warnings.catch_warnings(action="error", category=UserWarning):
        (H, g), (H_d, g_d) = (normal_equations(run, torch.arange(2), kind) for kind in ("forward", "difference"))
    size = H.diag().sqrt()
    assert ((H - H_d) / (size[:, None] * size)).abs().max() < .01
    assert ((g - g_d) / size).abs().max() < .01 * (g / size).abs().max()
    out = learned_by("s4s", denoiser, parent, train, valid, epochs=1)
    assert_whole(out, 4)
    assert not out.fallback and out.history["valid"][-1] < .5 * out.history["valid"][0]

META = torch.device("meta")

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
        patch.setattr(curvature, "vmap", vmap)
        assert torch.equal(forward_products(f, point, point.diag()), 2 * point.diag()) and sizes == [16, 8, 4]
        patch.setattr(curvature, "vmap", lambda g, chunk_size: vmap(g, 100))
        with pytest.raises(torch.OutOfMemoryError): forward_products(f, point, point.diag())

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
    run = new_run(seen, student, train, L2(), S4SConfig(chunk=chunk))
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
