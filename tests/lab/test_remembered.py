"""What ran is what is remembered: a record is only used for the tables, the teacher and the model that made it. Names
stay the same throughout, in one folder and one process, as in a notebook whose cells are edited and run again."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s4s_nb.denoise import Denoiser, GaussianMixture, fingerprint
from s4s_nb.files.verified import recipe_key
from s4s_nb.grids import time_logsnr
from s4s_nb.judging.distance import Distance
from s4s_nb.lab.catalog import DISTANCES, SCHEDULES
from s4s_nb.lab.cell import METHODS, Cell, Method, Outcome
from s4s_nb.lab.record import agree, record_path, run_cell, without_provenance
from s4s_nb.models.pretrained import FORMATS, Format
from s4s_nb.schedule import EDMSchedule, VPSchedule
from s4s_nb.solver import Solver, table_numbers
from s4s_nb.solvers.families import SOLVERS, Family
from s4s_nb.solvers.multistep import ddim, dpm_solver, ipndm, unipc
from s4s_nb.solvers.singlestep import heun

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import migrate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*will be made again")

MIXTURE = dict(format="mixture", shape=[1, 1, 1], metric="random", perceptual=.1,
               network=dict(weights=[.5, .5], means=[[-1.], [1.]], stds=[[.2], [.3]]),
               teacher=dict(solver="unipc", order=3, grid="logsnr", nfe=20))


@pytest.fixture
def run(tmp_path, monkeypatch):
    "The RMSE of a cell of the data set `mine`, as one run after the other finds it"
    cards = tmp_path / "cards"
    cards.mkdir()
    monkeypatch.setenv("S4S_CARDS", str(cards))
    def rmse(card=None, **cell):
        (cards / "mine.json").write_text(json.dumps(MIXTURE | (card or {})))
        cell = Cell("mine", **dict(n_eval=64) | cell)
        return run_cell(cell, tmp_path / "out", cache=tmp_path / "cache")["metrics"]["rmse"]["mean"]
    return rmse


def test_the_parents_table(run, monkeypatch):
    "Of a solver, and of what starts from it, is compared with it, or only its grid."
    weight = [1.]
    def mine(schedule, t, *rest): return replace(s := ddim(schedule, t), w=weight[0] * s.w)
    def half(cell, setup, checkpoint=None, progress=False):
        return Outcome(ddim(setup.schedule, setup.times("logsnr", cell.nfe)))
    monkeypatch.setitem(SOLVERS, "mine", Family("Mine", mine, (1,), 1, "this test"))
    monkeypatch.setitem(METHODS, "half", Method("half", half, fields=dict(train_seed=0), solvers=("mine",)))
    first, kept = run(parent="mine"), run(parent="mine", method="half")
    weight[0] = .98
    with pytest.warns(UserWarning, match="of another model, solver or configuration"):
        assert abs(run(parent="mine") - first) > 1e-4
    with pytest.warns(UserWarning, match="of another model, solver or configuration"):
        assert run(parent="mine", method="half") == kept # its ratio to the parent is new

def test_the_grid(run, monkeypatch):
    found = []
    for late in (1., 1.1):
        def times(setup, n, late=late):
            t = time_logsnr(setup.schedule, n)
            return torch.cat([t[:1], t[1:-1] / late, t[-1:]])
        monkeypatch.setitem(SCHEDULES, "own", times)
        found.append(run(schedule="own"))
    assert abs(found[0] - found[1]) > 1e-4

@pytest.mark.parametrize("change", [
    dict(teacher=MIXTURE["teacher"] | dict(nfe=8)), dict(teacher=MIXTURE["teacher"] | dict(grid="edm", nfe=8)),
    dict(network=MIXTURE["network"] | dict(stds=[[.2], [.35]]))])
def test_the_card(run, change):
    first = run()
    with pytest.warns(UserWarning, match="of another model, solver or configuration"): other = run(change)
    assert abs(other - first) > 1e-6
    with pytest.warns(UserWarning, match="of another model, solver or configuration"): assert run() == first

def test_the_teachers_table(run, monkeypatch):
    teacher = dict(teacher=dict(solver="own", order=1, grid="logsnr", nfe=30))
    found = []
    for w in (1., .9):
        def own(schedule, t, *rest, w=w): return replace(s := ipndm(schedule, t), w=w * s.w)
        monkeypatch.setitem(SOLVERS, "own", Family("Own", own, (1,), 1, "this test"))
        found.append(run(teacher))
    assert abs(found[1] - found[0]) > 1e-3

def test_the_model_behind_a_number_of_python(run, monkeypatch):
    "Neither its weights nor its recipe change."
    class Scaled(Denoiser):
        def __init__(self, by):
            super().__init__(EDMSchedule(), (1, 1, 1))
            self.by = by
        def recipe(self): return dict(kind="scaled")
        def conditions(self, seeds): return {}
        def forward(self, x, t, **cond): return self.by * x / (1 + t**2).to(x)
    found, known = [], []
    for by in (1., .9):
        monkeypatch.setitem(FORMATS, "scaled", Format(lambda c, *rest, by=by: Scaled(by), ("shape",)))
        found.append(run(dict(format="scaled")))
        known.append(fingerprint(Scaled(by)))
    assert known[0] == known[1] and abs(found[1] - found[0]) > 1e-4


def test_the_loss(run, monkeypatch):
    class Scaled(Distance):
        def residual(self, x, y): return (x - y).flatten(1) * torch.tensor([1., .1])[self.kind]
    budget = dict(method="s4s", distance="own", n_train=8, n_valid=8, epochs=1)
    for kind in (0, 1):
        def own(setup, kind=kind):
            distance = Scaled()
            distance.kind = kind
            return distance
        monkeypatch.setitem(DISTANCES, "own", own)
        if kind == 0: run(**budget)
    with pytest.warns(UserWarning, match="of another model, solver or configuration"): run(**budget)

def test_a_record_of_an_older_form_is_not_written_over(run, tmp_path):
    run()
    path = record_path(Cell("mine", n_eval=64).slug, tmp_path / "out")
    record = json.loads(path.read_text())
    write(path, migrate.older(without_provenance(record)), record["provenance"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="docs/migrate.py"): run()
    assert path.read_bytes() == before

@pytest.mark.parametrize("schedule", [EDMSchedule(), VPSchedule()])
@pytest.mark.parametrize("make", [ddim, ipndm, dpm_solver, unipc, heun])
def test_a_tables_numbers_change_with_what_it_does(make, schedule, tmp_path):
    "One number of it after the other, by a thousandth; the name and the notes are no part of it."
    solver = make(schedule, time_logsnr(schedule, 6))
    gm = GaussianMixture(schedule, [.5, .5], [[-1.], [1.]], [[.2], [.3]])
    x = schedule.prior_std * torch.randn(64, 1, dtype=torch.float64)
    end, numbers = solver.run(gm, x), table_numbers(solver)
    solver.save(tmp_path / "solver.json")
    assert table_numbers(replace(Solver.load(tmp_path / "solver.json"), name="other", meta=dict(note=1))) == numbers
    tried = 0
    for name, free in dict(w=solver.w_free, c=solver.c_free, a=None, t_eval=None).items():
        v = getattr(solver, name)
        for i in () if v is None else (torch.ones_like(v) if free is None else free).flatten().nonzero().flatten():
            edited = v.flatten().clone()
            edited[i] *= 1.001
            other = replace(solver, **{name: edited.reshape(v.shape)})
            effect = (other.run(gm, x) - end).square().mean().sqrt().item()
            if effect < 1e-5: continue
            assert not agree(dict(table=table_numbers(other)), dict(table=numbers)), (name, i, effect)
            tried += 1
    assert tried > 10


# ---- records that were written before ------------------------------------------------------------------------------
CELL = Cell(parent="ipndm", schedule="edm", nfe=4, ranges=1)

@pytest.fixture
def old(tmp_path):
    "A folder with a committed record of a parent as it was written before, and its path"
    below = ROOT / "results/digits/baselines/records"
    record = json.loads((below / f"cells/{CELL.slug}.json").read_text())
    (tmp_path / "records/solvers").mkdir(parents=True)
    (tmp_path / "records" / record["solver"]).write_bytes((below / record["solver"]).read_bytes())
    before = migrate.older(without_provenance(record))
    assert before.keys() == record.keys() - {"parent", "provenance"}
    said = {k: v for k, v in record["provenance"].items() if k != "files"}
    return tmp_path, write(record_path(CELL.slug, tmp_path), before, said), record

def write(path, content, provenance):
    path.parent.mkdir(exist_ok=True)
    migrate.write(path, content | dict(provenance=provenance | dict(digest=recipe_key(content))))
    return path

def test_migration_adds_what_is_proved(old):
    out, path, record = old
    migrate.main([out])
    assert json.loads(path.read_text()) == record
    after = path.stat().st_mtime_ns
    migrate.main([out])
    assert path.stat().st_mtime_ns == after

@pytest.mark.parametrize("trouble", ["table", "rmse", "model", "digest"])
def test_migration_refuses_what_is_not(old, trouble):
    out, path, record = old
    content = migrate.older(without_provenance(record))
    if trouble == "table":
        solver = Solver.load(out / "records" / record["solver"])
        replace(solver, w=solver.w * (1 + 1e-7)).save(out / "records" / record["solver"])
    if trouble == "rmse": content["metrics"]["rmse"]["ranges"][0] += 2e-9
    if trouble == "model": content["model"]["sha256"] = "0" * 64
    if trouble == "digest": migrate.write(path, content | dict(reference=None, provenance=record["provenance"]))
    else: write(path, content, record["provenance"])
    before = path.read_bytes()
    message = dict(table="has w=", rmse="made again", model="of another model", digest="damaged")[trouble]
    with pytest.raises(SystemExit, match=message): migrate.main([out])
    assert path.read_bytes() == before
