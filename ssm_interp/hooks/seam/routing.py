"""How one mixer's operator calls reach us, and nobody else's.

The mixer's class is swapped for a subclass. While nothing is asked of a mixer, it runs the host's own forward; else
a copy of that function (inside its decorators) that sees the host's globals, as they are at that moment, with the
operator names rebound. No global of the host is touched. A context variable, set around that copy,
says which mixer the rebound operator serves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, wraps
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ssm_interp.errors import UnsupportedModelError
from ssm_interp.hooks.edits.forward import edits_at
from ssm_interp.hooks.edits.site import EditSite
from ssm_interp.hooks.points import HookPoints
from ssm_interp.hooks.seam.cache import CACHES, cache_parameter
from ssm_interp.hooks.seam.classes import on_base, own_class
from ssm_interp.hooks.seam.convolution import OVER_POSITIONS, UPDATE, bind
from ssm_interp.hooks.seam.operators import FUSED_SHORTCUTS, GATED_FAMILY, OPERATORS, Operator
from ssm_interp.hooks.seam.record import has_record
from ssm_interp.hooks.seam.serving import Site, server_here

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies as its host class, hooked again."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_hooked, (self.host_class,), *reduced[2:]


def _new_hooked(host_class: Any) -> HookedMixer:
    hooked = hooked_class(host_class)
    return hooked.__new__(hooked)


class _Globals(dict[str, Any]):
    """Some names, and all others as a module has them at the moment they are looked up."""

    def __init__(self, module: dict[str, Any], names: dict[str, Any]) -> None:
        super().__init__(names)
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self._module[name]


@cache
def hooked_class(host_class: Any) -> type[HookedMixer]:
    """The subclass of a mixer class, one that `operators_of` knows, whose operator calls go through its hook points."""
    served = _rebind(host_class.forward, _served(host_forward(host_class)))

    @wraps(host_class.forward)
    def forward(self: HookedMixer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if not self.ssm.asked.now and not _has_record(self, args, kwargs):
                return host_class.forward(self, *args, **kwargs)
            return _uncompiled(self, *args, **kwargs)
        if _is_idle(self, args, kwargs):
            return host_class.forward(self, *args, **kwargs)
        return served(self, *args, **kwargs)

    namespace = {"forward": forward, "host_class": host_class, "__module__": host_class.__module__}
    return type(f"Hooked{host_class.__name__}", (host_class, HookedMixer), namespace)


@torch.compiler.disable(reason="ssm_interp: hooks or edits are at work, which run uncompiled")  # type: ignore[no-untyped-call, untyped-decorator]
def _uncompiled(mixer: HookedMixer, *args: Any, **kwargs: Any) -> Any:
    mixer.ssm.look_again()
    return type(mixer).forward(mixer, *args, **kwargs)


def _is_idle(mixer: HookedMixer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked of a forward, so that the host's own may run."""
    points = mixer.ssm
    if points.own_operator or points.requested or server_here() or any(edits_at(mixer)):
        return False
    return not _has_record(mixer, args, kwargs)


def _has_record(mixer: HookedMixer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the cache of a call read its prompt while something was asked, and counts what it reads."""
    return any(has_record(value, mixer.layer_idx) for value in [*args, *(kwargs.get(name) for name in CACHES)])


def _served(body: Any) -> Callable[..., Any]:
    """The host's forward with its operators served: what stands inside its decorators in the place of the body."""
    signature, takes_cache = inspect.signature(body), cache_parameter(body)
    if takes_cache is None or not {"hidden_states", "attention_mask"} <= set(signature.parameters):
        raise UnsupportedModelError(
            f"the forward of {body.__qualname__} takes {list(signature.parameters)}; expected are hidden_states, "
            f"attention_mask and a cache ({', '.join(CACHES)})"
        )
    host: dict[str, Any] = body.__globals__
    names: dict[str, Any] = {name: _route(OPERATORS[name], name, host) for name in _operators_in(body)}
    names |= {name: _route_conv(name, host) for name in (OVER_POSITIONS, UPDATE)}
    names |= {name: _no_shortcut for name in FUSED_SHORTCUTS if name in host}
    copy = FunctionType(body.__code__, _Globals(host, names), body.__name__, body.__defaults__, body.__closure__)
    copy.__kwdefaults__ = body.__kwdefaults__

    @wraps(body)
    def forward(self: HookedMixer, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        cached, mask = given.get(takes_cache), given.get("attention_mask")
        server = server_here()
        site = server.at(self, cached) if server else EditSite(self, cached, mask, given["hidden_states"])
        token = _site.set(site)
        try:
            output = copy(self, *args, **kwargs)
        finally:
            _site.reset(token)
        site.close()
        return output

    return forward


def operators_of(host_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the known operators that a mixer class calls; none for a class that is no SSM mixer."""
    body = host_forward(host_class)
    return _operators_in(body) if inspect.isfunction(body) else ()


def _operators_in(body: FunctionType) -> tuple[str, ...]:
    return tuple(name for name in OPERATORS if name in body.__code__.co_names and name in body.__globals__)


def _route(adapter: type[Operator], name: str, host: dict[str, Any]) -> Callable[..., Any]:
    def routed(*args: Any, **kwargs: Any) -> Any:
        return _site.get().serve(adapter(host[name], args, kwargs))

    return routed


def _route_conv(name: str, host: dict[str, Any]) -> Callable[..., Any]:
    def routed(*args: Any, **kwargs: Any) -> Any:
        return _site.get().convolve(bind(name, host[name], args, kwargs))

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


def _rebind(function: Callable[..., Any], served: Callable[..., Any]) -> Callable[..., Any]:
    """A function with all its decorators, and another one in the place of what they wrap."""
    inner = _inner(function)
    if inner is None:
        return served
    cells = tuple(
        CellType(_rebind(inner, served)) if cell.cell_contents is inner else cell for cell in function.__closure__ or ()
    )
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def hook_mixer(mixer: Any, own_operator: bool) -> None:
    """Swap the class of a mixer, and give it its hook points."""
    gated = bool(GATED_FAMILY.intersection(operators_of(type(mixer))))
    A_log: Tensor = mixer.A_log
    heads = A_log.shape[:-1].numel() if gated else A_log.shape[0]
    head_dim = 1 if gated else mixer.head_dim
    state_size = A_log.shape[-1] if gated else mixer.ssm_state_size
    host_class: Any = own_class(mixer)
    mixer.__class__ = on_base(type(mixer), host_class, hooked_class(host_class))
    mixer.add_module(
        "ssm",
        HookPoints(mixer.layer_idx, heads, head_dim, state_size, gated, own_operator).train(mixer.training),
    )
    _rebind_old_forward(mixer)


def class_without_hooks(mixer: HookedMixer) -> type[nn.Module]:
    """What a mixer is once its hook points are gone, see `on_base`."""
    hooked = next(kind for kind in type(mixer).__mro__ if "host_class" in kind.__dict__)
    plain: type[nn.Module] = on_base(type(mixer), hooked, mixer.host_class)
    return plain


def restore_mixer(mixer: Any, without_hooks: type[nn.Module]) -> None:
    """Undo `hook_mixer`."""
    del mixer._modules["ssm"]
    mixer.__class__ = without_hooks
    _rebind_old_forward(mixer)


def _rebind_old_forward(mixer: nn.Module) -> None:
    """accelerate's hooks keep the forward that was bound when they were added."""
    if "_old_forward" in mixer.__dict__:
        mixer._old_forward = MethodType(type(mixer).forward, mixer)  # type: ignore[assignment]
