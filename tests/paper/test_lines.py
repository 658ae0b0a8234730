"The paper, line by line: nothing is missing, every page, name and command exists, every line has a state."
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from s4s_nb.paper.lines import done_on, lines_of_paper, state_of
from s4s_nb.paper.printed import TABLES

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
    from s4s_nb.paper.tables import cells_of
    slugs = {c.slug for c in cells_of(["table11"], "digits")}
    assert done_on("table11", "digits", slugs, tmp_path)
    assert not done_on("table11", "digits", slugs - {min(slugs)}, tmp_path)
    assert not done_on("figure3", "digits", slugs, tmp_path)
    (tmp_path / "figure3.png").touch()
    assert done_on("figure3", "digits", slugs, tmp_path)
    with pytest.raises(ValueError, match="shows='figure9'"): done_on("figure9", "digits", slugs, tmp_path)
