"""A job on workers of Ray: processes on this machine or on a cluster, each with the model loaded.

The driver (the process that runs the job) hands a shard to each worker as it gets free. A worker that dies is started
again by Ray, where there is room, and its shard goes to the first that is free.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal, NamedTuple

from ssm_interp.errors import JobError, JobWarning
from ssm_interp.jobs.connection import connected
from ssm_interp.jobs.here import Beginning, Finished, Reports, versions
from ssm_interp.jobs.job import Job, Json, Prepared, Where, Worker

logger = logging.getLogger(__name__)

DEATHS = 3
"""A shard at which so many workers died, or a worker that died so often before its first one, is given up."""
TICK = 0.5
"""Seconds between two questions after the progress of a worker."""
PATIENCE = 20.0
"""Seconds without any worker until the user is told that the job waits for room."""


class Cluster:
    """The engine on workers of Ray.

    Raises:
        JobError: as `connected`; a worker that has other weights than the first one, or cannot be started; three
            workers in a row that died at one shard, or loading the model.
        Any error of a worker, once.

    Warns:
        JobWarning: the cluster has GPUs, and the workers get none.
    """

    def __init__(self, job: Job, where: Where) -> None:
        self.job, self.where = job, where
        self.members: list[_Member] = []
        self.asked: dict[Any, _Member] = {}
        self.queue: deque[int] = deque()
        self.deaths: Counter[int] = Counter()
        self.warned: set[tuple[type[Warning], str]] = set()
        self.weights: Json | None = None
        self.closing = ExitStack()

    def __enter__(self) -> Cluster:
        self.ray = self.closing.enter_context(connected(self.where))
        self._check_room()
        self.pickled = self.ray.put(self.ray.cloudpickle.dumps(self.job))
        self.alive_at = monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        with self.closing:
            for member in self.members:
                self.ray.kill(member.actor)

    def begin(self) -> Beginning:
        """What the first worker is, and what it prepares."""
        self._grow(1)
        for member, event, value in self._events():
            if event == "open":
                self._ask(member, "prepare")
            elif event == "prepare":
                return Beginning(self.weights or {}, value, member.versions)
        raise AssertionError("events never end")

    def work(self, numbers: Sequence[int], prepared: Prepared, report: Reports) -> Iterator[Finished]:
        """The shards of these numbers, as they get done."""
        shared, left = self.ray.put(prepared), len(numbers)
        self.queue.extend(numbers)
        self._grow(min(self.where.workers or 1, left))
        events = self._events(report)
        while left:
            for member in [member for member in self.members if member.doing == "nothing"][: len(self.queue)]:
                member.number = self.queue.popleft()
                self._ask(member, "shard", member.number, shared)
            member, event, value = next(events)
            if event == "shard":
                left -= 1
                yield Finished(member.number, value, member.versions)

    def _grow(self, count: int) -> None:
        """Start workers until there are so many; those for which there is no room yet begin when there is."""
        options = {
            "num_cpus": 1,
            "num_gpus": self.where.gpus_per_worker,
            "max_restarts": -1,
            "scheduling_strategy": "SPREAD",
            "max_concurrency": 2,  # at work, and asked after its progress
        }
        remote = self.ray.remote(**options)(JobWorker)
        for _ in range(count - len(self.members)):
            member = _Member(remote.remote(self.where.gpus_per_worker))
            self.members.append(member)
            self._ask(member, "start")

    def _ask(self, member: _Member, what: Doing, *arguments: object) -> None:
        # a start waits for the actor, however often it is restarted; the rest is lost with it, and asked for again
        retries = -1 if what == "start" else 0
        member.doing = what
        self.asked[getattr(member.actor, what).options(max_task_retries=retries).remote(*arguments)] = member

    def _events(self, report: Reports | None = None) -> Iterator[_Event]:
        """What comes back from the workers, for ever: what was asked for, or that it is lost."""
        questions: dict[Any, _Member] = {}  # after progress
        while True:
            for member in self.members if report else ():
                if member.doing == "shard" and monotonic() - member.questioned > TICK:
                    member.questioned = float("inf")
                    questions[member.actor.progress.remote()] = member
            answered, _ = self.ray.wait([*self.asked, *questions], num_returns=1, timeout=TICK)
            self._tell_waiting()
            for reference in answered:
                if reference in self.asked:
                    yield self._settled(reference, self.asked.pop(reference))
                    continue
                member = questions.pop(reference)
                member.questioned = monotonic()
                number, done = self._progress(reference)
                if report and member.doing == "shard" and number == member.number:
                    report(number, done)

    def _progress(self, reference: Any) -> tuple[int, int]:
        try:
            now: tuple[int, int] = self.ray.get(reference)
        except self.ray.exceptions.RayError:
            return -1, 0
        return now

    def _settled(self, reference: Any, member: _Member) -> _Event:
        event, member.doing = member.doing, "nothing"
        try:
            answer = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self._lost(member, event, error)
            return _Event(member, "nothing", None)
        if event == "start":
            self._ask(member, "open", self.pickled)
            return _Event(member, event, None)
        for warning in answer.warned:
            if (kind := (type(warning), str(warning))) not in self.warned:
                self.warned.add(kind)
                warnings.warn(warning, stacklevel=2)
        if answer.error:
            raise answer.error from RuntimeError(answer.raised_at)
        if event == "open":
            self._welcome(member, answer.value)
        elif event == "shard":
            member.deaths = 0
        return _Event(member, event, answer.value)

    def _welcome(self, member: _Member, opened: _Opened) -> None:
        member.versions = opened.versions
        self.weights = self.weights or opened.weights
        if opened.weights != self.weights:
            raise JobError(
                f"the worker on {opened.machine} has other weights than the first one: {opened.weights}, and not "
                f"{self.weights}; every machine must see the same model"
            )

    def _lost(self, member: _Member, event: Doing, error: Exception) -> None:
        """A worker died, or its machine did: what it did is to be done again, by whoever is free first."""
        if event == "start":
            raise JobError(f"a worker cannot be started: {str(error).strip().splitlines()[-1]}") from error
        if event == "shard":
            self.queue.appendleft(member.number)
            self.deaths[member.number] += 1
            deaths, at = self.deaths[member.number], f"at shard {member.number:05}"
        else:
            member.deaths += 1
            deaths, at = member.deaths, "before its first shard"
        if deaths >= DEATHS:
            raise JobError(f"a worker died {at}, {DEATHS} times; was there too little memory?") from error
        logger.warning("a worker died %s; it is started again, and its work done again", at)
        self._ask(member, "start")

    def _check_room(self) -> None:
        gpus, machines = self.where.gpus_per_worker, [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        room = sum(
            min(int(has.get("CPU", 0)), int(has.get("GPU", 0) / gpus) if gpus else int(has.get("CPU", 0)))
            for has in machines
        )
        if (workers := self.where.workers or 1) > room:
            logger.warning(
                "the Ray cluster has room for %d of %d workers (a CPU and %g GPUs each); the others begin when "
                "machines join", room, workers, gpus,
            )  # fmt: skip
        if not gpus and (there := sum(has.get("GPU", 0) for has in machines)):
            warnings.warn(
                f"the workers compute on the CPU, though there are {there:g} GPUs: give gpus_per_worker=1",
                JobWarning,
                stacklevel=4,
            )

    def _tell_waiting(self) -> None:
        if any(member.doing != "start" for member in self.members):
            self.alive_at = monotonic()
        elif monotonic() - self.alive_at > PATIENCE:
            self.alive_at = float("inf")
            logger.warning("no worker has started yet: the Ray cluster has no room for one; waiting until it has")


class JobWorker:
    """A worker, in its own process; lists of processes show it under this name."""

    def __init__(self, gpus: float) -> None:
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray's versions differ in what a worker without GPUs may see
        self.now = (-1, 0)
        self.thread = ThreadPoolExecutor(1)  # hooks and settings of torch belong to the thread that made them

    def start(self) -> None:
        """Return once this process is there."""

    def open(self, job: bytes) -> _Answer:
        return self._answer(lambda: self._open(job))

    def prepare(self) -> _Answer:
        return self._answer(self.worker.prepare)

    def shard(self, number: int, prepared: Prepared) -> _Answer:
        return self._answer(lambda: self.worker.shard(number, prepared, lambda done: self._report(number, done)))

    def progress(self) -> tuple[int, int]:
        """The shard at which this worker is, and how many of its inputs are done."""
        return self.now

    def _answer(self, work: Callable[[], object]) -> _Answer:
        return self.thread.submit(_answer, work).result()

    def _open(self, job: bytes) -> _Opened:
        self.worker: Worker = pickle.loads(job).open()
        return _Opened(self.worker.weights, versions(), platform.node())

    def _report(self, number: int, done: int) -> None:
        self.now = (number, done)


Doing = Literal["nothing", "start", "open", "prepare", "shard"]


@dataclass(eq=False)
class _Member:
    """A worker, as the driver sees it."""

    actor: Any
    doing: Doing = "nothing"
    number: int = -1  # of the shard
    deaths: int = 0  # since its last shard
    questioned: float = 0.0  # after its progress
    versions: dict[str, str] = field(default_factory=dict)


class _Event(NamedTuple):
    member: _Member
    what: Doing
    value: Any


class _Opened(NamedTuple):
    weights: Json
    versions: dict[str, str]
    machine: str


class _Answer(NamedTuple):
    """What a worker gives back: a value or an error, and the warnings on the way."""

    value: Any
    warned: list[Warning]
    error: Exception | None = None
    raised_at: str = ""  # the worker's traceback


def _answer(work: Callable[[], object]) -> _Answer:
    value, error, raised_at = None, None, ""
    with warnings.catch_warnings(record=True) as caught:
        try:
            value = work()
        except Exception as raised:
            error, raised_at = _portable(raised), traceback.format_exc()
    return _Answer(value, [item.message for item in caught if isinstance(item.message, Warning)], error, raised_at)


def _portable(error: Exception) -> Exception:
    """An error as the driver can read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its own __init__ or __reduce__ raises
        return JobError(f"{type(error).__name__}: {error}")
    return error
