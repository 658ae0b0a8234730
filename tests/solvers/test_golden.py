"""Our tables against the published samplers: the same states and the same network calls in the same order.

Every row of a golden file is either compared or named in `LEFT_OUT` with the reason. A published option that
changes the network's answer and not the solver (a free first step, dynamic thresholding) is a denoiser around
the denoiser.
"""
from collections import Counter, defaultdict

import pytest
import torch
from golden_data import (
    FOLDER,
    SCHEDULES,
    FittedVP,
    arrays,
    deviation,
    mixture,
    normals,
    records,
    rows,
    schedule,
    single_step,
    start,
)

from s4s_nb.denoise import AnalyticFirstStep, RecordingDenoiser, ThresholdedDenoiser, kernel_at
from s4s_nb.grids import time_edm, time_logsnr, time_power, time_quadratic, time_uniform
from s4s_nb.schedule import EDMSchedule, as_double
from s4s_nb.solver import Solver
from s4s_nb.solvers.multistep import ddim, deis, dpm_solver, ipndm, unipc
from s4s_nb.solvers.search import (
    cheapest_path,
    dmn,
    dmn_objective,
    gits,
    gits_costs,
    insert_step,
    teacher_trajectory,
)
from s4s_nb.solvers.singlestep import dpm2, fast_orders, heun

TOLERANCE = 1e-9 # |ours - theirs| <= TOLERANCE * max(1, |theirs|), float64

# ------------------------------------------------------------------------------------------------------------
# Which rows, and which solver
# ------------------------------------------------------------------------------------------------------------

# Rows that no table of ours reproduces, and why not: how to tell them.
LEFT_OUT = {
    # A second way to estimate the derivatives; its authors recommend the first, and so does everybody else.
    "dpm_solver": {"taylor": lambda c: c["stype"] == "taylor"},
    "dpm_solver_3m_corrected": {},
    # An index slip in the published corrector, which uses one row of an inverse only: order 1, no target.
    "unipc": {"vary_coeff": lambda c: c["variant"] == "vary_coeff"},
    "diff_sampler": {
        # A bracket slip in the order-3 term: not the variable-step Adams-Bashforth method it is meant to be, and
        # at order 4 not even on a uniform grid. Order 2 has no such term and is compared: it is DEIS rhoAB-2.
        "ipndm_v": lambda c: c["solver"] == "ipndm_v" and c["max_order"] > 2,
        # No grid is stored; EDM's own sampler is Heun with a last Euler step to sigma = 0.
        "nvlabs": lambda c: c["solver"].startswith("nvlabs"),
    },
    "ld3": {},
}
# Rows of a file (all, compared) in the folders we know; another folder is only asked for its coverage.
KNOWN = {
    "dpm_solver": {437: 437, 1828: 1708},
    "dpm_solver_3m_corrected": {80: 80, 320: 320},
    "unipc": {364: 364, 2314: 1780},
    "diff_sampler": {305: 305, 2256: 2104},
    "ld3": {536: 536, 2560: 2560},
}


def left_out(row) -> str|None:
    "The reason why a row is not compared, or None"
    return next((why for why, is_it in LEFT_OUT[row.file].items() if is_it(row.config)), None)


PREDICTION = {"dpmsolver": "noise", "dpmsolver++": "data",
              "noise_prediction": "noise", "data_prediction": "data"}

def our_dpm_solver(c, schedule, t):
    "DPM-Solver's own file lowers the final order only below 10 steps; ours does it whenever it is asked to."
    if c["method"] != "multistep": return our_single_step(c, schedule, t)
    lower = c["lof"] and c["steps"] < 10
    return dpm_solver(schedule, t, c["order"], PREDICTION[c["algo"]], lower, published="D2_factor" not in c)

def our_single_step(c, schedule, t):
    rule = GRIDS.get(("dpm", c["skip"]), time_edm)
    return single_step(schedule, t, c["orders"], PREDICTION[c["algo"]], rule)

def our_unipc(c, schedule, t):
    return unipc(schedule, t, c["order"], c["variant"], PREDICTION[c["algo"]], lower_order_final=c["lof"])

def our_diff_sampler(c, schedule, t):
    options = dict(prediction="data" if c.get("predict_x0") else "noise",
                   lower_order_final=c.get("lower_order_final"))
    match c["solver"]:
        case "euler": return ddim(schedule, t)
        case "heun": return heun(schedule, t)
        case "dpm_2": return dpm2(schedule, t, c.get("r", .5))
        case "ipndm": return ipndm(schedule, t, c["max_order"])
        case "ipndm_v" | "deis" if c.get("deis_mode") != "tab":
            return deis(schedule, t, c["max_order"], clock=EDMSchedule())
        case "deis": return stored_deis(c, schedule, t)
        case "dpm_pp": return dpm_solver(schedule, t, c["max_order"], **options)
        case "unipc": return unipc(schedule, t, c["max_order"], c["variant"], **options)

def stored_deis(c, schedule, t):
    "tAB with the published quadrature's coefficients: their sums of 10,000 rectangles are our weights times B."
    C = torch.from_numpy(arrays("deis_coeffs")[deis_key(c)]) / t.diff()[:, None]
    return Solver.tabulate(schedule, t, [[1.], *([w for w in row if w == w] for row in C[1:])])

def deis_key(c): return f"{c['schedule_type']}{c['rho']}_N{c['steps']}_o{c['max_order']}_{c['deis_mode']}"

def our_ld3(c, schedule, t):
    match c["solver"]:
        case "euler": return ddim(schedule, t)
        case "ipndm": return ipndm(schedule, t, c["order"])
        case "dpm_pp": return dpm_solver(schedule, t, c["order"], "data", lower_order_final=True)
        case "unipc": return unipc(schedule, t, c["order"], c["variant"], "data", lower_order_final=True)
        case "dpm_single2": return dpm2(schedule, t, c["r"])

OURS = {"dpm_solver": our_dpm_solver, "dpm_solver_3m_corrected": our_dpm_solver, "unipc": our_unipc,
        "diff_sampler": our_diff_sampler, "ld3": our_ld3}


def label(row) -> str:
    "Schedule, solver, prediction and order: one test per label"
    c = row.config
    method = None if c.get("method") == "multistep" else c.get("method")
    what = [c.get("solver"), method, c.get("algo"), c.get("variant"), c.get("deis_mode")]
    if "predict_x0" in c: what.append("data" if c["predict_x0"] else "noise")
    order = c.get("order", c.get("max_order"))
    return "-".join(str(w) for w in [row.file, row.sched, *what, order] if w is not None)


def grouped() -> dict[str, list]:
    "The rows to compare, by label"
    groups = defaultdict(list)
    for file in OURS:
        for row in rows(file):
            if not left_out(row): groups[label(row)].append(row)
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
    denoiser = recorder
    if c.get("afs"):
        denoiser = AnalyticFirstStep(recorder)
        denoiser.schedule = denoiser.schedule.between(t[0], t[-1]) # stored grids start at 80 up to rounding
    if c.get("thr") and c.get("predict_x0"): denoiser = ThresholdedDenoiser(denoiser)

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
        reasons = Counter(left_out(row) for row in rows(file))
        compared, total = reasons.pop(None), sum(reasons.values())
        total += compared
        rest = ", ".join(f"{n} {why}" for why, n in sorted(reasons.items()))
        notes.append(f"golden {file}: {COMPARED[file]} of {total} rows compared, worst deviation "
                     f"{WORST[file]:.1e}" + (f"; left out: {rest}" if rest else ""))
        assert COMPARED[file] == compared > 0
        assert KNOWN[file].get(total, compared) == compared, f"{file}: {compared} of {total} rows compared"
    assert FAMILIES <= set(GROUPS), f"not in this folder: {sorted(FAMILIES - set(GROUPS))}"

FAMILIES = {
    *(f"dpm_solver-{s}-{m}{a}-{o}" for s in SCHEDULES for a in ("dpmsolver", "dpmsolver++")
      for m in ("", "singlestep-", "singlestep_fixed-") for o in (1, 2, 3) if m != "singlestep_fixed-" or o > 1),
    *(f"dpm_solver_3m_corrected-{s}-{a}-3" for s in SCHEDULES for a in ("dpmsolver", "dpmsolver++")),
    *(f"unipc-{s}-{a}_prediction-{b}-{o}"
      for s in SCHEDULES for a in ("data", "noise") for b in ("bh1", "bh2") for o in (1, 2, 3)),
    *(f"diff_sampler-ve_edm-{s}" for s in ("euler", "heun", "dpm_2", "ipndm_v-2", *(f"{m}-{o}" for o in (2, 3, 4)
                                      for m in ("ipndm", "deis-tab", "deis-rhoab")))),
    *(f"diff_sampler-ve_edm-{s}-{a}-{o}"
      for s in ("dpm_pp", "unipc-bh1", "unipc-bh2") for a in ("data", "noise") for o in (1, 2, 3)),
    *(f"ld3-{s}-ipndm-{o}" for s in SCHEDULES for o in (2, 3, 4)),
    *(f"ld3-{s}-{m}-{o}" for s in SCHEDULES for m in ("dpm_pp", "unipc-bh1", "unipc-bh2") for o in (1, 2, 3)),
    *(f"ld3-{s}-dpm_single2-2" for s in SCHEDULES), "ld3-ve_edm-euler-1",
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
    "diff-sampler's `time_uniform`: u linear in u^(1/rho)"
    clock = FittedVP()
    def grid(schedule, n): return clock.lmbda(time_power(clock, n, rho)).neg().exp()
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

def outer_grid(rule, schedule, c, steps):
    """Single-step rows keep the ends of their steps: of a grid with one point a call ("fast"), except on logSNR,
    where the outer steps themselves are equal, and of a grid of outer steps where all orders are the same."""
    orders = c.get("orders")
    if orders is None: return rule(schedule, steps)
    if c["method"] == "singlestep_fixed" or c["skip"] == "logSNR": return rule(schedule, len(orders))
    assert orders == fast_orders(steps, c["order"])
    return rule(schedule, steps)[torch.tensor([0, *orders]).cumsum(0)]

def test_rows_use_these_grids():
    "The grid stored with a row is the grid of the rule that the row names."
    met = 0
    for file in ("dpm_solver", "dpm_solver_3m_corrected", "unipc", "ld3"):
        source = "ld3" if file == "ld3" else "dpm"
        for row in (r for name in GROUPS for r in GROUPS[name] if r.file == file):
            skip = row.config["skip"]
            if skip == "custom": continue # irregular, only stored
            rule, s = GRIDS.get((source, skip), time_edm), schedule(row.sched)
            check(str(row), outer_grid(rule, s, row.config, row.steps), row.grid)
            met += 1
    assert met > 100

# ------------------------------------------------------------------------------------------------------------
# DEIS: exact integrals against the published quadrature
# ------------------------------------------------------------------------------------------------------------

def test_deis_integrals(notes):
    "tAB's published sums of rectangles are ours to 2e-4; rhoAB's integrals are exact in both."
    worst, edm = Counter(), schedule("ve_edm")
    for key, theirs in arrays("deis_coeffs").items():
        kind, n, order, mode = key.split("_")[-4:] if "uniform" not in key else ("time_" + key.split("_")[1],
                                                                                *key.split("_")[2:])
        rule = next(GRIDS[r] for r in GRIDS if r[0] == "diffsampler" and r[1] + r[2][3:] == kind)
        t, order = rule(edm, int(n[1:])), int(order[1:])
        solver = deis(edm, t, order, clock=FittedVP() if mode == "tab" else EDMSchedule())
        theirs = torch.from_numpy(theirs)[:, :solver.w.shape[1]]
        ours = solver.w * solver.linear()[1][:, None]
        assert torch.equal(solver.w_free[1:], theirs.isfinite()[1:]), key
        worst[mode] = max(worst[mode], (ours / theirs - 1)[theirs.isfinite()].abs().max().item())
    notes.append("golden deis_coeffs: largest relative difference of a coefficient "
                 f"{worst['tab']:.1e} (tAB), {worst['rhoab']:.1e} (rhoAB)")
    assert worst["tab"] < 2e-4 and worst["rhoab"] < 1e-9

# ------------------------------------------------------------------------------------------------------------
# DMN and GITS
# ------------------------------------------------------------------------------------------------------------

DMN = {r["key"]: r for r in records("dmn")}
STARTS = {"unif": time_logsnr, "unif_t": time_uniform, "edm": time_edm, "quad": power(2.)}

def ld3_variant(latent: bool, n: int) -> dict:
    "What LD3 makes of DMN's objective"
    return dict(power=2. if latent else 1., head=3 if n <= 7 else 0)

@pytest.mark.parametrize("key", [k for k in DMN if "objtest" in k])
def test_dmn_objective(key):
    "The objective at the stored vectors, in the authors' variant and in LD3's"
    name, r = key.split("__")[0], DMN[key]
    s, inner = schedule(name), torch.from_numpy(arrays("dmn")[f"{key}__lambda_inner"])
    lmbda = torch.cat([s.lmbda(s.t_max)[None], inner, s.lmbda(s.t_min)[None]])
    check("official", dmn_objective(lmbda), as_double(r["official"]))
    check("LD3's", dmn_objective(lmbda, **ld3_variant(r["ld3_is_latent"], len(inner) + 1)),
          as_double(r["ld3"]))

def dmn_ratio(key: str) -> float:
    "Our objective over the published one, from the same start; the grid must be feasible."
    name, source, *rest = key.split("__")
    r, s, n = DMN[key], schedule(name), int(rest[-1][1:])
    options = ld3_variant(r["is_latent_space"], n) if source == "ld3" else {}
    at = rest[0] if source == "official" else "unif_t" if r["is_latent_space"] else "unif"
    t0 = STARTS[at](s, n)
    if "obj_init" in r: check("at the start", dmn_objective(s.lmbda(t0), **options), as_double(r["obj_init"]))
    t = dmn(s, n, t0, **options)
    assert t.shape == (n + 1,) and (t[0], t[-1]) == (s.t_max, s.t_min) and bool((t.diff() < 0).all())
    return dmn_objective(s.lmbda(t), **options).item() / r["obj"]

@pytest.mark.parametrize("name", SCHEDULES)
def test_dmn_finds_as_good_a_grid(name, notes):
    "At most 1 % above the published result (mostly below it: the published gradient is a finite difference)"
    ratios = {k: dmn_ratio(k) for k in DMN if k.startswith(name) and "objtest" not in k}
    notes.append(f"golden dmn: {len(ratios)} searches on {name}, our objective over theirs "
                 f"{min(ratios.values()):.4f} ... {max(ratios.values()):.4f}")
    assert ratios and max(ratios.values()) <= 1.01, ratios


def gits_teacher(key: str):
    "Denoiser, teacher and start of a stored cost matrix"
    name = key.removeprefix("cost__")
    t = torch.from_numpy(arrays("gits")[f"t_tea__{name}"])
    teachers = {"ipndm": lambda s, t: ipndm(s, t, 4), "euler": ddim, "heun": heun}
    denoiser, z = mixture("ve_edm"), torch.from_numpy(arrays("gits")["latents_z"])
    return denoiser, teachers[name.split("_")[0]](denoiser.schedule, t), z * t[0]

@pytest.mark.parametrize("key", sorted({r["cost_key"] for r in records("gits")}))
def test_gits_costs(key):
    "The cost matrix, every metric. The stored one of iPNDM and dev is of a teacher with a free first step."
    denoiser, teacher, x = gits_teacher(key)
    metric = key.split("_")[-1]
    if "ipndm" in key and metric == "dev": denoiser = AnalyticFirstStep(denoiser)
    costs = gits_costs(teacher_trajectory(denoiser, teacher, x), metric)
    check(key, costs, torch.from_numpy(arrays("gits")[key]))

def test_gits_paths():
    "The chosen steps: from the stored costs, and from the network; ties to the first index"
    for r in records("gits"):
        path = r["dp_list"]
        if r["afs"]: path = [path[0], *path[2:]] # without the inserted one
        assert cheapest_path(arrays("gits")[r["cost_key"]], r["N"], r["coeff"]) == path, r
        if r["N"] in (3, 6, 10) and not r["afs"]:
            denoiser, teacher, x = gits_teacher(r["cost_key"])
            t = gits(denoiser, teacher, r["N"], x, r["metric"], r["coeff"])
            ends = torch.tensor(sorted({*teacher.base, teacher.nfe}))
            assert torch.equal(t, teacher.t[ends][path]), r

def test_gits_free_step():
    "The step that an analytic first step adds"
    met = 0
    for r in (r for r in records("gits") if r["afs"]):
        denoiser, teacher, x = gits_teacher(r["cost_key"])
        denoiser = AnalyticFirstStep(denoiser)
        t = insert_step(denoiser, teacher.t[[0, *r["dp_list"][2:]]], teacher.t, x, teacher(denoiser, x))
        assert torch.equal(t, teacher.t[r["dp_list"]]), r
        met += 1
    assert met > 0
