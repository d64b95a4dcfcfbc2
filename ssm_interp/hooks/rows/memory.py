"""How much memory is free: on a device, and within the limits of the container that this process runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

ROOT = Path("/")


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a device; on a CPU, no more than its control groups allow.

    Example:
        >>> free_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *left_in_groups(ROOT)])


def left_in_groups(root: Path) -> Iterator[int]:
    """What is left under the limit of each control group (v2 or v1) that this process is in, of those that have one.

    Pages of files that were read count as used there, and are given back when somebody needs them.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # a system without them
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            base, limit, used, pages = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, used, pages = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        own = Path(group.lstrip("/"))
        for folder in (base / own, *(base / above for above in own.parents)):
            try:
                most, now = (folder / limit).read_text(), int((folder / used).read_text())
                statistics = dict(row.split(" ", 1) for row in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue  # outside of what a container sees, or without a limit
            if most.strip() != "max":
                yield max(0, int(most) - now + int(statistics.get(pages, 0)))
