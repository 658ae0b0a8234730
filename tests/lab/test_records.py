"Every committed record is one that today's code would look for, and its solver loads."
import json
from pathlib import Path

import pytest

from s4s_nb.lab.cell import Cell
from s4s_nb.lab.record import identity, replayed
from s4s_nb.lab.setup import setup_for

ROOT = Path(__file__).resolve().parents[2] / "results"
COUNT = 1573 # a record that is lost, or added without a thought, is noticed here


@pytest.fixture(scope="module")
def committed():
    "(path, record, cell, setup) of all records, those of one setup after each other."
    records = [(p, json.loads(p.read_text())) for p in sorted(ROOT.rglob("cells/*.json"))]
    cells = [(p, r, Cell(**r["key"])) for p, r in records]
    cells.sort(key=lambda x: (x[2].dataset, x[2].guidance or 0))
    return [(p, r, c, setup_for(c.dataset, c.guidance)) for p, r, c in cells]


def test_none_is_missing(committed):
    assert len(committed) == COUNT
    assert all(path.stem == cell.slug for path, _, cell, _ in committed)


def test_identities_are_unchanged(committed):
    "Cell, model, teacher, judges and configuration of learning: whatever the code is called today."
    differing = [f"{path}: {k}" for path, record, cell, setup in committed
                 for k, v in identity(cell, setup).items() if record.get(k) != v]
    assert not differing, f"{len(differing)} differ: {differing[:5]}"


def test_solvers_load(committed):
    "Also those before a fallback; each spends the evaluations of its cell."
    for path, record, cell, setup in committed:
        for before in {False, record.get("fallback", False)}:
            assert replayed(record, path.parents[2], setup, before_fallback=before).nfe == cell.nfe
