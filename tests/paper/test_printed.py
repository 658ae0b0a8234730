"The printed tables, and the rules that say which of their cells others disprove."
import json
import re
import shutil
from pathlib import Path

import pytest

from s4s_nb.lab.datasets import PAPER_NFES
from s4s_nb.paper.printed import (
    ERRATA,
    FULL,
    FULL_GRIDS,
    FULL_SOLVERS,
    TABLES,
    TRADITIONAL,
    WRITTEN,
    best_fid,
    chosen_rows,
    erratum_cells,
    fid_there,
    gains,
    nearest_schedule,
    printed_cells,
    printed_table,
)

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "results/paper"
DATASETS = {"CIFAR-10": 14, "FFHQ": 15, "ImageNet": 16}
SCHEDULES = {"EDM": "Time EDM", "LD3": "LD3", "t-Unif": "Time Uniform", "logSNR": "Time LogSNR"}


def csv_rows(number):
    "The file by plain text, line by line."
    head, *rows = (FOLDER / f"table{number:02d}.csv").read_text().splitlines()
    return [dict(zip(head.split(","), row.split(","))) for row in rows]

def wrong_cells(number, about=("number",)):
    found = [erratum_cells(e) for e in ERRATA.values() if e.table == number and e.about in about]
    return {i for part in found for i in part.index}


# ----------------------------------------------------------------------------------------------------------------------
# The tables
# ----------------------------------------------------------------------------------------------------------------------

def test_every_file_is_a_table_and_every_table_a_file():
    assert {f"table{n:02d}.csv" for n in TABLES} == {p.name for p in FOLDER.glob("table*.csv")}

@pytest.mark.parametrize("number", TABLES)
def test_cells_are_those_of_the_file(number):
    df, rows = printed_table(number), csv_rows(number)
    assert len(df) == len(rows) and {*rows[0]} | {
        "printed", "bold", "why", "wrong", "follows"} == {*df.columns}
    assert (df.table == number).all() and df.index.equals(printed_cells(number).index)
    assert str(df.nfe.dtype) == "Int64" and df.fid.dtype == float and df.bold.dtype == bool
    for cell, row in zip(df.itertuples(), rows):
        assert cell.printed == (row["fid"] or "-") and cell.bold == (row.get("bold") == "true")
        assert (cell.fid == float(row["fid"])) if row["fid"] else cell.fid != cell.fid
        assert str(cell.nfe) == (row["nfe"] or "<NA>") and cell.dataset == row["dataset"] and isinstance(cell.why, str)

@pytest.mark.parametrize("number", FULL)
def test_full_tables_are_full(number):
    "Seven grids, three solvers with and without S4S, sometimes DPM-Solver-v3, and S4S-Alt."
    df = printed_cells(number)
    with_v3 = "DPM-Solver-v3" in set(df.solver)
    nfes = PAPER_NFES[f"Table {number}"]
    assert len(df) == len(nfes) * (7 * (6 + with_v3) + 1) and {*df.nfe} == {*nfes}
    assert not df.duplicated(["schedule", "solver", "nfe"]).any() and with_v3 == (number in (14, 17, 18))
    assert ((df.solver.str.endswith("-S4S") | (df.solver == "S4S-Alt")) == df.learned).all()
    assert len(gains(df)) == len(nfes) * 21 and gains(df).gain.notna().all()

def test_sizes_of_the_small_tables():
    assert {n: len(printed_cells(n)) for n in TABLES if n not in FULL} == {
        2: 60, 3: 24, 4: 16, 5: 21, 6: 15, 8: 16, 9: 24, 10: 24, 11: 6, 12: 16}

@pytest.mark.parametrize("number", [1, 7, 0, 19, "2", None])
def test_a_number_without_a_table(number):
    with pytest.raises(ValueError) as e: printed_table(number)
    message = str(e.value)
    assert message.startswith(f"number={number!r}: expected one of 2, 3, 4") and "\n" not in message

def test_an_installed_package_asks_for_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("s4s_nb.paper.printed.project_root", lambda: None)
    with pytest.raises(FileNotFoundError, match="expected folder=... to be results/paper"): printed_table(2)
    with pytest.raises(FileNotFoundError, match="folder=... to hold the paper's tables"): printed_table(2, tmp_path)
    assert printed_table(14, FOLDER).equals(printed_table(14, str(FOLDER))) and len(printed_table(2, FOLDER)) == 60

def test_where_one_works_does_not_matter(monkeypatch, tmp_path):
    before = printed_table(10)
    monkeypatch.chdir(tmp_path)
    assert printed_table(10).equals(before)


# ----------------------------------------------------------------------------------------------------------------------
# What agrees: all but the errata
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", FULL)
def test_bold_is_the_lowest_of_its_schedule(number):
    df = printed_cells(number)
    lowest = df.fid == df.groupby(["schedule", "nfe"]).fid.transform("min")
    assert {*df.index[df.bold != lowest]} == wrong_cells(number, ("bold",))
    assert len(wrong_cells(number, ("bold",))) == {16: 1, 18: 2}.get(number, 0)

@pytest.mark.parametrize("number", [2, 5, 6, 8, 10])
def test_small_tables_agree_with_the_full_ones_but_for_the_errata(number):
    "Cell by cell; those without a cell in a full table are the ones that the full tables do not vary."
    df = printed_cells(number)
    if number == 5: df = df[df.order == "3"].replace(dict(method={"S4S": "iPNDM-S4S", "Baseline": "iPNDM"}))
    if number == 6: df = df[df.method != "Joint Obj."]
    agree, known = set(), set()
    for (dataset, schedule), part in df.groupby(["dataset", "schedule"]):
        full = printed_cells(DATASETS[dataset])
        there = fid_there(part, full, SCHEDULES.get(schedule, "LD3"))
        there = there.fillna(fid_there(part, full, ""))         # S4S-Alt
        agree |= {*part.index[there == part.fid]}
        known |= {*part.index[there.notna()]}
    wrong = wrong_cells(number)
    assert known - agree == wrong & known and (agree or number == 8) and not agree & wrong
    unknown = df.loc[[i for i in df.index if i not in known]]
    assert {*unknown.method} <= {"DPM-v3", "Gaussian-S4S"} | {m for m in df.method if "DPM-Solver" in m and number == 8}

@pytest.mark.parametrize("dataset, number", [("CIFAR-10", 14), ("MS-COCO", 18)])
def test_table_3_agrees_with_the_full_ones_but_for_the_errata(dataset, number):
    df, full = chosen_rows(printed_cells(3), dict(dataset=dataset)), printed_cells(number)
    meant = {"Best DPM-v3": dict(solver="DPM-Solver-v3"), "DPM-v3": dict(solver="DPM-Solver-v3"),
             "Best Trad. (LD3)": TRADITIONAL | dict(schedule="LD3"), "Best S4S": dict(learned=[True])}
    differ = set()
    for method, part in df.groupby("method"):
        alt = full[full.solver == "S4S-Alt"].set_index("nfe").fid.reindex(part.nfe).set_axis(part.index)
        there = alt if method == "S4S Alt" else best_fid(full, part.nfe, **meant[method])
        differ |= {*part.index[there != part.fid]}
    assert differ == wrong_cells(3) & {*df.index} and len(differ) == {14: 1, 18: 5}[number]

@pytest.mark.parametrize("number", [4, 12])
def test_tables_4_and_12_agree_with_the_full_ones_but_for_the_errata(number):
    df = printed_cells(number)
    own = df[~df.from_original_paper]
    meant = {"S4S": dict(learned=[True]), "LD3": TRADITIONAL | dict(schedule="LD3"),
             "DPM-v3": dict(solver="DPM-Solver-v3")}
    differ = set()
    for i, cell in own.iterrows():
        full = printed_cells({"CIFAR": 14, "MS-COCO": 18}[cell.dataset])
        if cell.method == "S4S-Alt": there = full[(full.solver == "S4S-Alt") & (full.nfe == cell.nfe)].fid.item()
        else: there = best_fid(full, own.nfe[[i]], **meant[cell.method]).item()
        if there != cell.fid: differ.add(i)
    assert differ == wrong_cells(number) and len(differ) == 1
    assert df.fid.equals(printed_cells(16 - number).fid) and df.nfe.equals(printed_cells(16 - number).nfe)

def test_table_11_repeats_table_8():
    eight, eleven = printed_cells(8), printed_cells(11)
    both = eight.merge(eleven, on=["method", "nfe"])
    assert len(both) == 3 and (both.fid_x == both.fid_y).all()


# ----------------------------------------------------------------------------------------------------------------------
# The rules
# ----------------------------------------------------------------------------------------------------------------------

COUNTS = dict(table2_uniform=12, table2_uniform_v3=3, table2_ld3_v3=3, table2_cifar10_v3=3,
              table3_s4s_cifar10=1, table3_s4s_coco=1, table3_v3_coco=1, table3_ld3_coco=3, table4_s4s_coco=1,
              table12_s4s_coco=1, table8_ipndm=4,
              table9_labels=24, table10_ffhq=8, table14_v3_ld3=8, table17_v3_ld3=6, table18_v3_ld3=6, table16_bold=1,
              table18_bold=2, table18_gain=1)

def patched(table, df):
    "A reader of tables in which one table is another."
    return lambda number: df if number == table else printed_cells(number)

@pytest.mark.parametrize("name", ERRATA)
def test_a_rule_finds_its_cells(name):
    e = ERRATA[name]
    found = erratum_cells(e)
    assert len(found) == COUNTS[name] and len(COUNTS) == len(ERRATA)
    assert {*found.index} <= {*chosen_rows(printed_cells(e.table), e.rows).index}
    assert e.about != "number" or (found.follows != found.fid).all()
    for text in (e.printed, e.follows, e.treated): assert text and "\n" not in text

@pytest.mark.parametrize("name", [k for k, e in ERRATA.items() if e.about == "number"])
def test_a_rule_stops_where_the_table_is_corrected(name):
    "Cell by cell: a corrected one is no longer found, the others are; all corrected, none is."
    e, df = ERRATA[name], printed_cells(ERRATA[name].table)
    found = erratum_cells(e)
    for i in found.index:
        right = df.copy()
        right.loc[i, "fid"] = found.follows[i]
        assert {*erratum_cells(e, patched(e.table, right)).index} == {*found.index} - {i}
    right = df.copy()
    right.loc[found.index, "fid"] = found.follows
    assert erratum_cells(e, patched(e.table, right)).empty

@pytest.mark.parametrize("name, source", [("table2_uniform", 15), ("table2_uniform_v3", 14), ("table2_ld3_v3", 14),
                                          ("table8_ipndm", 13), ("table10_ffhq", 15)])
def test_a_copy_is_found_by_the_place_it_is_from(name, source):
    "If that place had other numbers, nothing would be found."
    e, df = ERRATA[name], printed_cells(source)
    elsewhere = df.assign(fid=df.fid + .01 * ~df.learned) if name == "table10_ffhq" else df.assign(fid=df.fid + .01)
    assert erratum_cells(e, patched(source, elsewhere)).empty

@pytest.mark.parametrize("name, place", [("table3_s4s_cifar10", (13, "LD3", "iPNDM-S4S")),
                                         ("table3_s4s_coco", (18, "GITS", "iPNDM-S4S")),
                                         ("table4_s4s_coco", (18, "Time Quadratic", "iPNDM-S4S")),
                                         ("table12_s4s_coco", (18, "Time Quadratic", "iPNDM-S4S"))])
def test_a_number_stands_where_the_sentence_says(name, place):
    number, schedule, solver = place
    (cell,), full = [*erratum_cells(ERRATA[name]).itertuples()], printed_cells(number)
    there = full[(full.schedule == schedule) & (full.solver == solver) & (full.nfe == cell.nfe)]
    assert there.fid.item() == cell.fid and f"{schedule}, {solver}" in ERRATA[name].follows

def test_best_traditional_of_coco_is_the_lowest_of_all_schedules():
    cells, full = erratum_cells(ERRATA["table3_ld3_coco"]), printed_cells(18)
    assert (best_fid(full, cells.nfe, **TRADITIONAL) == cells.fid).all()
    gits = best_fid(full, cells.nfe, **TRADITIONAL, schedule="GITS")
    ld3 = best_fid(full, cells.nfe, **TRADITIONAL, schedule="LD3")
    assert (gits == cells.fid).all() and (ld3 == cells.follows).all()

def test_the_number_of_table_3_that_stands_nowhere():
    (cell,) = erratum_cells(ERRATA["table3_v3_coco"]).itertuples()
    assert cell.fid not in set(printed_cells(18).fid) and cell.follows in set(printed_cells(18).fid)

@pytest.mark.parametrize("number", [14, 17, 18])
def test_default_schedule_is_found_by_nearness(number):
    "The sentence names the schedule; other solvers are far; a row that were LD3's own would not be found."
    e, df = ERRATA[f"table{number}_v3_ld3"], printed_cells(number)
    schedule, far = nearest_schedule(df, "DPM-Solver-v3")
    assert schedule in e.follows and far < .002
    assert all(nearest_schedule(df, solver)[1] > .1 for solver in TRADITIONAL["solver"])
    own = df.copy()
    own.loc[erratum_cells(e).index, "fid"] *= .95
    assert erratum_cells(e, patched(number, own)).empty

def test_table_2_repeats_a_row_that_table_14_labels_wrongly():
    "The same numbers, found by the same rule, and no longer if either table had others."
    e, two, full = ERRATA["table2_cifar10_v3"], printed_cells(2), printed_cells(14)
    found, source = erratum_cells(e), erratum_cells(ERRATA["table14_v3_ld3"])
    assert {*zip(found.nfe, found.fid)} <= {*zip(source.nfe, source.fid)} and len(found) == 3
    assert {*found.index} == {*chosen_rows(two, e.rows).index} and "Time LogSNR" in e.follows
    own = full.copy()
    own.loc[source.index, "fid"] *= .95
    assert erratum_cells(e, patched(14, own)).empty
    one = two.copy()
    one.loc[found.index[0], "fid"] += 1
    assert {*erratum_cells(e, patched(2, one)).index} == {*found.index[1:]}

def test_a_row_under_ld3_is_marked_wherever_it_stands():
    "Of every table that prints DPM-Solver-v3 on LD3 of a data set."
    for number in TABLES:
        df = printed_table(number)
        if "schedule" not in df: continue
        name = df.solver if "solver" in df else df.method
        assert (df.why[(df.schedule == "LD3") & name.isin(["DPM-v3", "DPM-Solver-v3"])] != "").all(), number

@pytest.mark.parametrize("number", [16, 18])
def test_bold_is_found_until_it_is_right(number):
    e, df = ERRATA[f"table{number}_bold"], printed_cells(number)
    found = erratum_cells(e)
    right = df.assign(bold=df.bold ^ df.index.isin(found.index))
    assert erratum_cells(e, patched(number, right)).empty and (found.follows <= found.fid).all()

def test_labels_of_table_9_are_found_until_they_are_exchanged():
    e, df = ERRATA["table9_labels"], printed_cells(9)
    exchanged = df.replace({"Glob. phi": "Time Dep. phi", "Time Dep. phi": "Glob. phi"})
    assert erratum_cells(e, patched(9, exchanged)).empty
    one = df.copy()
    one.loc[df.index[0], "fid"] = df.fid.max() + 1                  # its pair says no more against the text
    assert len(erratum_cells(e, patched(9, one))) == len(df) - 2

def test_a_gain_like_the_others_is_not_alone():
    e, df = ERRATA["table18_gain"], printed_cells(18)
    (i,) = erratum_cells(e).index
    usual = df.copy()
    column = gains(df)[lambda d: d.nfe == df.nfe[i]].gain
    usual.loc[i, "fid"] = gains(df).base[i] * (1 - column.median() / 100)
    assert erratum_cells(e, patched(18, usual)).empty and column[i] == column.min()

def test_why_is_the_sentence_of_the_erratum():
    for number in TABLES:
        df = printed_table(number)
        assert {*df.index[df.why != ""]} == wrong_cells(number, ("number", "label"))
        assert {*df.index[df.wrong]} == wrong_cells(number) and df.wrong.dtype == bool
        for e in ERRATA.values():
            if e.table == number and e.about in ("number", "label"):
                found = erratum_cells(e)
                assert (df.why[found.index] == e.follows).all()
                if e.about == "number": assert df.follows[found.index].equals(found.follows)
                else: assert df.follows[found.index].isna().all() # a label is not a number
    assert (printed_table(18).why[erratum_cells(ERRATA["table18_bold"]).index] == "").all()

def test_corrected_files_have_no_why(tmp_path):
    "The CSVs themselves corrected, in a copy."
    for path in FOLDER.glob("*.csv"): shutil.copy(path, tmp_path)
    found = erratum_cells(ERRATA["table8_ipndm"])
    text = (tmp_path / "table08.csv").read_text()
    for cell in found.itertuples():
        start = f"{cell.method},{cell.order},{cell.nfe},"
        assert text.count(f"{start}{cell.printed},") == 1
        text = text.replace(f"{start}{cell.printed},", f"{start}{cell.follows:.2f},")
    (tmp_path / "table08.csv").write_text(text)
    assert (printed_table(8).why != "").sum() == 4 and (printed_table(8, tmp_path).why == "").all()
    assert not printed_table(8, tmp_path).wrong.any() and printed_table(8, tmp_path).follows.isna().all()


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------

def test_every_name_of_a_small_table_is_one_of_the_full_tables():
    "Grids and solvers are named once, with the spellings of the small tables."
    grids, solvers = {*FULL_GRIDS.values()}, {*FULL_SOLVERS.values()}
    full = {n: printed_cells(n) for n in FULL}
    assert {g for df in full.values() for g in df.schedule} == grids | {""}
    assert {s.removesuffix("-S4S") for df in full.values() for s in df.solver} == solvers | {"S4S-Alt"}
    assert {*WRITTEN.values()} <= grids | solvers | {f"{s}-S4S" for s in solvers}
    for number in (2, 5, 6, 8, 9, 10, 11):
        assert {WRITTEN.get(g, g) for g in printed_cells(number).schedule} <= grids | {""}

def test_how_a_cell_is_treated_is_what_is_shown():
    "Struck out, beside what follows; a note for a label; else as printed."
    for e in ERRATA.values():
        follows = erratum_cells(e).follows.notna()
        word = {"label": "a note", "bold": "shown as printed", "gain": "shown as printed"}.get(e.about, "struck out")
        assert e.treated.startswith(word)
        if e.about == "number": assert ("beside" in e.treated) == follows.any() == follows.all()

def test_no_number_of_a_table_is_typed_on_the_page():
    "Prose names no FID; code has only those of sentences and captions that it quotes."
    page = json.loads((ROOT / "nbs/paper/errata.ipynb").read_text(encoding="utf-8"))["cells"]
    printed = {p for n in TABLES for p in printed_cells(n).printed}
    prose = "\n".join("".join(c["source"]) for c in page if c["cell_type"] == "markdown")
    assert {*re.findall(r"\d+\.\d\d(?!\d)", prose)} & printed <= {"3.73"}       # "3.73 NFE", a caption
    code = [line for c in page if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()]
    typed = [line for line in code if {*re.findall(r"\d+\.\d\d(?!\d)", line)} & printed]
    assert typed and all(re.search("sentence = |FID|NFE", line) for line in typed)
