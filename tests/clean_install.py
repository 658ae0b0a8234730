"What must work where only the package and its core requirements are installed: run by `make wheel`."
import sys
from importlib.metadata import files, requires
from pathlib import Path

import torch

import s4s_nb
from s4s_nb import L2, S4SConfig, Solver, ipndm, load, s4s, sample_noise, teacher_pairs, time_edm

assert "site-packages" in s4s_nb.__file__, f"{s4s_nb.__file__} is not the installed package"
shipped = {Path(f).name for f in files("s4s_nb")}
assert {"py.typed", "LICENSE"} <= shipped and {"json", "safetensors"} <= {n.rpartition(".")[2] for n in shipped}
core = [r for r in requires("s4s_nb") if "extra ==" not in r]
assert core and not any(r.startswith(("torchvision", "diffusers", "pandas")) for r in core), core

denoiser = load("digits")
schedule = denoiser.schedule
parent, teacher = (ipndm(schedule, time_edm(schedule, n), order=3) for n in (4, 12))
train, valid = (teacher_pairs(denoiser, teacher, n=16, seed=s, progress=False) for s in (1_000_000, 2_000_000))
learned = s4s(denoiser, parent, train, valid, L2(), S4SConfig(epochs=2), progress=False)
learned.solver.save("learned.json")
noise = schedule.prior_std * sample_noise(range(4), denoiser.shape)
with torch.no_grad(): images = Solver.load("learned.json")(denoiser, noise)
assert images.shape == (4, 1, 8, 8) and images.isfinite().all()
heavy = {"torchvision", "diffusers", "transformers", "pandas", "matplotlib"} & sys.modules.keys()
assert not heavy, f"loaded: {heavy}"
print(f"s4s_nb {s4s_nb.__version__} with torch {torch.__version__}: loads, learns, saves and samples")
