"A solver in other people's programs: packs of solvers, a scheduler of diffusers, a sampler of k-diffusion, a command."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .k_diffusion import *
    from .pack import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "pack": "Pack", "k_diffusion": "sample_solver solver_sigmas k_start from_k_diffusion",
    })
