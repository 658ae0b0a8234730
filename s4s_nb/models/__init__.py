"Published networks as denoisers: architectures, readers, conditions, decoders and the cards that name them."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .adm import *
    from .cards import *
    from .compvis import *
    from .conditions import *
    from .digits import *
    from .latent import *
    from .networks import *
    from .pipelines import *
    from .pretrained import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "pretrained": "load load_edm",
        "pipelines": "from_diffusers",
        "cards": "card_of",
        "networks": "SongUNet EDMPrecond VPPrecond VEPrecond",
        "adm": "DhariwalUNet",
        "latent": "LatentDenoiser Decoded",
        "conditions": "LabelledDenoiser ConditionedDenoiser training_prompts",
    })
