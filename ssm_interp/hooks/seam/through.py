"""Tensors on their way through a hook point."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ssm_interp.errors import HookError
from ssm_interp.hooks.own import watches
from ssm_interp.hooks.points import HookPoint


def through_point(point: HookPoint, tensor: Tensor) -> Tensor:
    """Through a hook point, which may replace the tensor by one of the same shape and dtype."""
    watched = watches(point)
    for watch in watched:
        tensor = tensor if watch.give is None else watch.give(tensor)
    found = point(tensor)
    if not isinstance(found, Tensor) or found.shape != tensor.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise HookError(f"a hook on hook_{point.name} returned {got}; it must return a tensor {list(tensor.shape)}")
    found = found.to(tensor)  # itself, where no hook replaced it
    for watch in watched:
        watch.read(found)
    return found


def shift_at(point: HookPoint, compute: Callable[[], Tensor]) -> Tensor | None:
    """How a hook moved a tensor that is made for it alone; None if nobody touched it.

    With autograd the difference is returned though it is zero: through it the gradient reaches what the hook saw, while
    what it is subtracted from keeps the gradient upstream from being counted twice.
    """
    tensor = compute()
    untracked = tensor.is_inference()
    before = tensor.clone() if untracked else tensor
    version = None if untracked else tensor._version
    shown = tensor.view_as(tensor)
    found = through_point(point, shown)
    if not untracked and tensor._version != version:
        before = compute()
    elif found is shown and not untracked and not found.requires_grad:
        return None
    return found - before
