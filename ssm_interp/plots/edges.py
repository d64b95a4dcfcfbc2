"""What single edges are worth: those into one token by layer, and those between all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp.errors import PlotError
from ssm_interp.plots.cells import centred, colour_bar, extent, layer_cells, nothing, say_nothing, target_cells
from ssm_interp.plots.style import CHANGED, headline, picture, token_label

EDGE_LABEL = "Predicted change of the metric if the edge is removed"
MEANING = "(blue: the edge supports the metric, red: it opposes it)"


def edge_figure(
    values: Float[Tensor, "layer t s"],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    target: int = -1,
    scale: float | None = None,
    title: str = "",
    label: str = EDGE_LABEL,
) -> Figure:
    """Two maps of attributions of edges: source token x layer into one token, and target x source for all tokens.

    The second map shows of each edge the layer in which it is worth most, with its sign, so that nothing cancels and
    both maps have the same colours: blue is a predicted loss of the metric when the edge is removed (the edge supports
    it), red a gain.

    Args:
        values: one per layer and edge, `[layer t s]`, lower-triangular in its last two dimensions.
        tokens: a readable token per position.
        layers: the model's number of each layer.
        target: the position whose edges the first map shows.
        scale: the clean metric; values below a millionth of it are drawn as nothing, and the map says so.
        title: over the picture; a reader wants the model and the metric.
        label: of the colours.

    Raises:
        PlotError: values of another shape, or not finite; another number of tokens or layers; a target outside.

    Example:
        >>> edge_figure(edges.values[0], tokens, edges.layers).savefig("edges.png", dpi=200)     # doctest: +SKIP
    """
    shape = list(values.shape)
    if values.ndim != 3 or shape[1] != shape[2] or 0 in shape:
        raise PlotError(f"an edge map needs values [layer t s] with t = s and at least one of each, got {shape}")
    if [len(layers), len(tokens)] != shape[:2]:
        raise PlotError(
            f"the values are {shape} [layer t s], but there are {len(layers)} layers and {len(tokens)} tokens"
        )
    if not -len(tokens) <= target < len(tokens):
        raise PlotError(f"the target is position {target}, but there are {len(tokens)} tokens")
    values = values.detach().double().cpu()
    if not values.isfinite().all():
        raise PlotError("the values of an edge map must be finite; some are not")
    target %= len(tokens)
    wide, side = extent(len(layers), each=0.24, least=2.2, most=9.0), extent(len(tokens), each=0.27, least=2.6)
    figure = picture(wide + side + 4.8, side + 1.9)
    left, right = figure.subplots(1, 2, width_ratios=[wide, side])
    largest = float(values.abs().max())
    note = nothing(largest, scale and abs(scale), "the metric")
    colours: dict[str, Any] = {"cmap": CHANGED, "norm": centred(abs(scale or 1.0) if note else largest)}
    layer_cells(left, values[:, target, : target + 1].T.numpy(), tokens[: target + 1], layers, **colours)
    headline(left, f"Edges into “{token_label(tokens[target])}”, position {target}")
    strongest = values.gather(0, values.abs().argmax(0, keepdim=True))[0]
    colour_bar(target_cells(right, strongest.numpy(), tokens, **colours), [left, right], label, meaning=MEANING)
    for axes in (left, right) if note else ():
        say_nothing(axes, note)
    headline(right, "All edges, each in its strongest layer" if len(layers) > 1 else f"All edges of layer {layers[0]}")
    headline(figure, title)
    return figure
