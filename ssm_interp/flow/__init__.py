"""Knockout sweeps: where in the layers information crosses from one role of a prompt to another."""

from ssm_interp.errors import FlowError, NoEdgesError, NoEdgesWarning, NothingAnswered, StudyError, WindowError
from ssm_interp.experiments import Study, explain
from ssm_interp.experiments.values import Align
from ssm_interp.flow.dropped import dropped_prompts
from ssm_interp.flow.leak import LeakReport, leak
from ssm_interp.flow.metrics import changes
from ssm_interp.flow.named_edges import check_edges_exist
from ssm_interp.flow.result import FlowResult, FlowRun
from ssm_interp.flow.study_run import check_study, run_study
from ssm_interp.flow.summary import summarise
from ssm_interp.flow.sweep import FeatureGroups, Variant, sweep
from ssm_interp.flow.tokens import token_map
from ssm_interp.flow.windows import Window, default_size, windows

__all__ = [
    "Align",
    "FeatureGroups",
    "FlowError",
    "FlowResult",
    "FlowRun",
    "LeakReport",
    "NoEdgesError",
    "NoEdgesWarning",
    "NothingAnswered",
    "Study",
    "StudyError",
    "Variant",
    "Window",
    "WindowError",
    "changes",
    "check_edges_exist",
    "check_study",
    "default_size",
    "dropped_prompts",
    "explain",
    "leak",
    "run_study",
    "summarise",
    "sweep",
    "token_map",
    "windows",
]
