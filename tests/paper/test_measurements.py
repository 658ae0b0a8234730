"Measurements: Figure 1 against an independent solution, and the committed files."
import json
import math
from pathlib import Path

import numpy
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import norm

from s4s_nb.paper.measurements import (
    MEASUREMENTS,
    MODES,
    measure_figure1,
    mixture_on_a_line,
    stored_measurement,
)

DIGITS = Path(__file__).resolve().parents[2] / "results/digits"


def slope(t, x):
    "dx/dt of the probability-flow ODE, written out: drift, rate and score of the marginal density at t."
    rate = .1 + 19.9 * t
    alpha = math.exp(-19.9 * t**2 / 4 - .1 * t / 2)
    means, stds = (numpy.array(MODES[k])[:, 0] for k in ("means", "stds"))
    var = alpha**2 * stds**2 + 1 - alpha**2
    each = numpy.array(MODES["weights"]) * norm.pdf(x, alpha * means, var**.5)
    score = (each * (alpha * means - x) / var).sum() / each.sum()
    return -rate / 2 * (x + score)

def test_true_paths_are_the_ode_s():
    true, *others = stored_measurement(DIGITS / "figure1.json")
    for path in true["paths"]:
        t = numpy.array(true["t"])
        exact = solve_ivp(lambda t, x: [slope(t, x[0])], (t[0], t[-1]), path[:1], t_eval=t, rtol=1e-9, atol=1e-11).y[0]
        assert abs(exact - path).max() < 2e-3
    for f in others:
        assert [p[0] for p in f["paths"]] == [p[0] for p in true["paths"]] and f["nfe"] == len(f["t"]) - 1 == 4

def test_each_learned_solver_ends_nearer():
    true, classical, learned, alternating = stored_measurement(DIGITS / "figure1.json")
    def end_error(f): return numpy.mean([(a[-1] - b[-1])**2 for a, b in zip(f["paths"], true["paths"])])**.5
    for errors in ([f["rmse"] for f in (classical, learned, alternating)],
                   [end_error(f) for f in (classical, learned, alternating)]):
        assert errors[0] > errors[1] > errors[2]

def test_figure_1_can_be_made_again(tmp_path):
    kept, made = stored_measurement(DIGITS / "figure1.json"), measure_figure1("digits", tmp_path)
    for a, b in zip(kept, made):
        assert a["name"] == b["name"] and a["t"] == pytest.approx(b["t"], rel=1e-4)
        assert a["rmse"] == pytest.approx(b["rmse"], rel=1e-3, abs=1e-6)
    assert json.loads((tmp_path / "figure1.json").read_text())["settings"] == json.loads(
        (DIGITS / "figure1.json").read_text())["settings"]

def test_the_mixture_is_the_one_that_is_said():
    line = mixture_on_a_line()
    assert line.shape == (1,) and line.means[:, 0].tolist() == [m for (m,) in MODES["means"]]
    x = line.sample(20_000)[:, 0].numpy()
    weights = [(abs(x - m) < 5 * s).mean() for (m,), (s,) in zip(MODES["means"], MODES["stds"])]
    assert weights == pytest.approx(MODES["weights"], abs=.02)

@pytest.mark.parametrize("name", MEASUREMENTS)
def test_committed_measurements_are_whole(name):
    assert len(stored_measurement(DIGITS / f"{name}.json")) >= 3
