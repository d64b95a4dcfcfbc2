"""Logits under each of many knockouts, for about the cost of reading the prompts.

Removing edges into a position changes nothing before it. So the positions before the first target are read once, and
every variant goes on from there as rows of one batched step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ssm_interp.errors import HookError, InterventionError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.rows.plan import resolve
from ssm_interp.hooks.rows.steps import RowLogits, default_memory, each_length
from ssm_interp.hooks.rows.trial import obstacle
from ssm_interp.hooks.seam.inputs import check_ids
from ssm_interp.reprs import describe


def run_each(
    ssm: Attachment,
    input_ids: Int[Tensor, ...],
    variants: Sequence[Any],
    *,
    attention_mask: Int[Tensor, "b s"] | None = None,
    max_memory: int | None = None,
    refuse: bool = True,
) -> Iterator[RowLogits]:
    """Logits at the last token of every row under each of many knockouts, equal to those of a full forward for each.

    Args:
        ssm: an attached model, in eval mode.
        input_ids: `[b t]`.
        variants: each a Knockout, or several that act together in different layers or streams (none: the clean run).
            They name sources and targets, not single edges.
        attention_mask: 0 at padding, on the left or on the right; rows of one length are computed together, unpadded.
            Where a mixer's `in_proj` has a bias, a host's own forward of a left-padded row differs from that of the
            same row unpadded (its convolution sees the bias at the padding); what is given here is the unpadded one.
        max_memory: bytes that states and rows may take; None: a quarter of what is free.
        refuse: variants of which not one has an edge.

    Yields:
        Logits of some variants for some rows, in any order; every (variant, row) once.

    Raises:
        HookError: something that the batched step cannot be exact with (`obstacle` says what), then or before a later
            step; no variants; a mask that is not one run of ones; not enough memory for a single row.
        InterventionError: a stream, layer, feature or position that does not exist; two knockouts of one variant in
            the same stream of a layer.

    Cost: one forward pass over the positions before the first target (for each set of variants that agree on it), and
        for each variant the positions from there on, in the layers from its first one on.
    Source: Mamba Knockout (Endy et al., ACL 2025) for the knockouts; causality and linearity for the rest.

    Example:
        >>> every_layer = [Knockout(sources=[2, 3], targets=-1, layers=layer) for layer in ssm.layers]
        >>> for answers in run_each(ssm, ids, every_layer):
        ...     print(answers.variants, answers.logits.shape)
    """
    _check_exact(ssm)
    if isinstance(variants, Knockout):
        raise HookError("run_each takes a sequence of variants, got one Knockout; write [knockout]")
    if max_memory is not None and (not isinstance(max_memory, int) or max_memory < 1):
        raise HookError(f"max_memory must be a whole number of bytes, at least 1, got {describe(max_memory)}")
    sets = [tuple(variant) if isinstance(variant, list | tuple) else (variant,) for variant in variants]
    if not sets:
        raise HookError("run_each needs at least one variant; an empty one, (), is the clean run")
    if wrong := [knockout for group in sets for knockout in group if not isinstance(knockout, Knockout)]:
        raise InterventionError(f"run_each takes knockouts, got {describe(wrong[0])}")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        got = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise HookError(f"input_ids must be [b t] with at least one token, got {got}")
    check_ids(input_ids, ssm.model)
    for knockout in {(edit.layers, edit.features, edit.through): edit for group in sets for edit in group}.values():
        ssm.check(knockout)  # which looks at nothing else of it
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise HookError(f"the attention mask is {got}, but input_ids are {list(input_ids.shape)}")
    plan = resolve(sets, ssm.streams, mask, ssm.default_stream, refuse=refuse)
    memory = max_memory or default_memory(input_ids.device)
    return each_length(ssm, input_ids, mask, plan, memory, lambda: _check_exact(ssm))


def _check_exact(ssm: Attachment) -> None:
    if reason := obstacle(ssm):
        raise HookError(f"run_each cannot be exact here: {reason}; use one forward per knockout inside ssm.edit(...)")
