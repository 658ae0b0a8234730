"""Cut this folder out of the full reference folder: `python tests/golden/edm_networks/make_subset.py SOURCE [DEST]`.

One DDPM++ network (class-conditional) and one NCSN++ network keep their weights; of their outputs every second pixel
is kept. The parameter lists keep every real-size configuration.
"""
import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np

SAMPLES = {"cifar10_cond_ddpmpp_mc16_nb1": [0, 1, 2], "ffhq_ncsnpp_mc16_nb1": [1, 2]} # sigma = 0.01, 0.7, 40


def main(source: str, dest: str = str(Path(__file__).parent)):
    source, dest = Path(source), Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    configs = json.loads((source / "configs.json").read_text())
    (dest / "configs.json").write_text(json.dumps({n: configs[n] for n in SAMPLES}, indent=1) + "\n")
    for name, rows in SAMPLES.items():
        shutil.copyfile(source / f"{name}.state.npz", dest / f"{name}.state.npz")
        with np.load(source / f"{name}.io.npz") as z: io = {k: z[k][rows] for k in z.files}
        io = {k: v[..., ::2, ::2] if k[0] in "DF" else v for k, v in io.items()}
        np.savez_compressed(dest / f"{name}.io.npz", **io)
    lists = json.loads((source / "full_param_lists.json").read_text())
    with open(dest / "full_param_lists.json.gz", "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as z:
        z.write(json.dumps(lists).encode())
    print(f"{sum(p.stat().st_size for p in dest.iterdir() if p.is_file()) / 1e6:.2f} MB in {dest}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3): sys.exit(__doc__)
    main(*sys.argv[1:])
