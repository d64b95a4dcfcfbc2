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
    passed = point(tensor)
    if not isinstance(passed, Tensor) or passed.shape != tensor.shape:
        got = list(passed.shape) if isinstance(passed, Tensor) else type(passed).__name__
        raise HookError(f"a hook on hook_{point.name} returned {got}; it must return a tensor {list(tensor.shape)}")
    passed = passed.to(tensor)  # itself, where no hook replaced it
    for watch in watched:
        watch.read(passed)
    return passed


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
    passed = through_point(point, shown)
    if not untracked and tensor._version != version:
        before = compute()
    elif passed is shown and not untracked and not passed.requires_grad:
        return None
    return passed - before
