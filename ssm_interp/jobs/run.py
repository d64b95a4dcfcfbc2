"""Running a job, or what is left of it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ssm_interp.jobs.cluster import Cluster
from ssm_interp.jobs.here import Here
from ssm_interp.jobs.job import Job, Shard, Where
from ssm_interp.jobs.store import Store

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done, total) inputs of those that are left when a job is run."""


def run(job: Job, folder: str | Path, where: Where | None = None, *, progress: Progress | None = None) -> list[Shard]:
    """Run a job, and keep every shard of its table as soon as it is there.

    Killed at any moment, it loses the shards in flight alone (one per worker), and called again it ends with the same
    table. A worker that is killed is started again, and its shard done again.

    Args:
        job: what to compute.
        folder: of this job alone. It is on the disk of this process; workers do not write it.
        where: in this process (None), or on workers of Ray; it may be another one each time.
        progress: called with (done, total) inputs of those that are left, over all workers.

    Returns:
        All shards, in order.

    Raises:
        JobError: the folder holds another job (what differs is named), one of version 0.1, a damaged or a foreign
            shard, or a process at work; of a cluster: see `Cluster`.
        OSError: the folder cannot be written.
        Any error of a worker, once, as the worker raised it. In the course of the work, an error or KeyboardInterrupt
            has a note on what is stored and how to go on.

    Warns:
        Whatever the workers warn of, once. JobWarning: as `Cluster`.
    """
    known = {"experiment": job.experiment, "options": job.options, **job.identity}
    store = Store(Path(folder), known, len(job.sizes))
    store.refuse_another()
    where = where or Where()
    with Here(job) if where.workers is None else Cluster(job, where) as engine:
        weights, prepared, versions = engine.begin()
        with store.opened({**weights, **prepared.identity}, prepared.settings, versions):
            _tell_changed_versions(store, versions)
            left = [number for number, name in enumerate(store.names) if name not in store.records]
            tally = _Tally(job.sizes, left, progress)
            with _noted(store, job):
                for number, shard, made_with in engine.work(
                    left, replace(prepared, settings=store.settings), tally.part
                ):
                    store.write(number, shard, made_with)
                    tally.part(number, job.sizes[number])
            return store.shards()


class _Tally:
    """Inputs done, over all shards; it never goes back, though a shard that is done again does."""

    def __init__(self, sizes: Sequence[int], left: Sequence[int], progress: Progress | None) -> None:
        self.sizes, self.progress = sizes, progress
        self.total = sum(sizes[number] for number in left)
        self.parts: dict[int, int] = {}
        self.most = 0

    def part(self, number: int, done: int) -> None:
        """So many inputs of a shard are done."""
        self.parts[number] = min(done, self.sizes[number])
        self.most = max(self.most, sum(self.parts.values()))
        if self.progress:
            self.progress(self.most, self.total)


def _tell_changed_versions(store: Store, versions: dict[str, str]) -> None:
    for name, now in versions.items():
        others = {record["versions"].get(name, "none") for record in store.records.values()} - {now}
        if others:
            logger.warning(
                "%s has shards made with %s %s (now: %s), which may differ by rounding; the manifest says which",
                store.folder, name, ", ".join(sorted(others)), now,
            )  # fmt: skip


@contextmanager
def _noted(store: Store, job: Job) -> Iterator[None]:
    """Add to an error on its way out what is stored, and how to go on."""
    try:
        yield
    except BaseException as error:
        remedy = next((advice for kind, advice in job.remedies.items() if isinstance(error, kind)), "")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space, then"
        error.add_note(
            f"Nothing that was stored is lost: {len(store.records)} of {len(store.names)} shards are in "
            f"{store.folder}; {remedy}{' ' * bool(remedy)}the same command continues from there."
        )
        raise
