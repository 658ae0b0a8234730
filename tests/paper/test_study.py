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
from pandas import read_csv

from s4s_nb.lab.cell import Cell
from s4s_nb.lab.record import recall, without_provenance
from s4s_nb.lab.setup import setup_for
from s4s_nb.lab.sweep import cost, run_grid
from s4s_nb.paper.figures import FIGURES, MEASURED_TABLES, not_run, paper_table, write_outputs
from s4s_nb.paper.frame import cell_means, frame
from s4s_nb.paper.measurements import MEASUREMENTS
from s4s_nb.paper.report import quality_picture, samples_picture, side_by_side
from s4s_nb.paper.tables import EXPERIMENTS, cells_of, runs, study_frame

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
    assert {p.stem for p in (folder / "here/records/cells").iterdir()} == {c.slug for c in cells}
    shown = "".join(str(o.get("data", {}).get("text/markdown")) for c in notebook.cells for o in c.get("outputs", []))
    for name in SOME:
        assert EXPERIMENTS[name].title in shown and (folder / f"here/{name}.md").read_text().strip() in shown
    assert all((folder / f"here/{name}.json").exists() for name in CURVES)
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    drawn = {name for name, f in FIGURES.items() if f.of in ("figure4", *CURVES)}
    assert len(pictures) == len(drawn) == 4 and {p.stem for p in (folder / "here").glob("*.png")} == drawn

def test_cells_can_be_made_again(ablations, tmp_path):
    "Any cell, in an empty folder: the same record but for its provenance."
    folder, _ = ablations
    drawn = random.Random(0).sample(cells_of(SOME, "mixture", quick=True), 4)
    for cell, again in zip(drawn, run_grid(drawn, tmp_path, workers=2, cache=folder / "cache", progress=False)):
        kept = json.loads((folder / "here/records/cells" / f"{cell.slug}.json").read_text())
        assert without_provenance(again) == without_provenance(kept)


def readable(out):
    "Names of the records of a folder; each is of this model and configuration, and its solver loads."
    setup, paths = setup_for("digits"), sorted((out / "records/cells").glob("*.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            cell = Cell(**json.loads(path.read_text())["key"])
            assert path.stem == cell.slug and recall(cell, out, setup_of(setup, cell)) is not None
    return {p.stem for p in paths}

def setup_of(setup, cell): return setup if cell.guidance is None else setup_for("digits", cell.guidance)

def test_committed_learning_records():
    out = ROOT / "results/digits/learning"
    assert readable(out) == set(read_csv(out / "table.csv").cell)

def test_committed_study_records():
    "All are cells of the study."
    assert readable(ROOT / "results/digits") <= {c.slug for c in cells_of(EXPERIMENTS)}

def test_committed_tables_follow_from_the_records(tmp_path):
    "Every table and picture of the paper is there, and every table is what the records say."
    out = ROOT / "results/digits"
    found = dict.fromkeys(EXPERIMENTS, study_frame(out))
    found |= {name: json.loads((out / f"{name}.json").read_text())["found"] for name in MEASUREMENTS}
    assert all((out / f"{name}.png").exists() for name in FIGURES) and MEASURED_TABLES.keys() <= MEASUREMENTS.keys()
    for name in found:
        for path in write_outputs(name, found[name], tmp_path, "digits"):
            assert (out / path.name).exists()
            if path.suffix == ".md": assert (out / path.name).read_text() == path.read_text()
            else: assert (out / path.name).stat().st_size <= 60_000 # true colours, no palette

def test_the_full_table_is_the_mean_of_its_records():
    "Recomputed from the files, without the frame: every cell of every line."
    out, e = ROOT / "results/digits", EXPERIMENTS["full"]
    records = [json.loads(p.read_text()) for p in (out / "records/cells").glob("*.json")]
    found = runs(study_frame(records), e.rows).groupby(["label", "nfe"]).rmse.agg(["mean", "count"])
    for row in e.rows:
        own = [r for r in records if all(r["key"][k] == v for k, v in row.key.items())
               and r["key"]["n_train"] in (None, 100, 1024, 2000) and r["key"]["distance"] in (None, "l2")]
        for nfe in e.nfes:
            values = [r.get("learned_only", r["metrics"])["rmse"]["mean"] for r in own if r["key"]["nfe"] == nfe]
            assert found["count"][row.label, nfe] == len(values) > 0
            assert found["mean"][row.label, nfe] == pytest.approx(sum(values) / len(values), rel=1e-12)

def test_the_frame_keeps_what_records_say():
    "Means, ratios to the parent and fallbacks of the committed learning records."
    out = ROOT / "results/digits/learning"
    records = [json.loads(p.read_text()) for p in sorted((out / "records/cells").glob("*.json"))]
    df = frame(records)
    cells = cell_means(df).set_index("cell")
    assert len(cells) == len(records) and len(df) == sum(len(r["metrics"]["rmse"]["ranges"]) for r in records)
    for r in records:
        row = cells.loc[Cell(**r["key"]).slug]
        assert row.rmse == pytest.approx(r["metrics"]["rmse"]["mean"], rel=1e-12)
        assert row.fd_real == pytest.approx(r["metrics"]["fd_real"]["mean"], rel=1e-12)
        assert row.fallback == r.get("fallback", False) and row.solver == r["solver"]
        if not row.classical: assert row.ratio_mean == r["metrics"]["ratio"]["mean"] and row.parent_rmse > 0

@pytest.mark.parametrize("name", ["baselines", "learning"])
def test_committed_side_by_side_follows_from_the_records(name):
    out = ROOT / "results/digits" / name
    records = {p.stem: json.loads(p.read_text()) for p in (out / "records/cells").glob("*.json")}
    records = [records[slug] for slug in read_csv(out / "table.csv").cell]
    assert (out / "table.md").read_text() == side_by_side(records)
    assert (out / "table.csv").read_text() == cell_means(frame(records)).to_csv(index=False)

def test_letters_of_pictures_can_be_read(tmp_path, monkeypatch):
    "At least 9 pixels high where a picture is shown 390 pixels wide, on a telephone."
    from matplotlib.text import Text
    drawn = []
    monkeypatch.setattr("s4s_nb.paper.report.save_figure", lambda fig, path: drawn.append(fig) or path)
    out = ROOT / "results/digits/baselines"
    records = [json.loads(p.read_text()) for p in sorted((out / "records/cells").glob("*.json"))]
    quality_picture(records, tmp_path / "quality.png")
    samples_picture(records, out, tmp_path / "samples.png", cache=tmp_path)
    assert len(drawn) == 2
    for fig in drawn:
        sizes = [t.get_fontsize() for t in fig.findobj(Text) if t.get_text()]
        assert min(sizes) / 72 / fig.get_figwidth() * 390 >= 9
        for ax in fig.axes: assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title()
    assert all((out / f"{name}.png").stat().st_size <= 60_000 for name in ("quality", "samples"))
    labels = [t.get_text() for t in drawn[1].axes[0].get_yticklabels()]
    assert labels[0] == "teacher, NFE 20" and {"BNS", "AMED-Plugin", "DPM-Solver-v3"} <= {*labels}

@pytest.mark.parametrize("name", ["cifar10", "ffhq", "afhqv2", "lsun_bedroom", "imagenet", "mscoco"])
def test_folders_of_what_was_not_run_say_so(name):
    "Command, cost and the paper's numbers; every number of the paper's table is there."
    text = (ROOT / "results" / name / "README.md").read_text()
    assert text == not_run(name) and f"papermill nbs/experiments.ipynb results/{name}/experiments.ipynb" in text
    table = paper_table(name)
    number = table.index.name.removeprefix("Table ").removesuffix(", FID")
    printed = read_csv(ROOT / f"results/paper/table{number}.csv", dtype=str, keep_default_na=False)
    numbers = [f"**{v}**" if b == "true" else v for v, b in zip(printed.fid, printed.bold)]
    assert sorted(table.to_numpy().ravel()) == sorted(numbers)

def test_committed_cells_can_be_made_again(tmp_path):
    "RERUN=20: as many, drawn from all of them; else one of the cheapest. Numbers agree to 1e-6."
    n, cells = int(os.environ.get("RERUN", 0)), []
    for path in sorted((ROOT / "results/digits/records/cells").glob("*.json")):
        cells.append(Cell(**json.loads(path.read_text())["key"]))
    drawn = random.Random(n).sample(cells if n else sorted(cells, key=cost)[:50], n or 1)
    for cell, again in zip(drawn, run_grid(drawn, tmp_path, workers=2, progress=False)): # with the same arithmetic
        kept = json.loads((ROOT / "results/digits/records/cells" / f"{cell.slug}.json").read_text())
        for which in {"metrics", "learned_only"} & kept.keys():
            for quality in ("rmse", "fd_teacher", "fd_real"):
                assert again[which][quality]["ranges"] == pytest.approx(kept[which][quality]["ranges"], rel=1e-6), cell
