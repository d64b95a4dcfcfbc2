"""What results look like at a prompt: names and shapes, never numbers by the thousand, nor a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

MOST = 8  # items of a sequence or a mapping
LONGEST = 120  # characters of a text


def short_repr(self: Any) -> str:
    """The `__repr__` of a dataclass or a named tuple whose fields may hold tensors, tables or models.

    Example:
        >>> from typing import NamedTuple
        >>> import torch
        >>> class Found(NamedTuple):
        ...     layer: int
        ...     values: torch.Tensor
        ...     def __repr__(self) -> str:
        ...         return short_repr(self)
        >>> Found(3, torch.zeros(2, 5))
        Found(layer=3, values=[2, 5])
    """
    names = getattr(self, "_fields", None) or [field.name for field in fields(self) if field.repr]
    shown = ", ".join(f"{name}={short(getattr(self, name))}" for name in names)
    return f"{type(self).__name__}({shown})"


def short(value: Any) -> str:
    """A value in a few words: of tensors and arrays the shape, of tables the size, of modules the class."""
    match value:
        case Tensor() | np.ndarray():
            found = str(list(value.shape))
        case pd.DataFrame():
            found = f"<{len(value)} rows: {_listed(map(str, value.columns), len(value.columns))}>"
        case nn.Module():
            found = f"<{type(value).__name__}>"
        case Mapping():
            found = f"{{{_listed((f'{short(key)}: {short(one)}' for key, one in value.items()), len(value))}}}"
        case list():
            found = f"[{_listed(map(short, value), len(value))}]"
        case _ if is_dataclass(value) or hasattr(value, "_fields"):
            found = short_repr(value)
        case tuple():
            found = f"({_listed(map(short, value), len(value))}{',' * (len(value) == 1)})"
        case _:
            found = repr(value)
            if len(found) > LONGEST:
                found = f"{found[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
    return found


def _listed(items: Iterable[str], count: int) -> str:
    more = [f"... {count} in all"] if count > MOST else []
    return ", ".join([*islice(items, MOST), *more])
