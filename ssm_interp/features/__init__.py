"""Features of SSM layers (channels in Mamba-1, heads in Mamba-2): what tells them apart, and groups of them."""

from ssm_interp.errors import FeatureError
from ssm_interp.circuits.search import Circuit, find_circuit
from ssm_interp.circuits.trials import fact_roles
from ssm_interp.attribution.decomposition import Decomposition, Decompositions, decompose
from ssm_interp.attribution.check import EdgeCheck, check_edges
from ssm_interp.attribution.edges import EdgeAttribution, edge_attribution
from ssm_interp.features.groups import STATISTICS, FeatureGroup, check_groups, decay_norms, feature_groups
from ssm_interp.attribution.logits import LogitAttribution, logit_attribution
from ssm_interp.attribution.mixers import MixerRecord, record_mixers
from ssm_interp.features.spectrum import Spectrum, spectrum
from ssm_interp.attribution.views import AttentionView, AttentionViews, attention_views, rollout

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
