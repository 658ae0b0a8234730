"A cell of a table is a function and a record: models to judge on, methods to judge, runs over many cells."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .catalog import *
    from .datasets import *
    from .methods import *
    from .record import *
    from .sweep import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "datasets": "DATASETS Dataset dataset_of",
        "catalog": "SCHEDULES CellSetup setup_for",
        "methods": "METHODS Method Cell",
        "record": "judge identity run_cell replayed cached_measurement",
        "sweep": "grid run_grid budgets",
    })
