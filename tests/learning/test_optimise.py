"Steps of the optimisers."
import math
from dataclasses import replace

import pytest
import torch
from learning_cases import VP, data, learned_by, mixture, over_optimizers, parent_at

from s4s_nb.judging.distance import L2
from s4s_nb.learning import optimise
from s4s_nb.learning.alternate import BOTH, s4s_alt
from s4s_nb.learning.coefficients import S4SConfig
from s4s_nb.learning.optimise import Adam, GaussNewton, adam_scale
from s4s_nb.learning.run import new_run
from s4s_nb.learning.student import Learnable

# torch's own forward derivatives of attention are scripts, which it deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

@over_optimizers
def test_starts_move_at_the_parameters_of_their_losses(optimizer, monkeypatch):
    "What is compared are two starts, not two solvers; so the relaxed loss of no sample rises."
    seen, plain = [], optimise.move_starts
    def watched(run, idx, losses, grad):
        now = lambda: run.losses(run.theta, run.x_prime[idx], idx).detach().double().cpu()
        before, after = now(), plain(run, idx, losses, grad)
        seen.append((before - losses, after - now(), after - before))
        return after
    monkeypatch.setattr(optimise, "move_starts", watched)
    learned_by("s4s", mixture(), parent_at(4), *data(), optimizer, radius=.05)
    given, returned, gained = (torch.cat(d) for d in zip(*seen))
    assert given.abs().max() < 1e-7 and returned.abs().max() < 1e-7
    assert gained.max() < 1e-7 and gained.min() < 0

def test_one_call_is_a_linear_regression():
    "The only coefficient of one step, learned without moving starts, is that of least squares."
    train, valid = data()
    parent = parent_at(1)
    out = learned_by("s4s", mixture(), parent, train, valid, GaussNewton(promise=0.), epochs=5, radius=0., tol=0.)
    A, B = parent.linear()
    m = B[0] * parent.output(mixture(), train.x_T, 0)
    best = (m * (train.x_0 - A[0] * train.x_T)).sum() / (m * m).sum()
    torch.testing.assert_close(out.learned.w[0, 0], best.double(), rtol=1e-4, atol=0)

def test_rate_of_adam_falls_in_every_phase():
    "A phase of three epochs, where others have one: the rate falls to the end, it does not stop and rise again."
    out = s4s_alt(mixture(), parent_at(3), *data(), L2(), S4SConfig(epochs=1, optimizer=Adam(batch=16), radius=0.),
                  rounds=1, turn=3, progress=False)
    theta = torch.stack(out.history["theta"])
    steps = theta.diff(dim=0).norm(dim=1)[2:5] # after the two phases of LD3: coefficients
    assert steps[0] > steps[1] > steps[2] > 0


def by_recurrence(adam, run, epochs):
    "The parameters after every epoch by the recurrences of Kingma and Ba, written out; hard objective."
    theta, n = run.theta, len(run.train)
    batches = -(-n // adam.batch)
    scale = adam_scale(run)["scale"]
    m = v = torch.zeros_like(scale)
    for k in range(epochs):
        generator = torch.Generator().manual_seed(1_000_003 * adam.seed + k)
        for i, idx in enumerate(torch.randperm(n, generator=generator).split(adam.batch)):
            free = theta.clone().requires_grad_()
            g, = torch.autograd.grad(run.losses(free, run.train.x_T[idx], idx).mean(), free)
            g, step = g * scale, k * batches + i + 1
            m, v = adam.betas[0] * m + (1 - adam.betas[0]) * g, adam.betas[1] * v + (1 - adam.betas[1]) * g**2
            m_hat, v_hat = m / (1 - adam.betas[0]**step), v / (1 - adam.betas[1]**step)
            rate = adam.lr * (1 + math.cos(math.pi * (step - 1) / (epochs * batches))) / 2
            theta = theta - rate * scale * m_hat / (v_hat.sqrt() + 1e-12)
        yield theta

def hard_run(epochs, optimizer):
    "The mixture without relaxed starts"
    train = data(n=40)[0]
    train = replace(train, x_T=train.x_T.double(), x_0=train.x_0.double())
    run = new_run(mixture(), Learnable(parent_at(4), VP, BOTH), train, L2(), S4SConfig(optimizer=optimizer, radius=0.))
    run.epochs = epochs
    return run

@pytest.mark.parametrize("adam", [Adam(), Adam(batch=7, lr=.02, betas=(.8, .95), seed=3)])
def test_adam_is_its_recurrence(adam):
    "Over more than a hundred steps with cosine decay, to rounding."
    run, epochs = hard_run(30, adam), 30
    for k, theta in enumerate(by_recurrence(adam, hard_run(30, adam), epochs)):
        adam.epoch(run, k)
        torch.testing.assert_close(run.theta, theta, rtol=1e-10, atol=1e-10)

def test_adam_keeps_only_tensors_and_goes_on_from_them():
    "Its memory, copied between two epochs into another run, gives the same bits."
    adam, run, other = Adam(), hard_run(4, Adam()), hard_run(4, Adam())
    for k in range(4):
        other.state = {name: v.clone() for name, v in run.state.items()}
        other.set_theta(run.theta)
        other.history["train"] = list(run.history["train"])
        assert {type(v) for v in run.state.values()} <= {torch.Tensor}
        adam.epoch(run, k)
        adam.epoch(other, k)
        assert torch.equal(run.theta, other.theta) and run.history["train"] == other.history["train"]
