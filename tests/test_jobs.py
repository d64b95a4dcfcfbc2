"""Jobs in one process: what is stored, what is gone on with, and what is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from tiny_job import ERRORS, Squares, manifest, rewrite, stored, values

from ssm_interp.errors import JobError, JobWarning
from ssm_interp.jobs import Job, Shard, Where, here, job_folder, run

VALUES = [10] * 3 + [11] * 3 + [14] * 3 + [19]
pytestmark = pytest.mark.filterwarnings("ignore:a square is no cube:ssm_interp.errors.JobWarning")


@pytest.fixture
def job(tmp_path: Path) -> Squares:
    (tmp_path / "told").mkdir()
    return Squares(str(tmp_path / "told"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_a_job_is_computed_once_and_then_read(job: Squares, folder: Path) -> None:
    with pytest.warns(JobWarning, match="a square is no cube"):
        shards = run(job, folder)
    assert values(shards) == VALUES
    assert [shard.record for shard in shards] == [{"size": 3}, {"size": 3}, {"size": 3}, {"size": 1}]
    again = run(job, folder)
    assert [shard.table for shard in again] == [pq.read_table(path) for path in stored(folder)]
    assert values(again) == VALUES
    assert [len(job.logged(event)) for event in ("opened", "prepared", 0, 3, "closed")] == [2, 2, 1, 1, 2]


def test_the_manifest_says_what_the_job_is(job: Squares, folder: Path) -> None:
    job.tell(measured="5 m")
    run(job, folder)
    content = manifest(folder)
    assert (content["experiment"], content["options"], content["settings"]) == ("squares", {"power": 2}, {"offset": 0})
    assert (content["inputs"], content["weights"], content["measured"]) == ([3, 3, 3, 1], "w", "5 m")
    assert content["versions"].keys() == {"ssm_interp", "torch", "transformers", "python"}
    assert [path.stem for path in stored(folder)] == list(content["shards"])
    assert [record["rows"] for record in content["shards"].values()] == [3, 3, 3, 1]


def test_progress_counts_the_inputs_that_are_left(job: Squares, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(job, folder, progress=lambda *now: seen.append(now))
    assert sorted(set(seen)) == [(done, 10) for done in range(1, 11)]
    assert seen == sorted(seen)
    stored(folder)[3].unlink()
    seen.clear()
    run(job, folder, progress=lambda *now: seen.append(now))
    assert set(seen) == {(1, 1)}


def test_settings_are_those_that_a_job_began_with(job: Squares, folder: Path) -> None:
    job.tell(offset=1)
    run(job, folder)
    job.tell(offset=7)
    stored(folder)[2].unlink()
    assert values(run(job, folder)) == [value + 1 for value in VALUES]


@pytest.mark.parametrize(
    ("told", "changed", "message"),
    [
        ({}, {"power": 3}, r"what differs: power \(stored: 2, given: 3\)\. Give what is stored"),
        ({}, {"inputs": (3, 3, 3, 3)}, r"what differs: the inputs \(stored: \[3, 3, 3, 1\], now: \[3, 3, 3, 3\]\)"),
        ({"weights": "v"}, {}, r"what differs: the weights \(stored: 'w', now: 'v'\)"),
        ({"measured": "5"}, {}, r"what differs: the measured \(stored: '', now: '5'\)"),
    ],
)
def test_another_job_is_refused_with_what_differs(
    job: Squares, folder: Path, told: dict[str, str], changed: dict[str, object], message: str
) -> None:
    run(job, folder)
    job.tell(**told)
    with pytest.raises(JobError, match=f"the job in .*store is another one; {message}"):
        run(Squares(**vars(job) | changed), folder)
    assert len(job.logged("opened")) == 1 + bool(told)  # what is known without the model is refused without it


def test_a_store_of_version_0_1_is_refused_by_name(job: Squares, folder: Path) -> None:
    run(job, folder)
    rewrite(folder, lambda content: content.update(study=content.pop("job")) or content.pop("format"))
    rewrite(folder, lambda content: content["versions"].update(ssm_interp="0.1.0"))
    with pytest.raises(JobError, match="store holds what ssm_interp 0.1.0 stored, .* give another folder, or delete"):
        run(job, folder)
    assert len(job.logged("opened")) == 1


def test_damaged_and_foreign_shards_are_named(job: Squares, folder: Path, tmp_path: Path) -> None:
    run(job, folder)
    third = stored(folder)[2]
    whole = third.read_bytes()
    third.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(JobError, match=r"00002.parquet is damaged: .* delete it, and give the same command again"):
        run(job, folder)
    third.unlink()
    assert values(run(job, folder)) == VALUES
    run(Squares(**vars(job) | {"power": 3}), tmp_path / "other")
    for name, content in (("00007", stored(tmp_path / "other")[0].read_bytes()), ("notes", b"text")):
        path = folder / "shards" / f"{name}.parquet"
        path.write_bytes(content)
        with pytest.raises(JobError, match=f"{name}.parquet is no shard of this job: .* delete it or move it"):
            run(job, folder)
        path.unlink()
    assert values(run(job, folder)) == VALUES


def test_a_shard_without_a_record_is_computed_anew(job: Squares, folder: Path) -> None:
    run(job, folder)
    rewrite(folder, lambda content: content["shards"].pop("00001"))
    assert values(run(job, folder)) == VALUES
    assert len(job.logged(1)) == 2


def test_a_damaged_manifest_is_named(job: Squares, folder: Path) -> None:
    folder.mkdir()
    path = folder / "manifest.json"
    for content in ("", "[]", '{"job": "x"}', "[" * 10**5):
        path.write_text(content)
        with pytest.raises(JobError, match=r"manifest.json is damaged; delete it, and give the same command again"):
            run(job, folder)
    path.unlink()
    run(job, folder)
    changed = manifest(folder)
    changed["shards"]["00001"]["size"] += 1
    path.write_text(json.dumps(changed))
    with pytest.raises(JobError, match="manifest.json is damaged"):
        run(job, folder)
    path.unlink()
    assert values(run(job, folder)) == VALUES


def test_a_job_that_found_nothing_makes_room_for_another(job: Squares, folder: Path) -> None:
    job.tell(nothing="yes")
    assert values(run(Squares(job.folder, power=3), folder)) == []
    job.forget("nothing")
    assert values(run(job, folder)) == VALUES
    rewrite(folder, lambda content: content["shards"].clear())  # it may have found something
    with pytest.raises(JobError, match="is another one; what differs: power"):
        run(Squares(job.folder, power=3), folder)
    assert values(run(job, folder)) == VALUES


def test_two_processes_do_not_work_on_one_job(job: Squares, folder: Path) -> None:
    run(job, folder)
    message = "another process is at work on the job in .*; wait for it"
    with FileLock(folder / ".lock"), pytest.raises(JobError, match=message):
        run(job, folder)
    assert values(run(job, folder)) == VALUES


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "store; free some space, then the same command continues"),
        (MemoryError("out of memory"), "store; with smaller squares, the same command continues from there."),
        (KeyboardInterrupt(), "store; the same command continues from there."),
        (JobError("cannot"), "store; the same command continues from there."),
    ],
)
def test_an_error_loses_nothing_and_says_so(
    job: Squares, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, advice: str
) -> None:
    def fails(_: int) -> Exception:
        raise error

    monkeypatch.setitem(ERRORS, "any", fails)
    job.tell(error_2="any")
    with pytest.raises(type(error)) as raised:
        run(job, folder)
    (note,) = raised.value.__notes__
    assert note.startswith("Nothing that was stored is lost: 2 of 4 shards are in ")
    assert advice in note
    del raised.value.__notes__
    assert [path.name for path in stored(folder)] == ["00000.parquet", "00001.parquet"]
    assert job.logged("closed")
    job.forget("error-2")
    assert values(run(job, folder)) == VALUES
    assert len(job.logged(1)) == 1


def test_a_full_disk_leaves_no_half_of_a_file(job: Squares, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(job, folder)
    assert not list(folder.rglob(".*.tmp"))
    assert values(run(job, folder)) == VALUES


def test_versions_that_changed_are_told(
    job: Squares, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(job, folder)
    stored(folder)[0].unlink()
    now = here.versions() | {"torch": "9.9"}
    monkeypatch.setattr(here, "versions", lambda: now)
    with caplog.at_level(logging.WARNING):
        run(job, folder)
    (told,) = caplog.messages
    assert "has shards made with torch 2." in told
    assert "(now: 9.9)" in told
    assert manifest(folder)["shards"]["00000"]["versions"]["torch"] == "9.9"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0; leave it out to compute in this process"),
        ({"workers": 2, "gpus_per_worker": -1.0}, "gpus_per_worker is a share of one GPU .* got -1"),
        ({"workers": 2, "gpus_per_worker": 1.5}, "gpus_per_worker is a share of one GPU .* got 1.5"),
        ({"gpus_per_worker": 1.0}, "gpus_per_worker is given without workers; say how many"),
        ({"address": "auto"}, "address is given without workers; say how many"),
    ],
)
def test_where_a_job_cannot_run(options: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        Where(**options)  # type: ignore[arg-type]


def test_a_job_without_what_it_needs_is_none() -> None:
    class Nothing(Job):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing()  # type: ignore[abstract]
    assert Shard._fields == ("table", "record")


def test_folders_of_models_are_file_names() -> None:
    assert job_folder("out", "state-spaces/mamba-130m-hf") == Path("out/state-spaces--mamba-130m-hf")
    assert job_folder("out", "../models/a b/") == Path("out/models--a--b")
    assert job_folder("out", "/") == Path("out/model")
    long = [job_folder("out", f"{letter}/{'x' * 300}").name for letter in "ab"]
    assert len(set(long)) == 2
    assert max(map(len, long)) < 128
