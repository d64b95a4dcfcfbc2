"""A summary of a sweep, taken apart into the panels of a picture and the lines in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from ssm_interp.errors import PlotError
from ssm_interp.plots.style import ARROW, readable, short
from ssm_interp.reprs import short_repr

StatisticName = Literal["mean", "median", "accuracy", "logprob_difference", "metric"]
LAYER = "Layer"
APART = ["model", "source", "target", "feature_group"]
MOST_ACROSS = 4


class Statistic(NamedTuple):
    """One number of a summary, and how to draw it."""

    value: str
    low: str
    high: str
    label: str
    line: str  # what a line shows
    scale: float
    unchanged: float  # its value, scaled, where a knockout does nothing
    least: float  # how far the axis goes on both sides of that at least, so that noise does not fill it


STATISTICS: Mapping[str, Statistic] = {
    "mean": Statistic(
        "mean", "low", "high", "Relative change of the answer's probability (%)", "mean over prompts", 1, 0, 5
    ),
    "median": Statistic(
        "median",
        "median_low",
        "median_high",
        "Relative change of the answer's probability (%)",
        "median over prompts",
        1,
        0,
        5,
    ),
    "accuracy": Statistic(
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "Prompts still answered correctly (%)",
        "share of prompts",
        100,
        100,
        5,
    ),
    "logprob_difference": Statistic(
        "logprob_difference",
        "logprob_difference_low",
        "logprob_difference_high",
        "Change of the answer's log-probability (nats)",
        "mean over prompts",
        1,
        0,
        0.05,
    ),
    "metric": Statistic(
        "value_difference",
        "value_difference_low",
        "value_difference_high",
        "Change of the metric, in its own units",
        "mean over prompts",
        1,
        0,
        0,
    ),
}


class Covered(NamedTuple):
    """Pieces of a line that others run on top of.

    Attributes:
        name: of the line.
        above: how many lines hide it there.
        x, y: the two ends of each piece, and a NaN.
    """

    name: str
    above: int
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]

    def __repr__(self) -> str:
        return short_repr(self)


@dataclass(frozen=True)
class Panel:
    """A part of a picture: where it stands, what tells it from its neighbours, and its rows."""

    row: int
    column: int
    across: str  # words for what varies from column to column
    down: tuple[str, ...]  # and from row to row
    rows: pd.DataFrame

    __repr__ = short_repr

    @property
    def lane(self) -> tuple[str, ...]:
        """Words for its row of the grid: what is knocked out for which target, and what varies down."""
        said = any(ARROW in words for words in (self.across, *self.down))
        words = self.down if said else (in_words("target", self.rows["target"].iloc[0]), *self.down)
        source = readable(self.rows["source"].iloc[0])
        if self.across == f"source: {source}" or self.rows["feature_group"].nunique() == 1:
            return words
        edges = (word for word in words if word != f"source: {source}")  # lines are feature groups, of one source
        return tuple(word.replace(f"source {ARROW}", f"{source} {ARROW}") for word in edges)


@dataclass(frozen=True)
class Layout:
    """All panels of a picture.

    Attributes:
        panels: those that have rows, row by row.
        shape: rows and columns of the grid.
        across: the key that varies from column to column.
        wrapped: whether the panels of one long row were broken into several.
    """

    panels: tuple[Panel, ...]
    shape: tuple[int, int]
    across: str
    wrapped: bool

    __repr__ = short_repr

    def lowest(self, panel: Panel) -> bool:
        """Whether no other panel stands below this one."""
        return not any(other.column == panel.column and other.row > panel.row for other in self.panels)


def drawable(summary: pd.DataFrame, statistic: str) -> tuple[pd.DataFrame, Statistic]:
    """The rows with the columns `value`, `low`, `high` of a statistic, scaled, and `window`, the nominal window size.

    A window that is cut off at the model's first or last layer belongs to those of its layer's full size.

    Raises:
        PlotError: no such statistic, missing columns, no rows.
    """
    if statistic not in STATISTICS:
        raise PlotError(f"there is no statistic {statistic!r} to draw; give one of {', '.join(STATISTICS)}")
    chosen = STATISTICS[statistic]
    numbers = [chosen.value, chosen.low, chosen.high]
    needed = [*APART, "layer", "window_start", "window_size", "level", "n", "n_first", *numbers]
    if missing := [column for column in needed if column not in summary.columns]:
        raise PlotError(f"this picture needs a summary with the columns {needed}; these are missing: {missing}")
    if summary.empty:
        raise PlotError("this picture needs at least one row; the summary is empty")
    rows = summary[needed[:-3]].copy()
    rows[["value", "low", "high"]] = summary[numbers].to_numpy(float) * chosen.scale
    if statistic == "metric":
        chosen = chosen._replace(label=f"Change of {', '.join(map(str, summary['metric'].unique()))}, in its own units")
    rows["source"] = rows["source"].astype(str)
    rank = rows.groupby([*APART, "layer"])["window_size"].rank("dense")
    rows["window"] = rows.groupby([*APART, rank.rename("rank")])["window_size"].transform("max")
    return rows, chosen


def arrange(rows: pd.DataFrame, keys: Sequence[str], across: str | None = None) -> Layout:
    """Panels for the values of `keys`: those of the first key that varies go across, of the others down.

    Args:
        rows: from `drawable`.
        keys: columns of rows.
        across: the key that goes across, whether or not it varies.
    """
    varying = [key for key in keys if _varies(rows, key)]
    across = across or (varying or list(keys))[0]
    down = [key for key in varying if key != across]
    columns = _values(rows, across)
    lanes = list(dict.fromkeys(rows.sort_values("window", kind="stable")[down].itertuples(index=False, name=None)))
    wrapped = not down and len(columns) > MOST_ACROSS
    width = -(-len(columns) // -(-len(columns) // MOST_ACROSS)) if wrapped else len(columns)
    panels = []
    for (column, *lane), part in rows.sort_values("layer", kind="stable").groupby([across, *down], sort=False):
        index, line = columns.index(column), lanes.index(tuple(lane))
        cell = divmod(index, width) if wrapped else (line, index)
        words = tuple(in_words(key, value) for key, value in zip(down, lane, strict=True))
        panels.append(Panel(*cell, in_words(across, column), words, part))
    height = -(-len(columns) // width) if wrapped else len(lanes)
    panels.sort(key=lambda panel: (panel.row, panel.column))
    return Layout(tuple(panels), (height, width), across, wrapped)


def _varies(rows: pd.DataFrame, key: str) -> bool:
    """Whether a picture needs it to tell rows apart; each model having one window size of its own does not."""
    if key == "window":
        return bool(rows.groupby("model")["window"].nunique().max() > 1)
    return len(rows[key].unique()) > 1


def _values(rows: pd.DataFrame, key: str) -> list[Any]:
    values = list(rows[key].unique())
    return sorted(values) if key == "window" else values


def in_words(key: str, value: Any) -> str:
    """What a panel, or a legend, says of one value of a key."""
    if key == "window":
        return f"windows of {value} layer{'' if value == 1 else 's'}"
    if key == "target":
        return f"source {ARROW} {readable(value)}"
    if key == "source":
        return f"source: {readable(value)}"
    return short(str(value), 32) if key == "model" else f"features: {short(str(value), 48)}"


def layer_label(rows: pd.DataFrame) -> str:
    """What a layer axis says, in every picture: "Layer", and of windows which of its layers one is drawn at.

    Args:
        rows: with `layer`, at which a window is drawn, `window_start` and `window`, the size that was asked for.
    """
    shown = sorted(rows["window"].unique().tolist())
    if shown == [1]:
        return LAYER
    drawn_at = "first" if (rows["layer"] == rows["window_start"]).all() else "centre"
    return f"{LAYER} ({drawn_at} of the window{f', {shown[0]} layers' if len(shown) == 1 else ''})"


def value_range(rows: pd.DataFrame, statistic: Statistic) -> tuple[float, float]:
    """The lowest and the highest number to draw, with their intervals, and no less than the statistic's least range."""
    values = rows[["value", "low", "high"]].to_numpy(float)
    low, high = statistic.unchanged - statistic.least, statistic.unchanged + statistic.least
    return float(np.nanmin(values, initial=low)), float(np.nanmax(values, initial=high))


def covered(rows: pd.DataFrame, key: str, x: str, names: Sequence[str], near: float) -> Iterator[Covered]:
    """Where lines that are drawn one after the other run on top of each other.

    Args:
        rows: with `value`, `x` and `key`, whose values name the lines.
        names: of the lines, in the order of drawing.
        near: values that differ by less look the same.
    """
    lines = {name: rows[rows[key] == name].sort_values(x) for name in names}
    at = np.unique(rows[x].to_numpy(float))
    heights = np.array([np.interp(at, line[x], line["value"], np.nan, np.nan) for line in lines.values()])
    for index, name in enumerate(names):
        same = np.abs(heights[index + 1 :] - heights[index]) < near
        above = (same[:, 1:] & same[:, :-1]).sum(0)  # lines that hide it, per piece between two x
        for count in range(1, len(names) - index):
            pieces = np.flatnonzero(above == count)
            if len(pieces):
                ends = np.stack([pieces, pieces + 1, np.full_like(pieces, -1)], 1).ravel()
                gap = ends < 0
                yield Covered(name, count, np.where(gap, np.nan, at[ends]), np.where(gap, np.nan, heights[index][ends]))


def header(rows: pd.DataFrame) -> str:
    """How many prompts stand behind some rows, and how many of them are asked for a first token alone."""
    first = f", {_count(rows['n_first'])} by first token" if rows["n_first"].any() else ""
    return f"{_count(rows['n'])} prompt{'' if rows['n'].max() == 1 else 's'}{first}"


def _count(counts: pd.Series) -> str:
    return " to ".join(dict.fromkeys((str(counts.min()), str(counts.max()))))


def legend_title(what: str, statistic: Statistic, rows: pd.DataFrame) -> str:
    """What the lines and the bands of a picture are."""
    levels = " or ".join(f"{100 * level:g}" for level in sorted(rows["level"].unique()))
    band = "" if rows["low"].isna().all() else f", band: its {levels} % interval"
    return f"{what} (line: {statistic.line}{band})"
