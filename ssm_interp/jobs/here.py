"""A job in this process: one worker, one shard after another."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ssm_interp.jobs.job import Job, Json, Prepared, Shard

Reports = Callable[[int, int], None]
"""Told the number of a shard, and how many of its inputs are done."""


class Beginning(NamedTuple):
    """What an engine's first worker says before the first shard."""

    weights: Json
    prepared: Prepared
    versions: dict[str, str]


class Finished(NamedTuple):
    """A shard, its number, and the versions of the packages that made it."""

    number: int
    shard: Shard
    versions: dict[str, str]


class Here:
    """The engine that needs nothing else: the job's worker is opened in the process that runs the job."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __enter__(self) -> Here:
        self.worker = self.job.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()

    def begin(self) -> Beginning:
        """What the worker is, and what it prepares."""
        return Beginning(self.worker.weights, self.worker.prepare(), versions())

    def work(self, numbers: Sequence[int], prepared: Prepared, report: Reports) -> Iterator[Finished]:
        """The shards of these numbers, as they get done."""
        for number in numbers:
            shard = self.worker.shard(number, prepared, partial(report, number))
            yield Finished(number, shard, versions())


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, in this process."""
    known = {}
    for package in ("ssm-interp", "torch", "transformers"):
        try:
            known[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            continue
    return known | {"python": platform.python_version()}
