"""Our results in CircuitsVis' views, which move under the mouse in a notebook. Needs the extra `hosts`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ssm_interp.attribution import AttentionView
from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import row_of
from ssm_interp.results import labels

if TYPE_CHECKING:
    from circuitsvis.utils.render import RenderedHTML

SUPPORTS, OPPOSES = "#2166AC", "#B2182B"  # the ends of the colour map that all our figures use
MOST_MAPS = 64  # small maps that can be told apart


def attention_maps(views: AttentionView | Mapping[Any, AttentionView], *, row: int = 0) -> RenderedHTML:
    """A small map of attention for each head, or for each of several views; the one clicked on is shown large.

    Blue is positive and red negative, on one scale for all maps.

    Args:
        views: a view whose heads are apart (`reduction=None`), or one that is reduced, or name -> reduced view: layers,
            or blocks of heads. Their tokens name rows and columns.
        row: which row of the batch.

    Returns:
        What CircuitsVis draws, shown by a notebook as the last value of a cell. The page holds the numbers and, if
        there is no internet, the scripts.

    Raises:
        FeatureError: more than 64 maps; not all targets; views that differ in shape; no such row; entries that are not
            finite.
        ImportError: CircuitsVis is not installed.

    Example:
        >>> blocks = [range(start, start + 192) for start in range(0, 1536, 192)]          # doctest: +SKIP
        >>> views = {f"channels {b[0]} to {b[-1]}": attention_views(ssm, inputs, layers=3, heads=b)[3] for b in blocks}
        ...                                                                                # doctest: +SKIP
        >>> attention_maps(views)                                                          # doctest: +SKIP
    """
    names, values = _maps(views)  # values [b map t s]
    batch, maps, *shape = values.shape
    if maps > MOST_MAPS:
        raise FeatureError(
            f"{maps} maps are too many to tell apart (at most {MOST_MAPS}): give attention_views some heads, or "
            "name -> a view of a block of heads with a reduction"
        )
    if shape[0] != shape[1]:
        raise FeatureError(f"a map needs all targets, [t s] with t = s, got {shape}; leave targets out")
    row, (first, *_) = row_of(row, batch), [views] if isinstance(views, AttentionView) else views.values()
    limit = _limit(values[row])
    with _installed():
        from circuitsvis.attention import attention_heads
    return attention_heads(
        attention=values[row],
        tokens=list(labels(first.tokens, row, shape[1])),
        attention_head_names=names,
        max_value=limit,
        min_value=-limit,
        positive_color=SUPPORTS,
        negative_color=OPPOSES,
        mask_upper_tri=True,
    )


def coloured_tokens(
    values: Float[Tensor, " t"] | Mapping[str, Float[Tensor, " t"]], tokens: Sequence[str]
) -> RenderedHTML:
    """A text whose tokens are coloured by a number each: blue where it is positive, red where it is negative.

    Args:
        values: one per token, for example a row of `LogitAttribution.by_position()` summed over layers and groups; or
            name -> such numbers, between which the reader chooses.
        tokens: a readable token per position.

    Returns:
        What CircuitsVis draws, as `attention_maps` does.

    Raises:
        FeatureError: no numbers, another number of them than tokens, or some that are not finite.
        ImportError: CircuitsVis is not installed.

    Example:
        >>> coloured_tokens(logit_attribution(ssm, inputs, paris).by_position()[0].sum((0, 1)), tokens)
        ...                                                                                # doctest: +SKIP
    """
    columns = dict(values) if isinstance(values, Mapping) else {"": values}
    if not columns:
        raise FeatureError("there are no values to colour tokens by: the mapping is empty")
    for name, numbers in columns.items():
        if not isinstance(numbers, Tensor) or numbers.ndim != 1:
            got = list(numbers.shape) if isinstance(numbers, Tensor) else type(numbers).__name__
            raise FeatureError(f"values {name!r} must be a tensor with a number per token, [t], got {got}")
        if len(numbers) != len(tokens):
            raise FeatureError(f"there are {len(numbers)} values {name!r} for {len(tokens)} tokens; give one per token")
    table = torch.stack([numbers.detach().float().cpu() for numbers in columns.values()], dim=-1)  # t k
    limit = _limit(table)
    with _installed():
        from circuitsvis.tokens import colored_tokens, colored_tokens_multi
    if isinstance(values, Mapping):
        return colored_tokens_multi(list(tokens), table, labels=list(columns))
    return colored_tokens(
        list(tokens),
        table[:, 0],
        min_value=-limit,
        max_value=limit,
        positive_color=SUPPORTS,
        negative_color=OPPOSES,
    )


def _maps(views: AttentionView | Mapping[Any, AttentionView]) -> tuple[list[str], Float[Tensor, "b map t s"]]:
    if isinstance(views, AttentionView):
        if views.reduction is not None:
            return [f"layer {views.layer}"], rearrange(views.values, "b t s -> b 1 t s").float().cpu()
        counted = "channel" if views.form == "unified" else "head"
        return [f"{counted} {number}" for number in range(views.values.shape[1])], views.values.float().cpu()
    if not isinstance(views, Mapping) or not views:
        raise FeatureError(f"views must be an AttentionView, or name -> AttentionView, got {type(views).__name__}")
    named = {f"layer {name}" if isinstance(name, int) else str(name): view for name, view in views.items()}
    shapes = {name: list(view.values.shape) for name, view in named.items()}
    if any(view.reduction is None for view in views.values()) or len(set(map(tuple, shapes.values()))) > 1:
        raise FeatureError(f"views by name must be reduced over heads and of one shape [b t s], got {shapes}")
    return list(shapes), torch.stack([view.values.float().cpu() for view in views.values()], dim=1)


def _limit(values: Tensor) -> float:
    """Where the colours end: the largest size of a value; 1 where all are 0."""
    if not values.isfinite().all():
        raise FeatureError("there are values that are not finite numbers, which have no colour")
    return float(values.abs().max()) or 1.0


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError("CircuitsVis is not installed; pip install 'ssm-interp[hosts]'") from error
