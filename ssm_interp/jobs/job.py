"""What a job is: options and inputs as data, and a worker that turns a shard of the inputs into a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from ssm_interp.errors import JobError

Json = dict[str, Any]
"""A JSON object."""

Report = Callable[[int], None]
"""Told how many inputs of a shard are done."""


class Shard(NamedTuple):
    """What a worker makes of a shard of the inputs.

    Attributes:
        table: its rows; none if there is nothing to say of these inputs.
        record: what is kept of it in the manifest, beside its checksum.
    """

    table: pa.Table
    record: Json


@dataclass(frozen=True)
class Prepared:
    """What one worker finds out, before the first shard, for all of them.

    Attributes:
        identity: of the job, as far as it takes the model to know: a stored job with another one is refused.
        settings: that a job keeps from its beginning to its end, whatever they would be where it is continued.
        shared: handed to every worker with each shard, and not stored.
    """

    identity: Json = field(default_factory=dict)
    settings: Json = field(default_factory=dict)
    shared: Any = None


class Worker(ABC):
    """A model that is loaded, at work on one shard after another.

    Attributes:
        weights: what names the model's weights, such as their sha256: part of the job's identity, and alike for all.
    """

    weights: Json

    def prepare(self) -> Prepared:
        """What all workers are to know; asked of one of them, once in each run of a job."""
        return Prepared()

    @abstractmethod
    def shard(self, number: int, prepared: Prepared, report: Report) -> Shard:
        """A shard's table: it depends on the job, the weights and `prepared` alone.

        Args:
            number: of the shard, from 0.
            prepared: by any worker of this job, with the settings that the job began with.
            report: to be told how many of the shard's inputs are done, from time to time.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Leave the model as it was."""


class Job(ABC):
    """An experiment on inputs that come in shards; data that can be pickled.

    Attributes:
        experiment: its name in the store.

    Example:
        >>> class Lengths(Job):
        ...     experiment = "lengths"
        ...     def __init__(self, texts): self.texts = texts
        ...     options = property(lambda self: {"unit": "letters"})
        ...     sizes = property(lambda self: [1] * len(self.texts))
        ...     def open(self): return Counting(self.texts)
        >>> class Counting(Worker):
        ...     weights = {}
        ...     def __init__(self, texts): self.texts = texts
        ...     def shard(self, number, prepared, report):
        ...         return Shard(pa.table({"length": [len(self.texts[number])]}), {})
        >>> from tempfile import TemporaryDirectory
        >>> from ssm_interp.jobs import run
        >>> with TemporaryDirectory() as folder:
        ...     [shard.table["length"].to_pylist() for shard in run(Lengths(["to", "read"]), folder)]
        [[2], [4]]
    """

    experiment: ClassVar[str]

    @property
    @abstractmethod
    def options(self) -> Json:
        """What the table depends on and the user gives: a stored job with others is refused, and each is named."""

    @property
    @abstractmethod
    def sizes(self) -> Sequence[int]:
        """Inputs in each shard."""

    @property
    def identity(self) -> Json:
        """What else the table depends on, as far as it is known without the model: such as the sha256 of the inputs."""
        return {}

    @abstractmethod
    def open(self) -> Worker:
        """Load the model, in the process that is to work."""

    @property
    def remedies(self) -> dict[type[BaseException], str]:
        """What to change after an error of a type: the beginning of a sentence that ends with the same command."""
        return {}


@dataclass(frozen=True)
class Where:
    """Where a job runs: in this process, or on workers that Ray starts.

    Attributes:
        workers: processes that each load the model and take one shard after another; None: this process alone.
        gpus_per_worker: of the machines' GPUs each has to itself; 0: they compute on the CPU.
        address: of a Ray cluster that runs: "auto", host:port or ray://host:port; None: workers on this machine.

    Raises:
        JobError: no workers, or a part of a cluster's address without them; a number of GPUs that cannot be.
    """

    workers: int | None = None
    gpus_per_worker: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        gpus = self.gpus_per_worker
        if self.workers is not None and self.workers < 1:
            raise JobError(f"workers must be at least 1, got {self.workers}; leave it out to compute in this process")
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise JobError(f"gpus_per_worker is a share of one GPU (0 to 1) or a whole number of them, got {gpus}")
        if self.workers is None and (gpus or self.address):
            given = "gpus_per_worker" if gpus else "address"
            raise JobError(f"{given} is given without workers; say how many workers there are to be")
