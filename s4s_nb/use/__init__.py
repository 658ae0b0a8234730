"A solver in other people's programs: packs of solvers, a scheduler of diffusers, a sampler of k-diffusion, a command."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .cli import *
    from .k_diffusion import *
    from .learn import *
    from .pack import *
    from .scheduler import *
    from .show import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "k_diffusion": "sample_solver solver_sigmas k_start from_k_diffusion",
        "learn": "learn_for_pipeline learn_pack Effort Estimate",
        "pack": "Pack",
        "scheduler": "S4SScheduler write_remote_code",
    })
