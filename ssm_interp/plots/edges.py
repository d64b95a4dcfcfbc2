"""What single edges are worth: those into one token by layer, and those between all tokens."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp.plots.attention import attention_figure
from ssm_interp.plots.heatmap import TokenMap, heatmap_figure
from ssm_interp.plots.style import INK, picture, signed, token_label

LABEL = "Predicted change of the metric if the edge is removed"


def edge_figure(
    values: Float[Tensor, "layer t s"],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    target: int = -1,
    title: str = "",
    label: str = LABEL,
) -> Figure:
    """Two maps of attributions of edges: source token x layer into one token, and target x source summed over layers.

    Blue is a predicted loss of the metric when the edge is removed (the edge supports it), red a gain; each map has its
    own colours.

    Args:
        values: one per layer and edge, `[layer t s]`, lower-triangular in its last two dimensions.
        tokens: a readable token per position.
        layers: the model's number of each layer.
        target: the position whose edges the first map shows.
        title: over the picture.
        label: of the colours.

    Raises:
        ValueError: values of another shape, or not finite; another number of tokens or layers; a target outside.

    Example:
        >>> edge_figure(found.values[0], tokens, found.layers).savefig("edges.png", dpi=200)     # doctest: +SKIP
    """
    shape = list(values.shape)
    if values.ndim != 3 or shape[1] != shape[2] or 0 in shape:
        raise ValueError(f"an edge map needs values [layer t s] with t = s and at least one of each, got {shape}")
    if [len(layers), len(tokens)] != shape[:2]:
        raise ValueError(
            f"the values are {shape} [layer t s], but there are {len(layers)} layers and {len(tokens)} tokens"
        )
    if not -len(tokens) <= target < len(tokens):
        raise ValueError(f"the target is position {target}, but there are {len(tokens)} tokens")
    values = values.detach().double().cpu()
    if not values.isfinite().all():
        raise ValueError("the values of an edge map must be finite; some are not")
    target %= len(tokens)
    into = TokenMap(values[:, target, : target + 1].T.numpy(), tokens[: target + 1], layers)
    side = min(max(2.6, 0.27 * len(tokens)), 11.0)
    wide = min(max(2.2, 0.24 * len(layers)), 9.0)
    figure = picture(wide + side + 5.0, side + 1.8)
    left, right = figure.subplots(1, 2, width_ratios=[wide, side])
    heatmap_figure(into, limit=into.largest or 1.0, ax=left)
    left.set_xlabel("layer", fontsize=9)
    left.set_ylabel("source (written at)", fontsize=9)
    left.set_title(f"into “{token_label(tokens[target])}”, position {target}", fontsize=10, color=INK, parse_math=False)
    norm = Normalize(-(end := into.largest or 1.0), end)
    bar = figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=left, shrink=0.7, aspect=8 * side**0.5, pad=0.02)
    bar.ax.yaxis.set_major_formatter(signed)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    attention_figure(values.sum(0), tokens, title=f"all edges, summed over {len(layers)} layers", label=label, ax=right)
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    return figure
