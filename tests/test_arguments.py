"""What users pass that no function can use: a ValueError that names it. And numbers of numpy: they count."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from s4s_nb.denoise import (
    EpsDenoiser,
    GaussianMixture,
    GuidedDenoiser,
    WrappedDenoiser,
    X0Denoiser,
    sample_noise,
)
from s4s_nb.grids import time_edm, time_flow, time_logsnr, time_power, time_quadratic, time_uniform
from s4s_nb.judging.distance import L2, Distance
from s4s_nb.judging.moments import Moments, frechet_distance, paired_rmse, rmse_ratio, squared_errors
from s4s_nb.lab.cell import Cell, grid
from s4s_nb.lab.record import run_cell, stored_records
from s4s_nb.learning.alternate import s4s_alt
from s4s_nb.learning.coefficients import S4SConfig, s4s
from s4s_nb.learning.optimise import GaussNewton
from s4s_nb.learning.pairs import teacher_pairs
from s4s_nb.learning.student import Learnable, with_corrector
from s4s_nb.models.pretrained import load
from s4s_nb.schedule import CosineVPSchedule, DiscreteVPSchedule, EDMSchedule, FlowSchedule, VPSchedule
from s4s_nb.solver import Solver, exact_solution
from s4s_nb.solvers.multistep import ddim, deis, dpm_solver, ipndm, unipc
from s4s_nb.solvers.search import gits
from s4s_nb.solvers.singlestep import dpm2, dpm_solver_s

vp, edm = VPSchedule(), EDMSchedule()
T, X = time_uniform(vp, 3), sample_noise(range(4), (6,))
GM = GaussianMixture(vp, [.5, .5], [[-1.] * 6, [1.] * 6], [[.3] * 6] * 2)
SOLVER = ipndm(vp, T)
FINE = unipc(vp, time_logsnr(vp, 20))


class Net(nn.Module):
    "As many channels as it is told, a tuple, or an object"
    def __init__(self, answer=lambda x: x):
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.ones(1)), answer
    def forward(self, x, t): return self.answer(x * self.weight)

def eps(answer=lambda x: x): return EpsDenoiser(Net(answer), vp, (6,))
def pairs(seed=0, teacher=FINE, n=3, **kw):
    return teacher_pairs(GM, teacher, n, seed, cache=False, progress=False, **kw)
def learn(d=GM, parent=SOLVER, train=None, valid=None, distance=None, *cfg, **kw):
    return s4s(d, parent, train or pairs(), valid or pairs(9), distance or L2(), *cfg, progress=False, **kw)


CALLS = { # what is called: (call, what the message says)
    # states and times
    "a text as state": (lambda: SOLVER(GM, "noise"),
    "state 'noise': expected a tensor of floats"),
    "numpy as state": (lambda: SOLVER(GM, X.numpy()), "state ndarray of shape .4, 6."),
    "no samples": (lambda: SOLVER(GM, X[:0]), "at least one sample"),
    "a number as state": (lambda: SOLVER(GM, torch.tensor(1.)), "expected a tensor of floats"),
    "bools as state": (lambda: SOLVER(GM, X > 0), "torch.bool"),
    "whole numbers as state": (lambda: GM(X.long(), .5), "torch.int64"),
    "complex state": (lambda: SOLVER(GM, X + 1j), "torch.complex64"),
    "another width": (lambda: SOLVER(GM, X[:, :5]), r"state of shape \(4, 5\): expected \(B, 6\)"),
    "a flat state": (lambda: GM(X[0], .5), r"state of shape \(6,\): expected \(B, 6\)"),
    "a text as time": (lambda: GM(X, "0.5"),
    "time '0.5'"),
    "no time": (lambda: GM(X, None), "time None"),
    "times in a list": (lambda: GM(X, [.5] * 4), "expected a number, or a tensor"),
    "times of another batch": (lambda: GM(X, torch.ones(3) / 2), r"Tensor of shape \(3,\)"),
    "times in a column": (lambda: GM(X, torch.ones(4, 1) / 2), r"Tensor of shape \(4, 1\)"),
    "conditions for a model without": (lambda: SOLVER(eps(), X, prompt="x"),
    "prompt: Net takes no such conditions"),
    # networks
    "a network that answers with a tuple": (lambda: eps(lambda x: (x, x))(X, .5),
        "Net answers with .*expected a tensor"),
    "with an object": (lambda: eps(lambda x: Net())(X, .5), "lambda x, t: net.x, t..sample"),

           "with more channels":
        (lambda: eps(lambda x: torch.cat([x, x], 1))(X, .5), r"shape \(4, 12\), torch.float32 to a state"),
    "with one number": (lambda: eps(lambda x: x[:, :1])(X, .5), r"shape \(4, 1\), torch.float32 to a state"),
    "no network": (lambda: EpsDenoiser(None, vp), "None: expected a network"),
    "noise without a schedule": (lambda: EpsDenoiser(Net(), None, (6,)), "EpsDenoiser needs a schedule"),
    "a whole number as shape": (lambda: EpsDenoiser(Net(), vp, 6), "shape=6: expected a tuple or None"),
    "a text as guidance": (lambda: GuidedDenoiser(GM, "7", {}), "scale='7': expected a number"),
    "NaN as guidance": (lambda: GuidedDenoiser(GM, math.nan, {}), "scale=nan: expected a number"),
    # noise
    "no seeds": (lambda: sample_noise(None, (6,)), "seeds=None: expected whole numbers"),
    "seeds in a text": (lambda: sample_noise("12", (6,)), "seeds='12'"),
    "half a seed": (lambda: sample_noise([1.5], (6,)), r"seeds=\[1.5\]"),
    "a seed too large": (lambda: sample_noise([2**70], (6,)), "seeds="),
    "a text as shape": (lambda: sample_noise([1], "abc"),
    "shape='abc'"),
    "half a channel": (lambda: sample_noise([1], (2., 2)), "expected whole numbers above 0"),
    "a negative side": (lambda: sample_noise([1], (1, -1)), "expected whole numbers above 0"),
    # schedules and grids
    "rates in a text": (lambda: VPSchedule("0.1"),
    "VPSchedule: beta_min='0.1': expected a number"),
    "an infinite rate": (lambda: VPSchedule(.1, math.inf), "beta_max=inf"),
    "an infinite noise level": (lambda: EDMSchedule(.002, math.inf), "t_max=inf"),
    "no noise level": (lambda: EDMSchedule(.002, None), "sigma_max=None"),
    "NaN as offset": (lambda: CosineVPSchedule(math.nan), "s=nan"),
    "a name as alphas": (lambda: DiscreteVPSchedule("scaled_linear"),
    "'scaled_linear': expected real numbers"),
    "complex alphas": (lambda: DiscreteVPSchedule(torch.tensor([.9, .5j])), "expected real numbers"),
    "ends beyond a flow": (lambda: FlowSchedule().between(2, .001), "starts at t = 1 at the latest"),
    "ends below zero": (lambda: FlowSchedule().between(1, -1), "expected 0 <= t_min < t_max"),
    "rho = 0": (lambda: time_power(vp, 5, 0.), "rho=0.0"),
    "rho in a text": (lambda: time_power(vp, 5, "7"),
    "rho='7'"),
    "a negative rho": (lambda: time_edm(vp, 5, -1.), "rho=-1.0"),
    "steps with a point": (lambda: time_quadratic(vp, 5.), "n=5.0: expected a whole number"),
    "a text as shift": (lambda: time_flow(FlowSchedule(), 5, sigma_0="1"),
    "sigma_0='1'"),
    # solvers
    "order 2.0": (lambda: ipndm(vp, T, 2.), "order=2.0: expected a whole number"),
    "order True": (lambda: dpm_solver_s(vp, T, True), "order=True"),
    "order True of another": (lambda: dpm2(vp, T, True), "True"),
    "order '3'": (lambda: dpm_solver(vp, T, "3"),
    "order='3'"),
    "a clock by name": (lambda: deis(vp, T, 2, clock="rho"),
    "clock='rho': expected a NoiseSchedule"),
    "a flag in words": (lambda: unipc(vp, T, lower_order_final="no"),
    "lower_order_final='no': expected True or False"),
    "weights of outputs that do not exist": (lambda: Solver.tabulate(vp, T, [[1., .5], [1.], [1.]]),
        "row 0 has 2 weights"),
    "half a base": (lambda: Solver.tabulate(vp, T, [[1.]] * 3, base=[0, .5, 2]), "base=0.5"),
    "a file of no name": (lambda: Solver.load(None), "path=None"),
    "a folder": (lambda: Solver.load("."),
    "expected a file"),
    "a corrector for a text": (lambda: with_corrector("x"),
    "'x': expected a Solver"),
    "a student of order '3'": (lambda: Learnable(SOLVER, order="3"),
    "order='3'"),
    "a text to solve": (lambda: exact_solution("x", X), "denoiser='x': expected a Denoiser"),
    "steps of GITS in a text": (lambda: gits(GM, T, "4", X), "n='4'"),
    "a coefficient in a text": (lambda: gits(GM, T, 2, X, coeff="1"),
    "coeff='1'"),
    # pairs and learning
    "a seed in a text": (lambda: pairs("0"),
    "seed='0'"),
    "no seed": (lambda: pairs(None), "seed=None"),
    "a shape in a text": (lambda: pairs(shape="abc"),
    "shape='abc'"),
    "a model by name": (lambda: learn("digits"),
    "denoiser='digits': expected a Denoiser"),
    "a network as model": (lambda: learn(Net()), "Net: expected a Denoiser"),
    "a sample as pairs": (lambda: learn(train=3), "train=3: expected a Pairs"),
    "settings in a dict": (lambda: learn(GM, SOLVER, None, None, None, dict(epochs=1)),
        "cfg={'epochs': 1}: expected a S4SConfig"),
    "the class of settings": (lambda: learn(GM, SOLVER, None, None, None, S4SConfig), "cfg=the class S4SConfig"),
    "epochs in a text": (lambda: S4SConfig(epochs="5"),
    "epochs='5'"),
    "half an epoch": (lambda: S4SConfig(epochs=2.5), "epochs=2.5"),
    "epochs True": (lambda: S4SConfig(epochs=True), "epochs=True"),
    "NaN as radius": (lambda: S4SConfig(radius=math.nan), "radius=nan"),
    "accept in words": (lambda: S4SConfig(accept="no"),
    "accept='no'"),
    "an optimiser by name": (lambda: S4SConfig(optimizer="adam"),
    "optimizer='adam': expected GaussNewton"),
    "the class of an optimiser": (lambda: S4SConfig(optimizer=torch.optim.Adam), "the class Adam"),
    "rounds in a text": (lambda: s4s_alt(GM, SOLVER, pairs(), pairs(9), L2(), rounds="2"),
    "rounds='2'"),
    # judging
    "lists of errors": (lambda: rmse_ratio([1., 2.], [1., 2.]), "a=.1.0, 2.0.: expected a Tensor"),
    "infinite errors": (lambda: rmse_ratio(torch.tensor([1., math.inf]), torch.ones(2)), "expected positive numbers"),
    "numpy as images": (lambda: squared_errors(X.numpy(), X), "x=ndarray"),
    "one image": (lambda: squared_errors(X[0], X[0]), "two batches"),
    "complex images": (lambda: squared_errors(X * 1j, X * 0j), "real numbers"),
    "errors in a list": (lambda: paired_rmse([1.]), "errors="),
    "features in a list": (lambda: Moments([[1.]]), "features="),
    # the laboratory
    "a model of no name": (lambda: load(None), "name=None"),
    "a folder that is not there": (lambda: load("digits", folder="/no"),
    "/no: no folder"),
    "a device that is none": (lambda: load("digits", device="gpu"),
    "device='gpu'"),
    "guidance in a text": (lambda: load("digits", guidance="2"),
    "guidance='2'"),
    "guidance True": (lambda: load("digits", True), "guidance=True"),
    "NaN as scale": (lambda: load("digits", math.nan), "guidance=nan"),
    "a data set of no name": (lambda: Cell(dataset=None), "dataset=None"),
    "order 3.0": (lambda: Cell(order=3.), "order=3.0"),
    "losses in a list": (lambda: Cell(method="s4s", distance=["l2"]), "distance="),
    "a cell in a dict": (lambda: run_cell(dict(nfe=4), "out"),
    "cell={'nfe': 4}: expected a Cell"),
    "no folder": (lambda: run_cell(Cell("mixture"), None), "out=None"),
    "a field that no cell has": (lambda: grid("mixture", foo=5), "no cell has foo"),
}

@pytest.mark.parametrize("name", CALLS)
def test_is_refused_by_name(name):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message) as e: call()
    assert len(str(e.value)) < 600 and "\n" not in str(e.value)

def test_numbers_of_numpy_count():
    i, f = np.int64, np.float32
    assert ipndm(vp, time_logsnr(vp, i(4)), i(2)) == ipndm(vp, time_logsnr(vp, 4), 2)
    assert torch.equal(time_edm(vp, i(4), f(7)), time_edm(vp, 4, 7.))
    cfg = S4SConfig(epochs=i(1), tol=f(0), optimizer=GaussNewton(samples=i(20)))
    learned = learn(GM, SOLVER, None, None, None, cfg)
    assert learned.learned.meta["config"]["epochs"] == 1
    assert Cell("digits", nfe=i(4), guidance=f(2.)) == Cell("digits", nfe=4, guidance=2.)
    assert load("digits", f(2.)).scale == 2.

# ---- what ran without a word ---------------------------------------------------------------------------------------
def test_starts_have_the_deviation_of_their_time():
    "A schedule between other ends; a grid that starts later than its model."
    late = edm.between(40, .002)
    assert late.prior_std == EDMSchedule(.002, 40.).prior_std == 40
    gm = GaussianMixture(edm, [1.], [[0.] * 64], [[.5] * 64])
    for t in (time_edm(late, 40), [40., 20., 5., 1., .002]):
        with pytest.raises(ValueError, match="starts at t=40, where states have the deviation 40"):
            teacher_pairs(gm, ddim(edm, t), 2, 0, cache=False, progress=False)
    ends = ddim(late, time_edm(late, 40))(GaussianMixture(late, [1.], [[0.] * 64], [[.5] * 64]),
                                          late.prior_std * sample_noise(range(64), (64,)).double())
    assert abs(ends.std() - .5) < .05

def test_teacher_and_student_end_at_one_time():
    early = unipc(vp, time_logsnr(vp.between(1., .2), 20))
    with pytest.raises(ValueError, match="ends at t=0.001, its teacher UniPC-3 bh1, NFE 20 at 0.2"):
        learn(train=pairs(0, early), valid=pairs(9, early))
    with pytest.raises(ValueError, match="train was made by .* valid by .*on another grid"):
        learn(valid=pairs(9, unipc(vp, time_uniform(vp, 20))))

class Interval(WrappedDenoiser):
    "Stronger between two times only: numbers of Python"
    def __init__(self, denoiser, low, high):
        super().__init__(denoiser)
        self.low, self.high = low, high
    def forward(self, x, t, **cond):
        x_0 = self.denoiser(x, t)
        return 1.3 * x_0 if self.low <= float(t) <= self.high else x_0

def test_models_that_differ_at_some_times_only(tmp_path):
    gm = GaussianMixture(edm, [.5, .5], [[-1.] * 6, [1.] * 6], [[.3] * 6] * 2)
    teacher = unipc(edm, time_logsnr(edm, 20))
    ends = [teacher_pairs(Interval(gm, *b), teacher, 4, 0, cache=tmp_path, progress=False).x_0
            for b in ((.28, 1.61), (.19, 3.))]
    assert not torch.equal(*ends)

class Clipped(Solver):
    def run(self, denoiser, x, callback=None, **cond): return super().run(denoiser, x, callback, **cond).clamp(-.5, .5)

def test_a_solver_with_a_loop_of_its_own(tmp_path):
    clipped = Clipped(**{k: v for k, v in vars(FINE).items() if not k.startswith("_")})
    plain, own = (teacher_pairs(GM, s, 4, 0, cache=tmp_path, progress=False).x_0 for s in (FINE, clipped))
    assert plain.abs().max() > .5 == own.abs().max()

class Corner(Distance):
    def __init__(self, k):
        super().__init__()
        self.k = k
    def residual(self, x, y): return (x - y)[:, :self.k]

def test_checkpoints_of_another_distance(tmp_path):
    ends = [learn(GM, SOLVER, None, None, Corner(k), S4SConfig(epochs=2), checkpoint=tmp_path).history["valid"]
            for k in (2, 6)]
    assert ends[0] != ends[1]

def test_a_schedule_that_was_changed_after_a_call():
    schedule = VPSchedule()
    solver, d = ipndm(schedule, time_uniform(schedule, 3)), GaussianMixture(schedule, [1.], [[0.] * 6], [[.3] * 6])
    solver(d, X)
    schedule.beta_max = 10.
    with pytest.raises(ValueError, match="made for alpha, sigma"): solver(d, X)

def test_training_mode_outside_of_solvers():
    d = EpsDenoiser(nn.Module.train(nn.Sequential(nn.Dropout(.5))), vp, (6,))
    d.net.forward = lambda x, t: nn.functional.dropout(x, .5, d.net.training)
    assert torch.equal(d(X, .5), d(X, .5)) and d.net.training

def test_many_copies_of_few_images():
    features = torch.randn(20, 40, dtype=torch.float64).repeat(20, 1)
    with pytest.warns(UserWarning, match="about 20 different images"):
        frechet_distance(Moments(features), Moments(torch.randn(400, 40)))

@pytest.mark.parametrize("numbers", [([2., 2.], [.3, .3]), ([-1., 2.], [.3, .3]), ([.5, .5], [.3, -.3])])
def test_mixtures_that_are_none(numbers):
    weights, stds = numbers
    with pytest.raises(ValueError, match="expected positive"):
        GaussianMixture(edm, weights, [[0.], [1.]], [[s] for s in stds])

@pytest.mark.parametrize("labels", [-torch.eye(10), 10 * torch.eye(10), torch.ones(10, 10), torch.eye(10) * math.nan,
                                    torch.eye(9)])
def test_labels_that_are_no_classes(labels):
    d = load("digits", 2.)
    with pytest.raises(ValueError, match="class_labels"):
        d(sample_noise(range(len(labels)), d.shape), .5, class_labels=labels)

@pytest.mark.parametrize("labels", [[1, 2], 3, np.eye(10)])
def test_labels_that_are_no_tensors(labels):
    d = load("digits", 2.)
    with pytest.raises(ValueError, match="class_labels .*expected a tensor"):
        d(sample_noise(range(2), d.shape), .5, class_labels=labels)

def test_guided_models_in_inference_mode_and_labels_changed_in_place():
    "Conditions are doubled and checked once for a tensor; a change of it is seen."
    d, solver = load("digits", 2.), ipndm(edm, time_edm(edm, 3))
    x, cond = edm.prior_std * sample_noise(range(2), d.shape), d.conditions(range(2))
    expected = solver(d, x, **cond)
    with torch.inference_mode(): assert torch.equal(solver(d, x, **d.conditions(range(2))), expected)
    cond["class_labels"].copy_(d.conditions(range(5, 7))["class_labels"])
    assert torch.equal(solver(d, x, **cond), solver(d, x, **d.conditions(range(5, 7))))
    assert not torch.equal(solver(d, x, **cond), expected)
    with torch.inference_mode(): solver(d, x, **cond)
    solver(d, x.clone().requires_grad_(), **cond).sum().backward() # nothing of inference mode was kept
    before, d.null = solver(d, x, **cond), {k: v + .1 for k, v in d.null.items()}
    assert not torch.equal(solver(d, x, **cond), before)

def test_ends_of_a_schedule_are_places_to_start():
    "A flow that starts before pure noise, a short range of noise levels."
    for schedule in FlowSchedule(t_max=.9), EDMSchedule(.002, 2.), VPSchedule(t_max=.7):
        gm = GaussianMixture(schedule, [1.], [[0.] * 6], [[.3] * 6])
        teacher_pairs(gm, ipndm(schedule, time_uniform(schedule, 3)), 2, 0, cache=False, progress=False)

def test_a_model_without_a_schedule_is_not_cached(tmp_path):
    d = X0Denoiser(Net(), None, (6,))
    with pytest.raises(ValueError, match="cache=False"): teacher_pairs(d, FINE, 2, 0, cache=tmp_path, progress=False)

def test_broken_records_are_named(tmp_path):
    (tmp_path / "records/cells").mkdir(parents=True)
    (tmp_path / "records/cells/a.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="a.json: no record"): stored_records(tmp_path)
