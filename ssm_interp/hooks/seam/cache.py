"""What a host calls its cache: the name differs with the class and the version of transformers, so that it is asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

CACHES = ("cache", "cache_params", "past_key_values")  # since 5.24, and what mixers, models and hybrids had before


def cache_parameter(function: Callable[..., Any]) -> str | None:
    """The parameter by which a function takes a cache; None: it takes none.

    Example:
        >>> cache_parameter(lambda input_ids, cache_params=None: None)
        'cache_params'
    """
    takes = inspect.signature(function).parameters
    return next((name for name in CACHES if name in takes), None)


def cache_in(output: Any) -> Any:
    """The cache in what a model gave back; None if there is none."""
    has = {field.name for field in fields(output)} if is_dataclass(output) else set()
    return next((getattr(output, name) for name in CACHES if name in has), None)
