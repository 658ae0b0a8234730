"""What can go wrong while learning: NaN, tiny problems, other devices. Either learning survives it, or the error says
what happened and nothing is lost."""
import math
from functools import cache

import pytest
import torch
from learning_cases import (
    IN_TWO,
    MATCHING,
    METHODS,
    VP,
    Broken,
    assert_whole,
    data,
    files,
    is_one_of,
    learned_by,
    mixture,
    over_methods,
    over_optimizers,
    pairs_of,
    parent_at,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import s4s_nb
from s4s_nb.denoise import Denoiser, RecordingDenoiser, device_of
from s4s_nb.judging.distance import L2
from s4s_nb.learning.alternate import BOTH
from s4s_nb.learning.coefficients import S4SConfig, s4s
from s4s_nb.learning.optimise import Adam, GaussNewton
from s4s_nb.learning.pairs import Pairs
from s4s_nb.learning.run import evaluate
from s4s_nb.learning.student import Learnable
from s4s_nb.schedule import EDMSchedule, FlowSchedule
from s4s_nb.solvers.multistep import ipndm, unipc

# torch's own forward derivatives of attention are scripts, which it deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

def assert_refused(message, bad, value, method, optimizer, folder):
    "Learning with a network broken on the starts `bad` raises; the student and the folder stay as they were."
    student = Learnable(parent_at(4), VP, BOTH)
    before = student.theta.detach().clone()
    with pytest.raises(ValueError, match=message):
        learned_by(method, Broken(mixture(), is_one_of(bad), value), student, *data(), optimizer, checkpoint=folder)
    assert torch.equal(student.theta, before) and not files(folder)

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
