"The paper, line by line: nothing is missing, every page, name and command exists, every line has a state."
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from s4s_nb.lab.cell import Cell
from s4s_nb.lab.datasets import dataset_of
from s4s_nb.lab.record import stored_records
from s4s_nb.models.cards import cards
from s4s_nb.paper.figures import FIGURES
from s4s_nb.paper.lines import done_on, lines_of_paper, state_of
from s4s_nb.paper.planned import dataset_printed
from s4s_nb.paper.printed import TABLES, printed_table
from s4s_nb.paper.tables import EXPERIMENTS, cells_of

ROOT = Path(__file__).parents[2]
LINES = lines_of_paper()
SECTIONS = """Abstract 1 1.1.1 1.1.2 2.1 2.2 2.3 3.1 3.1.1 3.1.2 3.2.1 3.2.2 3.3 4 4.1 4.2 5 A.1 A.2 A.3 B.1 B.2 B.3
    C.1 C.2 D.1 D.2 E.1 E.2 F.1 F.2 G.1.1 G.1.2 G.2 H.1 H.2 H.2.1 H.2.2 H.2.3 H.2.4 H.3 H.4 H.5""".split()
NUMBERED = dict(equation=range(1, 12), algorithm=range(1, 4), table=range(1, 19), figure=range(1, 8))
HYPER = ["training pairs", "validation pairs", "batch", "epochs", "K", "r", "distance", "teacher", "start", "samples",
         "guidance", "offset bound"]
IDS = [f"{line.kind} {line.item}" for line in LINES.itertuples()]

def test_nothing_is_missing_and_nothing_stands_twice():
    wanted = {("section", s) for s in SECTIONS} | {("hyper-parameter", h) for h in HYPER} | {
        (kind, str(n)) for kind, numbers in NUMBERED.items() for n in numbers}
    assert set(zip(LINES.kind, LINES["item"])) == wanted and len(LINES) == len(wanted)
    assert {int(n) for n in LINES["item"][LINES.kind == "table"]} == {*TABLES, 1, 7}

@pytest.mark.parametrize("line", [*LINES.itertuples()], ids=IDS)
def test_page_name_and_command_exist(line):
    assert (ROOT / "nbs" / line.page).is_file(), line.page
    if line.name:
        module, _, name = line.name.rpartition(".")
        assert hasattr(import_module(module), name), line.name
    for notebook, target in re.findall(r"papermill (\S+) (\S+)", line.command):
        cells = json.loads((ROOT / notebook).read_text())["cells"]
        sources = ["".join(c["source"]) for c in cells]
        known = re.findall(r"^(\w+) = ", next(s for s in sources if s.startswith("dataset = ")), re.M)
        given = re.findall(r"-p (\w+) ", line.command)
        assert set(given) <= set(known) and target.startswith("results/"), line.command
    if target := re.match(r"make (\w+)", line.command):
        assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.M)

@pytest.mark.parametrize("line", [*LINES.itertuples()], ids=IDS)
def test_every_line_has_a_state(line, tmp_path):
    "Also where nothing was run."
    state = state_of(line, {}, tmp_path)
    assert state and (not line.shows or line.not_tested or state.startswith("not run"))

def test_a_table_is_done_when_all_its_cells_are_there(tmp_path):
    slugs = {c.slug for c in cells_of(["table11"], "digits")}
    assert done_on("table11", "digits", slugs, tmp_path)
    assert not done_on("table11", "digits", slugs - {min(slugs)}, tmp_path)
    for name in ("figure3.png", "figure3.json"): # a picture without what it is drawn of is not enough
        assert not done_on("figure3", "digits", slugs, tmp_path)
        (tmp_path / name).touch()
    assert done_on("figure3", "digits", slugs, tmp_path)
    with pytest.raises(ValueError, match="shows='figure9'"): done_on("figure9", "digits", slugs, tmp_path)

def test_pictures_alone_show_nothing(tmp_path):
    "Whatever was drawn: no line is done without records."
    out = tmp_path / "digits"
    out.mkdir()
    for name in FIGURES: (out / f"{name}.png").touch()
    for have in ({}, {"digits": set()}, {"digits": {"another"}}):
        for line in LINES.itertuples():
            if line.shows and not line.not_tested: assert "done" not in state_of(line, have, tmp_path), line
    assert not any(done_on(name, "digits", {"another"}, out) for name in (*EXPERIMENTS, *FIGURES))

def test_one_record_less_and_a_table_is_not_done(tmp_path):
    slugs = {Cell(**r["key"]).slug for r in stored_records(ROOT / "results/digits")}
    lacking = slugs - {next(c.slug for c in cells_of(["table5"], "digits") if c.method == "s4s_alt_order6")}
    for line in LINES[(LINES.kind == "table") & (LINES["item"] == "5")].itertuples():
        assert state_of(line, {"digits": slugs}, ROOT / "results").startswith("done on digits")
        assert state_of(line, {"digits": lacking}, ROOT / "results") == "not run on ffhq"

OWN = LINES[(LINES.command != "") & ~LINES.command.str.contains("{d}", regex=False)]

@pytest.mark.parametrize("line", [*OWN.itertuples()], ids=lambda line: f"{line.kind} {line.item}")
def test_what_one_data_set_is_about_is_not_done_on_another(line):
    "Tables 13 to 18 and Figures 5 to 7."
    assert len(OWN) == 9
    slugs = {Cell(**r["key"]).slug for r in stored_records(ROOT / "results/digits")}
    assert f"-p dataset {line.data} " in line.command
    assert state_of(line, {"digits": slugs}, ROOT / "results") == f"not run on {line.data}"

def test_all_parts_of_a_line_must_be_there(tmp_path):
    "Figure 2 has two."
    out = tmp_path / "digits"
    out.mkdir()
    (line,) = LINES[(LINES.kind == "figure") & (LINES["item"] == "2")].itertuples()
    for name in ("figure2.json", "figure2a.png"): (out / name).touch()
    assert state_of(line, {"digits": {"a"}}, tmp_path) == "not run"
    (out / "figure2b.png").touch()
    assert state_of(line, {"digits": {"a"}}, tmp_path) == "done on digits"

@pytest.mark.parametrize("line", [*LINES.itertuples()], ids=IDS)
def test_a_page_shows_what_a_line_names(line):
    "The function occurs there; what is run is shown by something that exists; data sets are the paper's."
    sources = ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / line.page).read_text())["cells"]]
    name = line.name.rpartition(".")[2]
    assert not name or re.search(rf"\b{name}\b", "\n".join(sources)), (line.page, name)
    assert bool(line.command) == bool(line.shows) and all(s in EXPERIMENTS or s in FIGURES for s in line.shows.split())
    assert {*line.data.split()} <= {name for name in cards() if dataset_of(name).published}

@pytest.mark.parametrize("number", TABLES)
def test_data_sets_of_a_table_are_those_that_it_prints(number):
    (line,) = LINES[(LINES.kind == "table") & (LINES["item"] == str(number))].itertuples()
    assert {*line.data.split()} == {dataset_printed(name) for name in printed_table(number).dataset}
