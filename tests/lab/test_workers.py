"What a worker process cannot do is said with its cause, and a device that is not here is refused first."
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from s4s_nb.lab.cell import Cell, grid
from s4s_nb.lab.sweep import on_device, run_grid
from s4s_nb.lab.workers import Workers
from s4s_nb.solvers.families import SOLVERS, Family
from s4s_nb.solvers.multistep import ipndm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ghost(monkeypatch):
    "A function of a module that exists in this process only."
    module = ModuleType("ghost")
    exec("def twice(x): return 2 * x\nclass Thing: pass", vars(module))
    monkeypatch.setitem(sys.modules, "ghost", module)
    return module

def said(function, *args):
    with Workers(2) as pool, pytest.raises(RuntimeError) as e: list(pool.run([("the task", function, args)]))
    assert str(e.value).startswith("the task: ")
    return str(e.value)

@pytest.mark.parametrize("task", [
    lambda g: (g.twice, (1,)), lambda g: (type, (g.Thing(),)), lambda g: (str, (g.Thing,)),
    lambda g: (map, (g.twice, [1]))])
def test_what_a_worker_cannot_load_is_named(ghost, task):
    function, args = task(ghost)
    message = said(function, *args)
    assert "ModuleNotFoundError: No module named 'ghost'" in message and "workers=1" in message
    assert "memory" not in message

def test_an_entry_that_a_worker_cannot_load_is_named(ghost, monkeypatch):
    monkeypatch.setitem(SOLVERS, "ghost", Family("Ghost", ghost.twice, (1,), 1, "nowhere"))
    assert "what was registered (ModuleNotFoundError: No module named 'ghost')" in said(math.sqrt, 4)

@pytest.mark.parametrize("function, args, cause", [
    (os._exit, (7,), "exit code 7"), (os.kill, None, "too little memory"), (os.abort, (), "SIGABRT"),
    (lambda: (x for x in "ab"), (), "result cannot be sent back"), (math.sqrt, (-1,), "ValueError")])
def test_how_a_worker_died_is_not_guessed(function, args, cause):
    if args is None: function, args = lambda: os.kill(os.getpid(), signal.SIGKILL), ()
    message = said(function, *args)
    assert cause in message and ("memory" in message) == (cause == "too little memory")

def test_what_is_registered_later_reaches_workers_that_exist(monkeypatch):
    names = lambda: "later" in SOLVERS
    with Workers(1 + 1) as pool:
        assert dict(pool.run([("before", names, ())])) == {0: False}
        monkeypatch.setitem(SOLVERS, "later", Family("Later", ipndm, (1,), 1, "this test"))
        assert dict(pool.run([("after", names, ())])) == {0: True}

SCRIPT = """
from s4s_nb import Solver
from s4s_nb.lab import grid, run_grid
from s4s_nb.solvers.families import SOLVERS, Family
def rab(schedule, t, *_): return Solver.tabulate(schedule, t, [[1.]] + [[3/2, -1/2]] * (len(t) - 2), name="AB2")
SOLVERS["rab"] = Family("RAB", rab, (2,), 2, "a notebook")
budget = dict(n_train=10, n_valid=10, epochs=1, n_eval=20)
cells = grid("mixture", solvers="rab", nfes="3,4", schedules="edm", distances="l2", **budget)
print(len(run_grid(cells, "out", workers=2, cache="cache", progress=False)))
"""

@pytest.mark.parametrize("how", ["stdin", "a script", "-c"])
def test_a_solver_of_ones_own_reaches_the_workers(how, tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT)
    rest = {"stdin": ["-"], "a script": ["own.py"], "-c": ["-c", SCRIPT]}[how]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, *rest], input=SCRIPT, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr

@pytest.mark.parametrize("device", ["gpu", "CPU", "", "cuda:99", "meta", "mps", 3, True, "cuda"])
def test_a_device_that_is_not_here_is_refused_first(device, tmp_path, monkeypatch):
    "In one line, and nothing is fetched for it."
    if device == "cuda" and torch.cuda.is_available(): pytest.skip("there is one")
    if device == 3 and torch.cuda.device_count() > 3: pytest.skip("there is one")
    def fetched(*_): raise AssertionError("asked for files")
    monkeypatch.setattr("s4s_nb.lab.sweep.dataset_of", fetched)
    for refuse in (lambda: on_device(device), lambda: run_grid([Cell("afhqv2")], tmp_path, device=device)):
        with pytest.raises(ValueError) as e: refuse()
        assert str(e.value).startswith(f"device={device!r}: expected cpu") and "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize("method", ["bns", "amed", "dpm_solver_v3"])
@pytest.mark.parametrize("solvers, orders", [("ipndm", "1,2,3"), ("ipndm,unipc", None), ("unipc,dpm_solver", "2,3"),
                                             ("ipndm", "2"), ("dpm_solver,ipndm,unipc", "3,1,2")])
def test_what_has_a_start_of_its_own_is_made_once(method, solvers, orders):
    "Whatever it is compared with; all parents that were asked for are there."
    cells = grid("mixture", methods=method, solvers=solvers, orders=orders, nfes="4,6", train_seeds="0,1",
                 schedules="edm,flow")
    own, parents = ([c for c in cells if (c.method == m)] for m in (method, "parent"))
    assert len(own) == 2 * 2 * 2 and {c.parent for c in own} == {solvers.split(",")[0]}
    asked = len(solvers.split(",")) * len((orders or "3").split(","))
    assert len(parents) == 2 * 2 * asked and {c.parent_cell() for c in own} <= set(parents)
    wanted = [int(v) for v in (orders or "3").split(",")]
    assert {c.order for c in own} == {3 if 3 in wanted else wanted[0]}
