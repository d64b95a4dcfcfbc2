"""Features of SSM layers (channels in Mamba-1, heads in Mamba-2): what tells them apart, and groups of them."""

from ssm_interp.features.groups import FeatureError, FeatureGroup, decay_norms, feature_groups

__all__ = ["FeatureError", "FeatureGroup", "decay_norms", "feature_groups"]
