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
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ssm_interp.hooks.convolution import OVER_POSITIONS, UPDATE, bind, convolve
from ssm_interp.hooks.operators import FUSED_SHORTCUTS, GATED_FAMILY, OPERATORS, Operator
from ssm_interp.hooks.points import EditMemory, HookPoints
from ssm_interp.hooks.rowsite import RowSite, rows_at_work
from ssm_interp.hooks.serve import serve
from ssm_interp.hooks.site import Site

_site: ContextVar[Site | RowSite] = ContextVar("ssm_interp_site")


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
    """The subclass of a mixer class, one that `operators_of` knows, whose operator calls go through its hook points."""
    body = host_forward(host_class)
    replacements: dict[str, Any] = {
        name: _route(OPERATORS[name], body.__globals__[name]) for name in operators_of(host_class)
    }
    replacements |= {name: _route_conv(name, body.__globals__[name]) for name in (OVER_POSITIONS, UPDATE)}
    replacements |= {name: _no_shortcut for name in FUSED_SHORTCUTS if name in body.__globals__}
    rebound = _rebind(host_class.forward, replacements)

    def forward(
        self: HookedMixer,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        rows = rows_at_work()
        site = rows.at(self) if rows else Site(self, cache_params, attention_mask, hidden_states.shape[1])
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
    body = host_forward(host_class)
    if not inspect.isfunction(body):
        return ()
    return tuple(name for name in OPERATORS if name in body.__code__.co_names and name in body.__globals__)


def _route(adapter: type[Operator], host: Callable[..., Any]) -> Callable[..., Any]:
    def routed(*args: Any, **kwargs: Any) -> Any:
        site, operator = _site.get(), adapter(host, args, kwargs)
        return site.serve(operator) if isinstance(site, RowSite) else serve(operator, site)

    return routed


def _route_conv(name: str, host: Callable[..., Any]) -> Callable[..., Any]:
    def routed(*args: Any, **kwargs: Any) -> Any:
        site, call = _site.get(), bind(name, host, args, kwargs)
        return site.convolve(call) if isinstance(site, RowSite) else convolve(call, site)

    return routed


def _no_shortcut(*_args: Any, **_kwargs: Any) -> None:
    """In place of a fused operator that contains the scan: transformers goes on without it when it gives None."""


def _inner(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that a decorator wraps: its `__wrapped__`, or (transformers 5.15 sets none) the one that it closes
    over."""
    closure = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    functions = [value for value in closure if inspect.isfunction(value)]
    alone = functions[0] if len(functions) == 1 else None
    return getattr(function, "__wrapped__", alone)


def host_forward(host_class: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class, inside all decorators."""
    function: Callable[..., Any] = host_class.forward
    while (inner := _inner(function)) is not None:
        function = inner
    return function


def _rebind(function: Callable[..., Any], replacements: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function, and of the functions that its decorators wrap, that sees other globals."""
    inner = _inner(function)
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


def hook_mixer(mixer: Any, own_operator: bool, memory: EditMemory) -> None:
    """Swap the class of a mixer, and give it its hook points."""
    gated = bool(GATED_FAMILY.intersection(operators_of(type(mixer))))
    A_log: Tensor = mixer.A_log
    heads = A_log.shape[:-1].numel() if gated else A_log.shape[0]
    head_dim = 1 if gated else mixer.head_dim
    state_size = A_log.shape[-1] if gated else mixer.ssm_state_size
    mixer.__class__ = hooked_class(type(mixer))  # type: ignore[arg-type]
    mixer.add_module(
        "ssm",
        HookPoints(mixer.layer_idx, heads, head_dim, state_size, gated, own_operator, memory).train(mixer.training),
    )
    _rebind_old_forward(mixer)


def restore_mixer(mixer: Any) -> None:
    """Undo `hook_mixer`."""
    del mixer._modules["ssm"]
    mixer.__class__ = mixer.host_class
    _rebind_old_forward(mixer)


def _rebind_old_forward(mixer: nn.Module) -> None:
    """accelerate's hooks keep the forward that was bound when they were added."""
    if "_old_forward" in mixer.__dict__:
        mixer._old_forward = MethodType(type(mixer).forward, mixer)  # type: ignore[assignment]
