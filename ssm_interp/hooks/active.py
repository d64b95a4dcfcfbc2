"""The interventions at work: in the thread (or task) that put them to work, and in the threads that it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock, Thread, current_thread

from torch import nn

from ssm_interp.hooks.intervention import Intervention
from ssm_interp.hooks.own import Key, spreading


@dataclass(frozen=True, eq=False)
class ActiveEdit:
    """An intervention at work on some modules.

    Attributes:
        intervention: what is at work.
        keys: those of the hook points and the attention modules that it works on, and of the copies made of them.
        streams: the streams that it acts on.
        seen: (id of an attention module, layer) -> positions of the prompt, and of all that it read under this edit.
    """

    intervention: Intervention
    keys: set[Key | int]
    streams: tuple[str, ...]
    seen: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


_active: ContextVar[tuple[ActiveEdit, ...]] = ContextVar("ssm_interp_active", default=())
_everywhere: list[ActiveEdit] = []
_lock = Lock()
_starts: list[Callable[[Thread], None]] = []  # what starts a thread, while ours stands in for it
_INHERITED = "ssm_interp_edits"


@contextmanager
def editing(edits: tuple[ActiveEdit, ...]) -> Iterator[None]:
    """Put edits to work in this thread (or task) and in those that it starts inside, beside those that already are."""
    token = _active.set((*_active.get(), *edits))
    with _lock:
        _everywhere.extend(edits)
        if not _starts:
            _starts.append(Thread.start)
            Thread.start = _start_with_edits  # type: ignore[method-assign, assignment]
    try:
        with spreading(edit.keys for edit in edits):
            yield
    finally:
        with _lock:
            for edit in edits:
                _everywhere.remove(edit)
            if not _everywhere and Thread.start is _start_with_edits:
                Thread.start = _starts.pop()  # type: ignore[method-assign, assignment]
        _active.reset(token)


def _start_with_edits(thread: Thread) -> None:
    """Start a thread under the edits of the one that starts it: by `Thread(target=model.generate)`, say."""
    thread.__dict__[_INHERITED] = edits_here()
    start = _starts[0] if _starts else Thread.start  # the last block may just have ended
    start(thread)


def edits_here() -> tuple[ActiveEdit, ...]:
    """The edits at work in this thread, on whatever model: its own, and those that it was started under."""
    mine = _active.get()
    if len(mine) == len(_everywhere):
        return mine
    inherited = current_thread().__dict__.get(_INHERITED, ())
    return (*mine, *(edit for edit in inherited if edit in _everywhere and edit not in mine))


def active_edits(module: nn.Module) -> tuple[ActiveEdit, ...]:
    """The edits at work, in this thread, on hook points or on an attention module."""
    key = key_of(module)
    return tuple(edit for edit in edits_here() if key in edit.keys)


def key_of(module: nn.Module) -> Key | int:
    """What an edit knows a module by: hook points by a key that copies carry on, modules of the host by their id."""
    key = getattr(module, "key", None)
    return key if isinstance(key, Key) else id(module)
