"""Few-step solvers for diffusion models, classical and learned.

Importing the package costs next to nothing: a name loads its module when it is first used (PEP 562).
Written by hand; `nbdev_export` keeps only the version line in step with settings.ini."""

from importlib import import_module as _import
from importlib.util import find_spec as _find
from pkgutil import iter_modules as _modules

__version__ = "0.1.0"

_names = {  # module -> the names that `s4s_nb` offers from it
    "schedule": "NoiseSchedule VPSchedule CosineVPSchedule DiscreteVPSchedule EDMSchedule FlowSchedule",
    "denoise": "Denoiser EpsDenoiser VDenoiser X0Denoiser FlowDenoiser EDMDenoiser GuidedDenoiser "
               "RecordingDenoiser GaussianMixture",
    "grids": "time_uniform time_quadratic time_edm time_logsnr time_power",
    "solver": "Solver exact_solution observed_order",
    "solvers.multistep": "ddim ipndm dpm_solver unipc deis",
    "solvers.singlestep": "heun dpm2 dpm_solver_s",
    "solvers.search": "dmn gits published_steps",
    "learning.pairs": "teacher_pairs Pairs sample_noise",
    "judging.distance": "L2 FeatureDistance LPIPS Sum",
    "learning.student": "Learnable with_corrector",
    "learning.learn": "s4s S4SConfig Learned",
    "learning.alternate": "ld3 s4s_alt s4s_joint match_trajectory",
    "models.networks": "SongUNet EDMPrecond VPPrecond VEPrecond",
    "models.adm": "DhariwalUNet",
    "models.pretrained": "load load_edm",
    "files.download": "fetch unzipped",
    "models.latent": "Decoded",
    "models.pipelines": "from_diffusers",
    "judging.moments": "paired_rmse rmse_ratio Moments frechet_distance",
    "lab.cell": "Cell",
    "lab.record": "run_cell",
    "lab.sweep": "run_grid",
}
_home = {name: module for module, names in _names.items() for name in names.split()}
__all__ = ["__version__", *_home]


def __getattr__(name):
    "Import the module `name`, or the one that holds `name`, once."
    if name in _home: value = getattr(_import(f"{__name__}.{_home[name]}"), name)
    elif name[0] != "_" and _find(f"{__name__}.{name}"): value = _import(f"{__name__}.{name}")
    else: raise AttributeError(f"s4s_nb has no {name!r}; `dir(s4s_nb)` lists what it offers")
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__, *(m.name for m in _modules(__path__))})
