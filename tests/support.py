"""What the tests of the hooks floor share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ssm_interp as si


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
    return output.cache_params if getattr(output, "cache_params", None) is not None else output.past_key_values


def decode(model: PreTrainedModel, ids: Tensor, prompt: int, cache_name: str) -> Tensor:
    """Logits of every position: the prompt in one call, the rest token by token on its cache."""
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        output = (
            model(input_ids=ids[:, :prompt], position_ids=positions[:, :prompt], use_cache=True)
            if cache_name == "past_key_values"
            else model(input_ids=ids[:, :prompt], use_cache=True)
        )
        found = [output.logits]
        for step in range(prompt, ids.shape[1]):
            options: dict[str, Any] = {cache_name: cache_of(output)}
            if cache_name == "past_key_values":
                options["position_ids"] = positions[:, step : step + 1]
            output = model(input_ids=ids[:, step : step + 1], use_cache=True, **options)
            found.append(output.logits)
    return torch.cat(found, dim=1)


def cache_name(model: PreTrainedModel) -> str:
    pure = model.config.model_type in ("mamba", "mamba2", "falcon_mamba")
    return "cache_params" if pure else "past_key_values"
