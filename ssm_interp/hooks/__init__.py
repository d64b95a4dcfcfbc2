"""Where the mathematics meets a model: hook points, attach, interventions."""

from ssm_interp.errors import (
    HookedWarning,
    HookError,
    InterventionError,
    MissingError,
    SsmInterpWarning,
    UnsupportedModelError,
)
from ssm_interp.hooks.attach import attach, attached
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.intervention import Intervention
from ssm_interp.hooks.interventions import EditAttention, Knockout, PatchState, ScaleFeatures, SetDelta
from ssm_interp.hooks.left_on import warn_hooked
from ssm_interp.hooks.points import HookPoint, HookPoints
from ssm_interp.hooks.rows.answers import Answers, answers
from ssm_interp.hooks.rows.metrics import Metric, accuracy, kl_divergence, log_probability, logit_difference, rank
from ssm_interp.hooks.run import Exposure, Run

__all__ = [
    "Answers",
    "Attachment",
    "EditAttention",
    "Exposure",
    "HookError",
    "HookPoint",
    "HookPoints",
    "HookedWarning",
    "Intervention",
    "InterventionError",
    "Knockout",
    "Metric",
    "MissingError",
    "PatchState",
    "Run",
    "ScaleFeatures",
    "SetDelta",
    "SsmInterpWarning",
    "UnsupportedModelError",
    "accuracy",
    "answers",
    "attach",
    "attached",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "rank",
    "warn_hooked",
]
