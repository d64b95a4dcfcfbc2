"""Who serves the forwards of hooked mixers: the edits at work, or an engine that stands in for them in this thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ssm_interp.hooks.seam.convolution import Convolution
from ssm_interp.hooks.seam.operators import Operator


@runtime_checkable
class Site(Protocol):
    """One forward of one hooked mixer, as its calls reach us."""

    def serve(self, call: Operator) -> Any:
        """Do one operator call; its result is what the host's operator returns."""

    def convolve(self, call: Convolution) -> Tensor:
        """Do one call of the causal convolution; its result is what the host's function returns."""

    def close(self) -> None:
        """After the forward."""


@runtime_checkable
class Server(Protocol):
    """What computes the forwards of a thread in place of the edits at work there."""

    def at(self, mixer: Any, cache: Any) -> Site:
        """Its site at a mixer that is called with a cache."""

    def removed_attention(self, layer: int, heads: int, queries: int, keys: int) -> Tensor | None:
        """The edges that it removes from the softmax attention of a layer, bool `[b #h q k]`; None: none."""


_server: ContextVar[Server | None] = ContextVar("ssm_interp_server", default=None)


def server_here() -> Server | None:
    """The engine that serves the forwards of this thread; None: the edits at work do."""
    return _server.get()


@contextmanager
def serving(server: Server) -> Iterator[None]:
    """Inside, an engine serves the forwards of this thread."""
    token = _server.set(server)
    try:
        yield
    finally:
        _server.reset(token)
