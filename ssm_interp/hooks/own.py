"""What one thread (or task) does to a model that others may be calling: they neither see it nor change it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock, get_ident
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

OWN = "ssm_interp_own"  # marks hooks that are ours


class Key:
    """What stands for a module among the keys of an edit. A replica of the module shares it; a deep copy has its own,
    which joins the sets of keys in which that of the original is at that moment."""

    def __deepcopy__(self, _memo: Any) -> Key:
        copy = Key()
        for keys in list(_spreading):
            if self in keys:
                keys.add(copy)
        return copy


_spreading: list[set[Any]] = []


@contextmanager
def spreading(key_sets: Iterable[set[Any]]) -> Iterator[None]:
    """Inside, copies made of modules whose keys are in some sets join them."""
    mine = list(key_sets)
    _spreading.extend(mine)
    try:
        yield
    finally:
        for keys in mine:
            del _spreading[next(index for index, other in enumerate(_spreading) if other is keys)]


@dataclass(frozen=True)
class Watch:
    """Who looks at what passes a hook point.

    Attributes:
        point: the hook point.
        read: is given what leaves it, after every hook.
        give: what it makes of the tensor enters instead, before any hook; None: the tensor itself.
    """

    point: Any
    read: Callable[[Tensor], object] = lambda _: None
    give: Callable[[Tensor], Tensor] | None = None


class Asked:
    """Whether anything is asked of a mixer, by any thread. Compiled code guards on `now`, a plain attribute, and is
    compiled anew when it changes.

    Attributes:
        now: True as soon as a hook is added or a block begins; looked at again when a block ends or a forward runs.
    """

    def __init__(self) -> None:
        self.now = False
        self.blocks = 0

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, which no block is about."""
        return {"now": self.now, "blocks": 0}


_asking = Lock()
_open: list[Any] = []  # a stance of torch.compile for each open block, or None


@contextmanager
def asking(mixers: Iterable[Asked]) -> Iterator[None]:
    """A block in which something is asked of some mixers. Compiled models run uncompiled inside: their graphs do not
    look at what such blocks put into the host, hooks on its modules for example."""
    asked = list(mixers)
    with _asking:
        _open.append(_uncompiled() if not any(_open) else None)
        for mixer in asked:
            mixer.blocks, mixer.now = mixer.blocks + 1, True
    try:
        yield
    finally:
        with _asking:
            for mixer in asked:
                mixer.blocks -= 1
            if len(_open) == 1:
                _restore_compiled()
            else:  # the block that set the stance may end first; the last one restores it
                _open.remove(None)


def _uncompiled() -> Any:
    """The stance in which compiled models run eagerly; None where nothing was ever compiled."""
    if "torch._dynamo" not in sys.modules:  # importing it takes a second or two
        return None
    return torch.compiler.set_stance("force_eager")  # in force from here on


def _restore_compiled() -> None:
    stance = _open.pop()
    if stance is not None:
        stance.__exit__(None, None, None)


_watches: ContextVar[Mapping[nn.Module, tuple[Watch, ...]]] = ContextVar(
    "ssm_interp_watches", default=MappingProxyType({})
)
_own_operators: ContextVar[frozenset[nn.Module]] = ContextVar("ssm_interp_own_operators", default=frozenset())


@contextmanager
def watching(watches: Iterable[Watch]) -> Iterator[None]:
    """Inside, forwards of this thread show what passes some hook points, which fire for that."""
    watches, by_point = list(watches), dict(_watches.get())
    for watch in watches:
        by_point[watch.point] = (*by_point.get(watch.point, ()), watch)
    token = _watches.set(by_point)
    try:
        with asking({watch.point.asked: None for watch in watches}):
            yield
    finally:
        _watches.reset(token)


def watches(point: nn.Module) -> tuple[Watch, ...]:
    """Who looks at a hook point in this thread."""
    return _watches.get().get(point, ())


@contextmanager
def own_operators(points: Iterable[Any]) -> Iterator[None]:
    """Inside, forwards of this thread run the library's recurrence in the mixers of these hook points."""
    chosen = frozenset(points)
    token = _own_operators.set(_own_operators.get() | chosen)
    try:
        with asking(mixer_points.asked for mixer_points in chosen):
            yield
    finally:
        _own_operators.reset(token)


def has_own_operator(points: nn.Module) -> bool:
    """Whether the mixer of these hook points is in a block of `own_operators` in this thread."""
    return points in _own_operators.get()


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for a module of the host that leaves the forwards of other threads as they are."""
    home = get_ident()
    return ours(lambda *args: hook(*args) if get_ident() == home else None)


def ours(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for a module of the host, marked as one that does nothing for others."""
    setattr(hook, OWN, True)
    return hook
