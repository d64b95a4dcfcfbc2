"""What somebody gave, or got, in a few words: names and shapes, never numbers by the thousand, nor a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice
from reprlib import Repr
from typing import Any

import pandas as pd
from torch import nn

MOST = 8  # items of a sequence or a mapping
LONGEST = 80  # characters of a text, and of any one value in an error
LONGEST_FIELD = 400  # characters of one field of a result


class _Short(Repr):
    def __init__(self, longest: int) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 4, MOST, MOST, MOST, MOST
        self.maxstring, self.maxother = LONGEST, longest

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        items = (f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in x)
        return f"{{{_listed(items, len(x))}}}"

    def repr_DataFrame(self, x: pd.DataFrame, level: int) -> str:  # noqa: N802, ARG002 - reprlib calls it by its type
        return f"DataFrame of {len(x)} rows: {_listed(map(str, x.columns), len(x.columns))}"

    def repr_instance(self, x: Any, level: int) -> str:
        name = type(x).__name__
        if isinstance(x, type) or inspect.isroutine(x):
            return getattr(x, "__qualname__", name)
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple) and len(shape) > 0:
            return f"{name} {list(shape)}"
        if isinstance(x, Mapping):
            return f"{name} of {self.repr1(list(x), level - 1)}"
        if isinstance(x, nn.Module):
            return name
        try:
            text = repr(x)
        except Exception:  # what somebody else's repr raises must not hide what was wrong
            return name
        return text if len(text) <= self.maxother and "\n" not in text else name


_in_an_error, _in_a_result = _Short(LONGEST), _Short(LONGEST_FIELD)


def describe(value: Any) -> str:
    """A value in an error: small ones as they are, tensors by their shape, tables by their size, long ones cut.

    Example:
        >>> import torch
        >>> describe({"state": torch.zeros(2, 3), "layers": [1, 2]})
        "{'state': Tensor [2, 3], 'layers': [1, 2]}"
    """
    return _in_an_error.repr(value)


def short_repr(self: Any) -> str:
    """The `__repr__` of a dataclass or a named tuple whose fields may hold tensors, tables or models.

    Example:
        >>> from typing import NamedTuple
        >>> import torch
        >>> class Reading(NamedTuple):
        ...     layer: int
        ...     values: torch.Tensor
        ...     def __repr__(self) -> str:
        ...         return short_repr(self)
        >>> Reading(3, torch.zeros(2, 5))
        Reading(layer=3, values=Tensor [2, 5])
    """
    names = [field.name for field in fields(self) if field.repr] if is_dataclass(self) else self._fields
    shown = ", ".join(f"{name}={_in_a_result.repr(getattr(self, name))}" for name in names)
    return f"{type(self).__name__}({shown})"


def _listed(items: Iterable[str], count: int) -> str:
    more = [f"... {count} in all"] if count > MOST else []
    return ", ".join([*islice(items, MOST), *more])
