"""Teacher, S4S and S4S-Alt killed with SIGKILL, at random moments and in the middle of writing a file: what is there
after going on is, bit for bit, what an undisturbed run gives."""
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

# A process that has imported everything and then, for every line "folder method when last", forks one that does the
# work: teacher pairs, then S4S or S4S-Alt, slowed down so that there is something to kill. With last = K > 0 it kills
# itself at its K-th file, before or after that file gets its name. A digest of all it made goes to <folder>.result.
NURSERY = """
import os, signal, sys, time
from pathlib import Path
import torch
import s4s_nb.files.verified
import s4s_nb.solver
from s4s_nb.denoise import GaussianMixture
from s4s_nb.files.verified import digest
from s4s_nb.grids import time_edm, time_logsnr
from s4s_nb.judging.distance import L2
from s4s_nb.learning.alternate import s4s_alt
from s4s_nb.learning.coefficients import S4SConfig, s4s
from s4s_nb.learning.pairs import teacher_pairs
from s4s_nb.schedule import EDMSchedule
from s4s_nb.solvers.multistep import ipndm, unipc

torch.set_num_threads(1)
torch.optim.Adam([torch.zeros(1)])   # so that the first life does not have to import what optimizers need

class Slow(GaussianMixture):
    pause = .005
    def forward(self, x_t, t, **cond):
        time.sleep(Slow.pause)
        return super().forward(x_t, t, **cond)

def deadly(when, last, replace=os.replace):
    count = 0
    def named(a, b):
        nonlocal count
        count += 1
        if when == "after": replace(a, b)
        if count == last: os.kill(os.getpid(), signal.SIGKILL)
        if when == "before": replace(a, b)
    return named

def life(folder, method, when, last):
    s4s_nb.files.verified.os.replace = deadly(when, last)
    edm = EDMSchedule()
    gm = Slow(edm, [.5, .5], [[-1., .5, 0.], [1., 0., .5]], [[.2, .3, .1], [.3, .2, .4]])
    teacher = unipc(edm, time_logsnr(edm, 20))
    train, valid = (teacher_pairs(gm, teacher, 60, seed, chunk=10, cache=folder, progress=False)
                    for seed in (1_000_000, 2_000_000))
    Slow.pause = .0002
    learner, epochs, more = (s4s, 6, {}) if method == "s4s" else (s4s_alt, 1, dict(rounds=2, turn=1))
    out = learner(gm, ipndm(edm, time_edm(edm, 4)), train, valid, L2(), S4SConfig(epochs=epochs, radius=.02),
                  checkpoint=folder + "/learning", progress=False, **more)
    made = dict(x_T=train.x_T, x_0=train.x_0, v_0=valid.x_0, w=out.learned.w, t=out.learned.t,
                theta=torch.stack(out.history["theta"]))
    made |= {k: torch.tensor(out.history[k]) for k in ("train", "valid", "phase")}
    Path(folder + ".result").write_text(digest(made))

print("ready", flush=True)
for line in sys.stdin:
    folder, method, when, last = line.split()
    if (child := os.fork()) == 0:
        life(folder, method, when, int(last))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    "Lives, one after the other."
    def __init__(self):
        env = os.environ | dict(OMP_NUM_THREADS="1")
        self.process = subprocess.Popen([sys.executable, "-W", "error", "-c", NURSERY], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == "ready\n"
    def begin(self, folder, method, when="before", last=0) -> int:
        "Starts one; its process."
        print(folder, method, when, last, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())
    def end(self) -> int:
        "Its exit code."
        return int(self.process.stdout.readline())
    def whole(self, folder, method) -> str:
        "A life until the end: its result. (Warnings are errors: a half-written file would be noticed.)"
        self.begin(folder, method)
        assert self.end() == 0
        return Path(f"{folder}.result").read_text()


@pytest.fixture(scope="module")
def nursery():
    n = Nursery()
    yield n
    n.process.stdin.close()
    assert n.process.wait(10) == 0


WHOLE = 1 + 12 + 1 + 1 # the model, chunks; the model again, the checkpoint, which is written six times

def files(folder): return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


@pytest.fixture(scope="module", params=["s4s", "s4s_alt"])
def method(request): return request.param


@pytest.fixture(scope="module")
def undisturbed(nursery, method, tmp_path_factory):
    "(result, seconds) of a run that nobody kills."
    folder, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    result = nursery.whole(folder, method), time.monotonic() - began
    assert len(files(folder)) == WHOLE
    return result


def test_killed_at_random_moments(nursery, method, undisturbed, tmp_path, notes):
    "Killed again and again, always going on; a life lasts at most a third of what an undisturbed run takes."
    result, seconds = undisturbed
    rng, kept, ends = random.Random(0), [], []
    for _ in range(8):
        child = nursery.begin(tmp_path / "run", method)
        time.sleep(rng.uniform(0, seconds / 3))
        with suppress(ProcessLookupError): os.kill(child, signal.SIGKILL)   # it may have come to its end
        ends.append(nursery.end())
        kept.append(len(files(tmp_path)))
    assert ends.count(-signal.SIGKILL) >= 4 and kept == sorted(kept) and kept[-1] > 0
    assert nursery.whole(tmp_path / "run", method) == result
    notes.append(f"teacher and {method}: killed {ends.count(-9)} times at random ({kept} files kept), same bits")


@pytest.mark.parametrize("when, last", [("before", 1), ("after", 5), ("before", 13), ("before", 15), ("after", 19)])
def test_killed_while_writing(when, last, nursery, method, undisturbed, tmp_path):
    "Killed when a file is written but has no name yet, and when it just got it."
    nursery.begin(tmp_path / "run", method, when, last)
    assert nursery.end() == -signal.SIGKILL
    assert len(files(tmp_path)) == min(last - (when == "before"), WHOLE)
    assert nursery.whole(tmp_path / "run", method) == undisturbed[0]
