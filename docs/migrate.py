"""Adds to the records of runs what identities have gained since: `python docs/migrate.py results/digits ...`.

An identity now holds numbers that tell what the parent's table, the teacher's, the model, the loss and the judging
network do, and a record the digests of its solver files; older records have names only. Each parent is made again from
its name: its table must equal the stored one, and its RMSE to today's teacher on the first evaluation range the one of
its record, to 1e-9. Where that holds, the identities of its cells grow; nothing else changes. Where it does not, its
records stay as they are and the run ends with an error. Measurements follow their model.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from s4s_nb.files.download import sha256_of
from s4s_nb.files.verified import recipe_key, write_atomic
from s4s_nb.lab.catalog import parent_solver
from s4s_nb.lab.cell import METHODS, Cell
from s4s_nb.lab.record import (
    agree,
    identity,
    judge,
    learned_name,
    record_path,
    records_folder,
    replayed,
    stored_records,
    without_provenance,
)
from s4s_nb.lab.setup import setup_for, setup_identity
from s4s_nb.lab.workers import Workers
from s4s_nb.paper import measurements

CLOSE = 1e-9
FIELDS = "t", "w", "c", "a", "t_eval", "alpha", "sigma", "alpha_eval", "sigma_eval"


def older(said):
    "An identity, or settings that hold some, as they were written before."
    if isinstance(said, list): return [older(v) for v in said]
    if not isinstance(said, dict): return said
    kept = {k: older(v) for k, v in said.items() if k not in ("answers", "table")}
    return {k: v for k, v in kept.items() if v != {}} # parent, loss and metric, of which only that was said


def without_card(said: dict, setup) -> dict:
    "An identity without what tables say now, if that is what today's card says; the teacher is proved by its errors."
    now = dict(edm_grid=setup.data.edm_grid, gits=setup.data.gits, guidance=setup.guidance)
    if any(said["model"].get(k, v) != v for k, v in now.items()): return said
    return said | dict(model={k: v for k, v in said["model"].items() if k not in (*now, "teacher")})


def dataset_in(said) -> str:
    "The data set that settings name."
    if isinstance(said, dict) and {"model", "teacher", "real"} <= said.keys(): return said["model"]["name"]
    parts = said.values() if isinstance(said, dict) else said if isinstance(said, list) else ()
    return next((name for name in map(dataset_in, parts) if name), "")


def check_parent(bare: Cell, out) -> None:
    "Raises ValueError unless the parent made today is the one of the record."
    record = json.loads(record_path(bare.slug, out).read_text())
    setup = setup_for(bare.dataset, bare.guidance)
    record["provenance"]["files"] = digests(record, out)
    kept, made = replayed(record, out, setup), parent_solver(bare, setup)
    if (kept.base, kept.prediction) != (made.base, made.prediction): raise ValueError(f"{bare}: another solver")
    for name in FIELDS:
        a, b = getattr(kept, name), getattr(made, name)
        if (a is None) != (b is None) or a is not None and not torch.allclose(a, b, rtol=CLOSE, atol=CLOSE):
            raise ValueError(f"{bare}: the table of its record has {name}={a}, made again {b}")
    before = record["metrics"]["rmse"]["ranges"][0]
    now = judge(setup, made, replace(bare, ranges=1))[0]["rmse"]["ranges"][0]
    if not abs(before - now) <= CLOSE: raise ValueError(f"{bare}: RMSE {before} in its record, {now} made again")


def digests(record: dict, out) -> dict:
    "Of the solver files of a record."
    solver = record["solver"]
    names = [solver] + [learned_name(solver, METHODS[record["key"]["method"]])] * bool(record.get("fallback"))
    return {n: sha256_of(records_folder(out) / n)[:16] for n in names}


def with_digest(content: dict, record: dict) -> dict:
    "New contents with the provenance of the old."
    if record["provenance"]["digest"] != recipe_key(without_provenance(record)): raise ValueError("a damaged record")
    return content | dict(provenance=record["provenance"] | dict(digest=recipe_key(content)))


def grow(bare: Cell, cells: list, out) -> int:
    "Checks a parent and writes its records; their number."
    check_parent(bare, out)
    for cell in cells:
        path, said = record_path(cell.slug, out), identity(cell, setup_for(cell.dataset, cell.guidance))
        record = json.loads(path.read_text())
        before = {k: v for k, v in without_card(older(record), setup_for(cell.dataset, cell.guidance)).items()
                  if k in older(said)}
        if before != older(said): raise ValueError(f"{path}: of another model, or of other settings than today's")
        rest = {k: v for k, v in record.items() if k not in (*said, "provenance")}
        record["provenance"]["files"] = digests(record, out)
        write(path, with_digest(said | rest, record))
    return len(cells)


def write(path: Path, record: dict) -> None: write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())


def settings_now(path: Path, dataset: str) -> list:
    "What today's measurements of this name would be known by, in both profiles, or the old ones with today's model."
    def note(path, settings, *rest): raise StopIteration(settings)
    found = []
    for quick in (False, True):
        with patch.object(measurements, "cached_measurement", note):
            try: measurements.MEASUREMENTS[path.stem].make(dataset, path.parent, quick)
            except StopIteration as e: found.append(json.loads(json.dumps(e.value)))
            except KeyError: pass # measured by a notebook
    return found or [json.loads(path.read_text())["settings"] | dict(setup=setup_identity(setup_for(dataset)))]


def grow_measurement(path: Path) -> None:
    record = json.loads(path.read_text())
    dataset = dataset_in(record["settings"])
    fitting = [s for s in settings_now(path, dataset) if older(s) == older(record["settings"])]
    if not fitting: raise ValueError(f"{path}: measured with other settings than today's")
    if not agree(fitting[0], record["settings"]):
        write(path, with_digest(dict(settings=fitting[0], found=record["found"]), record))


def main(folders: list) -> None:
    tasks = []
    for out in map(Path, folders):
        todo = {}
        for record in stored_records(out):
            cell = Cell(**record["key"])
            if "parent" not in record: todo.setdefault(cell.parent_cell(), []).append(cell)
        tasks += [(str(bare), grow, (bare, cells, out)) for bare, cells in todo.items()]
        found = {p: json.loads(p.read_text()) for p in out.glob("*.json")}
        tasks += [(str(p), grow_measurement, (p,)) for p, content in found.items() if "settings" in content]
    troubles = []
    with Workers(2) as pool:
        for n, (i, cells) in enumerate(pool.run(tasks, troubles.append), 1):
            print(f"{n}/{len(tasks)} {tasks[i][0]}: {cells or 'a measurement'}", flush=True)
    if troubles: raise SystemExit("\n".join(map(str, troubles)))


if __name__ == "__main__": main(sys.argv[1:])
