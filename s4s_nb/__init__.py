"""Few-step solvers for diffusion models, classical and learned.

Importing the package costs next to nothing: a name loads its module when it is first used (PEP 562). Below the names
offered here lie `s4s_nb.solver`, `solvers`, `learning`, `models`, `judging`, `use` and `lab`, which offer theirs the same way.
Written by hand; `nbdev_export` keeps only the version line in step with settings.ini."""

import sys as _sys
from importlib import import_module as _import
from importlib.util import find_spec as _find
from pkgutil import iter_modules as _modules
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _offer(
    package: str,           # its name, `__name__`
    names: dict[str, str],  # module below it -> the names offered from there, separated by blanks
) -> tuple:                 # __getattr__, __dir__, __all__ of the package
    "Offers names, and all modules below a package, without importing anything before it is asked for."
    here = _sys.modules[package]
    home = {name: module for module, found in names.items() for name in found.split()}

    def getter(name: str):
        if name in home: value = getattr(_import(f"{package}.{home[name]}"), name)
        elif name[0] != "_" and _find(f"{package}.{name}"): value = _import(f"{package}.{name}")
        else: raise AttributeError(f"{package} has no {name!r}; `dir({package})` lists what it offers")
        setattr(here, name, value)
        return value

    def lister() -> list[str]:
        found = {*vars(here), *home, *(m.name for m in _modules(here.__path__))} - {"TYPE_CHECKING", "_offer"}
        return sorted(found)

    return getter, lister, list(home)


if TYPE_CHECKING:  # editors and type checkers do not run this file: to them, all of the same modules
    from .denoise import *
    from .files import *
    from .grids import *
    from .judging import *
    from .lab import *
    from .learning import *
    from .models import *
    from .schedule import *
    from .solver import *
    from .solvers import *
    from .use import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "schedule": "NoiseSchedule VPSchedule CosineVPSchedule DiscreteVPSchedule EDMSchedule FlowSchedule",
        "denoise": "Denoiser EpsDenoiser VDenoiser X0Denoiser FlowDenoiser EDMDenoiser GuidedDenoiser "
                   "RecordingDenoiser GaussianMixture sample_noise",
        "grids": "time_uniform time_quadratic time_edm time_logsnr time_power",
        "solver": "Solver exact_solution observed_order",
        "solvers": "ddim ipndm dpm_solver unipc deis heun dpm2 dpm_solver_s dmn gits published_steps "
                   "from_scheduler",
        "learning": "teacher_pairs Pairs Learnable with_corrector s4s S4SConfig Learned ld3 s4s_alt s4s_joint "
                    "match_trajectory",
        "models": "SongUNet EDMPrecond VPPrecond VEPrecond DhariwalUNet load load_edm Decoded from_diffusers",
        "judging": "L2 FeatureDistance LPIPS Sum squared_errors paired_rmse rmse_ratio Moments frechet_distance",
        "lab": "Cell run_cell run_grid",
        "files": "fetch unzipped",
        "use": "Pack S4SScheduler learn_for_pipeline learn_pack sample_solver solver_sigmas k_start from_k_diffusion",
    })
    __all__ = ["__version__", *__all__]
