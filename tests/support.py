"""What the tests of the hooks floor share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ssm_interp as si

CACHES = ("cache", "cache_params", "past_key_values")


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def edited(ssm: si.Attachment, inputs: dict[str, Any], *interventions: si.Intervention) -> Tensor:
    with ssm.edit(*interventions):
        return logits(ssm.model, inputs)


@contextmanager
def zeroed_edges(ssm: si.Attachment, layer: int, mask: Tensor) -> Iterator[None]:
    """The slow way to knock edges out: zero entries of the materialised matrix. `mask` broadcasts to [b h t s]."""
    hook = ssm.layers[layer].hook_attn.register_forward_hook(lambda _m, _a, attn: torch.where(mask, 0.0, attn))
    try:
        yield
    finally:
        hook.remove()


def cache_of(output: Any) -> Any:
    return next(getattr(output, name) for name in CACHES if name in list(output))


def cached(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument that this model, in this version of transformers, takes it by."""
    return {next(name for name in CACHES if name in signature(model.forward).parameters): cache}


def checkpointing(model: PreTrainedModel, *args: Any) -> None:
    """Switch gradient checkpointing on, by the name that this version of transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*args)


def decode(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """Logits of every position: the prompt in one call, the rest token by token on its cache."""
    positions = torch.arange(ids.shape[1])[None] if "position_ids" in signature(model.forward).parameters else None
    found: list[Tensor] = []
    options: dict[str, Any] = {}
    with torch.no_grad():
        for begin, end in [(0, prompt), *((step, step + 1) for step in range(prompt, ids.shape[1]))]:
            if positions is not None:
                options["position_ids"] = positions[:, begin:end]
            output = model(input_ids=ids[:, begin:end], use_cache=True, **options)
            options = cached(model, cache_of(output))
            found.append(output.logits)
    return torch.cat(found, dim=1)
