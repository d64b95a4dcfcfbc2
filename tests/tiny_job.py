"""A job without a model, in processes that can be killed: its shards are squares of their numbers."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ssm_interp.errors import JobError, JobWarning, LoadError
from ssm_interp.jobs import Job, Prepared, Report, Shard, Where, Worker, run

FORK = multiprocessing.get_context("fork")  # starts without importing everything anew


@dataclass(frozen=True)
class Squares(Job):
    """`folder` is where workers leave a file with their process id for each shard that they begin, and where they look
    for what the test wants of them: files `load`, `wait`, `weights`, with the words that they act on."""

    folder: str
    power: int = 2
    shards: int = 4
    inputs: tuple[int, ...] = (3, 3, 3, 1)
    experiment = "squares"

    @property
    def options(self) -> dict[str, Any]:
        return {"power": self.power}

    @property
    def identity(self) -> dict[str, Any]:
        return {"inputs": list(self.inputs)}

    @property
    def sizes(self) -> Sequence[int]:
        return self.inputs[: self.shards]

    @property
    def remedies(self) -> dict[type[BaseException], str]:
        return {MemoryError: "with less,"}

    def told(self, file: str) -> str:
        path = Path(self.folder) / file
        return path.read_text() if path.is_file() else ""

    def open(self) -> Worker:
        if self.told("load") == "fails":
            raise LoadError("there is no such model")
        if self.told("load") == "dies":
            os._exit(1)
        return Squaring(self)


class Squaring(Worker):
    def __init__(self, job: Squares) -> None:
        self.job, self.closed = job, False
        self.weights = {"weights": job.told("weights") or "w"}

    def prepare(self) -> Prepared:
        warnings.warn("a worker warns", JobWarning, stacklevel=1)
        return Prepared({"measured": 5}, {"offset": int(self.job.told("offset") or 0)}, shared=100)

    def shard(self, number: int, prepared: Prepared, report: Report) -> Shard:
        folder, size = Path(self.job.folder), self.job.sizes[number]
        with (folder / f"{number}.pids").open("a") as pids:
            print(os.getpid(), file=pids)
        warnings.warn("a worker warns", JobWarning, stacklevel=1)
        for step in range(size):
            report(step + 1)
            while self.job.told(f"wait-{number}") == str(step + 1):
                time.sleep(0.01)
        if told := self.job.told(f"error-{number}"):
            raise {"memory": MemoryError, "job": JobError, "value": Unpicklable}[told](f"at {number}")
        rows = [number] * (0 if self.job.told("nothing") else size)
        value = number**self.job.power + prepared.settings["offset"] + prepared.shared
        return Shard(pa.table({"shard": pa.array(rows, pa.int64()), "value": [value] * len(rows)}), {"size": size})

    def close(self) -> None:
        (Path(self.job.folder) / "closed").touch()


class Unpicklable(ValueError):
    def __init__(self, message: str, *, more: bool = True) -> None:
        super().__init__(message, self.more if more else lambda: None)

    def more(self) -> None: ...


def values(shards: Sequence[Shard]) -> list[tuple[int, int]]:
    return [pair for shard in shards for pair in zip(*shard.table.to_pydict().values(), strict=True)]


def pids(job: Squares, number: int) -> list[int]:
    path = Path(job.folder) / f"{number}.pids"
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def started(work: Callable[..., object], *arguments: object) -> Any:
    """A process at work, forked from this one."""
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


if __name__ == "__main__":  # a driver in a process of its own: folder of the job, folder of its store, address
    warnings.simplefilter("ignore")
    print(values(run(Squares(sys.argv[1]), sys.argv[2], Where(workers=2, address=sys.argv[3]))))
