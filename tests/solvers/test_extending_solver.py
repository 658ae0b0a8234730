"A new classical solver is a function and an entry in the registry; everything else follows from these two."
import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from test_convergence import check_entry

import s4s_nb.solvers.families
from s4s_nb.grids import time_edm
from s4s_nb.lab.catalog import parent_solver
from s4s_nb.lab.cell import Cell, grid
from s4s_nb.paper.frame import frame
from s4s_nb.schedule import EDMSchedule
from s4s_nb.solver import Solver, phi
from s4s_nb.solvers.families import SOLVERS, Family, coefficients

ATLAS = Path(__file__).resolve().parents[2] / "nbs/solvers/atlas.ipynb"


def etd2(schedule, t):
    h = schedule.lmbda(t).diff()
    slope = phi(2, -h[1:]) / phi(1, -h[1:]) * h[1:] / h[:-1]
    return Solver.tabulate(schedule, t, [[1.], *([1 + d, -d] for d in slope)], prediction="data", name="ETD2")

NEW = Family("ETD2", etd2, (2,), 2, "Hochbruck & Ostermann 2010")

@pytest.fixture(autouse=True)
def registered(monkeypatch): monkeypatch.setitem(SOLVERS, "new", NEW)


def test_it_is_held_to_its_order(): check_entry(SOLVERS["new"], 2)

def test_a_false_claim_is_found():
    wrong = Family("ETD2", etd2, (3,), 3, "nobody")
    with pytest.raises(AssertionError, match="ETD2 : order 2.*expected 3"): check_entry(wrong, 3)


def test_cells_know_it():
    cell = Cell(parent="new", nfe=5)
    assert cell.order == 2 and "new" in cell.slug
    assert {c.parent for c in grid(solvers="new", nfes=5)} == {"new"}
    assert [c.method for c in grid(solvers="new", nfes=5)][0] == "parent"

def test_tables_call_it_by_its_label():
    folder = ATLAS.parents[2] / "results/digits/records/cells"
    record = json.loads(next(folder.glob("digits_edm_ipndm3_nfe4_parent_*.json")).read_text())
    record["key"] |= dict(parent="new", order=2)
    assert set(frame([record]).parent_label) == {"ETD2"}

def test_it_is_the_parent_of_a_cell():
    schedule = EDMSchedule()
    class Setup: # of a data set, as far as a parent needs one
        data = type("data", (), dict(variant="bh1"))
        times = staticmethod(lambda name, n: time_edm(schedule, n))
    Setup.schedule = schedule
    assert parent_solver(Cell(parent="new", nfe=5), Setup) == etd2(schedule, time_edm(schedule, 5))
    assert sum(coefficients(parent_solver(Cell(parent="new", nfe=5), Setup)).values()) == 9

@pytest.mark.parametrize("ask", [lambda: Cell(parent="nwe"), lambda: grid(solvers="nwe")])
def test_messages_list_it(ask):
    with pytest.raises(ValueError, match="'nwe'; expected one of: .*new"): ask()

def test_an_order_it_has_not_is_refused():
    with pytest.raises(ValueError, match="order=3: the solver 'new' has 2"): Cell(parent="new", order=3)


def test_the_atlas_shows_it(monkeypatch):
    "The atlas's own cells, on a registry of DDIM and the newcomer: a line, a row of names, a section, curves."
    matplotlib.use("Agg")
    monkeypatch.setattr(s4s_nb.solvers.families, "SOLVERS", {name: SOLVERS[name] for name in ("ddim", "new")})
    sources = ["".join(c["source"]) for c in json.loads(ATLAS.read_text(encoding="utf-8"))["cells"]]
    (last,) = [i for i, s in enumerate(sources) if "lines_of(SOLVERS.values())" in s]
    (names,) = [s for s in sources if "PROGRAMS = " in s]
    page = {}
    for source in [s for s in sources[:last + 1] if re.match(r"#\||import|def|from", s)]: exec(source, page)
    exec(names.replace("table(", "shown = table("), page)
    lines = {line[0]: line for line in page["lines"]}
    assert lines.keys() == {"DDIM", "ETD2"}
    assert lines["ETD2"][1:4] == ("`etd2`", 2, 2) and abs(float(lines["ETD2"][4]) - 2) < .2
    assert lines["ETD2"][5:] == ("1", "Hochbruck & Ostermann 2010") and "| ETD2 |" in page["shown"].data


def test_the_function_is_all_there_is():
    "Six lines that learn and replay like the others: gradients reach the grid."
    t = time_edm(EDMSchedule(), 5).requires_grad_()
    s = etd2(EDMSchedule(), t)
    assert (torch.autograd.grad(s.w[2, 1], t)[0] != 0).any() and torch.allclose(s.w.sum(1), torch.ones(5).double())
