"""Experiments: a run can be repeated, killed, continued, split over processes; wrong names are one line; the notebook
runs from anywhere. All on the exact mixture, with tiny budgets."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import load as load_tensors

import s4s_nb.lab.record as experiment
import s4s_nb.lab.setup as setups
from s4s_nb.judging.moments import paired_rmse, squared_errors
from s4s_nb.lab.catalog import SCHEDULES
from s4s_nb.lab.cell import LEARNING, LIMITS, METHODS, Cell, Method, grid
from s4s_nb.lab.record import recall, replayed, run_cell, without_provenance
from s4s_nb.lab.setup import setup_for
from s4s_nb.lab.sweep import run_grid
from s4s_nb.solvers.families import SOLVERS

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "nbs/experiments.ipynb"
BIN = Path(sys.executable).parent
TINY = dict(n_eval=200, n_train=40, n_valid=20, epochs=2)
ENV = os.environ | dict(OMP_NUM_THREADS="1")


def cells(): return grid("mixture", "edm", "ipndm,unipc", "3,4", distances="l2,perceptual", **TINY)
def read(out): return {p.name: json.loads(p.read_text()) for p in sorted((out / "records/cells").glob("*.json"))}
def contents(out): return {name: without_provenance(r) for name, r in read(out).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "Folder of a run with two workers, and its cache."
    out, cache = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("cache")
    run_grid(cells(), out, workers=2, cache=cache, progress=False)
    return out, cache

def test_a_folder_of_the_old_layout_says_what_to_move(tmp_path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(ValueError, match="move its folders cells, solvers and checkpoints into .*records"):
        run_grid([Cell("mixture")], tmp_path, workers=1, progress=False)

def test_second_run_computes_nothing(undisturbed, monkeypatch):
    "Neither a solver is run nor a file written."
    out, cache = undisturbed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    setups.KEPT_SETUPS.clear()
    for name in ("judge", "write_atomic"): monkeypatch.setattr(experiment, name, None)
    for name, method in METHODS.items(): monkeypatch.setitem(METHODS, name, replace(method, make=None))
    monkeypatch.setattr(setups, "teacher_pairs", None)
    monkeypatch.setattr(setups.CellSetup, "sample", None)
    records = run_grid(cells(), out, workers=2, cache=cache, progress=False)
    assert [r["key"] for r in records] == [json.loads(json.dumps(c.__dict__)) for c in cells()]
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_reads_only_its_own_folder(undisturbed, tmp_path, monkeypatch):
    "Records elsewhere, also in `results` beside it, are not a reason to skip work."
    out, cache = undisturbed
    (tmp_path / "results").mkdir()
    os.symlink(out, tmp_path / "results/mixture")
    monkeypatch.chdir(tmp_path)
    c = cells()[0]
    (record,) = run_grid([c], tmp_path / "out", workers=2, cache=cache, progress=False)
    old = read(out)[f"{c.slug}.json"]
    assert without_provenance(record) == without_provenance(old)
    assert record["provenance"]["date"] >= old["provenance"]["date"]
    assert len(list((tmp_path / "out/records/cells").iterdir())) == 1


# A run with two workers in a process of its own, in a session of its own
SWEEP = """
import sys
sys.path.insert(0, {tests!r})
if __name__ == "__main__":
    from test_experiment import cells
    from s4s_nb.lab.sweep import run_grid
    run_grid(cells(), sys.argv[1], workers=2, cache=sys.argv[2])
"""


def alive(group) -> bool:
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


def until(condition, seconds=180): # a busy machine takes a minute to start three processes
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.02)


def test_killed_run_goes_on_with_equal_records(undisturbed, tmp_path, notes):
    "SIGKILL after the third record, in another process with two workers and an empty cache; then on with others."
    out, cache = tmp_path / "out", tmp_path / "cache"
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP.format(tests=str(Path(__file__).parent)))
    run = subprocess.Popen([sys.executable, script, out, cache], env=ENV, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: len(list((out / "records/cells").glob("*.json"))) >= 3 or run.poll() is not None)
    run.kill()
    log = run.communicate()[0]
    assert run.returncode == -signal.SIGKILL, log
    until(lambda: not alive(run.pid))   # workers do not outlive it for longer than a cell
    kept = read(out)
    assert 3 <= len(kept) < len(cells())
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # nothing half-written was left behind
        run_grid(cells(), out, workers=2, cache=cache, progress=False)
    assert contents(out) == contents(undisturbed[0])
    assert all(read(out)[name] == r for name, r in kept.items())   # these were not made again
    notes.append(f"experiment: killed after {len(kept)} of {len(cells())} records, then equal to an undisturbed run")


DAMAGE = {
    "cut": lambda s: s[:len(s) // 2],
    "empty": lambda s: "",
    "binary": lambda s: "\x00\xff",
    "a list": lambda s: "[]",
    "a number changed": lambda s: s.replace('"high": 0.', '"high": 1.', 1),
    "no metrics": lambda s: json.dumps({k: v for k, v in json.loads(s).items() if k != "metrics"}),
    "no provenance": lambda s: json.dumps(without_provenance(json.loads(s))),
    "another model": lambda s: s.replace(json.loads(s)["model"]["sha256"], "0" * 64),
    "another cell": lambda s: s.replace('"epochs": 2', '"epochs": 3'),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "A cell, the folder of its record, made in this process, and the cache."
    c, out, cache = cells()[-1], tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("one_cache")
    run_cell(c, out, cache=cache)
    return c, out, cache


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_record_is_reported_and_made_again(how, one):
    c, out, cache = one
    path = out / "records/cells" / f"{c.slug}.json"
    good = path.read_text()
    path.write_text(DAMAGE[how](good))
    with pytest.warns(UserWarning, match="it is not used and will be made again") as caught:
        record = run_cell(c, out, cache=cache)
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    same = [without_provenance(r) for r in (record, json.loads(good), json.loads(path.read_text()))]
    assert same[0] == same[1] == same[2]


def test_damaged_solver_is_made_again(one):
    c, out, cache = one
    path = out / "records/solvers" / f"{c.slug}.json"
    good = path.read_text()
    for spoil in (lambda: path.write_text(good[:99]), path.unlink):
        spoil()
        with pytest.warns(UserWarning, match="damaged"): run_cell(c, out, cache=cache)
        assert path.read_text() == good


@pytest.mark.parametrize("wrong, exist", [
    (dict(dataset="cifar11"), "digits, ffhq"), (dict(schedules="edm,karras"), ", ".join(SCHEDULES)),
    (dict(solvers="euler"), ", ".join(SOLVERS)), (dict(distances="l3"), "l2, perceptual"),
    (dict(methods="s4s,s5s"), ", ".join(METHODS)),
    (dict(nfes="4,x"), "4,6"), (dict(nfes=0), "from 1 to 100"),
    (dict(nfes=[4.5]), "4,6"), (dict(orders=7), "1, 2, 3, 4"), (dict(train_seeds=10), "from 0 to 9"),
    (dict(n_eval=1), "from 2 to 50000"), (dict(guidance="strong"), "number"), (dict(nfes=""), "4,6")])
def test_wrong_value_is_one_line_that_says_what_exists(wrong, exist):
    with pytest.raises(ValueError) as e: grid(**dict(dataset="mixture") | wrong)
    message, (value,) = str(e.value), wrong.values()
    assert "\n" not in message and exist in message
    assert any(part in message for part in (repr(value), str(value).split(",")[-1]))


def test_impossible_nfe_is_told_before_anything_runs():
    with pytest.raises(ValueError, match="nfe=5: Heun takes 2 evaluations a step; possible are 4, 6"):
        grid("mixture", solvers="ipndm,heun", nfes="4,5")


def test_cells_differ_in_their_slugs():
    c = Cell("mixture", method="s4s", **TINY)
    assert len(c.slug) < 120 and c.slug.startswith("mixture_edm_ipndm3_nfe4_s4s_l2")
    many = grid("mixture", orders="1,2", train_seeds="0,1")
    assert len({v.slug for v in many}) == len(many)


# ----------------------------------------------------------------------------------------------------------------------
# Methods
# ----------------------------------------------------------------------------------------------------------------------

def cell_of(method):
    "A small cell of a method, on a grid it was published with."
    given = {k: TINY[k] for k in ("n_train", "n_valid", "epochs") if k in METHODS[method].fields}
    return Cell("mixture", METHODS[method].schedules[0], method=method, n_eval=200, **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "(folder, cache, {method: its record})."
    out, cache = tmp_path_factory.mktemp("methods"), tmp_path_factory.mktemp("methods_cache")
    return out, cache, {m: run_cell(cell_of(m), out, cache=cache) for m in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_record_of_every_method_comes_back(method, made, monkeypatch):
    "Reading makes and judges nothing; the file replays to the number in the record."
    out, cache, records = made
    cell, record, setup = cell_of(method), records[method], setup_for("mixture", cache=cache)
    assert Cell(**json.loads(json.dumps(record["key"]))) == cell and record["solver"].endswith(METHODS[method].suffix)
    pairs = setup.pairs(0, cell.n_eval)
    x, again = (setup.sample(replayed(record, out, setup, before), pairs) for before in (False, True))
    assert paired_rmse(squared_errors(x, pairs.x_0)) == record["metrics"]["rmse"]["mean"]
    if method != "parent":
        assert paired_rmse(squared_errors(again, pairs.x_0)) == record["learned_only"]["rmse"]["mean"]
        assert record["metrics"]["ratio"]["low"] < record["metrics"]["ratio"]["high"] or record["fallback"]
    monkeypatch.setattr(experiment, "judge", None)
    monkeypatch.setitem(METHODS, method, replace(METHODS[method], make=None))
    assert run_cell(cell, out, cache=cache) == record


@pytest.mark.parametrize("method", METHODS)
def test_same_cell_elsewhere_has_the_same_record(method, made, tmp_path):
    _, cache, records = made
    assert without_provenance(run_cell(cell_of(method), tmp_path, cache=cache)) == without_provenance(records[method])


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].suffix != ".json"])
def test_damaged_file_of_a_method_that_is_no_table(method, made):
    out, cache, records = made
    path = out / "records" / records[method]["solver"]
    good = path.read_bytes()
    tensors = load_tensors(good)
    for spoil in (lambda: path.write_bytes(good[:99]), lambda: path.write_bytes(good[:-1] + b"\1"), path.unlink):
        spoil()
        with pytest.warns(UserWarning, match="will be made again"): run_cell(cell_of(method), out, cache=cache)
        again = load_tensors(path.read_bytes())
        assert again.keys() == tensors.keys() and all(torch.equal(again[k], v) for k, v in tensors.items())


def test_a_fallback_keeps_the_start_the_method_really_had(made, tmp_path, monkeypatch):
    "BNS falls back to Euler, not to the parent it is compared with."
    _, cache, _ = made
    def no_gain(cell, setup, checkpoint, progress):
        found = bns.make(cell, setup, checkpoint, progress)
        return replace(found, solver=found.parent)
    bns = METHODS["bns"]
    monkeypatch.setitem(METHODS, "bns", replace(bns, make=no_gain))
    record, setup = run_cell(cell_of("bns"), tmp_path, cache=cache), setup_for("mixture", cache=cache)
    euler, learned = replayed(record, tmp_path, setup), replayed(record, tmp_path, setup, before_fallback=True)
    ddim = run_cell(replace(cell_of("bns").parent_cell(), parent="ddim", order=None), tmp_path, cache=cache)
    assert record["fallback"] and euler.name == "DDIM" and learned != euler
    assert abs(record["metrics"]["rmse"]["mean"] / ddim["metrics"]["rmse"]["mean"] - 1) < 1e-5
    assert record["metrics"]["ratio"]["mean"] != 1 and record["learned_only"] != record["metrics"]


def test_registry():
    "Fields, budgets and grids exist; what a method lacks is None in its cells; settings are JSON."
    for name, method in METHODS.items():
        cell = Cell("mixture", method=name, **TINY)
        assert isinstance(method, Method) and set(method.quick) <= set(method.fields) <= set(LEARNING)
        assert {k for k in LEARNING if getattr(cell, k) is not None} == set(method.fields)
        assert all(low <= method.fields[k] <= high for k, (low, high) in LIMITS.items() if k in method.fields)
        assert set(method.schedules) <= set(SCHEDULES) and set(method.shared) <= set(Cell.__dataclass_fields__)
        assert all(first >= 1_000_000 and n > 0 for first, n in method.pairs(cell))
    assert len({m.label for m in METHODS.values()}) == len(METHODS)
    assert METHODS["parent"].fields == {} and METHODS["dpm_solver_v3"].start is not None is METHODS["s4s"].start


def test_a_method_that_spends_other_evaluations_is_refused(tmp_path, monkeypatch, made):
    short = replace(METHODS["bns"], make=lambda c, *rest: METHODS["parent"].make(replace(c, nfe=c.nfe - 1), *rest))
    monkeypatch.setitem(METHODS, "short", short)
    with pytest.raises(ValueError, match="takes NFE 3"):
        run_cell(Cell("mixture", method="short", n_eval=200), tmp_path, cache=made[1])


def test_committed_baselines_are_what_this_code_reads():
    "Every record is of this model and configuration, its solver loads, and the table is made of them."
    from s4s_nb.paper.report import side_by_side
    out = ROOT / "results/digits/baselines"
    setup, records = setup_for("digits"), {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (out / "records/cells").glob("*.json"):
            cell = Cell(**json.loads(path.read_text())["key"])
            assert path.stem == cell.slug
            records[cell] = recall(cell, out, setup)
    cells = grid("digits", solvers="ipndm", nfes="4,6,8", methods="dpm_solver_v3,bns,amed")
    assert set(cells) == set(records) and (out / "table.md").read_text() == side_by_side([records[c] for c in cells])
    assert all(p.stat().st_size <= 150_000 for p in out.glob("*.png"))
    assert torch.tensor([records[c]["metrics"]["rmse"]["mean"] for c in cells]).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# The notebook
# ----------------------------------------------------------------------------------------------------------------------

def papermill(folder, *args, **parameters):
    "Runs the notebook from `folder`, its standard output redirected; (exit code, standard output, standard error)."
    command = [BIN / "papermill", NOTEBOOK, *args, "--no-progress-bar"]
    for k, v in parameters.items(): command += ["-p", k, str(v)]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_notebook_form():
    "One cell of parameters, no outputs, skipped by nbdev_test."
    from nbdev.test import test_nb
    nb = nbformat.read(NOTEBOOK, 4)
    tagged = [c for c in nb.cells if c.metadata.get("tags")]
    assert len(tagged) == 1 and tagged[0].metadata.tags == ["parameters"]
    assert not any(c.get("outputs") or c.get("execution_count") for c in nb.cells)
    assert test_nb(NOTEBOOK) == (True, 0)


def test_notebook_runs_from_another_folder(tmp_path):
    "With stdout redirected, papermill writes the executed notebook there."
    tiny = dict(n_samples=200, n_train=40, n_valid=20, epochs=2, distances="l2", nfes="3,4", solvers="unipc", workers=1,
                methods="s4s,amed")
    code, stdout, stderr = papermill(tmp_path, dataset="mixture", quick=True, out="here", cache="cache", **tiny)
    assert code == 0, stderr
    executed = nbformat.reads(stdout, 4)
    outputs = [o for c in executed.cells for o in c.get("outputs", [])]
    assert not any(o.output_type == "error" for o in outputs)
    out = tmp_path / "here"
    assert {p.name for p in out.iterdir()} == {"records", "table.csv", "table.md",
                                              "quality.png", "samples.png", "coefficients.png"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "here"]
    assert all(p.stat().st_size <= 150_000 for p in out.glob("*.png"))
    table, printed = (out / "table.md").read_text(), "".join(str(o.get("text")) for o in outputs)
    assert table.count("S4S, l2 ") == 4 and "RMSE: parent" in table   # two grids, two numbers of evaluations
    assert table.count("| AMED-Plugin ") == 2 and "AMED-Plugin: iPNDM-3 with half" in table   # one grid
    assert "Not calibrated: the paper prints nothing of mixture." in printed
    assert "done: 10 cells" in printed and len(list((out / "records/cells").iterdir())) == 10
    assert any(table.strip() in str(o.get("data", {}).get("text/markdown")) for o in outputs)


def test_notebook_tells_a_wrong_parameter_in_one_line(tmp_path):
    code, stdout, stderr = papermill(tmp_path, dataset="mixture", quick=True, solvers="ipndm,euler", out="here")
    assert code != 0
    assert [line for line in stderr.split("\n") if "Error" in line][-1] == (
        f"ValueError: solver='euler'; expected one of: {', '.join(SOLVERS)}")
    assert "Traceback" not in stderr.split("Exception encountered")[-1]
    assert not (tmp_path / "here").exists()
