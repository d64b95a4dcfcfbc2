"""Studies that are killed and go on with other workers: the table stays that of one process, to the last bit."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from tiny_job import started, until
from tiny_study import Scene, manifest, same, scene, shards

from ssm_interp.errors import LoadError
from ssm_interp.flow import run_study, study_job, study_run
from ssm_interp.flow.study_job import StudyJob
from ssm_interp.jobs import Prepared


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("study"))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_killed_in_one_process(tiny: Scene, tmp_path: Path) -> None:
    process = started(run_study, tiny.study(), tmp_path)
    until(lambda: len(shards(tiny.study(), tmp_path)) >= 2)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    same(run_study(tiny.study(), tmp_path), tiny.result)


@pytest.mark.slow
def test_killed_with_workers_and_gone_on_with_by_workers(tiny: Scene, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ssm_interp", "flow", "--model", tiny.options["model"], "--dtype", "float64"]
    words += ["--facts", tiny.options["facts"], "--source", "subject", "--source", "last", "--window", "1"]
    words += ["--window", "2", "--features", "all", "--features", "top half", "--device", "cpu", "--shard-size", "1"]
    words += ["--workers", "2", "--out", str(tmp_path)]
    study = tiny.study(shard_size=1, workers=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: len(shards(study, tmp_path)) >= 2, 120)  # so that one has its record
    processes = psutil.Process(driver.pid).children(recursive=True)
    workers = [process for process in processes if process.name().startswith("ray::JobWorker")]
    driver.kill()
    assert driver.communicate(timeout=60) == ("", "")
    assert 1 <= len(manifest(study, tmp_path)["shards"]) < 10
    _, alive = psutil.wait_procs(workers, 30)
    assert (len(workers), alive) == (2, [])  # none outlives its driver
    seen: list[tuple[int, int]] = []
    again = run_study(study, tmp_path, progress=lambda done, total: seen.append((done, total)))
    same(again, run_study(tiny.study(shard_size=1), tmp_path / "whole"))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] < 10


def test_a_worker_that_cannot_load_the_model(tiny: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it happens in a worker, which may see another disk than the driver."""
    job = StudyJob(tiny.study(), (), str(tmp_path / "elsewhere"), 1)
    with pytest.raises(LoadError, match="elsewhere' is not a folder that holds a model"):
        job.open()


def test_a_folder_is_named_as_every_worker_finds_it(
    tiny: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(tiny.options["model"]).parent)
    job = study_run._job(tiny.study(model="tiny"), say=False)
    assert job.model == tiny.options["model"]
    assert job.options["model"] == "tiny"
    assert study_run._job(tiny.study(model="tiny-mamba2", facts="geo"), say=False).model == "tiny-mamba2"


def test_out_of_memory_has_a_remedy(tiny: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(study_job, "sweep", fails)
    with pytest.raises(torch.OutOfMemoryError) as error:
        run_study(tiny.study(), tmp_path)
    advice = "with a smaller max_memory or batch_size, which change no result, the same command continues from there."
    assert error.value.__notes__[0].endswith(advice)


def test_a_worker_reports_its_prompts(tiny: Scene) -> None:
    """The answers that decide which prompts are kept count as nothing."""
    job = StudyJob(tiny.study(), tuple(tiny.prompts()), tiny.options["model"], 1)
    worker, seen = job.open(), list[int]()
    prepared = Prepared(**vars(worker.prepare()))
    table, record = worker.shard(0, prepared, seen.append)
    worker.close()
    assert (seen[0], seen[-1], record["kept"]) == (0, 2, 2)
    assert seen == sorted(seen)
    assert table.num_rows == record["kept"] * 2 * 7 * 2  # sources, windows of 1 and 2 of 4 layers, feature groups


@pytest.mark.parametrize(
    ("workers", "threads", "told"),
    [
        (8, 1, "3 of 8 workers have nothing to do: 10 prompts make 5 shards of 2; in another folder, a shard_size of "),
        (4, 64, "4 workers compute with 64 threads each on 8 cores; OMP_NUM_THREADS=2 is faster"),
    ],
)
def test_workers_too_many_are_told(
    tiny: Scene, caplog: pytest.LogCaptureFixture, workers: int, threads: int, told: str
) -> None:
    job = StudyJob(tiny.study(workers=workers), tuple(tiny.prompts()), "", threads)
    with caplog.at_level(logging.WARNING):
        study_run._tell_idle(job, cores=8)
    assert told in caplog.text
