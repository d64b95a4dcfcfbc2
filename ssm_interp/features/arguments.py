"""What the verbs of this floor are given, checked: inputs, layers, positions, counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ssm_interp.arguments import as_index, as_indices, as_list
from ssm_interp.errors import FeatureError, HookError
from ssm_interp.features.groups import check_attached
from ssm_interp.hooks import Attachment
from ssm_interp.hooks.seam.cache import CACHES
from ssm_interp.hooks.seam.inputs import as_inputs
from ssm_interp.hooks.seam.virtual import refuse_virtual_tokens
from ssm_interp.prompts import Batch
from ssm_interp.results import Tokens

UNFIT = (*CACHES, "seq_idx", "cu_seqlens", "cu_seq_lens_q", "logits_to_keep", "inputs_embeds")


def whole_texts(ssm: Attachment, inputs: Any) -> tuple[dict[str, Any], Bool[Tensor, "b t"]]:
    """What to call a model with, and which columns are no padding, `[b t]`.

    Args:
        inputs: ids `[b t]`, the mapping of a tokenizer, or a batch of prompts.

    Raises:
        FeatureError: no ids of the model; a cache, packed sequences, or anything else by which a row is not one whole
            text; a mask of another shape, or without a token in some row.
    """
    named = inputs if isinstance(inputs, Mapping) else {}
    if unfit := [name for name in UNFIT if named.get(name) is not None]:
        raise FeatureError(f"the inputs hold {unfit[0]}, but a row must be one whole text, as ids; leave it out")
    try:
        refuse_virtual_tokens(ssm.model, "a row must be one whole text, column by column")
        given = as_inputs(inputs, ssm.model)
    except HookError as error:
        raise FeatureError(str(error)) from None
    if "input_ids" not in given:
        raise FeatureError(f"inputs must have input_ids [b t]; these have {list(given)}")
    ids = given["input_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        raise FeatureError(f"attention_mask must be [b t] = {list(ids.shape)}, as input_ids, got {list(mask.shape)}")
    return given, mask.bool()


def same_columns(layer: int, read: int, given: int) -> None:
    """Refuse what was read in a layer that has other columns than the ids.

    Raises:
        FeatureError: the model puts tokens of its own in between.
    """
    if read != given:
        raise FeatureError(
            f"layer {layer} read {read} positions of {given} input_ids: the model puts tokens of its own in between, "
            "so that positions are not columns of input_ids; take the part of it that is called with all of them"
        )


def chosen_layers(ssm: Attachment, layers: Any) -> list[int]:
    """Layers that exist, in the order given; None: all SSM layers.

    Raises:
        FeatureError: no attachment; a model without SSM layers; no layer, or one that is none of them.
    """
    check_attached(ssm)
    known = sorted(ssm.layers)
    if not known:
        raise FeatureError(f"{type(ssm.model).__name__} has no SSM layers (or was detached): there is nothing to read")
    try:
        wanted = as_indices(layers, "layers")
    except HookError as error:
        raise FeatureError(f"{error}; the SSM layers of this model are {known}") from None
    if wanted is None:
        return known
    if not wanted:
        raise FeatureError(f"layers names no layer; leave it out for all SSM layers, {known}")
    if missing := [layer for layer in wanted if layer not in known]:
        raise FeatureError(f"there is no SSM layer {missing[0]!r}; the SSM layers of this model are {known}")
    return list(dict.fromkeys(wanted))


def columns(targets: Any, mask: Bool[Tensor, "b t"], name: str = "targets") -> list[int]:
    """Target positions as columns of the input ids, counted from 0.

    Args:
        targets: one or a sequence; negative ones count from the end.
        mask: False at padding, `[b t]`.

    Raises:
        FeatureError: none; something else than integers; a position outside the prompt, or in a row's padding.
    """
    length = mask.shape[1]
    wanted = indices(targets, name)
    if outside := [target for target in wanted if not -length <= target < length]:
        raise FeatureError(
            f"there is no position {outside[0]}: the prompt has {length} positions, 0 to {length - 1} (or -{length} "
            "to -1)"
        )
    positions = [target % length for target in wanted]
    for target in positions:
        if len(rows := (~mask[:, target]).nonzero()[:, 0].tolist()):
            raise FeatureError(
                f"position {target} is padding in row {rows[0]}; targets are columns of input_ids, the same in each "
                "row, so pad on the left to have the last tokens of all rows in one column"
            )
    return positions


def indices(values: Any, name: str) -> tuple[int, ...]:
    """One integer or a sequence of them (Python's, numpy's or torch's), at least one.

    Raises:
        FeatureError: anything else.
    """
    try:
        whole = as_indices(values, name)
    except HookError as error:
        raise FeatureError(str(error)) from None
    if not whole:
        raise FeatureError(f"{name} must be an integer or a sequence of at least one, got {values!r:.200}")
    return whole


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """A whole number, Python's, numpy's or torch's.

    Raises:
        FeatureError: something else, or a number below the least one.
    """
    number = as_index(value)
    if number is None or number < least:
        raise FeatureError(f"{name} must be a whole number, at least {least}, got {value!r:.200}")
    return number


def row_of(row: Any, count: int) -> int:
    """A row of a batch of so many.

    Raises:
        FeatureError: no whole number, or no such row.
    """
    if (chosen := whole_number(row, "row", least=0)) >= count:
        raise FeatureError(f"there is no row {chosen}; the batch has rows 0 to {count - 1}")
    return chosen


def row_tokens(tokens: Any, inputs: Any, mask: Bool[Tensor, "b t"]) -> Tokens | None:
    """A readable token per column, for every row of a batch; None where none are known.

    Args:
        tokens: one per column, or a sequence of such sequences, one per row; None: those of the inputs, if these are a
            batch of prompts, with "" at padding.
        inputs: what the model reads.
        mask: of the columns that are no padding.

    Raises:
        FeatureError: something else; another number of tokens than there are columns.
    """
    batch, length = mask.shape
    if tokens is None:
        if not isinstance(inputs, Batch):
            return None
        return tuple(("",) * (length - len(prompt)) + prompt.tokens for prompt in inputs.prompts)
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise FeatureError(f"tokens must be one text per position, or one such list per row, got {tokens!r:.200}")
    given = as_list(tokens)
    rows = [given] * batch if all(isinstance(token, str) for token in given) else [as_list(row) for row in given]
    counts = [len(row) for row in rows]
    if counts != [length] * batch:
        raise FeatureError(
            f"there are {counts} tokens, but {batch} rows of {length} positions; give one token per position, or one "
            "such sequence per row"
        )
    return tuple(tuple(str(token) for token in row) for row in rows)
