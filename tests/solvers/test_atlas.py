"The solver atlas has a line for every solver, grid and learner of the library, and names all that is left out."
import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from test_diffusers import DIFFERENCES
from test_golden import LEFT_OUT

import s4s_nb

PAGE = Path(__file__).resolve().parents[2] / "nbs/solvers/atlas.ipynb"
MODULES = ("solvers.multistep", "solvers.singlestep", "solvers.search", "solvers.dpm_solver_v3",
           "learning.bespoke", "learning.amed_plugin")
RESULTS = "Solver", "DPMSolverV3", "Learned", "AMED" # what a method returns; a search returns times
HELPERS = {"rebased": "the same solver in other coordinates", "load_amed": "reads a file"}


def methods() -> set[str]:
    "Functions of these modules that return a solver, and those that the package offers from them"
    offered = {name: getattr(s4s_nb, name) for name in s4s_nb.__all__}
    found = {name for name, f in offered.items() if getattr(f, "__module__", "").removeprefix("s4s_nb.") in MODULES}
    for m in (import_module(f"s4s_nb.{name}") for name in MODULES):
        functions = [f for f in map(vars(m).get, m.__all__) if inspect.isfunction(f)]
        found |= {f.__name__ for f in functions if returns(f) in RESULTS}
    return found - set(HELPERS)


def returns(f) -> str:
    kind = inspect.signature(f).return_annotation
    return kind if isinstance(kind, str) else getattr(kind, "__name__", "")


@pytest.fixture(scope="module")
def cells(): return json.loads(PAGE.read_text(encoding="utf-8"))["cells"]

@pytest.fixture(scope="module")
def outputs(cells):
    "Stored outputs that are Markdown"
    found = [o.get("data", {}).get("text/markdown") for c in cells for o in c.get("outputs", [])]
    return ["".join(text) for text in found if text]

@pytest.fixture(scope="module")
def catalogue(outputs):
    "The table with one line a method"
    (text,) = [text for text in outputs if text.startswith("| method | function |")]
    return text


def test_every_method_has_a_line(catalogue):
    listed = set(re.findall(r"^\|[^|]*\| `(\w+)` \|", catalogue, re.M))
    assert {"ddim", "dmn", "bns", "dpm_solver_v3"} <= methods(), "the search for methods is broken"
    assert methods() <= listed, f"add to METHODS in {PAGE}, and execute it: {sorted(methods() - listed)}"


def test_a_new_method_is_noticed(monkeypatch, catalogue):
    module = import_module("s4s_nb.solvers.multistep")
    def newcomer(schedule, t) -> module.Solver: pass
    monkeypatch.setattr(module, "newcomer", newcomer, raising=False)
    monkeypatch.setattr(module, "__all__", [*module.__all__, "newcomer"])
    with pytest.raises(AssertionError, match="newcomer"): test_every_method_has_a_line(catalogue)


def test_everything_left_out_has_its_reason(cells):
    (section,) = [text for c in cells if (text := "".join(c["source"])).startswith("## What is not reproduced")]
    missing = [why for reasons in LEFT_OUT.values() for why in reasons if f"`{why}" not in section]
    assert not missing, "tests/test_golden.py leaves out rows that the atlas does not name"


def test_differences_are_those_of_the_test(outputs):
    "The page shows the list that tests/test_diffusers.py proves."
    for name, text in DIFFERENCES.items():
        assert any(f"**{name}**: {text}" in o for o in outputs), f"{PAGE} shows an older list: execute it"
