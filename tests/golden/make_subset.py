"""Cut this folder out of the full reference folder: `python tests/golden/make_subset.py SOURCE [DEST]`.

A row is one configuration of one published sampler. Rows that agree in everything but the number of steps
form a group; every group keeps one or two step counts, drawn by a checksum of the group's own name, so the
choice is spread evenly, needs no random state and does not change when other groups are added or removed.
"""
import gzip
import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np

COPIED = ("problem.json", "problem.npz", "reference.npz", "schedules.npz", "convergence.json",
          "gits.json", "gits.npz")
# Which rows of which file are wanted at all. Add a line (or widen one) to extend the subset.
WANTED = {
    "dpm_solver": lambda c: c["stype"] != "taylor",
    "dpm_solver_3m_corrected": lambda c: True,
    "unipc": lambda c: c["variant"] in ("bh1", "bh2"),
    "diff_sampler": lambda c: c["solver"] in ("euler", "heun", "dpm_2", "ipndm", "deis", "dpm_pp", "unipc")
                              or c["solver"] == "ipndm_v" and c["max_order"] == 2,
    "ld3": lambda c: True,
}
# Rows kept on top of the drawn ones: from 10 steps on, DPM-Solver's own lower_order_final does nothing.
ALWAYS = {"dpm_solver": lambda c: c["steps"] == 10 and c["method"] == "multistep"}
# Groups that keep one step count instead of two: first order, single-step, and copies of formulas another file
# covers.
SINGLE = {
    "diff_sampler": lambda c: c["solver"] not in ("euler", "heun", "ipndm"),
    "ld3": lambda c: c["order"] == 1 or c["solver"] == "dpm_single2",
    "unipc": lambda c: c["order"] == 1 or c["variant"] == "bh2",
    "dpm_solver": lambda c: c["order"] == 1 or c["method"] != "multistep",
}
DMN_STEPS = 5, 8 # of the searches; the objective's test vectors are all kept
RESULTS = "i", "nfe", "steps", "orders", "ems_index" # what is not part of a group's name


def group(config: dict) -> str:
    "The name of a configuration without its number of steps"
    return json.dumps({k: v for k, v in sorted(config.items()) if k not in RESULTS})


def choose(
    configs: list[dict],         # the wanted configurations of one file
    single=lambda config: False, # true: the group keeps one step count, else two
    always=lambda config: False, # true: the row is kept whatever is drawn
) -> list[int]:                  # their row numbers in the full file, ascending
    "Keep one or two step counts of every group."
    groups = {}
    for c in configs: groups.setdefault(group(c), []).append(c)
    rows = []
    for name, members in groups.items():
        members = sorted(members, key=lambda c: zlib.crc32(f"{name}{c['steps']}".encode()))
        drawn = 1 if single(members[0]) else 2
        rows += [c["i"] for k, c in enumerate(members) if k < drawn or always(c)]
    return sorted(rows)


def cut(z, rows: list[int]) -> dict[str, np.ndarray]:
    "The same arrays, for these rows only: `X` with `X_off` is flat, everything else has one entry per row."
    flat = {k.split("_")[0]: z[k] for k in z.files if k.endswith("_off")}
    out = {}
    for k in z.files:
        if k.endswith("_off"): out[k] = np.cumsum([0, *np.diff(z[k])[rows]]).astype(z[k].dtype)
        elif k.split("_")[0] in flat:
            off = flat[k.split("_")[0]]
            out[k] = np.concatenate([z[k][off[i]:off[i + 1]] for i in rows])
        else: out[k] = z[k][rows]
    return out


def cut_dmn(source: Path, dest: Path) -> list[str]:
    "DMN's results as objectives only, at two numbers of steps; the test vectors of the objective whole."
    results = json.loads((source / "dmn.json").read_text())
    kept = [r for r in results if "objtest" in r["key"] or int(r["key"].split("__N")[1]) in DMN_STEPS]
    (dest / "dmn.json").write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    with np.load(source / "dmn.npz") as z:
        np.savez_compressed(dest / "dmn.npz", **{k: z[k] for k in z.files if "objtest" in k})
    return ["dmn.json", "dmn.npz"]


def cut_deis(source: Path, dest: Path) -> list[str]:
    "The coefficients of the DEIS rows that were kept"
    configs = json.loads(gzip.decompress((dest / "diff_sampler.json.gz").read_bytes()))
    rows = (c for c in configs if c["solver"] == "deis")
    keys = [f"{c['schedule_type']}{c['rho']}_N{c['steps']}_o{c['max_order']}_{c['deis_mode']}" for c in rows]
    with np.load(source / "deis_coeffs.npz") as z:
        np.savez_compressed(dest / "deis_coeffs.npz", **{k: z[k] for k in sorted(keys)})
    return ["deis_coeffs.npz"]


def main(source: str, dest: str = str(Path(__file__).parent)):
    source, dest = Path(source), Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    for name in COPIED: shutil.copyfile(source / name, dest / name)
    for name, wanted in WANTED.items():
        configs = json.loads((source / f"{name}.json").read_text())
        single = SINGLE.get(name, lambda config: False)
        rows = choose([c for c in configs if wanted(c)], single, ALWAYS.get(name, lambda config: False))
        with np.load(source / f"{name}.npz") as z: np.savez_compressed(dest / f"{name}.npz", **cut(z, rows))
        lines = [json.dumps({**configs[i], "i": k}) for k, i in enumerate(rows)]
        text = "[\n" + ",\n".join(lines) + "\n]\n"
        (dest / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        print(f"{name}: {len(rows)} of {len(configs)} rows")
    written = [*COPIED, *(f"{name}.{kind}" for name in WANTED for kind in ("json.gz", "npz"))]
    written += cut_dmn(source, dest) + cut_deis(source, dest)
    print(f"{sum((dest / name).stat().st_size for name in written) / 1e6:.2f} MB in {dest}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3): sys.exit(__doc__)
    main(*sys.argv[1:])
