"""Classes that others make of a mixer's class at run time, as torch's parametrisations do, with another class below."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ssm_interp.errors import HookError


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, below the one that torch makes for it when it is parametrised."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def on_base(kind: Any, old: type[Any], new: type[Any]) -> Any:
    """A class as it would be with `new` in the place of its base `old`; both may be the class itself.

    Raises:
        HookError: a method of it calls `super()`, which would look for the old class.
    """
    if kind is old:
        return new
    if old not in kind.__mro__:
        return kind
    for name, value in kind.__dict__.items():
        if inspect.isfunction(value) and "__class__" in value.__code__.co_freevars:
            raise HookError(
                f"somebody made {kind.__name__} out of {old.__name__}, and its {name} calls super(), which would not "
                f"find its class any more; undo that before its hook points come or go"
            )
    bases = tuple(on_base(base, old, new) for base in kind.__bases__)
    kept = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__.replace(old.__name__, new.__name__), bases, kept)
