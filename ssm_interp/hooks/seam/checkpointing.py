"""Which edits a forward runs under that gradient checkpointing repeats in the backward pass: those of the first time.

The repetition may come after the `with` block of the edits, or in a thread of autograd's. What connects it with the
forward that it repeats is an object of the checkpoint, on which that forward leaves its edits: the context of the
autograd function (re-entrant), or the frame that the saved-tensor hooks of the other kind share.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

NAME = "ssm_interp_edits"

Edits = TypeVar("Edits")

_forward = checkpoint.checkpoint.__wrapped__.__code__  # type: ignore[attr-defined]
_file = _forward.co_filename


def in_backward() -> bool:
    """Whether this forward is computed inside a backward pass."""
    # The only sign that torch gives of a backward pass; torch.utils.checkpoint reads the same.
    return torch._C._current_graph_task_id() != -1


def is_checkpointed() -> bool:
    """Whether a checkpoint will repeat this forward."""
    return any(not repeats for _, repeats in _checkpoints())


def as_first_run(key: Hashable, edits: Edits, none: Edits) -> Edits:
    """The edits that a forward runs under.

    Args:
        key: the part of a model that runs.
        edits: those at work now.
        none: what stands for no edits.
    """
    if edits == none and not in_backward():
        return none
    for owner, repeats in (checkpoints := list(_checkpoints())):
        if repeats:
            edits = getattr(owner, NAME, {}).get(key, none)
            break
    for owner, repeats in checkpoints:
        if not repeats and edits != none:
            owner.__dict__.setdefault(NAME, {})[key] = edits
    return edits


def _checkpoints() -> Iterator[tuple[Any, bool]]:
    """The checkpoints around this call, innermost first: the object of each, and whether it repeats a forward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _forward and (generator := frame.f_locals.get("gen")) is not None:
            inside = generator.gi_frame
            if inside is not None and "new_frame" in inside.f_locals:
                yield inside.f_locals["new_frame"], False
        elif code.co_name == "unpack_hook" and code.co_filename == _file:
            yield frame.f_locals["frame"], True
        elif code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",):
            context = frame.f_locals["ctx"]
            if isinstance(context, FunctionCtx):
                yield context, code.co_name == "backward"
        frame = frame.f_back
