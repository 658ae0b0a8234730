"Gradients into the table: pairs of a teacher, students, and the algorithms that fit them."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .alternate import *
    from .amed_plugin import *
    from .bespoke import *
    from .coefficients import *
    from .curvature import *
    from .optimise import *
    from .pairs import *
    from .relax import *
    from .run import *
    from .student import *
    from .trajectory import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "pairs": "Pairs teacher_pairs solve_seeds",
        "student": "Learnable with_corrector widen gaussian_start",
        "relax": "project_ball relax_radius",
        "coefficients": "s4s s4s_student S4SConfig",
        "alternate": "ld3 ld3_s4s s4s_alt s4s_joint",
        "run": "Learned",
        "optimise": "GaussNewton Adam",
        "trajectory": "match_trajectory",
        "bespoke": "BNS bns",
        "amed_plugin": "AMED AMEDConfig amed",
    })
