"""Every executed notebook, once: the library's examples against the exported modules, which is what a user imports and
what coverage counts; other pages as they stand. `nbdev_test` (`make notebooks`) runs the same pages with the code of
their own cells, which `test_clean_and_export_leave_no_diff` holds equal to the modules."""
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
EXECUTED = [p for p in pages() if "skip_exec: true" not in p.read_text(encoding="utf-8")]


def test_every_module_has_its_notebook():
    modules = [p for p in (NBS.parent / "s4s_nb").rglob("[!_]*.py")]
    assert len(LIBRARY) == len(modules) >= 50 and set(LIBRARY) < set(EXECUTED)


@pytest.mark.parametrize("path", EXECUTED, ids=lambda p: p.stem)
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
