"""What somebody gave, in a few words: no tensor and no model is ever printed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from reprlib import Repr
from typing import Any

from torch import nn

LONGEST = 80


class _Short(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 3, 8, 8, 4, 8
        self.maxstring = self.maxother = LONGEST

    def repr_instance(self, x: Any, level: int) -> str:  # noqa: ARG002
        name = type(x).__name__
        if isinstance(x, type) or inspect.isroutine(x):
            return getattr(x, "__qualname__", name)
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple) and len(shape) > 0:
            return f"{name} {list(shape)}"
        if isinstance(x, Mapping):
            return f"{name} of {self.repr(list(x))}"
        if isinstance(x, nn.Module):
            return name
        try:
            found = repr(x)
        except Exception:  # what somebody else's repr raises must not hide what was wrong
            return name
        return found if len(found) <= LONGEST and "\n" not in found else name


_short = _Short()


def describe(value: Any) -> str:
    """A value in an error or a repr: small ones as they are, tensors by their shape, long ones cut.

    Example:
        >>> describe({"state": torch.zeros(2, 3), "layers": [1, 2]})
        "{'layers': [1, 2], 'state': Tensor [2, 3]}"
    """
    return _short.repr(value)
