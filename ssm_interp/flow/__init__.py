"""Knockout sweeps: where in the layers information crosses from one role of a prompt to another."""

from ssm_interp.flow.engine import CLEAN, Answers, Engine, Variant, choose_engine, full_forwards, rows_engine
from ssm_interp.flow.metrics import changes, outcome
from ssm_interp.flow.result import FlowResult, FlowRun
from ssm_interp.flow.summary import summarise
from ssm_interp.flow.sweep import FeatureGroups, sweep
from ssm_interp.flow.windows import Align, FlowError, Window, default_size, windows

__all__ = [
    "CLEAN",
    "Align",
    "Answers",
    "Engine",
    "FeatureGroups",
    "FlowError",
    "FlowResult",
    "FlowRun",
    "Variant",
    "Window",
    "changes",
    "choose_engine",
    "default_size",
    "full_forwards",
    "outcome",
    "rows_engine",
    "summarise",
    "sweep",
    "windows",
]
