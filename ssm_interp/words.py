"""The words that users write, each list once: nothing is loaded to know them."""

from __future__ import annotations

from typing import Literal, get_args

Stream = Literal["ssm", "conv", "attention"]
STREAMS: tuple[Stream, ...] = get_args(Stream)
"""What carries information between tokens."""

Role = str
ROLES: tuple[Role, ...] = (
    "first",
    "last",
    "subject",
    "relation",
    "context",
    "all",
    "relation_minus_last",
    "subject_first",
    "subject_last",
)
"""Tokens of a prompt by the part that they play."""

MetricName = Literal["log_probability", "probability", "logit_difference", "rank", "accuracy", "kl"]

ALL = "all"
"""The feature group of all features."""
