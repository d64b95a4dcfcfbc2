"""Mechanistic interpretability for Mamba-1 and Mamba-2: read, edit and knock out what an SSM layer passes on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssm_interp.errors import (
        HookError,
        InterventionError,
        LoadError,
        PromptError,
        SsmInterpWarning,
        UnsupportedModelError,
    )
    from ssm_interp.hooks import (
        Attachment,
        EditAttention,
        HookPoint,
        HookPoints,
        Intervention,
        Knockout,
        PatchState,
        Run,
        ScaleFeatures,
        SetDelta,
        attach,
        attached,
    )
    from ssm_interp.models import load
    from ssm_interp.prompts import Fact, Prompt, load_prompts

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
    "SsmInterpWarning",
    "UnsupportedModelError",
    "attach",
    "attached",
    "load",
    "load_prompts",
]

_HOMES = ("hooks", "models", "prompts")
_FLOORS = (*_HOMES, "features", "flow", "jobs", "plots", "recipes", "scan")


def __getattr__(name: str) -> Any:
    """A floor, or a name of `__all__`: loaded, and torch and transformers with it, when it is first asked for."""
    if name in _FLOORS:
        return import_module(f"ssm_interp.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'ssm_interp' has no attribute {name!r}")
    homes = (import_module(f"ssm_interp.{home}") for home in _HOMES)
    found = globals()[name] = next(getattr(home, name) for home in homes if name in home.__all__)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FLOORS})
