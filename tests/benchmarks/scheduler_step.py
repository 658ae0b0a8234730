"""Seconds of a scheduler's step at (1, 4, 64, 64), float32, one thread: `python tests/benchmarks/scheduler_step.py`.

Ratios of one run: a step of S4SScheduler over the same sums written in plain torch, and every multistep scheduler of
diffusers over the S4SScheduler of its own method's table. Rounds are interleaved and the fastest of each counts, so
that a busy machine slows all alike.
"""
import logging
import sys
import time
import warnings

import pandas as pd
import torch

from s4s_nb.files.checks import import_torchvision
from s4s_nb.grids import time_uniform
from s4s_nb.models.pipelines import read_scheduler
from s4s_nb.solvers.multistep import ddim, deis, dpm_solver, ipndm, unipc
from s4s_nb.use.pack import Pack

import_torchvision()
import diffusers  # noqa: E402

from s4s_nb.use.scheduler import S4SScheduler  # noqa: E402

STEPS, ROUNDS, INNER = 10, 40, 3
OWN = diffusers.DDIMScheduler()
_, SCHEDULE, _ = read_scheduler(OWN)
GRID = time_uniform(SCHEDULE, STEPS)
TABLES = {s.name: s for s in (ddim(SCHEDULE, GRID), ipndm(SCHEDULE, GRID, 3), ipndm(SCHEDULE, GRID, 4),
    deis(SCHEDULE, GRID, 3), dpm_solver(SCHEDULE, GRID, 2), dpm_solver(SCHEDULE, GRID, 3), unipc(SCHEDULE, GRID, 3))}
THEIRS = {"DDIM": "DDIM", "PNDM": "iPNDM-4", "IPNDM": "iPNDM-4", "LMSDiscrete": "iPNDM-4", "DEISMultistep": "DEIS-3",
          "DPMSolverMultistep": "DPM-Solver++-2M", "UniPCMultistep": "UniPC-3 bh1", "SASolver": "UniPC-3 bh1"}


def loop_of(scheduler, x, output):
    "A run, without what happens once before it; of schedulers that count from set_timesteps, with it."
    def run():
        scheduler.set_timesteps(STEPS)
        timesteps, y = list(scheduler.timesteps), x
        if hasattr(scheduler, "set_begin_index"): scheduler.set_begin_index(0)
        for t in timesteps: scheduler.scale_model_input(y, t)
        start = time.perf_counter()
        for t in timesteps: y = scheduler.step(output, t, y, return_dict=False)[0]
        return (time.perf_counter() - start) / len(timesteps)
    return run


def bare_loop_of(scheduler, x, output):
    "The sums of the table as one would type them: a line for each, with its numbers."
    scheduler.set_timesteps(STEPS)
    lines = ["def run(x0, F):"]
    for sums, _ in scheduler.run:
        for name, terms in sums:
            (first, c), *rest = terms
            if c == 1 and not rest: lines.append(f"    {name} = {first}")
            else: lines.append(f"    {name} = {first} * {c!r}" if c != 1 else f"    {name} = {first}.clone()")
            lines += [f"    {name}.add_({other}, alpha={c!r})" for other, c in rest]
    exec("\n".join([*lines, f"    return x{STEPS}"]), made := {})
    def run():
        start = time.perf_counter()
        made["run"](x, output)
        return (time.perf_counter() - start) / STEPS
    return run


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    x, output = torch.randn(2, 1, 4, 64, 64)
    ours = {name: S4SScheduler.from_pack(Pack({(STEPS, None): s}), OWN) for name, s in TABLES.items()}
    loops = {("S4SScheduler", name): loop_of(s, x, output) for name, s in ours.items()}
    loops |= {("bare sums", name): bare_loop_of(s, x, output) for name, s in ours.items()}
    loops |= {(f"{k}Scheduler", name): loop_of(getattr(diffusers, f"{k}Scheduler")(), x, output)
              for k, name in THEIRS.items()}
    best = dict.fromkeys(loops, float("inf"))
    for _ in range(ROUNDS):
        for k, loop in loops.items(): best[k] = min(best[k], *(loop() for _ in range(INNER)))
    own = {name: t for (who, name), t in best.items() if who == "S4SScheduler"}
    rows = [dict(scheduler=who, table=name, microseconds=1e6 * t, ratio=own[name] / t)
            for (who, name), t in best.items() if who != "S4SScheduler"]
    frame = pd.DataFrame(rows).rename(columns=dict(ratio="S4SScheduler / this"))
    print(frame.to_string(index=False, float_format="{:.3g}".format))
    bare = frame[frame.scheduler == "bare sums"]["S4SScheduler / this"]
    others = frame[frame.scheduler != "bare sums"]["S4SScheduler / this"]
    slow = bare.max() > 2 or others.max() >= 1
    print(f"at most {bare.max():.2f} times the bare sums; at most {others.max():.2f} of another scheduler's step")
    return int(slow)


if __name__ == "__main__": sys.exit(main())
