"""Features of SSM layers (channels in Mamba-1, heads in Mamba-2): what tells them apart, and groups of them."""

from ssm_interp.errors import FeatureError
from ssm_interp.features.circuit import Circuit, find_circuit
from ssm_interp.features.circuit_trials import fact_roles
from ssm_interp.features.decomposition import Decomposition, Decompositions, decompose
from ssm_interp.features.edge_check import EdgeCheck, check_edges
from ssm_interp.features.edges import EdgeAttribution, edge_attribution
from ssm_interp.features.groups import STATISTICS, FeatureGroup, check_groups, decay_norms, feature_groups
from ssm_interp.features.logits import LogitAttribution, logit_attribution
from ssm_interp.features.mixers import MixerRecord, record_mixers
from ssm_interp.features.spectrum import Spectrum, spectrum
from ssm_interp.features.views import AttentionView, AttentionViews, attention_views, rollout

__all__ = [
    "STATISTICS",
    "AttentionView",
    "AttentionViews",
    "Circuit",
    "Decomposition",
    "Decompositions",
    "EdgeAttribution",
    "EdgeCheck",
    "FeatureError",
    "FeatureGroup",
    "LogitAttribution",
    "MixerRecord",
    "Spectrum",
    "attention_views",
    "check_edges",
    "check_groups",
    "decay_norms",
    "decompose",
    "edge_attribution",
    "fact_roles",
    "feature_groups",
    "find_circuit",
    "logit_attribution",
    "record_mixers",
    "rollout",
    "spectrum",
]
