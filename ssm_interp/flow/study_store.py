"""What a study leaves in its folder: shards of the table, and a manifest that says what they are.

    <folder>/manifest.json        the study, and a record of each finished shard; and the sha256 of all that
    <folder>/manifest.<k>.json    records of rank k that rank 0 has not taken over yet
    <folder>/shards/00000.parquet

Every file appears whole or not at all: it is written under another name, flushed to the disk and renamed. A shard is
written before its record, so one without a record is the trace of a killed run, if it names this study, and computed
anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ssm_interp.errors import NothingAnswered, StudyError
from ssm_interp.flow.result import FlowResult, FlowRun
from ssm_interp.flow.study_ranks import Ranks

METADATA = b"ssm_interp.study"
AGAIN = "and give the same command again"
Records = dict[str, dict[str, Any]]


class Store:
    """The folder of one study.

    Attributes:
        folder: where it is.
        identity: what the study is: `model`, `commit`, `options`, and the sha256 of `weights`, of `prompts` and of the
            `features` in its groups.
        names: of its shards.
        ranks: the processes that write it.
        manifest: the content of manifest.json; under `shards` a record of each finished one: `sha256`, `rows`, `asked`,
            `kept`, `versions`, and `run`, how the sweep went (None where no prompt was kept).
    """

    def __init__(self, folder: Path, identity: dict[str, Any], shards: int, ranks: Ranks) -> None:
        self.folder, self.identity, self.ranks = folder, identity, ranks
        self.names = [f"{number:05}" for number in range(shards)]
        self.study = digest(identity)
        self.manifest: dict[str, Any] = {"study": self.study, "shards": {}}

    @property
    def records(self) -> Records:
        """Of the finished shards that this process knows of, by name."""
        shards: Records = self.manifest["shards"]
        return shards

    @contextmanager
    def opened(self, versions: dict[str, str], max_memory: int) -> Iterator[None]:
        """Create or continue the folder: its shards are checked, and other processes kept out while this one works.

        Args:
            versions: of the packages, for the manifest of a new study.
            max_memory: the same: what a step may take decides how rows are batched, which decides the last bit of a
                number. So it is kept for the whole study, where it is not given.

        Raises:
            StudyError: a process works in it; it holds another study (what differs is named), or a damaged or foreign
                shard.
            OSError: it cannot be written.
        """
        if self.ranks.index:
            self.ranks.barrier()  # rank 0 prepares the folder
            self.manifest = self._read_json("manifest.json")
            self._compare(self.manifest)
            yield
            return
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StudyError(
                f"another process is at work on the study in {self.folder}; wait for it, end it, or give another folder"
            ) from None
        try:
            self._prepare(versions, max_memory)
            self.ranks.barrier()
            yield
        finally:
            lock.release()

    def write(self, name: str, asked: int, result: FlowResult | None, versions: dict[str, str]) -> None:
        """Store a shard, and its record: `asked` prompts and what was found (None: none of them was answered).

        Raises:
            OSError: it cannot be written; what was there before is as it was.
        """
        frame = result.frame if result else pd.DataFrame()
        data = self._encoded(frame, name)
        write_whole(self._path(name), data)
        run = result.runs[0] if result else None
        self.records[name] = {
            "sha256": sha256(data).hexdigest(),
            "rows": len(frame),
            "asked": asked,
            "kept": run.kept if run else 0,
            "run": asdict(run) if run else None,
            "versions": versions,
        }
        self._write_json(f"manifest.{self.ranks.index}.json" if self.ranks.index else "manifest.json", self.manifest)

    def collect(self) -> FlowResult:
        """The whole table, once every rank has written its shards: as one sweep over all prompts gives it.

        Raises:
            StudyError: shards are missing, or damaged.
            NothingAnswered: no shard kept a prompt.
        """
        self.ranks.barrier()
        if not self.ranks.index:
            self._take_over_parts()
        self.ranks.barrier()
        self.manifest = self._read_json("manifest.json")
        if missing := [name for name in self.names if name not in self.records]:
            raise StudyError(
                f"the shards {', '.join(missing[:5])} of {self.folder} are not there; several machines must see the "
                "same folder, on a disk that they share"
            )
        records = [self.records[name] for name in self.names]
        asked, kept = (sum(record[key] for record in records) for key in ("asked", "kept"))
        if not kept:
            raise NothingAnswered(asked, full_answer=self.identity["options"]["full_answer"])
        runs = [_run(record["run"]) for record in records if record["kept"]]
        engine = "; ".join(dict.fromkeys(run.engine for run in runs))
        tables = [self._read(name) for name in self.names if self.records[name]["kept"]]
        frame = _in_order(tables, [run.kept for run in runs])
        return FlowResult(frame, (replace(runs[0], asked=asked, kept=kept, engine=engine),))

    def _prepare(self, versions: dict[str, str], max_memory: int) -> None:
        for trace in [*self.folder.glob(".*.tmp"), *self.folder.glob("shards/.*.tmp")]:
            trace.unlink()
        manifest = self.folder / "manifest.json"
        if manifest.is_file():
            self.manifest = self._read_json(manifest.name)
            if self.manifest["study"] != self.study and self._is_without_rows():
                manifest.unlink()
                for name in self.records:
                    self._path(name).unlink(missing_ok=True)
        if manifest.is_file():
            self._compare(self.manifest)
        else:
            started = {"versions": versions, "max_memory": max_memory, "shards": {}}
            self.manifest = {"study": self.study, **self.identity, **started}
        self._take_over_parts()
        self._verify()

    def _is_without_rows(self) -> bool:
        """Whether the stored study failed before it found anything, so that nothing is lost if another begins here."""
        parts, shards = self.folder.glob("manifest.*.json"), (self.folder / "shards").glob("*.parquet")
        unknown = any(path.stem not in self.records for path in shards)
        return not (any(parts) or unknown or any(record["rows"] for record in self.records.values()))

    def _take_over_parts(self) -> None:
        """Put the other ranks' records into the manifest; forget the records whose shard somebody deleted."""
        parts = sorted(self.folder.glob("manifest.*.json"))
        for path in parts:
            part = self._read_json(path.name)
            if part["study"] == self.study:
                self.records.update(part["shards"])
        there = {name: record for name, record in sorted(self.records.items()) if self._path(name).is_file()}
        self.manifest["shards"] = there
        self._write_json("manifest.json", self.manifest)
        for path in parts:
            path.unlink()

    def _compare(self, stored: dict[str, Any]) -> None:
        before, now = stored["options"], self.identity["options"]
        different = [
            f"{name} (stored: {json.dumps(before.get(name))}, given: {json.dumps(now.get(name))})"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if not different:
            names = {
                "commit": "the model's commit",
                "weights": "the model's weights",
                "prompts": "the prompts",
                "features": "the features in the groups, as measured",
            }
            different = [
                f"{words} (stored: {stored.get(name)!r}, now: {self.identity[name]!r})"
                for name, words in names.items()
                if stored.get(name) != self.identity[name]
            ]
        if different:
            raise StudyError(
                f"the study in {self.folder} is another one; what differs: {', '.join(different)}. Give what is stored "
                f"to continue it, give another folder, or delete {self.folder} to begin anew"
            )

    def _verify(self) -> None:
        """Every shard that is there is whole and belongs to this study."""
        for path in sorted((self.folder / "shards").glob("*.parquet")):
            if path.stem in self.records:
                self._read_bytes(path.stem)
            elif path.stem not in self.names or _origin(path) != {"study": self.study, "shard": path.stem}:
                raise StudyError(
                    f"{path} is no shard of this study: the manifest does not know it, and it does not name the study; "
                    f"delete it or move it elsewhere, {AGAIN}"
                )

    def _read_bytes(self, name: str) -> bytes:
        data = self._path(name).read_bytes()
        found, expected = sha256(data).hexdigest(), self.records[name]["sha256"]
        if found != expected:
            raise StudyError(
                f"the shard {self._path(name)} is damaged: its sha256 is {found[:12]}..., the manifest has "
                f"{expected[:12]}...; delete it, {AGAIN}: it is then computed anew"
            )
        return data

    def _read(self, name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(self._read_bytes(name)))

    def _encoded(self, frame: pd.DataFrame, name: str) -> bytes:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        origin = json.dumps({"study": self.study, "shard": name})
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: origin}), sink)
        return bytes(sink.getvalue())

    def _path(self, name: str) -> Path:
        return self.folder / "shards" / f"{name}.parquet"

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            stored: dict[str, Any] = json.loads(path.read_bytes())
            whole = stored.pop("sha256") == digest(stored)
        except FileNotFoundError:
            raise StudyError(f"{path} is gone: somebody deleted it, or this machine does not see it") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise StudyError(
                f"{path} is damaged, or from another version of ssm_interp; delete it, {AGAIN}: the shards that it "
                "records are then computed anew"
            )
        return stored

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_whole(self.folder / name, json.dumps({"sha256": digest(content), **content}, indent=1).encode())


def _run(fields: dict[str, Any]) -> FlowRun:
    return FlowRun(**fields | {name: tuple(value) for name, value in fields.items() if isinstance(value, list)})


def _origin(path: Path) -> Any:
    """The study and shard that a file says it is of; None if it says nothing."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    return json.loads(metadata.get(METADATA, "null"))


def _in_order(tables: list[pa.Table], kept: list[int]) -> pd.DataFrame:
    """The rows of all shards as one sweep orders them: by knockout, then by prompt."""
    knockouts = [
        np.repeat(np.arange(len(table) // prompts), prompts) for table, prompts in zip(tables, kept, strict=True)
    ]
    order = np.argsort(np.concatenate(knockouts), kind="stable")
    frame: pd.DataFrame = pa.concat_tables(tables).take(order).to_pandas()
    return frame


def digest(content: Any) -> str:
    """sha256 of a JSON value."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it has, at any moment and after a power cut, its old content or all of the new.

    Raises:
        OSError: it cannot be written; its old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        place = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
