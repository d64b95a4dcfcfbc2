"""What a model is called with: token ids, the mapping of a tokenizer, or a batch of prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssm_interp.errors import HookError
from ssm_interp.hooks.seam.cache import CACHES
from ssm_interp.hooks.seam.options import named_as, options_of
from ssm_interp.reprs import describe

RUN = ("inputs", "read", "layers")  # what `Attachment.run` takes itself


def as_inputs(inputs: Any, model: nn.Module, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Inputs as the keyword arguments of a model, without those that are None.

    Args:
        inputs: `input_ids` `[b t]`; the mapping that a tokenizer returns; or what has `input_ids` and an
            `attention_mask`, as a `prompts.Batch`. What is said about the text alone (`offset_mapping`;
            `token_type_ids` and `position_ids` of one text per row) is left out where the model does not take it.
        model: whose vocabulary the ids are of.
        options: further arguments of the model.

    Raises:
        HookError: anything else; a name that the model does not take, or one in both; an empty tensor; ids that are no
            integers `[b t]` or outside the vocabulary; a mask of another shape, or of something else than 0 and 1.

    Example:
        >>> model(**as_inputs(ids, model))                                                        # doctest: +SKIP
    """
    names = ("input_ids", "attention_mask")
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    elif not isinstance(inputs, Mapping) and all(hasattr(inputs, name) for name in names):
        inputs = {name: getattr(inputs, name) for name in names}
    if not isinstance(inputs, Mapping) or not all(isinstance(name, str) for name in inputs):
        raise HookError(
            "inputs must be ids [b t], the mapping that a tokenizer returns, or a batch of prompts, got "
            f"{type(inputs).__name__}{f' with the keys {describe([*inputs])}' if isinstance(inputs, Mapping) else ''}"
        )
    given = _given(inputs, model, options or {})
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and tensor.numel() == 0:
            raise HookError(f"{name} is empty, {list(tensor.shape)}: a model reads at least one token")
    _check_text(given, options_of(model))
    _check_cache(given)
    if "input_ids" in given:
        check_ids(given["input_ids"], model)
    _check_mask(given)
    return given


def _given(inputs: Mapping[str, Any], model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    takes = options_of(model)
    given = named_as(model, {name: value for name, value in inputs.items() if value is not None}, takes)
    more = {name: value for name, value in named_as(model, options, takes, RUN).items() if value is not None}
    if twice := sorted(given.keys() & more.keys()):
        raise HookError(f"{twice[0]} is given twice, in the inputs and as an option; give it once")
    return given | more


def check_ids(ids: Any, model: nn.Module) -> None:
    """Refuse what are no token ids of a model.

    Raises:
        HookError: something else than integers `[b t]`; an id outside the vocabulary.
    """
    whole = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.ndim != 2:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise HookError(f"input_ids must be integers [b t], got {got}; with a tokenizer give return_tensors='pt'")
    if ids.dtype not in (torch.int64, torch.int32):
        raise HookError(f"input_ids must be torch.int64 or torch.int32, got {ids.dtype}; give ids.long()")
    if ids.is_meta:
        return
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    vocabulary = getattr(embedding, "num_embeddings", None)
    if vocabulary is not None and (outside := (ids < 0) | (ids >= vocabulary)).any():
        row, column = outside.nonzero()[0].tolist()
        raise HookError(
            f"input_ids have the token {int(ids[row, column])} in row {row}, position {column}, but the vocabulary of "
            f"{type(model).__name__} has 0 to {vocabulary - 1}; use the model's own tokenizer"
        )


def _check_text(given: Mapping[str, Any], takes: Collection[str] | None) -> None:
    names = {"input_ids", "inputs_embeds"}
    if takes is not None and names & set(takes) and len(names & given.keys()) != 1:
        raise HookError(f"inputs must have input_ids [b t] (or else inputs_embeds); these have {describe([*given])}")


def _check_cache(given: Mapping[str, Any]) -> None:
    for name in given.keys() & set(CACHES):
        if isinstance(given[name], tuple | list | Mapping | Tensor | str | int):
            raise HookError(
                f"{name} must be a cache, which a model that is called with use_cache=True gives back in its output, "
                f"got {describe(given[name])}"
            )


def _check_mask(given: Mapping[str, Any]) -> None:
    text, mask = given.get("input_ids", given.get("inputs_embeds")), given.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 4):  # one that says who may read whom
        return
    continues = any(name in given for name in CACHES)
    shape = list(text.shape[:2]) if isinstance(text, Tensor) else []
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and len(shape) == 2 and len(mask) == shape[0]
    if not fits or mask.shape[1] < shape[1] or (mask.shape[1] > shape[1] and not continues):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise HookError(f"attention_mask must be a tensor [b t], as input_ids are ({shape}), got {got}")
    if mask.is_meta:
        return
    if not ((mask == 0) | (mask == 1)).all():
        raise HookError("attention_mask must be 1 at tokens and 0 at padding; this one holds something else")
    if not (tokens := (mask != 0).any(1)).all():
        row = int((~tokens).nonzero()[0, 0])
        raise HookError(f"attention_mask must be 1 at tokens, with a token in every row; row {row} is all padding")
