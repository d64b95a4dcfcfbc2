"""What can go wrong, as one tree: catch `SsmInterpError` for all of it, or a family, or the built-in that it is too.

Nothing is imported here, so that an error can be named without loading torch.
"""

from __future__ import annotations

from functools import partial


class SsmInterpError(Exception):
    """Something that was asked for cannot be done. Errors of this package are of this kind, but for those that Python's
    own protocols want: a keyword that a function does not take, a name that a module or a mapping does not have."""


class TermsError(SsmInterpError, ValueError):
    """Tensors that do not form one recurrence."""


class HookError(SsmInterpError, ValueError):
    """Something asked of the hooks cannot be done; nothing was changed."""


class InterventionError(HookError):
    """An intervention does not fit the model, the batch or the prompt."""


class UnsupportedModelError(HookError):
    """A model, or a version of its library, whose SSM operator cannot be hooked."""


class MissingError(HookError, KeyError):
    """No such layer, or a tensor that was not read."""

    __str__ = Exception.__str__  # a KeyError would show its message quoted


class LoadError(SsmInterpError, ValueError):
    """A name under which no model can be loaded."""


class PromptError(SsmInterpError, ValueError):
    """A prompt, or a file of prompts, that cannot be used as it is."""


class MetricError(SsmInterpError, ValueError):
    """A metric that there is not, or one that is not a finite number for every row."""


class FeatureError(SsmInterpError, ValueError):
    """Features, groups of them, or statistics that rank them, that do not exist or do not fit the model."""


class ResultError(SsmInterpError, ValueError):
    """A file that holds no result, or another one, or a result that cannot be drawn or stored as it is."""


class PlotError(SsmInterpError, ValueError):
    """Numbers, tokens or tables that do not make a picture."""


class FlowError(SsmInterpError, ValueError):
    """A sweep that cannot be run, or a result that cannot be used, as it is."""


class WindowError(FlowError):
    """A window of more layers than the model has, or of none."""


class NoEdgesError(FlowError):
    """A knockout of edges target <- source of which no prompt has a single one."""


class NothingAnswered(FlowError):  # noqa: N818 - what happened, not a fault
    """The model answers none of the prompts correctly.

    Attributes:
        asked: how many there were.
        full_answer: whether all tokens of the answers were asked for, not the first ones alone.
    """

    def __init__(self, asked: int, *, full_answer: bool = False) -> None:
        self.asked, self.full_answer = asked, full_answer
        never = "tokens are never all of the answer's" if full_answer else "token is never the answer's first one"
        super().__init__(
            f"the model answers none of the {asked} prompts correctly (its most likely next {never}), so there is "
            "nothing to knock out; is this the model's own tokenizer?"
        )

    def __reduce__(self) -> tuple[partial[NothingAnswered], tuple[int]]:
        return partial(type(self), full_answer=self.full_answer), (self.asked,)  # args hold the message, not these


class StudyError(FlowError):
    """A study that cannot be run, or continued, as it is."""


class JobError(SsmInterpError, ValueError):
    """A job that cannot be run, or continued, as it is."""


class RecipeError(SsmInterpError, ValueError):
    """A recipe that cannot be run as it is; the message names file, line and key."""


class SsmInterpWarning(UserWarning):
    """Numbers are right, and may mean something else than one thinks. All warnings of this package are of this kind."""


class HookedWarning(SsmInterpWarning):
    """Something is measured while hooks of the user's are on hook points, and so under them."""


class SharedTokenWarning(SsmInterpWarning):
    """Prompts ask for a first token that other answers among them begin with too."""


class NoEdgesWarning(SsmInterpWarning):
    """Some of the knockouts of a sweep have no edges in any prompt, so that they change nothing."""


class JobWarning(SsmInterpWarning):
    """A job runs, and maybe not in the way one thinks."""
