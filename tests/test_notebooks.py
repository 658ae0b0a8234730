"""The examples of the library notebooks, run against the exported modules: `nbdev_test` runs the code in the cells,
this runs what a user imports, and coverage counts it."""
import re

import pytest
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from nbdev.config import get_config
from readme import NBS, directives, pages

EXPORTED = {"export", "exports", "exporti"}
USE = "import s4s_nb.{0} as module_; globals().update({{k: v for k, v in vars(module_).items() if k[:2] != '__'}})"


def module_of(path):
    found = re.search(r"default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
    return found and found[1]


LIBRARY = [p for p in pages() if module_of(p)]


def test_every_module_has_its_notebook():
    modules = [p for p in (NBS.parent / "s4s_nb").rglob("[!_]*.py")]
    assert len(LIBRARY) == len(modules) >= 38


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_examples_hold_for_the_module(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("IN_TEST", "1")
    slow = set(get_config(path=NBS.parent).tst_flags.split())
    shell = CaptureShell(path)

    def skip(cell):
        if cell.cell_type != "code": return True
        flags, _ = directives(cell.source)
        if "default_exp" in flags: cell.source = USE.format(flags["default_exp"])
        return flags.get("eval") == "false" or bool(flags.keys() & (slow | EXPORTED))

    try: shell.run_all(read_nb(path), exc_stop=True, preproc=skip)
    except Exception: pytest.fail(shell.prettytb(fname=path), pytrace=False)
