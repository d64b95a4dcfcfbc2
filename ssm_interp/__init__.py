"""Mechanistic interpretability for Mamba-1 and Mamba-2: read, edit and knock out what an SSM layer passes on."""

from ssm_interp.hooks import (
    Attachment,
    EditAttention,
    HookError,
    HookPoint,
    HookPoints,
    Intervention,
    InterventionError,
    Knockout,
    PatchState,
    Run,
    ScaleFeatures,
    SetDelta,
    UnsupportedModelError,
    attach,
    attached,
)
from ssm_interp.models import LoadError, load
from ssm_interp.prompts import Fact, Prompt, PromptError, load_prompts

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "EditAttention",
    "Fact",
    "HookError",
    "HookPoint",
    "HookPoints",
    "Intervention",
    "InterventionError",
    "Knockout",
    "LoadError",
    "PatchState",
    "Prompt",
    "PromptError",
    "Run",
    "ScaleFeatures",
    "SetDelta",
    "UnsupportedModelError",
    "attach",
    "attached",
    "load",
    "load_prompts",
]
