"Every printed number has cells in the plan of its table, with the paper's settings; a plan without them is seen."
from pathlib import Path

import pytest
from pandas import read_csv

from s4s_nb.lab.datasets import dataset_of
from s4s_nb.lab.methods import rounds_of
from s4s_nb.paper.planned import (
    NAMED_BY,
    TRAINED,
    V3_ON_LD3,
    asked,
    dataset_printed,
    names_of_rows,
    on_grid,
    unplanned,
)
from s4s_nb.paper.printed import FULL, TABLES, printed_table
from s4s_nb.paper.tables import EXPERIMENTS, cells_of, pairs_for, rows_with

ROOT = Path(__file__).parents[2]
SETTINGS = read_csv(ROOT / "results/paper/settings.csv")

@pytest.mark.parametrize("number", TABLES)
def test_printed_numbers_are_planned(number):
    "Or there is one of two reasons: no such grid, or a network is trained."
    for reason in unplanned(printed_table(number)).values():
        assert reason == V3_ON_LD3 or reason.endswith(TRAINED), reason

@pytest.mark.parametrize("number, field, value", [
    (2, "schedule", "edm"), (5, "method", "ld3_s4s_order4"), (5, "method", "ld3"), (6, "method", "joint_order_nfe"),
    (8, "parent", "dpm_solver_s_noise"), (9, "distance", "l2"), (9, "method", "s4s_alt_shared_r0"), (10, "nfe", 3),
    (11, "method", "s4s_consistent"), (14, "nfe", 10), (18, "parent", "unipc"), (3, "method", "s4s_alt")])
def test_missing_cells_are_seen(number, field, value):
    "Without cells of one kind, the numbers that need them are named."
    def fewer(names, dataset): return [c for c in cells_of(names, dataset) if getattr(c, field) != value]
    lost = unplanned(printed_table(number), fewer)
    found = [reason for reason in lost.values() if reason.startswith("no cell has")]
    assert found and all(repr(value) in reason for reason in found)

@pytest.mark.parametrize("line", [*SETTINGS.itertuples()], ids=lambda line: f"{line.datasets}-{line.method}")
def test_published_cells_have_the_printed_settings(line):
    "Pairs, epochs, loss, samples and teacher of Appendix G.2."
    for name in line.datasets.split():
        data = dataset_of(name)
        cells = [c for c in cells_of(["full"], name) if c.method == line.method]
        fields = {(c.n_train, c.n_valid, c.n_eval, c.distance) for c in cells}
        assert fields == {(line.n_train, line.n_valid, line.n_eval, "perceptual")} and data.perceptual == "lpips vgg"
        if line.epochs == line.epochs: assert {c.epochs for c in cells} == {line.epochs}
        if line.rounds == line.rounds: assert {rounds_of(c, None)["rounds"] for c in cells} == {line.rounds}
        assert (data.teacher["solver"], data.teacher["grid"]) == (line.teacher, line.teacher_grid)
        assert data.teacher["nfe"] == line.teacher_nfe

def test_columns_are_those_of_the_large_tables():
    "No more and no fewer numbers of evaluations than printed."
    tables = {dataset_printed(table.dataset.iloc[0]): table for table in map(printed_table, FULL)}
    assert set(tables) == set(NAMED_BY)
    for name, table in tables.items(): assert {c.nfe for c in cells_of(["full"], name)} == set(table.nfe)

def test_pairs_of_figure4_go_beyond_the_usual():
    "1400 pairs are in the middle on CIFAR-10; the digits have the same shares of theirs."
    for name in ("cifar10", "digits"):
        pairs = sorted({c.n_train for c in cells_of(["figure4"], name) if c.method == "s4s_alt"})
        usual = pairs_for(1, "s4s_alt", name)
        assert usual in pairs and pairs[0] < usual / 4 and pairs[-1] > 2 * usual
    assert pairs_for(1, "s4s_alt", "cifar10") == 1400

def test_rows_of_the_study_are_the_rows_of_the_paper():
    "Single-step solvers of Tables 8 and 11 predict noise, and Table 5's baseline stands on LD3's grid."
    for number in (8, 11):
        for cell in printed_table(number).itertuples():
            if cell.printed == "-": continue
            key = asked(cell).rows[0].key
            assert key["parent"] in ("dpm_solver_s_noise", "ipndm") and key["schedule"] == "logsnr"
    assert {r.key["method"] for r in EXPERIMENTS["table5"].rows if r.over and r.over["method"] == "ld3"} == {
        f"{base}{order}" for base in ("ld3_s4s", "s4s_alt") for order in ("", "_order4", "_order6")}

@pytest.mark.parametrize("number", FULL)
def test_names_of_a_row_lead_there_and_back(number):
    "Every row of a full table but those without cells; no two rows have one key."
    named = {names: key for key, names in names_of_rows().items()}
    assert len(named) == len(names_of_rows())
    for cell in printed_table(number).drop_duplicates(["schedule", "solver"]).itertuples():
        rows = on_grid(cell.schedule, cell.solver, cell.learned).rows
        assert [(*r.key.values(),) for r in rows] == ([named[cell.schedule, cell.solver]] if rows else [])
        assert rows or (cell.schedule, cell.solver) == ("LD3", "DPM-Solver-v3")

@pytest.mark.parametrize("number, method", [(3, "Best Trad. (LD3)"), (4, "LD3"), (12, "LD3")])
def test_ld3_is_on_ld3s_grids_and_nowhere_else(number, method):
    "Section 4.1: 'the best “traditional” ODE solver using the learned LD3 discretization schedule'."
    table = printed_table(number)
    for cell in table[table.method == method].itertuples():
        assert asked(cell).rows == rows_with("best on LD3's grids")
        assert {r.key["method"] for r in asked(cell).rows} == {"ld3"} and len(asked(cell).rows) == 3

def test_nothing_is_asked_where_nothing_is_printed():
    dashes = [cell for n in TABLES for cell in printed_table(n).itertuples() if cell.printed == "-"]
    assert len(dashes) == 12 and all(not asked(c).rows and asked(c).reason for c in dashes)
