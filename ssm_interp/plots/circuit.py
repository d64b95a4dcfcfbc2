"""A circuit: token roles across, layers upward, and arrows for the edges that are left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.bezier import BezierSegment
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from ssm_interp.errors import PlotError
from ssm_interp.plots.panels import LAYER
from ssm_interp.plots.style import (
    FAINT,
    INK,
    headline,
    legend,
    picture,
    printable,
    readable,
    short,
    sign_colour,
    signed,
)

COLUMNS = ["layer", "source", "target", "feature_group", "kept", "effect"]
Place = tuple[float, float]
MOST_NUMBERS = 14  # with more arrows their numbers would cover each other
THINNEST, THICKEST = 1.2, 6.0
HEIGHT = 0.7  # of an arrow; a layer is 1
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))


def circuit_figure(
    frame: pd.DataFrame, *, roles: Sequence[str] | None = None, title: str | None = None, metric: str = "the metric"
) -> Figure:
    """Which edges a circuit has, in which layers, and how much each matters.

    A column per role, which the residual stream runs up, from the embedding to the answer; a row per layer, in which an
    arrow goes from the source's column to the target's. Its width is the square root of how far the metric moves when
    the edge group is removed from the circuit; the number beside it is that change. Blue edges support the metric (it
    falls without them), red ones oppose it. A dash per group of features.

    Args:
        frame: a row per edge group, with `layer`, `source`, `target`, `feature_group`, `kept` and `effect`, as
            `Circuit.frame` gives. Groups that are not kept give the picture its layers and nothing else.
        roles: the columns, from left to right; None: as the frame has them, sources first.
        title: over the picture; a reader wants the model and how much the circuit explains. None: numbers of groups.
        metric: what the effects are changes of, with its unit.

    Raises:
        PlotError: missing columns, no rows, a role of the frame that `roles` leaves out, an effect of a kept group
            that is not finite.

    Example:
        >>> circuit_figure(circuit.frame, roles=circuit.roles).savefig("circuit.svg")      # doctest: +SKIP
    """
    columns, layers = checked_roles(frame, roles), sorted(map(int, frame["layer"].unique()))
    kept = frame[frame["kept"].astype(bool)]
    wide, high = 1.35 if len(columns) < 10 else 0.8, 0.95 if len(layers) < 5 else 0.62
    figure = picture(1.6 + wide * len(columns), 1.9 + high * len(layers))
    axes = figure.subplots()
    _streams(axes, columns, layers, metric)
    _arrows(axes, kept, columns, layers)
    headline(figure, title or f"{len(kept)} of {len(frame)} edge groups")
    groups = list(dict.fromkeys(kept["feature_group"]))
    if len(groups) > 1:
        handles = [Line2D([], [], color=INK, linestyle=dash) for _, dash in zip(groups, cycle(DASHES), strict=False)]
        options = {"loc": "outside lower center", "ncols": min(3, len(columns) // 2 + 1), "fontsize": 8}
        legend(figure, handles, [short(group) for group in groups], title="Features", title_fontsize=8, **options)
    return figure


def checked_roles(frame: pd.DataFrame, roles: Sequence[str] | None) -> list[str]:
    """The columns of the picture, of a frame that can be drawn; raises as `circuit_figure`."""
    if missing := [column for column in COLUMNS if column not in frame.columns]:
        raise PlotError(f"a circuit is drawn from a frame with the columns {COLUMNS}; these are missing: {missing}")
    if frame.empty:
        raise PlotError("a circuit is drawn from at least one edge group; the frame has no rows")
    named = list(dict.fromkeys([*frame["source"], *frame["target"]]))
    if roles is not None and (missing := [role for role in named if role not in roles]):
        raise PlotError(f"the frame has the roles {named}, but the columns {list(roles)} leave out {missing}")
    if not np.isfinite(frame.loc[frame["kept"].astype(bool), "effect"].to_numpy(float)).all():
        raise PlotError("the edge groups that are kept must have a finite effect")
    return named if roles is None else list(roles)


def _streams(axes: Axes, roles: Sequence[str], layers: Sequence[int], metric: str) -> None:
    """The residual streams and the axes around them."""
    for x in range(len(roles)):
        axes.plot([x, x], [-0.35, len(layers) + 0.05], color=FAINT, linewidth=5, solid_capstyle="round", zorder=1)
    names = [fill(readable(role), 12) for role in roles]
    axes.set_xticks(range(len(roles)), names, fontsize=9, parse_math=False)
    axes.set_yticks([row + HEIGHT / 2 for row in range(len(layers))], [str(layer) for layer in layers], fontsize=8)
    axes.set_ylabel(LAYER, fontsize=9, color=INK)
    meaning = "blue: they support it, red: they oppose it"
    numbers = fill(f"(width and number: change of {metric} if the edges are removed; {meaning})", 20 + 14 * len(roles))
    axes.set_xlabel(f"Role of the token\n{printable(numbers)}", fontsize=9, color=INK, parse_math=False)
    axes.set_xlim(-0.6, len(roles) - 0.4)
    axes.set_ylim(-0.45, len(layers) + 0.2)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    for row in range(1, len(layers)):
        axes.axhline(row - 0.15, color=FAINT, linewidth=0.6, zorder=0)


def _arrows(axes: Axes, kept: pd.DataFrame, roles: Sequence[str], layers: Sequence[int]) -> None:
    """An arrow per edge group; wide ones first, so that they cover none."""
    groups = list(dict.fromkeys(kept["feature_group"]))
    strength, written = kept["effect"].abs(), list[Place]()
    widths = THICKEST * np.sqrt(strength / (strength.max() or 1.0))
    for index in strength.sort_values(ascending=False, kind="stable").index:
        row, width = kept.loc[index], max(THINNEST, float(widths[index]))
        group = groups.index(row["feature_group"])
        path = arrow_path(
            roles.index(row["source"]), roles.index(row["target"]), layers.index(int(row["layer"])), group
        )
        axes.add_patch(
            FancyArrowPatch(
                path=path,
                arrowstyle="-|>",
                mutation_scale=7 + 2 * width,
                linewidth=width,
                linestyle=DASHES[group % len(DASHES)],
                color=sign_colour(float(row["effect"])),
                alpha=0.9,
                zorder=2,
            )
        )
        if len(kept) <= MOST_NUMBERS:
            written.append(_write(axes, float(row["effect"]), path, written))


def _write(axes: Axes, effect: float, path: Path, taken: Sequence[Place]) -> Place:
    """Write a number onto an arrow, near its middle, where no other number stands; its place."""
    along = [BezierSegment(path.vertices)(part) for part in (0.5, 0.38, 0.62, 0.26, 0.74)]
    free = [(x, y) for x, y in along if all(abs(x - left) > 0.42 or abs(y - low) > 0.17 for left, low in taken)]
    x, y = (free or along)[0]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    axes.text(x, y, signed(float(f"{effect:.2g}")), fontsize=7, color=INK, ha="center", va="center", bbox=box, zorder=3)
    return float(x), float(y)


def arrow_path(source: int, target: int, floor: int, group: int) -> Path:
    """From one stream to another within the band of a layer; to itself a loop on the left. Groups of features do not
    cover each other."""
    low, high = floor + 0.1 * group, floor + HEIGHT
    if source == target:
        out = source - 0.3 - 0.14 * group
        points = [(source, low), (out, low + 0.1), (out, high - 0.1), (target, high)]
        return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    points = [(source, low), ((source + target) / 2, low + 0.75 * (high - low)), (target, high)]
    return Path(points, [Path.MOVETO, Path.CURVE3, Path.CURVE3])
