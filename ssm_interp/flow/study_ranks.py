"""The processes that share a study: as many as `torchrun` or `accelerate launch` started, or one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(days=30)
"""How long a rank waits for the slowest one at the end of a study."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Attributes:
        index: its number, from 0.
        count: how many there are.
        local: its number on its machine.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    group: Any = None

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            dist.barrier(self.group)


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks that the launcher's environment variables tell of (RANK, WORLD_SIZE, LOCAL_RANK), able to wait for each
    other.

    They exchange nothing but that, over gloo on any device; what they find they pass on in files.

    Raises:
        RuntimeError: the other ranks cannot be reached.

    Example:
        >>> with ranks() as peers:
        ...     peers.index, peers.count
        (0, 1)
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), group)
    finally:
        if ours:
            dist.destroy_process_group()
