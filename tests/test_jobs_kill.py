"""Jobs that are killed, at every step of their writing and at random moments, and taken up again."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_job import Squares, manifest, started, stored, until, values

from ssm_interp.errors import JobError
from ssm_interp.jobs import files, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:a square is no cube:ssm_interp.errors.JobWarning"),
]


@pytest.fixture
def job(tmp_path: Path) -> Squares:
    (tmp_path / "told").mkdir()
    return Squares(str(tmp_path / "told"), inputs=(2, 1))


def run_until(step: int, job: Squares, folder: Path) -> None:
    """Run the job in this process, and end it as SIGKILL does at its n-th flush or rename, just before or after."""
    steps = [0]

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*arguments: Any) -> None:
            for moment in (lambda: None, lambda: work(*arguments)):
                moment()
                steps[0] += 1
                if steps[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        return watch

    files.os.fsync = watched(os.fsync)  # type: ignore[assignment]
    files.Path.replace = watched(Path.replace)  # type: ignore[method-assign]
    run(job, folder)


def killed(process: Any) -> bool:
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return bool(process.exitcode)


def test_killed_at_every_step_of_writing(job: Squares, tmp_path: Path) -> None:
    step, complete = 0, False
    while not complete:
        step += 1
        folder = tmp_path / str(step)
        complete = not killed(started(run_until, step, job, folder))
        recorded = manifest(folder)["shards"] if (folder / "manifest.json").is_file() else {}
        before = {path.stem: path.stat().st_mtime_ns for path in stored(folder)}
        assert len(before.keys() - recorded.keys()) <= 1  # at most one is lost, the one in flight
        assert values(run(job, folder)) == [10, 10, 11]
        after = {path.stem: path.stat().st_mtime_ns for path in stored(folder)}
        assert list(after) == ["00000", "00001"]
        assert all(after[name] == before[name] for name in recorded)  # none is computed twice
    # before and after a file is flushed, renamed, and its folder flushed: 2 shards, and the manifest 3 times
    assert step == 2 * 3 * (2 + 3) + 1


def test_killed_again_and_again(job: Squares, tmp_path: Path) -> None:
    many, moments, kills = Squares(job.folder, inputs=(1,) * 60), random.Random(1), 0
    for _ in range(200):
        process = started(run, many, tmp_path / "store")
        process.join(moments.uniform(0.01, 0.1) * (1 + kills / 20))  # longer on a busy machine
        process.kill()
        if not killed(process):
            break
        kills += 1
    assert kills >= 2
    assert len(manifest(tmp_path / "store")["shards"]) == 60
    assert values(run(many, tmp_path / "store")) == [10 + number**2 for number in range(60)]


def test_a_lock_left_by_a_killed_process_does_not_block(job: Squares, tmp_path: Path) -> None:
    job.tell(wait_1=1)
    process = started(run, job, tmp_path / "store")
    until(lambda: job.logged(1))
    with pytest.raises(JobError, match="another process is at work"):
        run(job, tmp_path / "store")
    process.kill()
    assert killed(process)
    job.forget("wait-1")
    assert values(run(job, tmp_path / "store")) == [10, 10, 11]
