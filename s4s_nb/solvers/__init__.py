"The classical methods and searched time grids, as tables that the one loop runs."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .dpm_solver_v3 import *
    from .families import *
    from .multistep import *
    from .search import *
    from .singlestep import *
    from .tracing import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "multistep": "ddim ipndm dpm_solver unipc deis",
        "singlestep": "heun dpm2 dpm_solver_s",
        "families": "SOLVERS Family",
        "search": "dmn gits published_steps",
        "tracing": "from_scheduler",
        "dpm_solver_v3": "DPMSolverV3 EMS model_statistics",
    })
