"A learned method is one entry of a registry: from a module, from a notebook, and in worker processes."
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from s4s_nb.files.registry import REGISTRIES
from s4s_nb.lab.catalog import parent_solver
from s4s_nb.lab.cell import METHODS, Cell, Method, Outcome, grid, published_budget
from s4s_nb.lab.record import replayed
from s4s_nb.lab.setup import setup_for
from s4s_nb.lab.sweep import run_grid
from s4s_nb.paper.report import write_table

LAB = Path(__file__).resolve().parents[2] / "s4s_nb/lab"


# ---- one entry: this is all that a method needs ----------------------------------------------------------------------
def make_shrunk(cell, setup, checkpoint=None, progress=False):
    "The classical solver with all weights a little smaller: less as the training seed grows."
    parent = parent_solver(cell, setup)
    return Outcome(replace(parent, w=(1 - .1 / (1 + cell.train_seed)) * parent.w, name="shrunk"))

SHRUNK = Method("shrunk", make_shrunk, fields=dict(train_seed=0), schedules=("edm",), budget="s4s", multistep=True)
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shrunk(monkeypatch): monkeypatch.setitem(METHODS, "shrunk", SHRUNK)


def test_a_registered_method_is_one_like_the_others(shrunk, tmp_path):
    "From the plan to the table, with no other line of code."
    cells = grid("mixture", solvers="ipndm", nfes="3,4", methods="shrunk", train_seeds="0,1", n_eval=100)
    assert [c.method for c in cells] == ["parent"] * 2 + ["shrunk"] * 4 and cells[-1].distance is None
    records = run_grid(cells, tmp_path, workers=1, cache=tmp_path / "cache", progress=False)
    assert run_grid(cells, tmp_path, workers=1, cache=tmp_path / "cache", progress=False) == records
    setup = setup_for("mixture", cache=tmp_path / "cache")
    for cell, record in zip(cells, records):
        solver = replayed(record, tmp_path, setup)
        assert Cell(**record["key"]) == cell and (solver.name == "shrunk") == (cell.method == "shrunk")
    table = write_table(records, tmp_path)
    assert table.count("| shrunk ") == 2 and "shrunk: lower RMSE than the parent in" in table

def test_its_entry_decides_its_budget_and_its_parents(shrunk):
    assert published_budget("cifar10", "shrunk") == published_budget("cifar10", "s4s") != {}
    assert published_budget("cifar10", "bns") == {}   # it has its own
    with pytest.raises(ValueError, match="solvers='heun': shrunk starts from ddim, ipndm"):
        grid("mixture", solvers="heun", methods="shrunk")

def test_without_its_entry_it_does_not_exist():
    with pytest.raises(ValueError, match="method='shrunk'; expected one of: parent, s4s, ld3"): Cell(method="shrunk")

def test_no_other_file_of_the_laboratory_knows_a_method():
    "The classical solver itself and S4S, where a method has to be named as the default, excepted."
    texts = {p.name: re.sub("dmn_variant.*", "", p.read_text()) for p in LAB.glob("*.py")} # "ld3" is one of a search
    assert len(texts) >= 9
    def named(text, name): return re.search(rf'["\']{name}["\']|\b{name}=from_parent', text)
    for name in set(METHODS) - {"parent", "s4s"}:
        if re.search(r"_(r0|shared|consistent|order\w+)$", name): # made of two names, not written anywhere
            assert not any(named(text, name) for text in texts.values())
        else: assert [file for file, text in texts.items() if named(text, name)] == ["methods.py"], name


# What a notebook does: everything is defined in __main__, which has no file, and nothing guards the run
NOTEBOOK = """
import sys
from dataclasses import replace
from s4s_nb.grids import time_power
from s4s_nb.lab.catalog import DISTANCES, SCHEDULES, parent_solver
from s4s_nb.lab.cell import METHODS, Method, Outcome, grid
from s4s_nb.lab.sweep import run_grid
from s4s_nb.paper.report import side_by_side
from s4s_nb.solvers.families import SOLVERS, Family
from s4s_nb.solvers.multistep import ipndm

FACTOR = .99
def shrink(solver): return replace(solver, w=FACTOR * solver.w)
def make(cell, setup, checkpoint, progress):
    assert cell.schedule in SCHEDULES and setup.times(cell.schedule, 3)[0] == 80
    return Outcome(shrink(parent_solver(cell, setup)))

SCHEDULES["cubic"] = lambda setup, n: time_power(setup.schedule, n, 3.)
SOLVERS["low"] = Family("Low-{}", lambda s, t, order, *_: ipndm(s, t, order), (1, 2), 2, "this notebook")
METHODS["shrunk"] = Method("shrunk", make, schedules=("cubic",))
{more}
cells = grid("mixture", solvers="low", nfes="3,4", methods="shrunk", n_eval=100)
records = run_grid(cells, sys.argv[1], workers=2, cache=sys.argv[2], progress=False)
print(side_by_side(records))
"""

def piped(folder, more=""):
    "Runs it from a pipe, with two workers."
    command = [sys.executable, "-", folder / "out", folder / "cache"]
    done = subprocess.run(command, input=NOTEBOOK.replace("{more}", more), text=True, capture_output=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr

def test_what_a_notebook_registers_reaches_the_workers(tmp_path):
    out, err = piped(tmp_path)
    rows = re.findall(r"^\| cubic +\| Low-2 +\| +(\d)", out, re.M)
    assert "one process" not in err and rows == ["3", "4"] and "shrunk: lower RMSE" in out
    records = [json.loads(p.read_text()) for p in (tmp_path / "out/records/cells").iterdir()]
    assert len(records) == 4 and {r["provenance"]["threads"] for r in records} == {1}

def test_what_cannot_be_sent_is_said_and_done_here(tmp_path):
    "A method that holds a lock."
    more = "import threading; METHODS['locked'] = replace(METHODS['shrunk'], quick=threading.Lock())"
    out, err = piped(tmp_path, more)
    lines = [line for line in err.split("\n") if "this run goes on in one process" in line]
    assert len(lines) == 1 and "UserWarning: locked (TypeError: cannot pickle" in lines[0]
    assert "shrunk: lower RMSE" in out

def test_standard_entries_are_not_sent():
    assert not any(r.added for r in REGISTRIES.values())
    assert {"SOLVERS", "SCHEDULES", "DISTANCES", "METHODS"} <= {address.split(":")[1] for address in REGISTRIES}
