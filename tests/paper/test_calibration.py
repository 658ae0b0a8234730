"A run on a published model begins with FIDs that the paper prints, and stops if ours are others."
import csv
import json
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from edm_pickle import write_edm_pickle
from scipy.stats import norm

from s4s_nb.lab import datasets
from s4s_nb.lab.cell import Cell
from s4s_nb.lab.datasets import dataset_of
from s4s_nb.lab.record import identity, recall, run_cell, stored_records, without_provenance
from s4s_nb.lab.setup import setup_for
from s4s_nb.lab.sweep import run_grid
from s4s_nb.models.adm import edm_network
from s4s_nb.models.cards import card_of
from s4s_nb.models.pretrained import randomised
from s4s_nb.paper import calibration
from s4s_nb.paper.calibration import (
    calibrate,
    calibration_cells,
    printed_beside,
    printed_fid,
    program_spread,
    tolerance,
)
from s4s_nb.paper.report import side_by_side
from s4s_nb.paper.tables import EXPERIMENTS, paper_row, show, study_frame

PAPER = Path(__file__).resolve().parents[2] / "results/paper"
PUBLISHED = dict(afhqv2=13, cifar10=14, ffhq=15, imagenet=16, lsun_bedroom=17, mscoco=18)
TEACHERS = dict(cifar10="2.03", ffhq="2.62", afhqv2="2.24")
NAMES = "Time LogSNR, DPM-Solver++, NFE 5", "Time LogSNR, DPM-Solver++, NFE 10", "Time EDM, iPNDM, NFE 6"
VARIANCE = 3. # the largest of the features of real images


@cache
def plan(name): return paper_row(name)

def lines(name):
    with open(PAPER / name, newline="") as f: return list(csv.DictReader(f))

def in_table(name, nfe, schedule, solver):
    "A printed FID, read without the code that is tested."
    (found,) = [r["fid"] for r in lines(f"table{PUBLISHED[name]}.csv")
                if (r["nfe"], r["schedule"], r["solver"]) == (str(nfe), schedule, solver)]
    return float(found)

def printed_of(name):
    "The three FIDs of a calibration."
    last = max(dataset_of(name).nfes)
    return [in_table(name, 5, "Time LogSNR", "DPM-Solver++"), in_table(name, last, "Time LogSNR", "DPM-Solver++"),
            in_table(name, 6, "Time EDM", "iPNDM")]

def record(cell, fid, teacher=2., made_by=None):
    "A record of a cell, and of a teacher: the card's unless said."
    made_by = made_by or dict(name="UniPC-3", **{k: dataset_of(cell.dataset).teacher[k] for k in ("nfe", "grid")})
    metrics = {k: dict(mean=fid, std=None, ranges=[fid] * cell.ranges) for k in ("rmse", "fd_teacher", "fd_real")}
    return dict(key={k: getattr(cell, k) for k in cell.__dataclass_fields__}, metrics=metrics, solver="a",
                teacher=made_by, reference=dict(real=50_000, teacher_fd_real=dict(mean=teacher, std=None)),
                provenance=dict(seconds=60., device="a GPU"))

@pytest.fixture
def measured(monkeypatch):
    "In place of a GPU: the FIDs that a run would give. Returns the cells that were run."
    asked = []
    def prepare(fids, teacher, made_by=None):
        def run(cells, out, *rest, beside, **kw):
            asked.extend(cells)
            found = [record(c, fid, teacher, made_by) for c, fid in zip(cells, fids, strict=True)]
            for r in found: r["provenance"] |= beside(r)
            return found
        monkeypatch.setattr(calibration, "run_grid", run)
        real = SimpleNamespace(cov=torch.diag(torch.tensor([VARIANCE, 1., .5], dtype=torch.float64)))
        monkeypatch.setattr(calibration, "setup_for", lambda *key: SimpleNamespace(real=real))
        return asked
    return prepare


# ----------------------------------------------------------------------------------------------------------------------
# What is printed
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PUBLISHED)
def test_three_classical_cells_of_the_table(name):
    found = calibration_cells(plan(name))
    assert len(found) == 3 and set(found) <= set(plan(name)) and {c.method for c in found} == {"parent"}
    assert [printed_fid(c)["fid"] for c in found] == printed_of(name)
    assert {printed_fid(c)["table"] for c in found} == {f"Table {PUBLISHED[name]}"}

@pytest.mark.parametrize("name", PUBLISHED)
def test_every_cell_that_the_table_prints_is_found_once(name):
    "Each number belongs to one cell of the plan; BNS, AMED-Plugin and joint learning stand in no table."
    found = {c: printed_fid(c) for c in paper_row(name, nfes=5)}
    at_five = [float(r["fid"]) for r in lines(f"table{PUBLISHED[name]}.csv") if r["nfe"] == "5"
               and (r["schedule"], r["solver"]) != ("LD3", "DPM-Solver-v3")]
    assert sorted(p["fid"] for p in found.values() if p) == sorted(at_five)
    assert {c.method for c, p in found.items() if not p} >= {"bns", "amed", "joint"}

def test_other_questions_have_no_printed_answer():
    cell = Cell("cifar10", "logsnr", "dpm_solver", nfe=5, n_eval=50_000)
    assert printed_fid(cell) and printed_fid(replace(cell, ranges=2)) == printed_fid(cell)
    for other in (dict(n_eval=49_999), dict(order=2), dict(schedule="flow"), dict(parent="deis"), dict(nfe=12),
                  dict(guidance=2.), dict(dataset="cifar10_smoke"), dict(dataset="digits")):
        assert printed_fid(replace(cell, **other)) is None, other
    guided = Cell("imagenet", "logsnr", "dpm_solver", nfe=5, n_eval=50_000)
    assert printed_fid(replace(guided, guidance=2.)) == printed_fid(guided) != printed_fid(replace(guided, guidance=3.))

def test_captions_repeat_the_tables_but_for_the_teachers():
    names = {"CIFAR-10 32x32": "cifar10", "FFHQ 64x64": "ffhq", "AFHQ-v2 64x64": "afhqv2"}
    solvers = {"iPNM": "iPNDM", "S4S": "iPNDM-S4S"} # the caption of Figure 6 misses a letter
    for r in lines("figures.csv"):
        name = names[r["dataset"]]
        if r["teacher"] == "true": assert r["fid"] == TEACHERS[name] and (r["nfe"], r["panel"]) == ("20", "a")
        else: assert float(r["fid"]) == in_table(name, r["nfe"], r["schedule"], solvers.get(r["solver"], r["solver"]))
    assert {names[r["dataset"]] for r in lines("figures.csv") if r["teacher"] == "true"} == set(TEACHERS)


# ----------------------------------------------------------------------------------------------------------------------
# The tolerance
# ----------------------------------------------------------------------------------------------------------------------

def test_spread_is_the_largest_of_sixteen():
    names = {"CIFAR-10 32x32": "cifar10", "FFHQ 64x64": "ffhq"}
    found = [in_table(names[r["dataset"]], r["nfe"], r["schedule"], r["solver"]) / float(r["fid"]) - 1
             for r in lines("diff_solvers.csv")]
    assert len(found) == 16 and program_spread() == pytest.approx(max(map(abs, found)))

@pytest.mark.parametrize("k", [1, 4])
def test_tolerance_is_what_its_formula_says(k):
    expected = .01 * 9 + norm.ppf(1 - .025 / k) * 2 * (VARIANCE * 9 * (1 / 50_000 + 1 / 30_000))**.5
    assert tolerance(9., 50_000, 30_000, VARIANCE, .01, k) == pytest.approx(expected)

def test_a_right_pipeline_is_rarely_stopped():
    "FIDs of normal features beside FIDs of others of as many samples: all four agree in at least 95 of 100 runs."
    from s4s_nb.judging.moments import Moments, frechet_distance
    g, n = torch.Generator().manual_seed(1), 500
    scale = torch.tensor([1., .7, .5], dtype=torch.float64)
    def fids(shift, runs):
        draws = torch.randn(runs, n, 3, generator=g, dtype=torch.float64) * scale + shift
        return [frechet_distance(Moments(x), real) for x in draws]
    real = Moments(torch.randn(200_000, 3, generator=g, dtype=torch.float64) * scale)
    pairs = [(fids(shift, 150), fids(shift, 150)) for shift in (.3, .6, 1., 1.5)]
    stopped = [any(abs(ours[i] - printed[i]) > tolerance(printed[i], n, n, 1., 0., 4) for ours, printed in pairs)
               for i in range(150)]
    assert sum(stopped) <= .05 * len(stopped)


# ----------------------------------------------------------------------------------------------------------------------
# To go on, or to stop
# ----------------------------------------------------------------------------------------------------------------------

def off(name, which, factor):
    "The printed FIDs, one of them off by a factor; the teacher's comes first."
    fids = [float(TEACHERS.get(name, 2.)), *printed_of(name)]
    if which is not None: fids[which] *= factor
    return fids

@pytest.mark.parametrize("name", PUBLISHED)
def test_printed_numbers_go_on(name, measured, capsys):
    "Where no caption has the teacher's FID, it decides nothing."
    teacher, *fids = off(name, None, 1.)
    asked = measured([f * 1.004 for f in fids], teacher if name in TEACHERS else 99.)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(plan(name), "out")
    said = capsys.readouterr().out
    assert asked == calibration_cells(plan(name))
    assert said.count("agrees") == 3 + (name in TEACHERS) and said.count("nothing printed") == (name not in TEACHERS)
    assert all(f"{f:.2f}" in said for f in fids) and f"Table {PUBLISHED[name]}" in said

@pytest.mark.parametrize("factor", [1.2, .8])
@pytest.mark.parametrize("which", range(4))
def test_another_number_stops(which, factor, measured, capsys):
    teacher, *fids = off("cifar10", which, factor)
    measured(fids, teacher)
    with pytest.raises(RuntimeError) as e: calibrate(plan("cifar10"), "out")
    message, said = str(e.value), capsys.readouterr().out
    names = ["teacher, UniPC-3 NFE 20", *NAMES]
    where, printed = ["Figure 5 (a)", *["Table 14"] * 3][which], off("cifar10", None, 1.)[which]
    assert f"{names[which]}: FID {printed * factor:.2f}, {where} prints {printed:.2f}, tolerance " in message
    assert not any(n in message for i, n in enumerate(names) if i != which) and "\n" not in message
    files = card_of("cifar10")["files"]
    for hint in (files["network"]["url"], files["reference"]["url"], "50000", "legacy_tensorflow", "-p force True"):
        assert hint in message
    assert said.count("differs") == 1 and said.count("agrees") == 3

@pytest.mark.parametrize("side", [1, -1])
def test_the_tolerance_is_the_border(side, measured):
    teacher, first, *rest = off("cifar10", None, 1.)
    width = tolerance(first, 50_000, 50_000, VARIANCE, program_spread(), 4)
    measured([first + side * .999 * width, *rest], teacher)
    calibrate(plan("cifar10"), "out")
    measured([first + side * 1.001 * width, *rest], teacher)
    with pytest.raises(RuntimeError, match="Time LogSNR, DPM-Solver.., NFE 5: FID"): calibrate(plan("cifar10"), "out")

def test_force_goes_on_and_warns(measured, capsys):
    teacher, *fids = off("ffhq", 2, 1.5)
    measured(fids, teacher)
    with pytest.warns(UserWarning, match="ffhq is not calibrated: Time LogSNR, DPM-Solver.., NFE 10: FID"):
        calibrate(plan("ffhq"), "out", force=True)
    assert capsys.readouterr().out.count("differs") == 1

@pytest.mark.parametrize("cells, why", [
    ([Cell("digits")], "the paper prints nothing of digits"),
    ([Cell("mixture")], "the paper prints nothing of mixture"),
    ([Cell("mscoco_smoke", n_eval=64)], "mscoco_smoke is a tiny random network"),
    ([Cell("cifar10", n_eval=1000)], "1000 samples are drawn, and the FIDs of Table 14 are of 50000"),
    ([Cell("mscoco", n_eval=50_000)], "50000 samples are drawn, and the FIDs of Table 18 are of 30000"),
    ([], "there are no cells to run")])
def test_what_cannot_be_compared_is_said_in_one_line(cells, why, measured, capsys):
    "Whatever its FIDs are: nothing is run, nothing agrees, nothing stops."
    asked = measured([], 99.)
    calibrate(cells, "out")
    assert capsys.readouterr().out == f"Not calibrated: {why}.\n" and asked == []

def test_another_teacher_is_not_the_one_of_the_caption(measured, capsys):
    "The cells do not depend on the teacher, so they are compared all the same."
    _, *fids = off("cifar10", None, 1.)
    measured(fids, 99., dict(name="iPNDM-3", nfe=20, grid="edm"))
    calibrate(plan("cifar10_auto"), "out")
    said = capsys.readouterr().out
    assert said.count("agrees") == 3 and said.count("nothing printed") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def stub(tmp_path, monkeypatch):
    "A tiny network that claims to be the model of Table 14, of which 64 samples are printed."
    c = card_of("cifar10")
    kwargs = c["smoke"]["network"]
    write_edm_pickle(tmp_path / "stub.pkl", randomised(lambda: edm_network("EDMPrecond", kwargs)), "EDMPrecond", kwargs)
    card = dict(format="edm", shape=[3, 8, 8], t_range=[.002, 80.], files=dict(network=dict(path="stub.pkl")),
                metric="random", perceptual=.1, paper="Table 14", n_eval=64, teacher=c["teacher"], budgets=c["budgets"])
    (tmp_path / "stub.json").write_text(json.dumps(card))
    monkeypatch.setenv("S4S_CARDS", str(tmp_path))
    judged_by = datasets.judged_by
    monkeypatch.setattr(datasets, "judged_by", lambda c: judged_by(c) | (dict(fid=True) if c["name"] == "stub" else {}))
    datasets.dataset_from.cache_clear()
    yield tmp_path
    datasets.dataset_from.cache_clear()

@pytest.mark.filterwarnings("ignore::UserWarning")
def test_from_files_to_the_error_and_on(stub, capsys):
    "A random network has other FIDs: the run stops, its records are kept and used again, and say what is printed."
    out, kw, cells = stub / "out", dict(workers=1, cache=stub / "cache"), paper_row("stub", nfes=5)
    with pytest.raises(RuntimeError, match=r"stub is not calibrated: .* \(stub.pkl\), .* real images \(its own\)"):
        calibrate(cells, out, **kw)
    paths = sorted((out / "records/cells").iterdir())
    before = [p.stat().st_mtime_ns for p in paths]
    with pytest.warns(UserWarning, match="stub is not calibrated"): calibrate(cells, out, force=True, **kw)
    assert [p.stat().st_mtime_ns for p in paths] == before and len(paths) == 3
    records = stored_records(out)
    for r in records:
        cell, printed = Cell(**r["key"]), r["provenance"]["printed"]
        assert printed == dict(**printed_fid(cell), difference=printed["difference"])
        assert printed["difference"] == pytest.approx(r["metrics"]["fd_real"]["mean"] - printed["fid"], abs=1e-4)
        assert "printed" not in without_provenance(r) and recall(cell, out, setup_for("stub", cache=kw["cache"])) == r
    assert run_grid([Cell(**r["key"]) for r in records], out, progress=False, **kw) == records

def test_what_is_printed_is_no_part_of_a_record(tmp_path):
    cell = Cell("mixture", n_eval=50)
    bare = run_cell(cell, tmp_path / "bare", cache=tmp_path)
    told = run_cell(cell, tmp_path / "told", cache=tmp_path, beside=lambda r: dict(printed=dict(fid=2., difference=0.)))
    assert without_provenance(told) == without_provenance(bare) and "printed" not in bare["provenance"]
    assert told["provenance"]["printed"] == dict(fid=2., difference=0.)
    assert told["provenance"]["digest"] == bare["provenance"]["digest"]
    said = identity(cell, setup_for("mixture", cache=tmp_path))
    assert said.items() <= told.items() and "printed" not in str(said)
    assert run_cell(cell, tmp_path / "told", cache=tmp_path) == told

def test_committed_records_have_nothing_printed():
    for r in stored_records(PAPER.parent / "digits")[:20]: assert printed_beside(r) == {}

def test_tables_show_printed_and_difference():
    "The side-by-side table in per cent, the paper's own form in FID."
    cells = [c for c in paper_row("cifar10", nfes=5) if c.schedule == "edm" and c.method in ("parent", "s4s")]
    records = [record(c, printed_fid(c)["fid"] * 1.1) for c in cells]
    for r in records:
        r |= dict(fallback=False)
        if r["key"]["method"] == "s4s": r["metrics"]["ratio"] = dict(mean=.9, low=.9, high=.9)
    plain = side_by_side(records)
    for r in records: r["provenance"] |= printed_beside(r)
    text = side_by_side(records)
    assert "paper: parent" not in plain and text.count("(+10.0 %)") == len(records)
    for c in cells: assert f"{printed_fid(c)['fid']:.2f} (+10.0 %)" in text
    table = show(study_frame(records), EXPERIMENTS["full"])
    assert "Ours minus the printed FID:" in table
    assert f"{.1 * in_table('cifar10', 5, 'Time EDM', 'iPNDM'):.3g}" in table.split("Ours minus")[1].split("\n\n")[1]
