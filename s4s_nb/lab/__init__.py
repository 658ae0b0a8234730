"A cell of a table is a function and a record: models to judge on, methods to judge, runs over many cells."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .catalog import *
    from .cell import *
    from .datasets import *
    from .methods import *
    from .parameters import *
    from .record import *
    from .seeds import *
    from .setup import *
    from .sweep import *
    from .workers import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "datasets": "Dataset dataset_of",
        "catalog": "SCHEDULES",
        "setup": "CellSetup setup_for",
        "cell": "METHODS Method Cell grid budgets",
        "record": "judge identity run_cell replayed cached_measurement",
        "sweep": "run_grid",
    })
