"""Tokens that stand in no `input_ids`: prompt tuning, p-tuning and prefix tuning put virtual ones in front of a prompt.

Positions are columns of `input_ids`, and only the callers of a forward know that they no longer are.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from types import FrameType
from typing import Any

from torch import Tensor, nn

from ssm_interp.errors import HookError, InterventionError

WHAT_TO_DO = "call the model without them (PEFT: inside `with model.disable_adapter():`)"


def virtual_tokens(model: nn.Module) -> str | None:
    """What puts virtual tokens in front of the prompts of a model; None: nothing that it knows of."""
    return next((reason for part in model.modules() if (reason := _learned(part))), None)


def refuse_virtual_tokens(model: nn.Module, what: str, kind: type[HookError] = HookError) -> None:
    """Refuse what counts columns of `input_ids` in a model that puts virtual tokens in front of them.

    Raises:
        HookError: it does.
    """
    if reason := virtual_tokens(model):
        raise kind(f"{what}, but {reason}, so that positions are not columns of input_ids; {WHAT_TO_DO}")


def check_columns(what: str, length: int) -> None:
    """Refuse positions in a forward whose prompt has other columns than the `input_ids` of its callers.

    Args:
        what: names the positions.
        length: positions of the prompt, in the forward that asks.

    Raises:
        InterventionError: a caller puts virtual tokens in front, or passes longer embeddings on than it was given ids.
    """
    embedded, expanded = False, None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("forward", "generate"):
            given = frame.f_locals
            caller = given.get("self")
            if isinstance(caller, nn.Module) and (reason := _learned(caller)):
                raise _refusal(what, reason)
            ids, embeddings = (_argument(given, name) for name in ("input_ids", "inputs_embeds"))
            if embedded and ids is not None and ids.shape[1] < length and _argument(given, "decoder_input_ids") is None:
                expanded = f"{type(caller).__name__} makes {length} positions of {ids.shape[1]} input_ids"
            embedded |= ids is None and embeddings is not None and embeddings.shape[1] == length
        frame = frame.f_back
    if expanded is not None:
        raise _refusal(what, expanded)


def _refusal(what: str, reason: str) -> InterventionError:
    return InterventionError(
        f"{what} names positions, but {reason}, so that positions are not columns of input_ids; {WHAT_TO_DO}"
    )


def _learned(module: Any) -> str | None:
    config = None
    with suppress(Exception):  # a property of PEFT's models, which may have no adapter at the moment
        config = getattr(module, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False) is not True or getattr(module, "_adapters_disabled", False):
        return None
    kind = getattr(config, "peft_type", None)
    count = getattr(config, "num_virtual_tokens", None) or "some"
    name = f" ({getattr(kind, 'value', kind)})" if kind else ""
    return f"{type(module).__name__} puts {count} virtual tokens in front of every prompt{name}"


def _argument(given: dict[str, Any], name: str) -> Tensor | None:
    """A tensor `[b t ...]` that a forward was called with, by name or in its keyword arguments."""
    keywords = given.get("kwargs")
    value = given.get(name, keywords.get(name) if isinstance(keywords, dict) else None)
    return value if isinstance(value, Tensor) and value.ndim >= 2 else None
