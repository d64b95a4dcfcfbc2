"""Classifier-free guidance, with which `generate` reads a second prompt that nobody named positions of."""

from __future__ import annotations

import sys
from types import FrameType

from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from ssm_interp.hooks.errors import InterventionError

_unconditional = UnbatchedClassifierFreeGuidanceLogitsProcessor.get_unconditional_logits.__code__


def check_guidance(what: str) -> None:
    """Whether this forward reads the prompt whose positions are named.

    Raises:
        InterventionError: it is the unconditional one of guidance, which is called like any other; only the function
            that reads it knows.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _unconditional:
            raise InterventionError(
                f"{what} names positions of the prompt, but with guidance_scale `generate` reads a second, "
                "unconditional prompt, in which they are others; leave guidance_scale out inside `edit`, or combine "
                "the logits of the two prompts yourself, with the edit around the forward of one of them"
            )
        frame = frame.f_back
