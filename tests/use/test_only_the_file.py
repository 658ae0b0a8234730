"""The numpy sampler of the page, as it stands there, in a process that can import neither this package nor torch."""
import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s4s_nb.denoise import GaussianMixture, sample_noise
from s4s_nb.grids import time_edm
from s4s_nb.schedule import EDMSchedule, FlowSchedule, VPSchedule
from s4s_nb.solver import Solver
from s4s_nb.solvers.families import SOLVERS
from s4s_nb.solvers.multistep import dpm_solver, unipc
from s4s_nb.use.pack import Pack

PAGE = Path(__file__).resolve().parents[2] / "nbs/use/03_only_the_file.ipynb"

# An exact mixture and the isolation, in numpy. Blocked modules raise, whoever asks for them.
PROGRAM = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "s4s_nb", "scipy", "diffusers"): raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
for name in ("torch", "s4s_nb"):
    try: __import__(name)
    except ImportError as e: assert "is blocked" in str(e)
    else: raise SystemExit(name + " could be imported")
{sampler}
job = json.load(open(sys.argv[1]))
weights, means, stds = (np.array(v) for v in job["mixture"])
def denoise(x, t, alpha, sigma):
    v = alpha**2 * stds**2 + sigma**2
    d = x[:, None] - alpha * means
    log = np.log(weights) - ((np.log(v) + d**2 / v).sum(-1)) / 2
    r = np.exp(log - log.max(1, keepdims=True))
    r = r / r.sum(1, keepdims=True)
    return (r[..., None] * (means + alpha * stds**2 / v * d)).sum(1)
out = [sample(denoise, np.array(job["start"]), load(sys.argv[2], nfe, w)).tolist() for nfe, w in job["solvers"]]
print(json.dumps(dict(out=out, loaded=[m for m in sys.modules if m.split(".")[0] in ("torch", "s4s_nb")])))
"""
MIXTURE = [.5, .3, .2], [[.8, -.5], [-.7, .4], [.1, .9]], [[.3, .45], [.5, .3], [.35, .33]]


@pytest.fixture(scope="module")
def sampler():
    "The code cell of the page"
    found = ["".join(c["source"]) for c in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
             if c["cell_type"] == "code" and "def sample(" in "".join(c["source"])]
    assert len(found) == 1
    return found[0]

def test_twenty_lines_of_numpy(sampler):
    body = [n for n in ast.parse(sampler).body if not isinstance(n, ast.Import)]
    lines = [line for node in body for line in ast.unparse(node).splitlines()]
    written = [s for s in sampler.splitlines() if s.strip() and not s.startswith(("import", "#"))]
    assert len(body) == 2 and len(lines) <= 20 and len(written) <= 20
    imported = {a.name for n in ast.walk(ast.parse(sampler)) if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"json", "numpy"} and "from " not in sampler

def tables(schedule):
    "Every family, and every field that a table can have"
    for family in SOLVERS.values():
        steps = family.steps(6, family.order)
        yield family.make(schedule, time_edm(schedule, len(steps)), family.order, steps)
    t = time_edm(schedule, 6)
    shown = t[:-1] * torch.linspace(1, .95, 6).double()
    for prediction in ("noise", "data"):
        s = unipc(schedule, t, 3, prediction=prediction)
        yield s
        yield replace(s, start_factor=.97, end_factor=1.02, a=torch.linspace(.98, 1.02, 6).double())
        yield s.decouple(schedule, shown)
        yield Solver.from_sampler(s.decouple(schedule, shown).run, schedule, prediction=prediction)
        yield replace(s, w_free=s.w_free & (torch.rand(s.w.shape, generator=torch.Generator().manual_seed(0)) < .7))
    yield replace(dpm_solver(schedule, t, 2), meta=dict(anything=[1, "x"]))

# a flow from t = 0.99: nearer to 1 an image is read off a state that holds a thousandth of it, and rounding grows
SCHEDULES = VPSchedule(), EDMSchedule(), FlowSchedule(t_max=.99)

@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_equal_to_solver(sampler, schedule, tmp_path):
    solvers = {(s.nfe, float(i)): s for i, s in enumerate(tables(schedule))}
    mixture, start = GaussianMixture(schedule, *MIXTURE), schedule.prior_std * sample_noise(range(8), (2,)).double()
    Pack(solvers, "all kinds").save(tmp_path / "pack.json")
    (tmp_path / "job.json").write_text(json.dumps(dict(mixture=MIXTURE, start=start.tolist(), solvers=list(solvers))))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("{sampler}", sampler))
    command = [sys.executable, "-I", str(program), str(tmp_path / "job.json"), str(tmp_path / "pack.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["loaded"] == [] and len(answer["out"]) == len(solvers) >= 20
    for key, out in zip(solvers, answer["out"]):
        want = solvers[key](mixture, start)
        off = (torch.tensor(out, dtype=torch.float64) - want).abs().max() / want.abs().max()
        assert off < 1e-12, (solvers[key], float(off))
