"""Cut DPM-Solver-v3's rows out of the full reference folder: `python tests/golden/make_subset_v3.py SOURCE [DEST]`.

Rows that agree in everything but the number of steps form a group; every group keeps one step count, drawn by
the checksum that `make_subset.py` uses. The statistics (EMS), an input of all rows, are copied whole.
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from make_subset import choose, cut

NAME, STATISTICS = "dpm_solver_v3", "dpm_solver_v3_ems.npz"


def main(source: str, dest: str = str(Path(__file__).parent)):
    source, dest = Path(source), Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / STATISTICS, dest / STATISTICS)
    configs = json.loads((source / f"{NAME}.json").read_text())
    rows = choose(configs, single=lambda config: True)
    with np.load(source / f"{NAME}.npz") as z: np.savez_compressed(dest / f"{NAME}.npz", **cut(z, rows))
    lines = [json.dumps({**configs[i], "i": k}) for k, i in enumerate(rows)]
    (dest / f"{NAME}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    size = sum((dest / name).stat().st_size for name in (STATISTICS, f"{NAME}.npz", f"{NAME}.json"))
    print(f"{NAME}: {len(rows)} of {len(configs)} rows, {size / 1e3:.0f} kB in {dest}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3): sys.exit(__doc__)
    main(*sys.argv[1:])
