"""Our tables against the published samplers: the same states and the same network calls in the same order.

Every row of a golden file is either compared or named in `LATER` with the reason. A published option that
changes the network's answer and not the solver (a free first step, dynamic thresholding) is a denoiser around
the denoiser.
"""
from collections import Counter, defaultdict

import pytest
import torch
from golden_data import FOLDER, SCHEDULES, arrays, deviation, mixture, normals, rows, schedule, start

from s4s_nb.classical import ddim, dpm_solver, ipndm, unipc
from s4s_nb.denoise import RecordingDenoiser, WrappedDenoiser, kernel_at
from s4s_nb.discretize import time_edm, time_logsnr, time_power, time_quadratic, time_uniform
from s4s_nb.schedule import VPSchedule
from s4s_nb.singlestep import heun

TOLERANCE = 1e-9 # |ours - theirs| <= TOLERANCE * max(1, |theirs|), float64

# ------------------------------------------------------------------------------------------------------------
# Which rows, and which solver
# ------------------------------------------------------------------------------------------------------------

# Rows of solvers that the package does not have (yet): how to tell them.
LATER = {
    "dpm_solver": {
        "single-step": lambda c: c["method"] != "multistep",
        "taylor": lambda c: c["stype"] == "taylor",
    },
    "dpm_solver_3m_corrected": {},
    "unipc": {"vary_coeff": lambda c: c["variant"] == "vary_coeff"}, # an index slip, as published: order 1
    "diff_sampler": {
        "DPM-2": lambda c: c["solver"] == "dpm_2",
        "iPNDM-v": lambda c: c["solver"] == "ipndm_v",
        "DEIS": lambda c: c["solver"] == "deis",
        "EDM's own sampler": lambda c: c["solver"].startswith("nvlabs"), # no grid stored; ends at sigma = 0
    },
    "ld3": {"single-step": lambda c: c["solver"] == "dpm_single2"},
}
# Rows of a file (all, compared) in the folders we know; another folder is only asked for its coverage.
KNOWN = {
    "dpm_solver": {337: 337, 1828: 908},
    "dpm_solver_3m_corrected": {80: 80, 320: 320},
    "unipc": {468: 468, 2314: 1780},
    "diff_sampler": {264: 264, 2256: 1776},
    "ld3": {512: 512, 2560: 2368},
}


def later(row) -> str|None:
    "The reason why a row is not compared, or None"
    return next((why for why, is_it in LATER[row.file].items() if is_it(row.config)), None)


PREDICTION = {"dpmsolver": "noise", "dpmsolver++": "data",
              "noise_prediction": "noise", "data_prediction": "data"}

def our_dpm_solver(c, schedule, t):
    "DPM-Solver's own file lowers the final order only below 10 steps; ours does it whenever it is asked to."
    lower = c["lof"] and c["steps"] < 10
    return dpm_solver(schedule, t, c["order"], PREDICTION[c["algo"]], lower, published="D2_factor" not in c)

def our_unipc(c, schedule, t):
    return unipc(schedule, t, c["order"], c["variant"], PREDICTION[c["algo"]], lower_order_final=c["lof"])

def our_diff_sampler(c, schedule, t):
    options = dict(prediction="data" if c.get("predict_x0") else "noise",
                   lower_order_final=c.get("lower_order_final"))
    match c["solver"]:
        case "euler": return ddim(schedule, t)
        case "heun": return heun(schedule, t)
        case "ipndm": return ipndm(schedule, t, c["max_order"])
        case "dpm_pp": return dpm_solver(schedule, t, c["max_order"], **options)
        case "unipc": return unipc(schedule, t, c["max_order"], c["variant"], **options)

def our_ld3(c, schedule, t):
    match c["solver"]:
        case "euler": return ddim(schedule, t)
        case "ipndm": return ipndm(schedule, t, c["order"])
        case "dpm_pp": return dpm_solver(schedule, t, c["order"], "data", lower_order_final=True)
        case "unipc": return unipc(schedule, t, c["order"], c["variant"], "data", lower_order_final=True)

OURS = {"dpm_solver": our_dpm_solver, "dpm_solver_3m_corrected": our_dpm_solver, "unipc": our_unipc,
        "diff_sampler": our_diff_sampler, "ld3": our_ld3}


class FreeFirstStep(WrappedDenoiser):
    "diff-sampler's `afs`: at the first time, the direction x/sqrt(1+t^2) stands in for the network's."
    def forward(self, x_t, t, **cond):
        if float(t) < self.schedule.t_max * (1 - 1e-9): return self.denoiser(x_t, t, **cond)
        return x_t - t * x_t / (1 + t**2)**.5

class Thresholded(WrappedDenoiser):
    "Dynamic thresholding, as diff-sampler does to every x_0: clip at the 99.5 % quantile, rescale."
    def forward(self, x_t, t, **cond):
        x_0 = self.denoiser(x_t, t, **cond)
        s = x_0.abs().quantile(.995, dim=1, keepdim=True).clamp(min=1)
        return x_0.clamp(-s, s) / s


def label(row) -> str:
    "Schedule, solver, prediction and order: one test per label"
    c = row.config
    what = [c.get("solver"), c.get("algo"), c.get("variant")]
    if "predict_x0" in c: what.append("data" if c["predict_x0"] else "noise")
    order = c.get("order", c.get("max_order"))
    return "-".join(str(w) for w in [row.file, row.sched, *what, order] if w is not None)


def grouped() -> dict[str, list]:
    "The rows to compare, by label"
    groups = defaultdict(list)
    for file in OURS:
        for row in rows(file):
            if not later(row): groups[label(row)].append(row)
    return dict(groups)

GROUPS = grouped()
COMPARED, WORST = Counter(), Counter() # filled while the tests run: rows, and worst deviation, per file

# ------------------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------------------

def mismatch(row) -> str|None:
    "What differs between a stored row and our solver, in words, or None. Notes the worst deviation."
    c, t = row.config, row.grid
    calls_t, calls_x = row.eval_t, row.eval_x
    if row.file == "ld3" and c["solver"] in ("dpm_pp", "unipc"):
        calls_t, calls_x = calls_t[:-1], calls_x[:-1] # LD3 calls the network once more on its result, to no effect
    solver = OURS[row.file](c, schedule(row.sched), t)
    if c.get("decoupled"): solver = solver.decouple(schedule(row.sched), calls_t)
    recorder = RecordingDenoiser(mixture(row.sched))
    denoiser = FreeFirstStep(recorder) if c.get("afs") else recorder
    if c.get("thr") and c.get("predict_x0"): denoiser = Thresholded(denoiser)

    x_T = normals(row.sched) * t[0] if row.file == "diff_sampler" else start(row.sched)
    states = {}
    final = solver(denoiser, x_T, callback=lambda n, x: states.update({n: x[:2]}))
    if len(recorder.calls) != len(calls_t): return f"{len(recorder.calls)} network calls, expected {len(calls_t)}"
    off = {
        "final state": deviation(final, row.final),
        "times of the calls": deviation(torch.stack([time for time, _ in recorder.calls]), calls_t),
        "inputs of the calls": deviation(torch.stack([x[:2] for _, x in recorder.calls]), calls_x),
    }
    if len(row.traj): # a state is the end of a step, and no stage inside one, if a row starts from it
        ends = [states[n] for n in sorted({*solver.base, solver.nfe})]
        off["states"] = deviation(torch.stack(ends), row.traj)
    WORST[row.file] = max(WORST[row.file], *off.values())
    bad = [f"{name} off by {d:.1e}" for name, d in off.items() if not d <= TOLERANCE]
    return ", ".join(bad) or None


@pytest.mark.parametrize("name", GROUPS)
def test_rows(name):
    "Every stored row of one solver on one schedule"
    wrong = [f"{row}: {why}" for row in GROUPS[name] if (why := mismatch(row))]
    COMPARED[GROUPS[name][0].file] += len(GROUPS[name])
    assert not wrong, f"{len(wrong)} of {len(GROUPS[name])} rows differ:\n" + "\n".join(wrong[:10])


def test_every_row_is_accounted_for(request, notes):
    "Every row is compared or left out by name, every family was met, and the counts are the known ones."
    selected = [i for i in request.session.items if i.originalname == "test_rows"]
    if len(selected) < len(GROUPS): pytest.skip("only some of the rows were selected")
    for file in OURS:
        reasons = Counter(later(row) for row in rows(file))
        compared, total = reasons.pop(None), sum(reasons.values())
        total += compared
        rest = ", ".join(f"{n} {why}" for why, n in sorted(reasons.items()))
        notes.append(f"golden {file}: {COMPARED[file]} of {total} rows compared, worst deviation "
                     f"{WORST[file]:.1e}" + (f"; later: {rest}" if rest else ""))
        assert COMPARED[file] == compared > 0
        assert KNOWN[file].get(total, compared) == compared, f"{file}: {compared} of {total} rows compared"
    assert FAMILIES <= set(GROUPS), f"not in this folder: {sorted(FAMILIES - set(GROUPS))}"

FAMILIES = {
    *(f"dpm_solver-{s}-{a}-{o}" for s in SCHEDULES for a in ("dpmsolver", "dpmsolver++") for o in (1, 2, 3)),
    *(f"dpm_solver_3m_corrected-{s}-{a}-3" for s in SCHEDULES for a in ("dpmsolver", "dpmsolver++")),
    *(f"unipc-{s}-{a}_prediction-{b}-{o}"
      for s in SCHEDULES for a in ("data", "noise") for b in ("bh1", "bh2") for o in (1, 2, 3)),
    *(f"diff_sampler-ve_edm-{s}" for s in ("euler", "heun", "ipndm-2", "ipndm-3", "ipndm-4")),
    *(f"diff_sampler-ve_edm-{s}-{a}-{o}"
      for s in ("dpm_pp", "unipc-bh1", "unipc-bh2") for a in ("data", "noise") for o in (1, 2, 3)),
    *(f"ld3-{s}-ipndm-{o}" for s in SCHEDULES for o in (2, 3, 4)),
    *(f"ld3-{s}-{m}-{o}" for s in SCHEDULES for m in ("dpm_pp", "unipc-bh1", "unipc-bh2") for o in (1, 2, 3)),
    "ld3-ve_edm-euler-1",
}


def test_the_comparison_notices_a_wrong_weight(monkeypatch):
    "A solver of the wrong order, and one that calls the network once too often, are reported."
    row = next(r for r in GROUPS["dpm_solver-vp_linear-dpmsolver++-3"] if r.steps == 10)
    assert mismatch(row) is None
    monkeypatch.setitem(OURS, "dpm_solver", lambda c, s, t: dpm_solver(s, t, 2, "data"))
    assert "final state off by" in mismatch(row)
    monkeypatch.setitem(OURS, "dpm_solver", lambda c, s, t: heun(s, t))
    assert "20 network calls, expected 10" in mismatch(row)

# ------------------------------------------------------------------------------------------------------------
# Schedules and time grids
# ------------------------------------------------------------------------------------------------------------

def check(name: str, ours, theirs):
    d = deviation(ours, theirs)
    assert d <= TOLERANCE, f"{name}: off by {d:.1e}"

@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    "alpha, sigma, lambda, its inverse, and the mixture's x_0 and noise at the stored points"
    z, s = arrays("problem"), schedule(name)
    t, lmbda, x, x_0, eps = (torch.from_numpy(z[f"{name}__chk_{k}"]) for k in ("t", "lambda", "x", "x0", "eps"))
    assert len(t) > 10
    for k, ours in dict(alpha=s.alpha(t), sigma=s.sigma(t), t_from_lambda=s.t(lmbda)).items():
        check(f"{name} {k}", ours, z[f"{name}__chk_{k}"])
    check(f"{name} lambda", s.lmbda(t), lmbda)
    ours = mixture(name)(x, t)
    alpha_t, sigma_t = kernel_at(s, t, x)
    check(f"{name} x_0", ours, x_0)
    check(f"{name} eps", (x - alpha_t * ours) / sigma_t, eps)

def test_discrete_schedule_knots():
    z, s = arrays("problem"), schedule("vp_sd")
    check("log alpha", s.alpha(torch.from_numpy(z["vp_sd__t_array"])).log(), z["vp_sd__log_alpha_array"])


def vp_clock(rho: float):
    """diff-sampler's `time_uniform`: u linear in u^(1/rho) from 1 to 0.001, and sigma^2 + 1 = exp(d u^2/2 + m u)
    fitted to sigma = 80 and 0.002 at the ends. (m comes out slightly negative: not quite a VP schedule.)"""
    e = 1e-3
    low, high = torch.tensor([.002, 80.], dtype=torch.float64).square().log1p()
    d = 2 * (high - low / e) / (1 - e)
    m = high - d / 2
    def grid(schedule, n):
        u = time_power(VPSchedule(t_min=e, t_max=1.), n, rho)
        return (d * u**2 / 2 + m * u).expm1().sqrt()
    return grid

def power(rho): return lambda s, n: time_power(s, n, rho)

GRIDS = { # source, rule[, rho] -> our function of (schedule, n)
    ("dpm", "time_uniform"): time_uniform,
    ("dpm", "time_quadratic"): power(2.),
    ("dpm", "logSNR"): time_logsnr,
    ("ld3", "time_uniform"): time_uniform,
    ("ld3", "time_quadratic"): time_quadratic,
    ("ld3", "logSNR"): time_logsnr,
    ("ld3", "edm"): power(7.), # on t itself, also for VP
    ("dmn_origin", "edm_rho7_in_sigma"): time_edm,
    ("v3codebase", "edm"): time_edm,
    ("diffsampler", "polynomial", "rho5"): power(5.),
    ("diffsampler", "polynomial", "rho7"): time_edm,
    ("diffsampler", "logsnr", "rho7"): time_logsnr,
    **{("diffsampler", "time_uniform", f"rho{rho}"): vp_clock(rho) for rho in (1, 2, 7)},
}

@pytest.mark.parametrize("rule", GRIDS, ids="-".join)
def test_grid(rule):
    "Every stored grid of one rule, at every number of steps and on every schedule"
    met = 0
    for key, theirs in arrays("schedules").items():
        name, *rest, n = key.split("__")
        if tuple(rest) != rule: continue
        check(key, GRIDS[rule](schedule(name), int(n[1:])), theirs)
        met += 1
    assert met > 0, f"no grid of the rule {rule} in {FOLDER}"

def test_every_grid_has_a_rule():
    assert {tuple(k.split("__")[1:-1]) for k in arrays("schedules")} == set(GRIDS)

def test_rows_use_these_grids():
    "The grid stored with a row is the grid of the rule that the row names."
    met = 0
    for file in ("dpm_solver", "dpm_solver_3m_corrected", "unipc", "ld3"):
        source = "ld3" if file == "ld3" else "dpm"
        for row in (r for name in GROUPS for r in GROUPS[name] if r.file == file):
            skip = row.config["skip"]
            if skip == "custom": continue # irregular, only stored
            rule = GRIDS.get((source, skip), time_edm)
            check(str(row), rule(schedule(row.sched), row.steps), row.grid)
            met += 1
    assert met > 100
