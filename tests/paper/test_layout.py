"The paper's tables beside ours: every number in its place, marks by the captions, files that follow from the records."
import json
import re
from csv import DictReader
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy
import pytest
from pandas import DataFrame

from s4s_nb.lab.cell import Cell
from s4s_nb.lab.record import stored_records
from s4s_nb.paper.figures import command_for
from s4s_nb.paper.layout import (
    SIGNS,
    Place,
    beside,
    html_page,
    in_html,
    in_latex,
    in_markdown,
    latex_table,
    marks,
    paper_tables,
    places,
    tables_about,
    write_page,
    write_tables,
)
from s4s_nb.paper.planned import NAMED_BY
from s4s_nb.paper.printed import FEWEST, FULL, TABLES, printed_table
from s4s_nb.paper.tables import best, fewest_table, goal_of, rows_with, study_frame

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
NEITHER = [n for n in TABLES if n not in FULL or n == 14] # tables of the digits


@pytest.fixture(scope="module")
def tables():
    "Those of a data set, made once."
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, paper_tables(name, RESULTS / name))

@pytest.fixture(scope="module")
def digits(): return stored_records(RESULTS / "digits")

@pytest.fixture(scope="module")
def study(digits): return study_frame(digits)

@pytest.fixture(scope="module")
def found(study):
    "Of a table, beside the digits."
    made = {}
    return lambda n: made[n] if n in made else made.setdefault(n, beside(n, "digits", study))

def csv_rows(number):
    "The file by plain text."
    with open(RESULTS / f"paper/table{number:02d}.csv", newline="") as f: return [*DictReader(f)]

def markdown_cells(text):
    "Heading and lines of the first table of a text."
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[v.strip() for v in line.split("|")[1:-1]] for line in lines]
    return head, rows

class Page(HTMLParser):
    "Links, numbers that are struck out, and tags that are open; scripts are none of it."
    def __init__(self, text):
        super().__init__()
        self.links, self.struck, self.open = [], 0, []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name == "href"]
        self.struck += tag == "s"
        if tag in ("a", "s", "span", "table", "td", "tr"): self.open.append(tag)
    def handle_endtag(self, tag):
        if tag in ("a", "s", "span", "table", "td", "tr"): assert self.open.pop() == tag

def table_of(tables, name, number): return next(t for t in tables(name) if t.number == number)


# ----------------------------------------------------------------------------------------------------------------------
# Files follow from the records
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["digits", *NAMED_BY])
def test_committed_files_follow_from_the_records(name, tables, tmp_path):
    "Byte by byte, and no file more or less."
    write_tables(tables(name), tmp_path)
    write_page(name, tables(name), tmp_path)
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.*")}
    there = {p.relative_to(RESULTS / name): p.read_bytes()
             for p in [*(RESULTS / name / "tables").iterdir(), RESULTS / name / "tables.html"]}
    assert made.keys() == there.keys() and len(made) == 3 * len(tables_about(name)) + 1
    assert not [str(p) for p in made if made[p] != there[p]]

def test_another_record_gives_another_file(digits, tables, tmp_path):
    "What is compared above depends on the records."
    slug = next(r for r in csv_of(tables, "digits", 5) if r["records"])["records"].split()[0]
    changed = json.loads(json.dumps(next(r for r in digits if Cell(**r["key"]).slug == slug)))
    for part in ("metrics", "learned_only"):
        if part in changed: changed[part]["rmse"]["ranges"] = [2 * v for v in changed[part]["rmse"]["ranges"]]
    df = study_frame([changed if Cell(**r["key"]).slug == slug else r for r in digits])
    text = "".join(map(in_markdown, places(beside(5, "digits", df), "RMSE")))
    assert text != "".join(map(in_markdown, places(beside(5, "digits", study_frame(digits)), "RMSE")))


# ----------------------------------------------------------------------------------------------------------------------
# Every number in its place
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, number", [*(("digits", n) for n in NEITHER), ("afhqv2", 13), ("ffhq", 15),
                                          ("imagenet", 16), ("lsun_bedroom", 17), ("mscoco", 18), ("cifar10", 14)])
def test_every_printed_number_stands_in_its_place(name, number, tables):
    "Line by line, and from left to right, as in the file."
    head, rows = markdown_cells(table_of(tables, name, number).texts["md"])
    paper = [i for i, title in enumerate(head) if title.endswith((", paper", ", FID"))]
    shown = [row[i].replace("**", "").split(" ")[0] for row in rows for i in paper]
    assert shown == [r["fid"] or "-" for r in csv_rows(number)]
    if number in FEWEST:
        nfes = [i for i, title in enumerate(head) if title in ("CIFAR, NFE", "MS-COCO, NFE")]
        assert [row[i] for row in rows for i in nfes] == [r["nfe"] or "-" for r in csv_rows(number)]
        names = [row[0].removesuffix("†") for row in rows]
        assert names == [*dict.fromkeys(r["method"] for r in csv_rows(number))]
    else:
        nfes = sorted({int(r["nfe"]) for r in csv_rows(number)})
        assert [head[i] for i in paper] == [f"NFE {n}, paper" for n in nfes]

def test_bold_of_the_paper_is_as_printed(tables):
    for number in NEITHER:
        head, rows = markdown_cells(table_of(tables, "digits", number).texts["md"])
        paper = [i for i, title in enumerate(head) if title.endswith((", paper", ", FID"))]
        assert ["**" in row[i] for row in rows for i in paper] == [r.get("bold") == "true" for r in csv_rows(number)]

def csv_of(tables, name, number): return [*DictReader(StringIO(table_of(tables, name, number).texts["csv"]))]

@pytest.mark.parametrize("number", NEITHER)
def test_ours_are_means_of_the_records_that_are_named(number, tables, digits):
    "Recomputed from the records, without the frame; with the evaluations of the column, their solvers and command."
    records = {Cell(**r["key"]).slug: r for r in digits}
    rows = csv_of(tables, "digits", number)
    assert len(rows) == len(csv_rows(number)) and any(r["records"] for r in rows)
    for row, printed in zip(rows, csv_rows(number)):
        assert row["printed"] == (printed["fid"] or "-")
        own = [records[slug] for slug in row["records"].split()]
        if not own:
            assert not row["ours"] and row["reason"]
            continue
        values = [numpy.mean(r.get("learned_only", r["metrics"])["rmse"]["ranges"]) for r in own]
        assert float(row["ours"]) == pytest.approx(numpy.mean(values), rel=1e-5)
        assert printed["fid"] and {r["key"]["nfe"] for r in own} == {
            int(row["nfe_ours"].split()[-1]) if number in FEWEST else int(printed["nfe"])}
        assert row["solvers"].split() == [r["solver"] for r in own]
        key = own[0]["key"]
        for part in (f"-p nfes {key['nfe']}", f"-p methods {key['method']}"): assert part in row["command"]

def test_nothing_stands_beside_a_dash(found):
    for number in (5, 8):
        table = found(number)
        assert (table.printed == "-").sum() > 0
        assert table.ours[table.printed == "-"].isna().all() and not table.cells[table.printed == "-"].map(len).any()


# ----------------------------------------------------------------------------------------------------------------------
# Marks
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", NEITHER)
def test_what_is_disproved_is_struck_out_and_never_the_best(number, found):
    for table in (found(number), beside(number, "digits")):
        for cell, paper, own in zip(table.itertuples(), marks(table, "fid"), marks(table, "ours")):
            assert ("wrong" in paper) == cell.wrong and ("label" in paper) == (cell.why != "" and not cell.wrong)
            assert not {"wrong", "label"} & own and ("best" not in paper or cell.why == "")

def test_the_next_best_is_marked_if_the_best_is_disproved(found):
    table = found(14).copy()
    column = table[table.nfe == 6]
    first, second = column.fid.nsmallest(2).index
    table.loc[first, ["why", "wrong"]] = "a sentence", True
    shaded = [i for i, m in zip(table.index, marks(table, "fid")) if "best" in m and table.nfe[i] == 6]
    assert shaded == [second]

def test_marks_follow_the_captions(found):
    for number in (5, 6, 9, 10, 11): assert not any({"bold", "best"} & m for m in marks(found(number), "ours"))
    two = found(2)
    base = two.set_index(["dataset", "schedule", "method", "nfe"]).ours
    for cell, own in zip(two.itertuples(), marks(two, "ours")):
        before = base[cell.dataset, cell.schedule, cell.method.removesuffix("-S4S"), cell.nfe]
        assert ("bold" in own) == (cell.learned and cell.ours < before) and "best" not in own
    for number, within in ((3, ["dataset", "nfe"]), (8, ["nfe"]), (14, ["schedule", "nfe"])):
        table = found(number)
        table = table[table.schedule != ""] if number == 14 else table
        lowest = table.ours == table.groupby(within).ours.transform("min")
        bold = ["bold" in m for m, i in zip(marks(found(number), "ours"), found(number).index) if i in table.index]
        assert bold == [*lowest]
    full = found(14)
    assert [("best" in m) for m in marks(full, "ours")] == [*(full.ours == full.groupby("nfe").ours.transform("min"))]

@pytest.mark.parametrize("number, baseline", [(5, "Baseline"), (6, "iPNDM")])
def test_red_is_worse_than_the_baseline(number, baseline, found):
    table = found(number)
    for value in ("fid", "ours"):
        base = table[table.method == baseline].set_index("nfe")[value]
        for cell, m in zip(table.itertuples(), marks(table, value)):
            if cell.method != baseline: assert ("worst" in m) == (getattr(cell, value) > base[cell.nfe])

@pytest.mark.parametrize("number", FEWEST)
def test_red_is_what_cannot_match_s4s_alt_and_a_dash_has_no_mark(number, found):
    table = found(number)
    goal = table[table.method == "S4S-Alt"].set_index("dataset").fid
    own_goal = table.ours[table.method == "S4S-Alt"].max()
    for cell, paper, own in zip(table.itertuples(), marks(table, "fid"), marks(table, "ours")):
        assert ("worst" in paper) == (cell.fid > goal[cell.dataset]) and (cell.printed != "-" or not paper)
        assert ("worst" in own) == (cell.fewest is not None and not cell.ours <= own_goal)
    assert {cell.printed for cell in table.itertuples() if cell.why} == {"10.84"}


# ----------------------------------------------------------------------------------------------------------------------
# What follows, and gains
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [n for n in NEITHER if printed_table(n).wrong.any()])
def test_what_follows_stands_behind_what_is_struck_out(number, tables):
    table, printed = table_of(tables, "digits", number), printed_table(number)
    for cell in printed[printed.wrong].itertuples():
        assert ("→" if cell.follows == cell.follows else "✗") in table.texts["md"]
        if cell.follows == cell.follows:
            assert re.search(rf"{cell.printed}\*{{0,2}} ✗ → {cell.follows:.2f} ", table.texts["md"])
            assert rf"\sout{{{cell.printed}}} {cell.follows:.2f}" in table.texts["tex"]
            assert f"<s>{cell.printed}</s> ✗ → {cell.follows:.2f}" in table.texts["html"]
    assert table.texts["tex"].count(r"\sout{") == Page(table.texts["html"]).struck == printed.wrong.sum()
    assert {n for n in table.notes if n[0] in "✗‡"} == {
        f"{'✗' if part.wrong.any() else '‡'} {why} ({len(part)} number{'s' * (len(part) > 1)})"
        for why, part in printed[printed.why != ""].groupby("why")}

@pytest.mark.parametrize("number", [2, 5, 6, 8, 10, 14])
def test_gains_of_the_paper_are_of_numbers_that_hold(number, found):
    table = found(number)
    assert table.printed_gain[table.why != ""].isna().all()
    held = table[table.printed_gain.notna()]
    base = held.fid / (1 - held.printed_gain)
    for cell, value in zip(held.itertuples(), base):
        same = table[(table.dataset == cell.dataset) & (table.nfe == cell.nfe) & (table.why == "")]
        assert (abs(same.fid - value) < 1e-9).any()


# ----------------------------------------------------------------------------------------------------------------------
# How few evaluations
# ----------------------------------------------------------------------------------------------------------------------

GROUPS = {"S4S-Alt": "S4S-Alt", "S4S": "best S4S", "LD3": "best on LD3's grids", "DPM-v3": "best DPM-Solver-v3",
          "BNS": "BNS"}

@pytest.mark.parametrize("left_out", [(), (4, 5)])
def test_both_views_say_the_same_of_evaluations_and_time(left_out, study):
    "The study's own table and the paper's; also where some numbers of evaluations were not run."
    df = study[~study.nfe.isin(left_out)]
    _, rows = markdown_cells(fewest_table(df))
    own = {row[0]: row[1:] for row in rows}
    table = beside(12, "digits", df).drop_duplicates("method").set_index("method")
    for method, group in GROUPS.items():
        f = table.fewest[method]
        shown, which, minutes, device = own[group]
        assert (str(f), f.which, f"{f.minutes:.1f} minutes", f.device) == (shown, which, minutes, device)
        lowest = best(df, rows_with(group)).dropna()
        reached = lowest[lowest <= goal_of(df)]
        assert f.enough == bool(len(reached)) and f.nfe == (reached.index[0] if len(reached) else lowest.index[-1])
        assert f.value == pytest.approx(lowest[f.nfe]) and (not f.enough or f.exact == (not left_out))


# ----------------------------------------------------------------------------------------------------------------------
# Formats
# ----------------------------------------------------------------------------------------------------------------------

def balanced(text): return len(re.findall(r"(?<!\\)\{", text)) == len(re.findall(r"(?<!\\)\}", text))

@pytest.mark.parametrize("name, number", [*(("digits", n) for n in NEITHER), ("mscoco", 12), ("lsun_bedroom", 17)])
def test_latex_is_escaped_balanced_and_rectangular(name, number, tables):
    text = table_of(tables, name, number).texts["tex"]
    assert text.isascii() and text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    body = [line for line in text.splitlines() if not line.startswith("%")]
    columns = len(re.search(r"\\begin\{tabular\}\{(l+)\}", text)[1])
    for line in body:
        assert not re.search(r"(?<!\\)[_#%]", re.sub(r"\$[^$]*\$", "", line)), line
        assert balanced(line), line
        assert line.count("$") % 2 == 0
        if line.endswith(r"\\"):
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == columns, line

@pytest.mark.parametrize("text", ["a_b", "50 %", "A & B", "$x$", "{}", "a\\b", "x^2", "~", "#1", "< 1 hour",
                                  "0.1 ± 2", "–", "BNS†"])
def test_any_text_can_be_set_in_latex(text):
    made = in_latex(Place("", "", "", "", text, {"wrong", "label"}, "7.00"))
    assert made.isascii() and made.startswith(r"\sout{") and balanced(made)
    assert not re.search(r"(?<!\\)[%#_&]", made) and made.count("$") % 2 == made.count(r"\$") % 2
    assert latex_table([Place(text, text, text, text, text)]).isascii()

def test_signs_are_those_of_the_legend(tables):
    "No sign without a note that explains it."
    for number in NEITHER:
        table = table_of(tables, "digits", number)
        signs = set(table.texts["md"]) & {*SIGNS.values(), "†", "→"}
        assert signs <= {note[0] for note in table.notes}, number

def test_text_of_html_is_escaped():
    place = Place("", "a", "b", "c", "< 1 & 2", set(), "", 'because "<"')
    assert in_html(place, {}) == '<span title="because &quot;&lt;&quot;">&lt; 1 &amp; 2</span>'

def test_links_of_the_page_lead_to_records_and_solvers(tables):
    "Those of Tables 4 and 12 as well."
    page = Page(html_page("digits", tables("digits")))
    local = [link for link in page.links if not link.startswith("http")]
    assert not page.open and len(local) > 500 and all((RESULTS / "digits" / link).is_file() for link in {*local})
    for number in FEWEST: assert "records/cells/" in table_of(tables, "digits", number).texts["html"]

def test_the_page_reads_without_a_script(tables):
    "Every number of ours is in the page itself, once."
    page = html_page("digits", tables("digits"))
    assert page.count("<script") == 1 and 'hidden="' not in page and page.count("<table") == len(tables("digits"))
    for row in csv_of(tables, "digits", 6): assert f"{float(row['ours']):.3g}" in page.split("<script")[0]

def test_no_file_names_a_folder_of_this_machine():
    files = [*RESULTS.glob("*/*.*"), *RESULTS.glob("*/tables/*")]
    text = {p: p.read_text(encoding="utf-8") for p in files if p.suffix in (".md", ".csv", ".tex", ".html", ".ipynb")}
    assert len(text) > 100 and not [p for p, t in text.items() if str(ROOT) in t or str(Path.home()) + "/" in t]


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------

def test_commands_write_into_folders_of_a_fresh_copy():
    "papermill makes no folders; `out` is kept, and empty."
    kept = (ROOT / ".gitignore").read_text().splitlines()
    assert (ROOT / "out/.gitkeep").is_file() and {"/out/*", "!/out/.gitkeep"} <= {*kept} and "out/" not in kept
    files = [*(ROOT / "nbs").rglob("*.ipynb"), ROOT / "README.md", *RESULTS.glob("*/tables/*.csv"),
             *RESULTS.glob("*/*.md")]
    found = {}
    for path in files:
        text = path.read_text(encoding="utf-8")
        made = re.findall(r"mkdir -p (\S+?)(?:\\n|\s)", text)
        found |= {target: path for target in re.findall(r"papermill nbs/\S+ ([\w./{}]+\.ipynb)", text)
                  if Path(target).parent.as_posix() not in made and "{" not in target}
    assert len(found) > 8
    fresh = {".", "out"} | {p.relative_to(ROOT).as_posix() for p in RESULTS.iterdir()}
    assert not {target: str(path) for target, path in found.items() if Path(target).parent.as_posix() not in fresh}

def test_a_command_names_no_folder_but_one_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "-p out" not in command_for("full", RESULTS / "digits", "digits")
    assert command_for("full", tmp_path / "mine", "digits").endswith("-p tables full -p out mine")

def test_a_place_has_no_room_for_two():
    "Two numbers of one place are an error and not the last of them."
    twice = [Place("", "a", "NFE 4", "paper", "1")] * 2
    with pytest.raises(ValueError, match="duplicate"): latex_table(twice)

def test_numbers_of_evaluations_are_in_order():
    "Whatever row comes first."
    from s4s_nb.paper.layout import placed
    where = [Place("", line, f"NFE {n}", "paper", "1") for line, n in (("a", 4), ("a", 10), ("b", 3))]
    table = placed(where, ["1", "2", "3"])
    assert isinstance(table, DataFrame) and [c[0] for c in table] == ["NFE 3", "NFE 4", "NFE 10"]
    assert list(table.index) == ["a", "b"] and table.loc["a"].tolist() == ["", "1", "2"]
