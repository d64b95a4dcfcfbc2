"""What only the callers of a forward know."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.utils import GenerationMixin

from ssm_interp.errors import InterventionError
from ssm_interp.hooks.own import ours

_prefill = GenerationMixin._prefill.__code__
_unconditional = UnbatchedClassifierFreeGuidanceLogitsProcessor.get_unconditional_logits.__code__


_mask: ContextVar[Tensor | None] = ContextVar("ssm_interp_mask", default=None)


@contextmanager
def keeping_mask(model: nn.Module) -> Iterator[None]:
    """Inside, attention layers can ask for the padding mask that the model was called with."""

    def before(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        _mask.set(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)

    handle = model.register_forward_pre_hook(ours(before), with_kwargs=True)
    token = _mask.set(None)
    try:
        yield
    finally:
        _mask.reset(token)
        handle.remove()


def prompt_mask(batch: int, prompt: int) -> Tensor | None:
    """0 at the padding of the prompt, `[b t]`, as far as `keeping_mask` knows of it."""
    mask = _mask.get()
    return mask[:, :prompt] if mask is not None and len(mask) == batch and mask.shape[1] >= prompt else None


def chunks_of_prompt() -> int:
    """In how many chunks `generate` reads the prompt that is being read; 1 outside of it.

    A chunk is called like a whole prompt; only the function that makes them knows that more will come.
    """
    frame = _caller(_prefill)
    return 1 if frame is None else len(frame.f_locals.get("input_chunks", (None,)))


def check_guidance(what: str) -> None:
    """Whether this forward reads the prompt whose positions are named.

    Raises:
        InterventionError: it is the unconditional one of guidance, which is called like any other; only the function
            that reads it knows.
    """
    if _caller(_unconditional) is not None:
        raise InterventionError(
            f"{what} names positions of the prompt, but with guidance_scale `generate` reads a second, unconditional "
            "prompt, in which they are others; leave guidance_scale out inside `edit`, or combine the logits of the "
            "two prompts yourself, with the edit around the forward of one of them"
        )


def _caller(code: CodeType) -> FrameType | None:
    """The nearest call of a function around this one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame
