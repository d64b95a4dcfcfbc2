"""Studies that are killed, at every step of their writing and at random moments, and taken up again."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_study import Scene, manifest, same, scene, shards, started

from ssm_interp.flow import Study, run_study, study_folder
from ssm_interp.flow import study_store as storing

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("study"))


def run_until(step: int, study: Study, folder: Path) -> None:
    """Run the study in this process, and end it as SIGKILL does at its n-th flush or rename, just before or after."""
    steps = [0]

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*arguments: Any) -> None:
            for moment in (lambda: None, lambda: work(*arguments)):
                moment()
                steps[0] += 1
                if steps[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        return watch

    storing.os.fsync = watched(os.fsync)  # type: ignore[assignment]
    storing.Path.replace = watched(Path.replace)  # type: ignore[method-assign]
    run_study(study, folder)


def killed(process: Any) -> bool:
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return bool(process.exitcode)


@pytest.mark.slow
def test_killed_at_every_step_of_writing(tiny: Scene, tmp_path: Path) -> None:
    study = tiny.study(sources=["subject"], windows=[1], features=["all"], shard_size=5)
    whole = run_study(study, tmp_path / "whole")
    step, complete = 0, False
    while not complete:
        step += 1
        folder = tmp_path / str(step)
        complete = not killed(started(run_until, step, study, folder))
        begun = (study_folder(folder, study.model) / "manifest.json").is_file()
        recorded = manifest(study, folder)["shards"] if begun else {}
        before = {path.stem: path.stat().st_mtime_ns for path in shards(study, folder)}
        assert len(before.keys() - recorded.keys()) <= 1  # at most one is lost, the one in flight
        same(run_study(study, folder), whole)
        after = {path.stem: path.stat().st_mtime_ns for path in shards(study, folder)}
        assert list(after) == ["00000", "00001"]
        assert all(after[name] == before[name] for name in recorded)  # none is computed twice
    # before and after a file is flushed, renamed, and its folder flushed: 2 shards, and the manifest 4 times
    assert step == 2 * 3 * (2 + 4) + 1


def test_killed_again_and_again(tiny: Scene, tmp_path: Path) -> None:
    moments = random.Random(1)
    kills = 0
    for _ in range(200):
        process = started(run_study, tiny.study(shard_size=1), tmp_path)
        process.join(moments.uniform(0.1, 0.5) * (1 + kills / 20))  # longer on a busy machine
        process.kill()
        if not killed(process):
            break
        kills += 1
    assert kills >= 2
    assert len(manifest(tiny.study(), tmp_path)["shards"]) == 10
    whole = run_study(tiny.study(shard_size=1), tmp_path / "whole")
    same(run_study(tiny.study(shard_size=1), tmp_path), whole)


def test_a_lock_left_by_a_killed_process_does_not_block(tiny: Scene, tmp_path: Path) -> None:
    process = started(run_study, tiny.study(shard_size=1), tmp_path)
    deadline = time.monotonic() + 30
    while not list(tmp_path.rglob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(storing.StudyError, match="another process is at work"):
        run_study(tiny.study(shard_size=1), tmp_path)
    process.kill()
    assert killed(process)
    assert run_study(tiny.study(shard_size=1), tmp_path).runs[0].asked == 10
