"""A saved solver is the solver: it replays bit for bit elsewhere, and a damaged file is refused in words."""
import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from golden_data import mixture, schedule, start

import s4s_nb.files.verified
import s4s_nb.solver
from s4s_nb.grids import time_edm, time_logsnr
from s4s_nb.solver import Solver
from s4s_nb.solvers.multistep import ddim, ipndm, unipc
from s4s_nb.solvers.singlestep import heun

# Everything a fresh process needs besides the solver file: it makes no solver itself.
REPLAY = """
import sys, torch
from golden_data import mixture, start
from s4s_nb.solver import Solver
jobs = zip(sys.argv[2::2], sys.argv[3::2])
torch.save({file: Solver.load(file)(mixture(name), start(name)) for file, name in jobs}, sys.argv[1])
"""
PATHS = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(s4s_nb.solver.__file__))])

def edm(n): return schedule("ve_edm"), time_edm(schedule("ve_edm"), n)
def sd(n): return schedule("vp_sd"), time_logsnr(schedule("vp_sd"), n)

def learned() -> Solver:
    "What learning leaves: weights with all their digits, and decoupled network times."
    g = torch.Generator().manual_seed(0)
    s = ipndm(*edm(6), 4)
    noise = 1e-2 * torch.randn(s.w.shape, dtype=torch.float64, generator=g)
    t_eval = s.t_eval * (1 + 1e-2 * torch.rand(6, dtype=torch.float64, generator=g))
    return Solver.tabulate(schedule("ve_edm"), s.t, s.w + noise, t_eval=t_eval, name="learned", meta={"seed": 0})

SOLVERS = {
    "ipndm": ("ve_edm", lambda: ipndm(*edm(10), 3)),
    "learned": ("ve_edm", learned),
    "unipc": ("vp_sd", lambda: unipc(*sd(7), 3, "bh2")),
    "unipc_noise": ("ve_edm", lambda: unipc(*edm(5), 2, "bh1", "noise", lower_order_final=False)),
    "heun": ("ve_edm", lambda: heun(*edm(5))),
}


def test_bit_exact_in_a_new_process(tmp_path):
    "Solvers with and without corrector, single-step, learned and decoupled; same bits out as here."
    jobs = {}
    for name, (problem, make) in SOLVERS.items():
        make().save(tmp_path / f"{name}.json")
        jobs[str(tmp_path / f"{name}.json")] = problem, make()(mixture(problem), start(problem))
    out = tmp_path / "replayed.pt"
    files = [arg for file, (problem, _) in jobs.items() for arg in (file, problem)]
    run = subprocess.run([sys.executable, "-c", REPLAY, str(out), *files], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": PATHS})
    assert run.returncode == 0, run.stderr
    replayed = torch.load(out, weights_only=True)
    for file, (_, here) in jobs.items(): assert torch.equal(replayed[file], here), file


@pytest.mark.parametrize("name", SOLVERS)
def test_every_number_survives(name, tmp_path):
    "Each tensor comes back with the same bits, type and shape; saving again gives the same file."
    solver = SOLVERS[name][1]()
    solver.save(tmp_path / "a.json")
    back = Solver.load(tmp_path / "a.json")
    for f in fields(solver):
        here, there = getattr(solver, f.name), getattr(back, f.name)
        if torch.is_tensor(here): assert here.dtype == there.dtype and torch.equal(here, there), f.name
        else: assert here == there, f.name
    back.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()

@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("nfe", [3, 6, 10])
def test_a_file_is_small_and_readable(order, nfe, tmp_path):
    "Linear multistep, at most 10 evaluations: less than 4 kB, on lines a person can read."
    g = torch.Generator().manual_seed(order)
    for grid in (edm, sd): # with 17 random digits in every weight, as after learning
        s = (ipndm(*grid(nfe), order) if order > 1 else ddim(*grid(nfe)))
        w = s.w * (1 + .1 * torch.rand(s.w.shape, dtype=torch.float64, generator=g))
        Solver.tabulate(grid(nfe)[0], s.t, w, name=f"ipndm-{order}-s4s").save(tmp_path / "s.json")
        text = (tmp_path / "s.json").read_text()
        assert len(text.encode()) < 4000, len(text.encode())
        assert json.loads(text)["nfe"] == nfe and text.count("\n") > nfe


# ------------------------------------------------------------------------------------------------------------
# Damaged files
# ------------------------------------------------------------------------------------------------------------

def damaged(change):
    "A file whose JSON went through `change(dict)` on the way"
    def write(path, text):
        d = json.loads(text)
        d = change(d) or d
        path.write_text(json.dumps(d))
    return write

def without(key): return damaged(lambda d: d.pop(key) and None)
def with_(**new): return damaged(lambda d: d | new)
def nan(key):
    def change(d):
        row = d[key][-1]
        if isinstance(row, list): row[0] = float("nan")
        else: d[key][-1] = float("nan")
    return damaged(change)

DAMAGE = { # how the file is spoiled; a word that the message must contain
    "empty": (lambda p, s: p.write_text(""), "not a solver file"),
    "not JSON": (lambda p, s: p.write_text("PK\x03\x04 no json"), "not a solver file"),
    "not text": (lambda p, s: p.write_bytes(bytes(range(256))), "not a solver file"),
    "cut": (lambda p, s: p.write_text(s[:len(s) // 2]), "not a solver file"),
    "a list": (lambda p, s: p.write_text("[1, 2]"), "a JSON object"),
    "a number": (lambda p, s: p.write_text("3"), "a JSON object"),
    "other JSON": (lambda p, s: p.write_text('{"a": 1}'), "format"),
    "other format": (with_(format="safetensors"), "format"),
    "newer version": (with_(version=99), "99"),
    "no version": (without("version"), "version"),
    "version in words": (with_(version="one"), "one"),
    **{f"no {k}": (without(k), k) for k in ("format", "t", "w", "alpha", "sigma", "w_free", "prediction", "nfe")},
    **{f"NaN in {k}": (nan(k), "NaN") for k in ("t", "w", "alpha", "sigma")},
    "infinite": (lambda p, s: p.write_text(s.replace("80.0", "Infinity", 1)), "Infinity"),
    "overflow": (lambda p, s: p.write_text(s.replace("80.0", "1e999", 1)), "no number"),
    "null": (damaged(lambda d: d["w"][2].__setitem__(0, None)), "damaged"),
    "text among numbers": (damaged(lambda d: d["w"][2].__setitem__(0, "x")), "damaged"),
    "t too short": (damaged(lambda d: d["t"].pop() and None), "t of shape"),
    "w too short": (damaged(lambda d: d["w"].pop() and None), "nfe"),
    "ragged w": (damaged(lambda d: d["w"][1].pop() and None), "damaged"),
    "w a vector": (with_(w=[1., 2., 3., 4.]), "w of shape"),
    "t a number": (with_(t=1.), "damaged"),
    "mask too short": (damaged(lambda d: d["w_free"].pop() and None), "w_free of shape"),
    "mask with another letter": (damaged(lambda d: d["w_free"].__setitem__(0, "?..")), "damaged"),
    "times rise": (damaged(lambda d: d["t"].reverse()), "fall"),
    "prediction unknown": (with_(prediction="velocity"), "velocity"),
    "base out of range": (with_(base=[0, 0, 7, 0]), "base"),
    "base not a list": (with_(base=3), "damaged"),
    "corrector of wrong shape": (with_(c=[[.5, .5]], c_free=["xx"]), "c of shape"),
    "unknown field": (with_(surprise=1), "surprise"),
}
# What belongs together, and what a solver would silently be without: solver, missing field.
PARTS = [("unipc", "c"), ("unipc", "c_free"), ("heun", "base"), ("learned", "t_eval"), ("learned", "alpha_eval"),
         ("learned", "sigma_eval")]

@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_file(how, tmp_path):
    "ValueError, naming the file and what is wrong with it"
    spoil, word = DAMAGE[how]
    path = tmp_path / "broken-solver.json"
    ipndm(*edm(4), 3).save(path)
    spoil(path, path.read_text())
    with pytest.raises(ValueError) as e: Solver.load(path)
    assert word in str(e.value), str(e.value)
    assert "broken-solver.json" in str(e.value), f"does not name the file: {e.value}"

@pytest.mark.parametrize("name, part", PARTS)
def test_missing_part(name, part, tmp_path):
    "Half of a pair is refused rather than completed by a default that means another solver."
    path = tmp_path / "broken-solver.json"
    SOLVERS[name][1]().save(path)
    without(part)(path, path.read_text())
    with pytest.raises(ValueError, match="broken-solver.json"): Solver.load(path)

def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"): Solver.load(tmp_path / "nowhere.json")


# ------------------------------------------------------------------------------------------------------------
# Nothing half-written
# ------------------------------------------------------------------------------------------------------------

class Full:
    "A file on a full disk: takes half of what it is given."
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        raise OSError(28, "No space left on device")

@pytest.mark.parametrize("broken", ["write", "rename"])
def test_failing_save_leaves_what_was_there(broken, tmp_path, monkeypatch):
    "The old file keeps its bytes, and no temporary file stays behind."
    path = tmp_path / "s.json"
    ipndm(*edm(4), 3).save(path)
    before = path.read_bytes()
    def fail(*args): raise OSError(28, "No space left on device")
    if broken == "rename": monkeypatch.setattr(s4s_nb.files.verified.os, "replace", fail)
    else:
        fdopen = os.fdopen
        monkeypatch.setattr(s4s_nb.files.verified.os, "fdopen", lambda *args, **kw: Full(fdopen(*args, **kw)))
    with pytest.raises(OSError, match="No space left"): ipndm(*edm(5), 2).save(path)
    with pytest.raises(OSError, match="No space left"): ipndm(*edm(5), 2).save(tmp_path / "new.json")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
    assert path.read_bytes() == before

def test_impossible_folder(tmp_path):
    "A file where the folder should be"
    (tmp_path / "file").write_text("here first")
    with pytest.raises(OSError): ipndm(*edm(4), 3).save(tmp_path / "file" / "s.json")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "here first"

SUPERUSER = getattr(os, "geteuid", lambda: 0)() == 0

@pytest.mark.skipif(SUPERUSER, reason="the superuser may write anywhere")
def test_read_only_folder(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        with pytest.raises(OSError): ipndm(*edm(4), 3).save(folder / "s.json")
        assert not list(folder.iterdir())
    finally: folder.chmod(0o700)
