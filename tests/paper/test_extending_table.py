"A table of the paper is one entry of `EXPERIMENTS`: cells, table, files and lists of names follow."
import pytest

from s4s_nb.lab.cell import Cell
from s4s_nb.lab.sweep import run_grid
from s4s_nb.paper.figures import write_outputs
from s4s_nb.paper.measurements import all_of
from s4s_nb.paper.tables import (
    EXPERIMENTS,
    Experiment,
    Row,
    cells_of,
    key_of,
    show,
    study_budget,
    study_frame,
)

FORM = dict(order=2, schedule="edm")
NEW = Experiment("Two orders: does a second-order parent learn as much?",
                 [dict(methods="s4s", schedules="edm", solvers="ipndm", orders=2, nfes=(3, 4))],
                 [Row("iPNDM-2", key_of("parent", **FORM)),
                  Row("S4S from iPNDM-2", key_of("s4s", **FORM), key_of("parent", **FORM))], (3, 4))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "orders", NEW)
    return "orders"


def test_its_cells_are_planned(registered):
    cells, seeds = cells_of([registered]), study_budget("digits")["train_seeds"]
    assert len(cells) == 2 * (1 + len(seeds)) and all(isinstance(c, Cell) and c.order == 2 for c in cells)
    assert set(cells) <= set(cells_of(EXPERIMENTS))
    assert registered in all_of("digits") and registered in all_of("mixture")
    with pytest.raises(ValueError, match="experiment='order'; expected one of.*orders"): cells_of(["order"])


def test_its_table_is_written(registered, tmp_path, monkeypatch):
    "Cells are made, and the table has a line for each row that has records."
    small = dict(train_seeds=(0, 1), n_train=16, n_valid=16, epochs=1, n_eval=64, ranges=1)
    monkeypatch.setattr("s4s_nb.paper.tables.study_budget", lambda dataset: dict(distances="l2") | small)
    records = run_grid(cells_of([registered], "mixture"), tmp_path, workers=1, cache=tmp_path / "cache", progress=False)
    (path,) = write_outputs(registered, study_frame(records), tmp_path)
    text = path.read_text()
    assert path.name == "orders.md" and text == show(study_frame(tmp_path), NEW) + "\n"
    parent, learned = ([v for v in text.splitlines() if v.startswith(f"| {name}")] for name in ("iPNDM-2", "S4S from"))
    assert len(parent) == 2 and len(learned) == 3 and "±" in learned[0] # RMSE, FD; and the ratios
