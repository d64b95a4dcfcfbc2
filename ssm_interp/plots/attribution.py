"""What each layer writes to the logits, by source token, as a heat map."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp.plots.style import INK, MOST_LABELS, STYLES, picture, signed, token_label


def attribution_figure(
    values: Float[Tensor, "l s"],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    subject: Collection[int] = (),
    title: str = "",
    label: str = "Written to the logit difference",
    ax: Axes | None = None,
) -> Figure:
    """Heat map of what layers write to a logit difference: a row per source token, a column per layer.

    Red speaks for the target, blue for the other token, white for neither.

    Args:
        values: attributions `[l s]`, such as `logit_attribution(...).by_position()[0].sum(1)`.
        tokens: a readable token per position.
        layers: the layer of each column.
        subject: positions whose tokens are set in bold blue.
        title: over the picture.
        label: of the colour bar.
        ax: draw into these axes.

    Raises:
        ValueError: values of another shape, or that are not finite; a subject outside the prompt.

    Example:
        >>> attribution_figure(found.by_position()[0].sum(1), tokens, found.layers).savefig("x.png")    # doctest: +SKIP
    """
    wanted = [len(layers), len(tokens)]
    if list(values.shape) != wanted or 0 in wanted:
        raise ValueError(
            f"attributions must be [layer source] = {wanted} for {wanted[0]} layers and {wanted[1]} tokens, got "
            f"{list(values.shape)}"
        )
    if not values.isfinite().all():
        raise ValueError("the attributions have entries that are not finite numbers")
    if outside := [place for place in subject if not 0 <= place < len(tokens)]:
        raise ValueError(f"the subject has position {outside[0]}, but there are {len(tokens)} tokens")
    height, width = min(max(1.6, 0.22 * len(tokens)), 11.0), min(max(2.8, 0.3 * len(layers)), 9.0)
    axes = picture(width + 3.0, height + 1.2).subplots() if ax is None else ax
    largest = float(values.abs().max()) or 1.0
    shown = values.detach().double().cpu().T.numpy()
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="none")
    _labels(axes, tokens, layers, subject)
    axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, pad=0.02)
    bar.set_label(label, fontsize=9, parse_math=False)
    bar.ax.yaxis.set_major_formatter(signed)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    return axes.figure.figure


def _labels(axes: Axes, tokens: Sequence[str], layers: Sequence[int], subject: Collection[int]) -> None:
    every, step = -(-len(tokens) // MOST_LABELS), -(-len(layers) // 16)
    rows, columns = range(0, len(tokens), every), range(0, len(layers), step)
    style: dict[str, Any] = {"family": "DejaVu Sans Mono", "parse_math": False}
    axes.set_yticks(rows, [token_label(tokens[row]) for row in rows], fontsize=8, **style)
    for row, text in zip(rows, axes.get_yticklabels(), strict=True):
        if row in subject:
            text.set(color=STYLES["subject"].colour, weight="bold")
    axes.set_xticks(columns, [str(layers[column]) for column in columns], fontsize=8)
    axes.set_xlabel("Layer", fontsize=9)
    axes.set_ylabel("Source token (bold: the subject)" if subject else "Source token", fontsize=9)
    axes.tick_params(length=2, colors=INK)
    axes.spines[:].set_visible(False)
