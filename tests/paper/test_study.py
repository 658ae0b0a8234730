"The paper's experiments: the notebook that runs them, and the committed records of the digits."
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest

from s4s_nb.lab.cell import Cell
from s4s_nb.lab.record import recall, without_provenance
from s4s_nb.lab.setup import setup_for
from s4s_nb.lab.sweep import cost, run_grid
from s4s_nb.paper.claims import verdicts
from s4s_nb.paper.figures import FIGURES, TABLES, write_outputs
from s4s_nb.paper.measurements import MEASUREMENTS
from s4s_nb.paper.tables import EXPERIMENTS, Records, cells_of

ROOT = Path(__file__).resolve().parents[2]
BIN, ENV = Path(sys.executable).parent, os.environ | dict(OMP_NUM_THREADS="1")
SOME = "table9", "table11", "figure4", "trajectory" # without a guided model
CURVES = "figure2", "turns"


@pytest.fixture(scope="module")
def ablations(tmp_path_factory):
    "The notebook in its reduced profile, run from a folder that knows nothing; the folder and the executed notebook."
    folder = tmp_path_factory.mktemp("ablations")
    command = [BIN / "papermill", ROOT / "nbs/ablations.ipynb", "--no-progress-bar"]
    values = dict(dataset="mixture", quick=True, out="here", cache="cache", tables=",".join(SOME + CURVES))
    for k, v in values.items(): command += ["-p", k, str(v)]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, nbformat.reads(done.stdout, 4)

def test_every_experiment_leaves_its_cells_and_tables(ablations):
    folder, notebook = ablations
    cells = cells_of(SOME, "mixture", quick=True)
    assert {p.stem for p in (folder / "here/cells").iterdir()} == {c.slug for c in cells}
    shown = "".join(str(o.get("data", {}).get("text/markdown")) for c in notebook.cells for o in c.get("outputs", []))
    for name in SOME:
        assert EXPERIMENTS[name].title in shown and (folder / f"here/{name}.md").read_text().strip() in shown
    assert all((folder / f"here/{name}.json").exists() for name in (*CURVES, "done"))
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3 and {p.stem for p in (folder / "here").glob("*.png")} == {"figure4", *CURVES}

def test_cells_can_be_made_again(ablations, tmp_path):
    "Any cell, in an empty folder: the same record but for its provenance."
    folder, _ = ablations
    drawn = random.Random(0).sample(cells_of(SOME, "mixture", quick=True), 4)
    for cell, again in zip(drawn, run_grid(drawn, tmp_path, workers=2, cache=folder / "cache", progress=False)):
        kept = json.loads((folder / "here/cells" / f"{cell.slug}.json").read_text())
        assert without_provenance(again) == without_provenance(kept)


def readable(out):
    "Names of the records of a folder; each is of this model and configuration, and its solver loads."
    setup, paths = setup_for("digits"), sorted((out / "cells").glob("*.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            cell = Cell(**json.loads(path.read_text())["key"])
            assert path.stem == cell.slug and recall(cell, out, setup_of(setup, cell)) is not None
    return {p.stem for p in paths}

def setup_of(setup, cell): return setup if cell.guidance is None else setup_for("digits", cell.guidance)

def test_committed_learning_records():
    out = ROOT / "results/digits/learning"
    assert readable(out) == set(json.loads((out / "done.json").read_text())["cells"])

def test_committed_study_records():
    "All are cells of the study."
    assert readable(ROOT / "results/digits") <= {c.slug for c in cells_of(EXPERIMENTS)}

def test_committed_tables_follow_from_the_records(tmp_path):
    "Every table and picture of the paper is there, and every table is what the records say."
    out = ROOT / "results/digits"
    found = dict.fromkeys(EXPERIMENTS, Records.read(out))
    found |= {name: json.loads((out / f"{name}.json").read_text())["found"] for name in MEASUREMENTS}
    for name in TABLES | FIGURES:
        for path in write_outputs(name, found[name], tmp_path):
            assert (out / path.name).exists()
            if path.suffix == ".md": assert (out / path.name).read_text() == path.read_text()

def test_verdicts_follow_from_the_cells():
    from pandas import read_csv
    out = ROOT / "results/digits"
    found, kept = verdicts(Records.read(out)), read_csv(out / "claims.csv", keep_default_na=False)
    assert len(found) >= 30 and [(r["claim"], r["verdict"]) for r in found] == list(zip(kept["claim"], kept["verdict"]))
    for name in ("value", "low", "high"):
        for r, written in zip(found, kept[name]):
            assert written == "" if r[name] is None else float(written) == pytest.approx(r[name], rel=1e-5)

def test_committed_cells_can_be_made_again(tmp_path):
    "RERUN=20: as many, drawn from all of them; else one of the cheapest. Numbers agree to 1e-6."
    n, cells = int(os.environ.get("RERUN", 0)), []
    for path in sorted((ROOT / "results/digits/cells").glob("*.json")):
        cells.append(Cell(**json.loads(path.read_text())["key"]))
    drawn = random.Random(n).sample(cells if n else sorted(cells, key=cost)[:50], n or 1)
    for cell, again in zip(drawn, run_grid(drawn, tmp_path, workers=2, progress=False)): # with the same arithmetic
        kept = json.loads((ROOT / "results/digits/cells" / f"{cell.slug}.json").read_text())
        for which in {"metrics", "learned_only"} & kept.keys():
            for quality in ("rmse", "fd_teacher", "fd_real"):
                assert again[which][quality]["ranges"] == pytest.approx(kept[which][quality]["ranges"], rel=1e-6), cell
