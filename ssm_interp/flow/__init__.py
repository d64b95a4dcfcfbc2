"""Knockout sweeps: where in the layers information crosses from one role of a prompt to another."""

from ssm_interp.flow.metrics import answer_metrics, hits, summarise
from ssm_interp.flow.result import FlowResult, FlowRun
from ssm_interp.flow.sweep import CLEAN, Engine, Variant, knockout_engine, sweep
from ssm_interp.flow.windows import Align, FlowError, Window, default_size, windows

__all__ = [
    "CLEAN",
    "Align",
    "Engine",
    "FlowError",
    "FlowResult",
    "FlowRun",
    "Variant",
    "Window",
    "answer_metrics",
    "default_size",
    "hits",
    "knockout_engine",
    "summarise",
    "sweep",
    "windows",
]
