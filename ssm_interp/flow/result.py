"""What a sweep found: a tidy table, its summary, its picture, its file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ssm_interp import plots
from ssm_interp.errors import FlowError
from ssm_interp.experiments.values import Align
from ssm_interp.flow.summary import summarise
from ssm_interp.results import Result

COLUMNS = [
    "prompt_id",
    "answer",
    "unasked",
    "model",
    "revision",
    "source",
    "target",
    "feature_group",
    "layer",
    "window_start",
    "window_size",
    "n_edges",
    "p_base",
    "p",
    "relative_change",
    "logprob_difference",
    "hit",
]
OF_METRIC = ["metric", "value_base", "value"]


@dataclass(frozen=True)
class FlowRun:
    """How one model was swept.

    Attributes:
        model: its name in the table.
        layers: the layers that windows run over.
        windows: layers per window, w; one number or several.
        align: `"left"` or `"centre"`.
        asked: how many prompts it was asked.
        kept: how many of them are in the table: those that it answered correctly, unless all were asked for.
        engine: how the answers were computed: as rows of one step, or by full forwards and why.
        full_answer: whether every token of the answers was scored, not the first one alone.
    """

    model: str
    layers: tuple[int, ...]
    windows: tuple[int, ...]
    align: Align
    asked: int
    kept: int
    engine: str
    full_answer: bool = False

    @property
    def x_label(self) -> str:
        """What the layer axis of its picture says."""
        if self.windows == (1,):
            return "Layer"
        drawn_at = "first" if self.align == "left" else "centre"
        return f"Layer ({drawn_at} of the window, {', '.join(map(str, self.windows))} of {len(self.layers)} layers)"


@dataclass(frozen=True, eq=False, repr=False)
class FlowResult(Result):
    """Every number of a sweep, or of several.

    Attributes:
        frame: one row per prompt, source, target, feature group and window, with the columns `prompt_id`; `answer`,
            what it is asked for (`Paris`, or the first token of several, `"·P" of "Prague"`); `unasked`, how many
            further tokens that answer has; `model`, `revision`, `source`, `target`, `feature_group` ("all": all
            features); `layer`, the one that the window is drawn at (its first or its centre); `window_start`, its first
            layer; `window_size`, w (centred windows have fewer layers at the ends); `n_edges`, edges removed in each of
            them; `p_base`, `p`, `relative_change` in %, `logprob_difference` (see `changes`); `hit`, whether what is
            asked for is (still) most likely. Where a metric was asked for: `metric`, its name; `value_base` and
            `value`, what it says of the clean run and under the knockout.
        runs: how each model was swept.

    Raises:
        FlowError: missing columns; two runs of one model name.

    Example:
        >>> result.summary().loc[lambda rows: rows["mean"].idxmin()]        # doctest: +SKIP
    """

    frame: pd.DataFrame
    runs: tuple[FlowRun, ...]

    holds = (FlowRun,)

    def __post_init__(self) -> None:
        if missing := [column for column in COLUMNS if column not in self.frame.columns]:
            raise FlowError(f"a table of a sweep needs the columns {COLUMNS}; these are missing: {missing}")
        times = Counter(run.model for run in self.runs)
        if twice := [model for model, count in times.items() if count > 1]:
            raise FlowError(f"two runs have the same model name, {twice[0]!r}; give one of them another `name`")
        columns = [*COLUMNS, *(column for column in OF_METRIC if column in self.frame.columns)]
        if list(self.frame.columns) != columns:
            object.__setattr__(self, "frame", self.frame[columns])

    @staticmethod
    def join(results: Sequence[FlowResult]) -> FlowResult:
        """Several models' results as one.

        Raises:
            FlowError: none given, or two runs of one model name.
        """
        if not results:
            raise FlowError("there are no results to join")
        frame = pd.concat([result.frame for result in results], ignore_index=True)
        return FlowResult(frame, tuple(run for result in results for run in result.runs))

    def summary(self, **options: Any) -> pd.DataFrame:
        """Means over prompts with intervals, and medians, per model, source, target, feature group and window.

        Args:
            options: level, interval ("bootstrap" or "t"), resamples, seed; see `summarise`.
        """
        return summarise(self.frame, **options)

    def largest_drops(self, **options: Any) -> pd.DataFrame:
        """The summary's row with the lowest mean change, for each model, source, target, feature group, window size.

        Args:
            options: of `summary`.
        """
        summary = self.summary(**options)
        groups = summary.groupby(["model", "source", "target", "feature_group", "window_size"], sort=False)
        return summary.loc[groups["mean"].idxmin()].reset_index(drop=True)

    def plot(self, **options: Any) -> Figure:
        """A panel per model (and a row per target): mean relative change over the windows, a line per source.

        Args:
            options: statistic ("mean", "median", "accuracy", "logprob_difference"), ax; see `plots.flow_figure`.
        """
        return plots.flow_figure(self.summary(), x_labels={run.model: run.x_label for run in self.runs}, **options)

    def page(self, **options: Any) -> str:
        """The same as an interactive page of HTML, which opens in a browser offline; options of `plots.flow_page`."""
        return plots.flow_page(self.summary(), x_labels={run.model: run.x_label for run in self.runs}, **options)
