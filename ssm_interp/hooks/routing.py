"""How one mixer's operator calls reach us, and nobody else's.

The mixer's class is swapped for a subclass whose `forward` runs the host's own forward with the operator names rebound:
a copy of the function object with other globals, `__wrapped__` decorators followed. No global of the host is touched. A
context variable, set by that forward, says which mixer the rebound operator serves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from ssm_interp.hooks.errors import UnsupportedModelError
from ssm_interp.hooks.operators import FUSED_SHORTCUTS, OPERATORS, Operator
from ssm_interp.hooks.points import HookPoints
from ssm_interp.hooks.serve import serve
from ssm_interp.hooks.site import Site

_site: ContextVar[Site] = ContextVar("ssm_interp_site")


class HookedMixer(nn.Module):
    """Marks the classes that `hooked_class` makes.

    Attributes:
        host_class: the class that it stands in for.
        layer_idx: index of the layer in the model, as transformers keeps it.
        ssm: the hook points.
    """

    host_class: type[nn.Module]
    layer_idx: int
    ssm: HookPoints


@cache
def hooked_class(host_class: Any) -> type[HookedMixer]:
    """The subclass of a mixer class whose operator calls go through the mixer's hook points.

    Raises:
        UnsupportedModelError: the class's forward does not call a known operator.
    """
    body = inspect.unwrap(host_class.forward)
    names = [name for name in OPERATORS if name in body.__code__.co_names and name in body.__globals__]
    if not names:
        raise UnsupportedModelError(
            f"{host_class.__module__}.{host_class.__name__} does not call any operator that ssm_interp knows "
            f"({', '.join(OPERATORS)}); it works with transformers >= 5.15, "
            f"this is transformers {transformers_version()}"
        )
    replacements: dict[str, Any] = {name: _route(OPERATORS[name], body.__globals__[name]) for name in names}
    replacements |= {name: _no_shortcut for name in FUSED_SHORTCUTS if name in body.__globals__}
    rebound = _rebind(host_class.forward, replacements)

    def forward(
        self: HookedMixer,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        site = Site(self, cache_params, attention_mask, hidden_states.shape[1])
        token = _site.set(site)
        try:
            output = rebound(self, hidden_states, cache_params, attention_mask, **kwargs)
        finally:
            _site.reset(token)
        site.close()
        return output

    namespace = {"forward": forward, "host_class": host_class, "__module__": host_class.__module__}
    return type(f"Hooked{host_class.__name__}", (host_class, HookedMixer), namespace)


def operators_of(host_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the known operators that a mixer class calls; none for a class that is no SSM mixer."""
    body = inspect.unwrap(host_class.forward)
    if not inspect.isfunction(body):
        return ()
    return tuple(name for name in OPERATORS if name in body.__code__.co_names and name in body.__globals__)


def _route(adapter: type[Operator], host: Callable[..., Any]) -> Callable[..., Any]:
    def routed(*args: Any, **kwargs: Any) -> Any:
        return serve(adapter(host, args, kwargs), _site.get())

    return routed


def _no_shortcut(*_args: Any, **_kwargs: Any) -> None:
    """In place of a fused operator that contains the scan: transformers goes on without it when it gives None."""


def _rebind(function: Callable[..., Any], replacements: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function, and of the functions that its decorators wrap, that sees other globals."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        copy = FunctionType(
            function.__code__, function.__globals__ | replacements, function.__name__, function.__defaults__,
            function.__closure__,
        )  # fmt: skip
    else:
        cells = tuple(
            CellType(_rebind(inner, replacements)) if cell.cell_contents is inner else cell
            for cell in function.__closure__ or ()
        )
        copy = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def transformers_version() -> str:
    import transformers

    return transformers.__version__
