"A name or a value that a notebook cannot use ends in one line, before anything is done."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from s4s_nb.lab.parameters import check_parameters, literals

ROOT = Path(__file__).resolve().parents[2]
RUN_BY_PAPERMILL = [p.relative_to(ROOT / "nbs").as_posix() for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
                    if '"parameters"' in p.read_text() and ".ipynb_checkpoints" not in p.parts]

def parameters(notebook):
    "The source of the cell with the parameters."
    cells = json.loads((ROOT / "nbs" / notebook).read_text())["cells"]
    (found,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return found

def injected(**given): return "# Parameters\n" + "".join(f"{k} = {v!r}\n" for k, v in given.items())

def said(notebook, **given):
    with pytest.raises(ValueError) as e: check_parameters(dict(In=["", parameters(notebook), injected(**given)]))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_there_are_four(): assert len(RUN_BY_PAPERMILL) >= 4

@pytest.mark.parametrize("notebook, wrong, likely", [
    ("experiments.ipynb", dict(nfe=4), "nfes"), ("experiments.ipynb", dict(solver="ipndm"), "solvers"),
    ("experiments.ipynb", dict(method="s4s"), "methods"), ("experiments.ipynb", dict(schedule="edm"), "schedules"),
    ("experiments.ipynb", dict(seed=3), "train_seeds"), ("experiments.ipynb", dict(n_sample=9), "n_samples"),
    ("experiments.ipynb", dict(guidence=2.), "guidance"), ("experiments.ipynb", dict(Quick=True), "quick"),
    ("experiments.ipynb", dict(data_set="digits"), "dataset"), ("experiments.ipynb", dict(epoch=None), "epochs"),
    ("ablations.ipynb", dict(table="table9"), "tables"), ("ablations.ipynb", dict(worker=1), "workers"),
    ("lab/learning_study.ipynb", dict(n_pairs=5, nfe="4"), "nfes"),
    ("lab/learning_study.ipynb", dict(outs="a"), "out"),
    ("models/train_digits.ipynb", dict(iteration=5), "iterations"),
    ("models/train_digits.ipynb", dict(seeds=1), "seed")])
def test_a_name_that_does_not_exist_names_the_one_that_does(notebook, wrong, likely):
    message = said(notebook, **wrong)
    for name, value in wrong.items(): assert f"{name}={value!r}: there is no such parameter" in message
    assert f"did you mean {likely}" in message and all(k in message for k in literals(parameters(notebook)))

@pytest.mark.parametrize("notebook, wrong, expected", [
    ("experiments.ipynb", dict(smoke="yes"), "True or False"), ("experiments.ipynb", dict(quick=1), "True or False"),
    ("ablations.ipynb", dict(quick="no"), "True or False"), ("ablations.ipynb", dict(smoke="false"), "True or False"),
    ("lab/learning_study.ipynb", dict(epochs=None), "a whole number"),
    ("lab/learning_study.ipynb", dict(n_train="many"), "a whole number"),
    ("models/train_digits.ipynb", dict(iterations="12k"), "a whole number"),
    ("models/train_digits.ipynb", dict(n_samples=1.5), "a whole number"),
    ("models/train_digits.ipynb", dict(quick="on"), "True or False")])
def test_a_switch_and_a_number_are_what_they_should_be(notebook, wrong, expected):
    ((name, value),) = wrong.items()
    assert said(notebook, **wrong).startswith(f"{name}={value!r}: expected {expected}")

@pytest.mark.parametrize("notebook", RUN_BY_PAPERMILL)
def test_what_a_notebook_knows_is_accepted(notebook):
    "Its own defaults; and nothing is asked of somebody who runs it by hand."
    known = literals(parameters(notebook))
    check_parameters(dict(In=["", parameters(notebook), injected(**known)]))
    check_parameters(dict(In=["", parameters(notebook), "nfe = 4"]))

@pytest.mark.parametrize("notebook", RUN_BY_PAPERMILL)
def test_papermill_ends_in_that_line(notebook, tmp_path):
    papermill, values = Path(sys.executable).parent / "papermill", ["-p", "ot", "here"]
    command = [papermill, ROOT / "nbs" / notebook, "--no-progress-bar", *values]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True,
                          text=True)
    told = done.stderr.split("Exception encountered")[-1]
    assert done.returncode != 0 and "ValueError: ot='here': there is no such parameter; did you mean out?" in told
    assert "Traceback" not in told and list(tmp_path.iterdir()) == []
