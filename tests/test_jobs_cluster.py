"""Jobs on workers of Ray: the same table, whichever workers die, and what is refused; one cluster for all of them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_job import Squares, manifest, stored, until, values

from ssm_interp.errors import JobError, JobWarning, LoadError
from ssm_interp.jobs import Where, cluster, run

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

VALUES = [10] * 3 + [11] * 3 + [14] * 3 + [19]
TESTS = str(Path(__file__).parent)
quietly = pytest.mark.filterwarnings("ignore:a square is no cube:ssm_interp.errors.JobWarning")


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A cluster of one machine with two cores, which this process has joined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([TESTS, str(Path(TESTS).parent)]))
        machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")
        yield machines
        ray.shutdown()
        machines.shutdown()


@pytest.fixture
def job(tmp_path: Path) -> Squares:
    (tmp_path / "told").mkdir()
    return Squares(str(tmp_path / "told"))


@quietly
def test_a_machine_joins_late_gets_work_and_is_lost(
    machines: Any, job: Squares, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two workers hold their shards until the third one has begun one, and its machine is gone."""
    job.tell(wait_0=1, wait_1=1, wait_2=1)
    joined: list[Any] = []

    def joins(*_: int) -> None:
        if not joined:
            joined.append(machines.add_node(num_cpus=1))
        if job.logged(2) and job.told("wait-0"):
            machines.remove_node(joined[0], allow_graceful=False)
            job.forget("wait-0", "wait-1", "wait-2")

    with caplog.at_level(logging.WARNING):
        assert values(run(job, tmp_path / "store", Where(workers=3), progress=joins)) == VALUES
    assert "room for 2 of 3 workers (a CPU and 0 GPUs each); the others begin when machines join" in caplog.text
    assert "a worker died at shard 00002; it is started again" in caplog.text
    assert len(job.logged(2)) == 2
    assert job.logged(2)[0] not in job.logged(0) + job.logged(1)


def test_the_table_is_that_of_one_process_and_warnings_come_once(machines: Any, job: Squares, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.warns(JobWarning) as warned:
        found = run(job, tmp_path / "two", Where(workers=2), progress=lambda *now: seen.append(now))
    assert [str(warning.message) for warning in warned] == ["a square is no cube"]
    with pytest.warns(JobWarning):
        run(job, tmp_path / "one")
    assert values(found) == VALUES
    for two, one in zip(stored(tmp_path / "two"), stored(tmp_path / "one"), strict=True):
        assert two.read_bytes() == one.read_bytes()
    assert len(job.logged("prepared")) == 2
    assert seen == sorted(seen)
    assert seen[-1] == (10, 10)


@quietly
def test_a_worker_killed_in_mid_shard(
    machines: Any, job: Squares, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job.tell(wait_1=2)
    seen: list[int] = []

    def kills(done: int, _: int) -> None:
        seen.append(done)
        if job.told("wait-1") and done > 3:  # two inputs of shard 1 are done, and some of another
            job.forget("wait-1")
            os.kill(job.logged(1)[0], signal.SIGKILL)

    with caplog.at_level(logging.WARNING):
        assert values(run(job, tmp_path / "store", Where(workers=2), progress=kills)) == VALUES
    assert [len(job.logged(number)) for number in range(4)] == [1, 2, 1, 1]
    assert seen == sorted(seen)
    (told,) = caplog.messages
    assert told == "a worker died at shard 00001; it is started again, and its work done again"


@quietly
def test_a_shard_that_kills_every_worker_is_given_up(
    machines: Any, job: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "DEATHS", 2)
    job.tell(wait_3=1)

    def kills(*_: int) -> None:
        for process in job.logged(3):
            if process not in killed:
                killed.append(process)
                os.kill(process, signal.SIGKILL)

    killed: list[int] = []
    with pytest.raises(JobError, match="a worker died at shard 00003, 2 times; was there too little memory?") as error:
        run(job, tmp_path / "store", Where(workers=2), progress=kills)
    assert "3 of 4 shards are in" in error.value.__notes__[0]


@quietly
@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        ({"load": "fails"}, LoadError, "^there is no such model$"),
        ({"error_0": "memory"}, MemoryError, "^no memory for 0\n"),
        ({"error_0": "odd"}, JobError, "^OddError: odd at 0\n"),
    ],
)
def test_the_error_of_a_worker_is_raised_once_as_it_is(
    machines: Any, job: Squares, tmp_path: Path, told: dict[str, str], kind: type[Exception], message: str
) -> None:
    job.tell(**told)
    with pytest.raises(kind, match=message) as error:
        run(job, tmp_path / "store", Where(workers=2))
    assert "tiny_job.py" in str(error.value.__cause__)  # where it was raised
    assert (tmp_path / "store").exists() == ("load" not in told)
    if kind is MemoryError:
        assert "; with smaller squares, the same command continues" in error.value.__notes__[0]


def test_a_worker_that_dies_while_it_loads_is_given_up(
    machines: Any, job: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "DEATHS", 2)
    job.tell(load="dies")
    with pytest.raises(JobError, match="a worker died before its first shard, 2 times; was there too little memory?"):
        run(job, tmp_path / "store", Where(workers=1))
    assert len(job.logged("opened")) == 2


@quietly
def test_workers_with_other_weights_are_refused(machines: Any, job: Squares, tmp_path: Path) -> None:
    job.tell(weights="first", later_weights="others", wait_0=1)  # the second worker loads meanwhile
    with pytest.raises(
        JobError, match="weights than the first one: {'weights': 'others'}, and not {'weights': 'first'}"
    ):
        run(job, tmp_path / "store", Where(workers=2))


def recorded(folder: Path) -> list[str]:
    return sorted(manifest(folder)["shards"]) if (folder / "manifest.json").is_file() else []


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_ended_is_resumed_by_the_same_command(
    machines: Any, job: Squares, tmp_path: Path, end: signal.Signals
) -> None:
    words = [sys.executable, str(Path(TESTS) / "tiny_job.py"), job.folder, str(tmp_path / "store"), machines.address]
    environment = os.environ | {"PYTHONPATH": str(Path(TESTS).parent)}
    job.tell(wait_2=1)
    first = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: job.logged(2) and recorded(tmp_path / "store") == ["00000", "00001", "00003"])
    first.send_signal(end)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == -end
    assert said.endswith("the same command continues from there.\n" if end is signal.SIGINT else "")
    job.forget("wait-2")
    second = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert second.stdout == f"{VALUES}\n"
    assert second.stderr == ""
    assert [len(job.logged(number)) for number in range(4)] == [1, 1, 2, 1]


def test_another_cluster_than_the_one_that_is_joined(machines: Any, job: Squares, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"connected to the Ray cluster {machines.address}, and not to other:6379"):
        run(job, tmp_path / "store", Where(workers=2, address="other:6379"))


def test_an_address_that_does_not_answer(job: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("ssm_interp.jobs.connection.SECONDS", 0.5)
    with socket.socket() as silent, socket.socket() as closed:
        for bound in (silent, closed):
            bound.bind(("127.0.0.1", 0))
        silent.listen()
        for address, reason in (
            (f"127.0.0.1:{closed.getsockname()[1]}", "Connection refused"),
            (f"ray://127.0.0.1:{closed.getsockname()[1]}", "Connection refused"),
            (f"127.0.0.1:{silent.getsockname()[1]}", "timed out"),
            ("no.such.host.invalid:6379", ""),
        ):
            began = time.monotonic()
            with pytest.raises(JobError, match=f"no Ray cluster answers at {address}: .*{reason}"):
                run(job, tmp_path / "store", Where(workers=2, address=address))
            assert time.monotonic() - began < 10
    with pytest.raises(JobError, match="the address 'localhost:x' is none of a Ray cluster; give auto, host:port"):
        run(job, tmp_path / "store", Where(workers=2, address="localhost:x"))


def test_auto_may_lead_to_a_cluster_that_is_gone(job: Squares, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(JobError, match="no Ray cluster answers at .*:1, where 'auto' leads: "):
        run(job, tmp_path / "store", Where(workers=2, address="auto"))


def test_without_ray_the_extra_is_named(job: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(JobError, match=r"not installed: pip install 'ssm-interp\[cluster\]', or leave out workers"):
        run(job, tmp_path / "store", Where(workers=2))
