"Bytes and inputs that can be trusted: written whole, verified, fetched, and read without being executed."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .checkpoint import *
    from .checks import *
    from .download import *
    from .registry import *
    from .unpickle import *
    from .verified import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "download": "fetch unzipped",
        "verified": "write_atomic cache_folder digest recipe_key save_verified load_verified",
        "checkpoint": "load_checkpoint to_safetensors",
    })
