"""What edges, positions, features and layers are worth: decompositions, logits, single edges, and their checks."""

from ssm_interp.attribution.check import EdgeCheck, check_edges
from ssm_interp.attribution.decomposition import Decomposition, Decompositions, decompose
from ssm_interp.attribution.edges import EdgeAttribution, edge_attribution
from ssm_interp.attribution.logits import LogitAttribution, logit_attribution
from ssm_interp.attribution.mixers import MixerRecord, record_mixers
from ssm_interp.attribution.views import AttentionView, AttentionViews, attention_views, rollout

__all__ = [
    "AttentionView",
    "AttentionViews",
    "Decomposition",
    "Decompositions",
    "EdgeAttribution",
    "EdgeCheck",
    "LogitAttribution",
    "MixerRecord",
    "attention_views",
    "check_edges",
    "decompose",
    "edge_attribution",
    "logit_attribution",
    "record_mixers",
    "rollout",
]
