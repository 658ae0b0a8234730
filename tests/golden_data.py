"""Reads the outputs of the published samplers: `tests/golden`, or the folder that GOLDEN_DIR names."""
import gzip
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s4s_nb.denoise import GaussianMixture
from s4s_nb.schedule import DiscreteVPSchedule, EDMSchedule, NoiseSchedule, VariancePreserving, VPSchedule
from s4s_nb.solver import Solver
from s4s_nb.solvers.singlestep import dpm_solver_s

SUBSET = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("GOLDEN_DIR") or SUBSET)
SCHEDULES = "vp_linear", "ve_edm", "vp_sd"


@dataclass(frozen=True)
class Row:
    "One configuration of one published sampler and what it did; float64, empty where not stored."
    file: str
    config: dict    # as in FILE.json
    grid: Tensor    # (N+1,) decreasing times
    final: Tensor   # (8, 4) last state of all start points
    eval_t: Tensor  # (C,) time of every network call, in order
    eval_x: Tensor  # (C, 2, 4) its input, first two start points
    traj: Tensor    # (N+1, 2, 4) state after every outer step, first two start points

    @property
    def sched(self) -> str: return self.config["sched"]
    @property
    def steps(self) -> int: return self.config.get("steps", self.config.get("num_steps"))
    def __str__(self):
        "file[row] key=value ...: enough to find the row again"
        fields = " ".join(f"{k}={v}" for k, v in self.config.items() if k not in ("i", "nfe"))
        return f"{self.file}[{self.config['i']}] {fields}"


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    "All arrays of NAME.npz"
    with np.load(FOLDER / f"{name}.npz") as z: return {k: z[k] for k in z.files}

def listed(folder: Path, name: str):
    "What is in NAME.json, or in NAME.json.gz"
    plain, packed = folder / f"{name}.json", folder / f"{name}.json.gz"
    return json.loads(plain.read_text() if plain.exists() else gzip.decompress(packed.read_bytes()))

@cache
def records(name: str) -> list[dict]:
    "The list in NAME.json"
    return listed(FOLDER, name)


def rows(name: str) -> list[Row]:
    "Every row of a sampler file; the flat arrays `X` are cut at `X_off`."
    z = arrays(name)
    def part(key, i):
        off = z[key.split('_')[0] + '_off']
        return torch.from_numpy(z[key][off[i]:off[i + 1]])
    return [Row(name, c, final=torch.from_numpy(z["final"][i]),
                **{k: part(k, i) for k in ("grid", "eval_t", "eval_x", "traj")})
            for i, c in enumerate(records(name))]


@cache
def schedule(name: str) -> NoiseSchedule:
    "Our schedule, from the numbers in problem.json"
    p = json.loads((FOLDER / "problem.json").read_text())["schedules"][name]
    if name == "vp_linear": return VPSchedule(p["beta_0"], p["beta_1"], t_min=p["t_0"], t_max=p["t_T"])
    if name == "ve_edm": return EDMSchedule(p["t_0"], p["t_T"])
    betas = torch.linspace(p["beta_start"]**.5, p["beta_end"]**.5, p["n"], dtype=torch.float64)**2
    return DiscreteVPSchedule((1 - betas).cumprod(0), t_min=p["t_0"], t_max=p["t_T"])


@cache
def mixture(name: str) -> GaussianMixture:
    "The exact denoiser of the stored problem under this schedule"
    p = json.loads((FOLDER / "problem.json").read_text())
    return GaussianMixture(schedule(name), p["weights"], p["means"], p["stds"])


def normals(name: str) -> Tensor:
    "(8, 4) standard normals of the start points"
    return torch.from_numpy(arrays("problem")[f"{name}__z"])

def start(name: str) -> Tensor:
    "(8, 4) start points x_T"
    return torch.from_numpy(arrays("problem")[f"{name}__xT"])


def deviation(ours: Tensor, theirs: Tensor) -> float:
    "max |ours - theirs| / max(1, |theirs|); infinite if the shapes differ or anything is not a number"
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    if ours.shape != theirs.shape: return float("inf")
    d = ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item() if theirs.numel() else 0.
    return d if d == d else float("inf")


# ------------------------------------------------------------------------------------------------------------
# Conventions of the published samplers that ours leaves to the caller
# ------------------------------------------------------------------------------------------------------------

class FittedVP(VPSchedule):
    """The VP clock u that diff-sampler lays under an EDM network, for its `time_uniform` grid and for DEIS:
    sigma^2 + 1 = exp(d u^2/2 + m u), fitted to sigma = 80 at u = 1 and 0.002 at u = 0.001. The fitted m is
    slightly negative, so that it is not quite a VP schedule; ours would refuse it."""
    def __init__(self):
        VariancePreserving.__init__(self, 1e-3, 1.)
        low, high = torch.tensor([.002, 80.], dtype=torch.float64).square().log1p().tolist()
        d = 2 * (high - low / self.t_min) / (1 - self.t_min)
        self.beta_min = high - d / 2
        self.beta_max = self.beta_min + d


def single_step(schedule: NoiseSchedule, t, orders: list, prediction: str, rule) -> Solver:
    """DPM-Solver's single-step methods, with the stages of the published code: no fixed fractions of a step, but
    the points of the grid's own rule on it."""
    inner = [rule(schedule.between(a, b), k)[1:-1] for a, b, k in zip(t, t[1:], orders)]
    return dpm_solver_s(schedule, t, prediction=prediction, orders=orders, inner=inner)
