"""A job without a model, told by files what is to happen to it, and ways to run it in processes that can be killed."""

from __future__ import annotations

import json
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
from ssm_interp.jobs.files import digest

FORK = multiprocessing.get_context("fork")  # starts without importing everything anew


class OddError(ValueError):
    """An error that cannot be pickled."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(f"{message} {number}")


ERRORS: dict[str, Callable[[int], Exception]] = {
    "memory": lambda number: MemoryError(f"no memory for {number}"),
    "job": lambda number: JobError(f"cannot do {number}"),
    "odd": lambda number: OddError("odd at", number),
}


@dataclass(frozen=True)
class Squares(Job):
    """The squares of the shards' numbers.

    Attributes:
        folder: where workers write a log (an event and the process), and read what the test tells them in files: in
            `load` that loading "fails" or the process "dies"; in `weights` what the weights are, and in `later-weights`
            what they are once a worker has them; in `offset` a setting; in `measured` a part of the identity; in
            `error-<shard>` a key of ERRORS; in `wait-<shard>` after how many inputs to wait until the file is gone.
    """

    folder: str
    power: int = 2
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
        return self.inputs

    @property
    def remedies(self) -> dict[type[BaseException], str]:
        return {MemoryError: "with smaller squares,"}

    def open(self) -> Worker:
        self.log("opened")
        if self.told("load") == "fails":
            raise LoadError("there is no such model")
        if self.told("load") == "dies":
            os._exit(1)
        return Squaring(self)

    def told(self, file: str) -> str:
        try:
            return (Path(self.folder) / file).read_text()
        except FileNotFoundError:
            return ""

    def tell(self, **files: object) -> None:
        for file, content in files.items():
            (Path(self.folder) / file.replace("_", "-")).write_text(str(content))

    def forget(self, *files: str) -> None:
        for file in files:
            (Path(self.folder) / file).unlink()

    def log(self, event: object) -> None:
        with (Path(self.folder) / "log").open("a") as log:
            print(event, os.getpid(), file=log)

    def logged(self, event: object) -> list[int]:
        """The processes that logged an event."""
        lines = (line.split() for line in self.told("log").splitlines())
        return [int(process) for name, process in lines if name == str(event)]


class Squaring(Worker):
    def __init__(self, job: Squares) -> None:
        self.job = job
        self.weights = {"weights": job.told("weights") or "w"}

    def prepare(self) -> Prepared:
        self.job.log("prepared")
        warnings.warn("a square is no cube", JobWarning, stacklevel=1)
        if later := self.job.told("later-weights"):
            self.job.tell(weights=later)
        measured, offset = self.job.told("measured"), int(self.job.told("offset") or 0)
        return Prepared({"measured": measured}, {"offset": offset}, shared=10)

    def shard(self, number: int, prepared: Prepared, report: Report) -> Shard:
        size = self.job.sizes[number]
        self.job.log(number)
        warnings.warn("a square is no cube", JobWarning, stacklevel=1)
        for step in range(1, size + 1):
            report(step)
            while self.job.told(f"wait-{number}") == str(step):
                time.sleep(0.01)
        if told := self.job.told(f"error-{number}"):
            raise ERRORS[told](number)
        value = number**self.job.power + prepared.settings["offset"] + prepared.shared
        rows = 0 if self.job.told("nothing") else size
        return Shard(pa.table({"value": pa.array([value] * rows, pa.int64())}), {"size": size})

    def close(self) -> None:
        self.job.log("closed")


def values(shards: Sequence[Shard]) -> list[int]:
    return [value for shard in shards for value in shard.table["value"].to_pylist()]


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as the program could have written it."""
    content = manifest(folder)
    del content["sha256"]
    change(content)
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest(content), **content}))


def stored(folder: Path) -> list[Path]:
    """The files of the shards."""
    return sorted((folder / "shards").glob("*"))


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


def drive(folder: str, store: str, address: str) -> None:
    """Run the job on two workers, and print its values."""
    warnings.simplefilter("ignore")
    shards = run(Squares(folder), store, Where(workers=2, address=address))
    sys.stdout.write(f"{values(shards)}\n")


if __name__ == "__main__":
    from tiny_job import drive as drive_importable  # a class of __main__ is another one in the workers

    drive_importable(*sys.argv[1:])
