"""Mechanistic interpretability for Mamba-1 and Mamba-2: read, edit and knock out what an SSM layer passes on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssm_interp.attribution import (
        AttentionView,
        AttentionViews,
        Decomposition,
        Decompositions,
        EdgeAttribution,
        EdgeCheck,
        LogitAttribution,
        attention_views,
        check_edges,
        decompose,
        edge_attribution,
        logit_attribution,
        rollout,
    )
    from ssm_interp.circuits import Circuit, find_circuit
    from ssm_interp.errors import (
        FeatureError,
        FlowError,
        HookError,
        InterventionError,
        JobError,
        LoadError,
        MetricError,
        MissingError,
        PlotError,
        PromptError,
        RecipeError,
        ResultError,
        SsmInterpError,
        SsmInterpWarning,
        StudyError,
        UnsupportedModelError,
    )
    from ssm_interp.features import Spectrum, feature_groups
    from ssm_interp.features.spectrum import spectrum  # by its module, whose name is its own: mypy takes it for that
    from ssm_interp.flow import FlowResult, LeakReport, token_map
    from ssm_interp.flow.leak import leak
    from ssm_interp.flow.sweep import sweep
    from ssm_interp.hooks import (
        Answers,
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
        log_probability,
        logit_difference,
    )
    from ssm_interp.hooks.rows.answers import answers
    from ssm_interp.models import load
    from ssm_interp.plots import TokenMap
    from ssm_interp.prompts import Batch, Fact, Prompt, load_prompts, pad, tokenize
    from ssm_interp.results import Result

__version__ = "0.1.0"

__all__ = [
    "Answers",
    "Attachment",
    "AttentionView",
    "AttentionViews",
    "Batch",
    "Circuit",
    "Decomposition",
    "Decompositions",
    "EdgeAttribution",
    "EdgeCheck",
    "EditAttention",
    "Fact",
    "FeatureError",
    "FlowError",
    "FlowResult",
    "HookError",
    "HookPoint",
    "HookPoints",
    "Intervention",
    "InterventionError",
    "JobError",
    "Knockout",
    "LeakReport",
    "LoadError",
    "LogitAttribution",
    "MetricError",
    "MissingError",
    "PatchState",
    "PlotError",
    "Prompt",
    "PromptError",
    "RecipeError",
    "Result",
    "ResultError",
    "Run",
    "ScaleFeatures",
    "SetDelta",
    "Spectrum",
    "SsmInterpError",
    "SsmInterpWarning",
    "StudyError",
    "TokenMap",
    "UnsupportedModelError",
    "answers",
    "attach",
    "attached",
    "attention_views",
    "check_edges",
    "decompose",
    "edge_attribution",
    "feature_groups",
    "find_circuit",
    "leak",
    "load",
    "load_prompts",
    "log_probability",
    "logit_attribution",
    "logit_difference",
    "pad",
    "rollout",
    "spectrum",
    "sweep",
    "token_map",
    "tokenize",
]

_HOMES = {
    "errors": (
        "FeatureError FlowError HookError InterventionError JobError LoadError MetricError MissingError PlotError "
        "PromptError RecipeError ResultError SsmInterpError SsmInterpWarning StudyError UnsupportedModelError"
    ),
    "attribution": (
        "AttentionView AttentionViews Decomposition Decompositions EdgeAttribution EdgeCheck LogitAttribution "
        "attention_views check_edges decompose edge_attribution logit_attribution rollout"
    ),
    "circuits": "Circuit find_circuit",
    "features": "Spectrum feature_groups spectrum",
    "flow": "FlowResult LeakReport leak sweep token_map",
    "hooks": (
        "Answers Attachment EditAttention HookPoint HookPoints Intervention Knockout PatchState Run ScaleFeatures "
        "SetDelta answers attach attached log_probability logit_difference"
    ),
    "models": "load",
    "plots": "TokenMap",
    "prompts": "Batch Fact Prompt load_prompts pad tokenize",
    "results": "Result",
}
"""Floor -> the names of `__all__` that live there."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_FLOORS = (*_HOMES, "experiments", "hosts", "jobs", "recipes", "scan")


def __getattr__(name: str) -> Any:
    """A floor, or a name of `__all__`: loaded, and torch and transformers with it, when it is first asked for."""
    if name in _FLOORS:
        return import_module(f"ssm_interp.{name}")
    if name not in _HOME_OF:
        from difflib import get_close_matches

        near = get_close_matches(name, __dir__(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'ssm_interp' has no attribute {name!r}{hint}")
    value = globals()[name] = getattr(import_module(f"ssm_interp.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_FLOORS, "__version__"})
