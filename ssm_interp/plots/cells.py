"""What heat maps share: cells over layers or over targets, axes that name tokens, and the bar that explains colours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from ssm_interp.plots.panels import LAYER
from ssm_interp.plots.style import FAINT, INK, MONO, MOST_LABELS, printable, signed, token_label

MOST_LAYERS = 16  # labelled on one axis
NOTHING = 1e-6  # entries below this share of what they are changes of are rounding


def extent(count: int, each: float = 0.22, least: float = 1.6, most: float = 11.0) -> float:
    """Inches for so many rows or columns."""
    return min(max(least, each * count), most)


def centred(limit: float) -> Normalize:
    """Colours from -limit to limit; of nothing but zeros, from -1 to 1."""
    return Normalize(-(end := limit or 1.0), end)


def nothing(largest: float, scale: float | None, what: str) -> str:
    """What a map says that has nothing to show; empty where it has.

    Args:
        largest: its largest entry of either sign.
        scale: the size of what the entries are shares or changes of; None: unknown, so that zeros alone are nothing.
        what: words for the latter.
    """
    if largest > NOTHING * (scale or 0.0):
        return ""
    return f"nothing above {NOTHING:g} of {what}\n(largest entry: {largest:.1g})" if largest else "all entries are 0"


def say_nothing(axes: Axes, note: str) -> None:
    """Write what `nothing` says across a map."""
    box = {"facecolor": "white", "edgecolor": FAINT, "pad": 3}
    axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", va="center", fontsize=8, color=INK, bbox=box)


def layer_cells(
    axes: Axes,
    values: Float[np.ndarray, "token layer"],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    subject: Collection[int] = (),
    **colours: Any,
) -> ScalarMappable:
    """A row per source token, a column per layer; hatched where the value is NaN."""
    axes.patch.set(facecolor="white", hatch="/////", edgecolor=FAINT)
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="none", **colours)
    columns = range(0, len(layers), -(-len(layers) // MOST_LAYERS))
    axes.set_xticks(columns, [str(layers[column]) for column in columns], fontsize=8)
    axes.set_xlabel(LAYER, fontsize=9)
    axes.set_ylabel("Source token (bold: the subject)" if subject else "Source token", fontsize=9)
    axes.tick_params(length=2, colors=INK)
    name_tokens(axes.yaxis, tokens, subject)
    axes.spines[:].set_visible(False)
    return image


def target_cells(axes: Axes, values: Float[np.ndarray, "t s"], tokens: Sequence[str], **colours: Any) -> ScalarMappable:
    """A row per target token, a column per source token; blank where the source comes after the target."""
    later = np.triu(np.ones(values.shape, dtype=bool), k=1)
    image = axes.imshow(np.ma.masked_array(values, mask=later), aspect="equal", **colours)
    axes.set_xlabel("Source token", fontsize=9)
    axes.set_ylabel("Target token", fontsize=9)
    axes.tick_params(length=2, colors=INK)
    name_tokens(axes.xaxis, tokens, rotation=90)
    name_tokens(axes.yaxis, tokens)
    axes.spines[:].set_visible(False)
    corners = np.arange(len(tokens) + 1) - 0.5  # of the staircase that bounds the causal half
    axes.plot(corners.repeat(2)[1:], corners.repeat(2)[:-1], color=FAINT, linewidth=0.6)
    return image


def name_tokens(axis: Axis, tokens: Sequence[str], subject: Collection[int] = (), **style: Any) -> None:
    """Label an axis with tokens; of many every second, third, ... one. The subject's are bold."""
    positions = range(0, len(tokens), -(-len(tokens) // MOST_LABELS))
    axis.set_ticks(
        positions, [token_label(tokens[position]) for position in positions], fontsize=8, parse_math=False, **style
    )
    for position, text in zip(positions, axis.get_ticklabels(), strict=True):
        text.set(family=MONO)
        if position in subject:
            text.set(weight="bold")


def colour_bar(
    image: ScalarMappable, axes: Axes | Sequence[Axes], label: str, *, meaning: str = "", extend: str = "neither"
) -> None:
    """Beside the axes, with what blue and red mean; numbers have their sign where both signs have colours."""
    panels = [axes] if isinstance(axes, Axes) else list(axes)
    figure = panels[0].figure.figure
    bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=25, pad=0.02, extend=extend)
    width = max(24, int(9 * figure.get_figheight()))
    lines = (fill(printable(words), width) for words in (label, meaning) if words)
    bar.set_label("\n".join(lines), fontsize=9, parse_math=False)
    bar.ax.yaxis.set_major_formatter(signed if bar.norm.vmin else "{x:.4g}")
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
