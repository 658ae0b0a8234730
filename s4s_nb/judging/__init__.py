"How far apart two images, or two sets of images, are."
from typing import TYPE_CHECKING

from s4s_nb import _offer

if TYPE_CHECKING:
    from .distance import *
    from .fid import *
    from .moments import *
else:
    __getattr__, __dir__, __all__ = _offer(__name__, {
        "distance": "Distance L2 FeatureDistance LPIPS Sum",
        "moments": "squared_errors paired_rmse rmse_ratio Moments feature_moments frechet_distance",
        "fid": "Statistics inception image_statistics published_fid save_statistics load_statistics",
    })
