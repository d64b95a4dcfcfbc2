"""Every experiment, declared once: what it takes. Keys of recipes, flags, help, errors and identities are read off it.

Importing this loads neither torch nor transformers.
"""

from ssm_interp.experiments.commands import (
    COMMANDS,
    Attention,
    Check,
    Circuit,
    Edges,
    Experiment,
    Features,
    Flow,
    Heatmap,
    Run,
)
from ssm_interp.experiments.declared import Declared, Key, KeyedError, Several, option, same
from ssm_interp.experiments.mistakes import Problem, did_you_mean, dotted, explain, problems
from ssm_interp.experiments.study import WITHOUT_EFFECT, Study

__all__ = [
    "COMMANDS",
    "WITHOUT_EFFECT",
    "Attention",
    "Check",
    "Circuit",
    "Declared",
    "Edges",
    "Experiment",
    "Features",
    "Flow",
    "Heatmap",
    "Key",
    "KeyedError",
    "Problem",
    "Run",
    "Several",
    "Study",
    "did_you_mean",
    "dotted",
    "explain",
    "option",
    "problems",
    "same",
]
