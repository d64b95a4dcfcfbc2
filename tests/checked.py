"""Check the package's annotations while the tests run, at a cost that a suite of thousands of forwards can bear.

jaxtyping decorates every function of a package, binds the arguments of every call and checks them twice, for shapes
that agree with each other. Most functions have no shapes in their annotations: beartype alone says the same of them, in
a tenth of the time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from threading import local
from types import CodeType
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import config

_with_shapes = jaxtyping.jaxtyped


def install(package: str) -> None:
    """Check all annotations of a package; call this before anything imports it."""
    jaxtyping.jaxtyped = _checked
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _checked(decorated: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """In the place of `jaxtyping.jaxtyped`, by which name the import hook calls its decorator."""
    if decorated is None:
        return partial(_checked, typechecker=typechecker)
    if not inspect.isfunction(decorated):
        return _with_shapes(decorated, typechecker=typechecker)
    code = decorated.__code__
    if code not in _calls:
        hints = {name: _resolved(hint, decorated.__globals__) for name, hint in decorated.__annotations__.items()}
        _calls[code] = None if any(map(_has_shape, hints.values())) else _checked_call(decorated, hints)
    call = _calls[code]
    if call is None:
        return _with_shapes(decorated, typechecker=typechecker)

    @wraps(decorated)
    def unless_disabled(*args: Any, **kwargs: Any) -> Any:
        if config.jaxtyping_disable:
            return decorated(*args, **kwargs)
        before, _called.function = _called.function, decorated
        try:
            return call(*args, **kwargs)
        finally:
            _called.function = before

    return unless_disabled


class _Called(local):
    """The function that a checked call is about."""

    function: Callable[..., Any] | None = None


_called = _Called()
_calls: dict[CodeType, Callable[..., Any] | None] = {}


def _checked_call(function: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """A checked call of whichever function of this code is called: one that another function defines anew each time it
    runs need not be decorated anew each time."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _called.function(*args, **kwargs)

    call.__annotations__ = hints
    return beartype(call)


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """What an annotation says; anything where it names what is not there yet, as for jaxtyping."""
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, names)
    except Exception:  # a name that comes later, or no valid shape
        return Any


def _has_shape(hint: Any) -> bool:
    array = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return array or any(map(_has_shape, get_args(hint)))
