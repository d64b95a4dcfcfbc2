"""Features of SSM layers (channels in Mamba-1, heads in Mamba-2): what tells them apart, and groups of them."""

from ssm_interp.errors import FeatureError
from ssm_interp.features.groups import STATISTICS, FeatureGroup, check_groups, decay_norms, feature_groups
from ssm_interp.features.spectrum import Spectrum, spectrum

__all__ = [
    "STATISTICS",
    "FeatureError",
    "FeatureGroup",
    "Spectrum",
    "check_groups",
    "decay_norms",
    "feature_groups",
    "spectrum",
]
