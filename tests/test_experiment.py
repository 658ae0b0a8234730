"""Experiments: a run can be repeated, killed, continued, split over processes; wrong names are one line; the notebook
runs from anywhere. All on the exact mixture, with tiny budgets."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import pytest

import s4s_nb.experiment as experiment
from s4s_nb.experiment import Cell, content, run_cell
from s4s_nb.sweep import grid, run_grid

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs/experiments.ipynb"
BIN = Path(sys.executable).parent
TINY = dict(n_eval=200, n_train=40, n_valid=20, epochs=2)
ENV = os.environ | dict(OMP_NUM_THREADS="1")


def cells(): return grid("mixture", "edm", "ipndm,unipc", "3,4", distances="l2,perceptual", **TINY)
def read(out): return {p.name: json.loads(p.read_text()) for p in sorted((out / "cells").glob("*.json"))}
def contents(out): return {name: content(r) for name, r in read(out).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "Folder of a run in this process, and its cache."
    out, cache = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("cache")
    run_grid(cells(), out, workers=1, cache=cache, progress=False)
    return out, cache


def test_second_run_computes_nothing(undisturbed, monkeypatch):
    "Neither a solver is run nor a file written."
    out, cache = undisturbed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    experiment.setup_for.cache_clear()
    for name in ("judge", "learn_s4s", "write_atomic", "teacher_pairs"): monkeypatch.setattr(experiment, name, None)
    monkeypatch.setattr(experiment.Setup, "sample", None)
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
    record = run_cell(c, tmp_path / "out", cache=cache)
    old = read(out)[f"{c.slug}.json"]
    assert content(record) == content(old) and record["provenance"]["date"] >= old["provenance"]["date"]
    assert len(list((tmp_path / "out/cells").iterdir())) == 1


# A run with two workers in a process of its own, in a session of its own
SWEEP = """
import sys
sys.path.insert(0, {tests!r})
if __name__ == "__main__":
    from test_experiment import cells
    from s4s_nb.sweep import run_grid
    run_grid(cells(), sys.argv[1], workers=2, cache=sys.argv[2])
"""


def alive(group) -> bool:
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.02)


def test_killed_run_goes_on_with_equal_records(undisturbed, tmp_path, notes):
    "SIGKILL after the third record, in another process with two workers and an empty cache; then on in this one."
    out, cache = tmp_path / "out", tmp_path / "cache"
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP.format(tests=str(ROOT / "tests")))
    run = subprocess.Popen([sys.executable, script, out, cache], env=ENV, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: len(list((out / "cells").glob("*.json"))) >= 3 or run.poll() is not None)
    run.kill()
    log = run.communicate()[0]
    assert run.returncode == -signal.SIGKILL, log
    until(lambda: not alive(run.pid))   # workers do not outlive it for longer than a cell
    kept = read(out)
    assert 3 <= len(kept) < len(cells())
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # nothing half-written was left behind
        run_grid(cells(), out, workers=1, cache=cache, progress=False)
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
    "no provenance": lambda s: json.dumps(content(json.loads(s))),
    "another model": lambda s: s.replace(json.loads(s)["model"]["sha256"], "0" * 64),
    "another cell": lambda s: s.replace('"epochs": 2', '"epochs": 3'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_record_is_reported_and_made_again(how, undisturbed):
    out, cache = undisturbed
    c = next(c for c in cells() if c.method == "s4s")
    path = out / "cells" / f"{c.slug}.json"
    good = path.read_text()
    path.write_text(DAMAGE[how](good))
    with pytest.warns(UserWarning, match="it is not used and will be made again") as caught:
        record = run_cell(c, out, cache=cache)
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    assert content(record) == content(json.loads(good)) == content(json.loads(path.read_text()))


def test_damaged_solver_is_made_again(undisturbed):
    out, cache = undisturbed
    c = next(c for c in cells() if c.method == "s4s")
    path = out / "solvers" / f"{c.slug}.json"
    good = path.read_text()
    for spoil in (lambda: path.write_text(good[:99]), path.unlink):
        spoil()
        with pytest.warns(UserWarning, match="damaged"): run_cell(c, out, cache=cache)
        assert path.read_text() == good


@pytest.mark.parametrize("wrong, exist", [
    (dict(dataset="cifar11"), "digits, mixture"), (dict(schedules="edm,karras"), "edm, logsnr, quadratic, uniform"),
    (dict(solvers="euler"), "ipndm, unipc, dpm_solver, ddim"), (dict(distances="l3"), "l2, perceptual"),
    (dict(method="s5s"), "parent, s4s"), (dict(nfes="4,x"), "4,6"), (dict(nfes=0), "from 1 to 100"),
    (dict(nfes=[4.5]), "4,6"), (dict(orders=7), "1, 2, 3, 4"), (dict(train_seeds=10), "from 0 to 9"),
    (dict(n_eval=1), "from 2 to 50000"), (dict(guidance="strong"), "number"), (dict(nfes=""), "4,6")])
def test_wrong_value_is_one_line_that_says_what_exists(wrong, exist):
    with pytest.raises(ValueError) as e: grid(**dict(dataset="mixture") | wrong)
    message, (value,) = str(e.value), wrong.values()
    assert "\n" not in message and exist in message
    assert any(part in message for part in (repr(value), str(value).split(",")[-1]))


def test_cells_differ_in_their_slugs():
    c = Cell("mixture", method="s4s", **TINY)
    assert len(c.slug) < 120 and c.slug.startswith("mixture_edm_ipndm3_nfe4_s4s_l2")
    many = grid("mixture", orders="1,2", train_seeds="0,1")
    assert len({v.slug for v in many}) == len(many)


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
    tiny = dict(n_samples=200, n_train=40, n_valid=20, epochs=2, distances="l2", nfes="3,4", solvers="unipc", workers=1)
    code, stdout, stderr = papermill(tmp_path, dataset="mixture", quick=True, out="here", cache="cache", **tiny)
    assert code == 0, stderr
    executed = nbformat.reads(stdout, 4)
    outputs = [o for c in executed.cells for o in c.get("outputs", [])]
    assert not any(o.output_type == "error" for o in outputs)
    out = tmp_path / "here"
    assert {p.name for p in out.iterdir()} == {"cells", "solvers", "checkpoints", "done.json", "table.csv", "table.md",
                                              "quality.png", "samples.png", "coefficients.png"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "here"]
    assert all(p.stat().st_size <= 60_000 for p in out.glob("*.png"))
    table, done = (out / "table.md").read_text(), json.loads((out / "done.json").read_text())
    assert table.count("UniPC-3 | ") == 4 and "RMSE: parent" in table   # two grids, two numbers of evaluations
    assert len(done["cells"]) == len(list((out / "cells").iterdir())) == 8
    assert any(table.strip() in str(o.get("data", {}).get("text/markdown")) for o in outputs)


def test_notebook_tells_a_wrong_parameter_in_one_line(tmp_path):
    code, stdout, stderr = papermill(tmp_path, dataset="mixture", quick=True, solvers="ipndm,euler", out="here")
    assert code != 0
    assert [line for line in stderr.split("\n") if "Error" in line][-1] == (
        "ValueError: solver='euler'; expected one of: ipndm, unipc, dpm_solver, ddim")
    assert "Traceback" not in stderr.split("Exception encountered")[-1]
    assert not (tmp_path / "here").exists()
