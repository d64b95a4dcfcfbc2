"""What a job leaves in its folder: shards of the table, and a manifest that says what they are.

    <folder>/manifest.json        the job, and a record of each finished shard; and the sha256 of all that
    <folder>/shards/00000.parquet

Every file appears whole or not at all: it is written under another name, flushed to the disk and renamed. A shard is
written before its record, so one without a record is the trace of a killed run, if it names this job, and computed
anew. Nobody but the process that holds the lock writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ssm_interp.errors import JobError
from ssm_interp.jobs.files import digest, write_whole
from ssm_interp.jobs.job import Json, Shard

FORMAT = 1
METADATA = b"ssm_interp.job"
AGAIN = "and give the same command again"
OWN = ("sha256", "rows", "versions")
"""Of a shard's record: what the store itself says."""


class Store:
    """The folder of one job.

    Args:
        folder: where it is; its own.
        identity: what the job is, as far as it is known without its model: `experiment`, `options`, and more.
        shards: how many there are.

    Attributes:
        names: of the shards.
        manifest: the content of manifest.json; under `shards` a record of each finished one: `sha256`, `rows`,
            `versions`, and what the worker recorded.
    """

    def __init__(self, folder: Path, identity: Json, shards: int) -> None:
        self.folder, self.identity = folder, identity
        self.names = [f"{number:05}" for number in range(shards)]
        self.manifest: Json = {"job": "", "settings": {}, "shards": {}}

    @property
    def records(self) -> dict[str, Json]:
        """Of the finished shards, by name."""
        records: dict[str, Json] = self.manifest["shards"]
        return records

    @property
    def settings(self) -> Json:
        """Those that the job began with."""
        settings: Json = self.manifest["settings"]
        return settings

    def refuse_another(self) -> None:
        """Raise what `opened` would, as far as the identity is known by now; nothing is written.

        Raises:
            JobError: as `opened`.
        """
        if (self.folder / "manifest.json").is_file():
            self.manifest = self._stored()
            if not self._is_without_rows():
                self._compare()

    @contextmanager
    def opened(self, identity: Json, settings: Json, versions: dict[str, str]) -> Iterator[None]:
        """Create or continue the folder: its shards are checked, and other processes kept out while this one works.

        Args:
            identity: what else the job is, as its workers know it.
            settings: for a job that begins; one that is continued keeps its own.
            versions: of the packages, for the manifest of a job that begins.

        Raises:
            JobError: a process works in it; it holds another job (what differs is named), or one of version 0.1, or a
                damaged or foreign shard.
            OSError: it cannot be written.
        """
        self.identity = self.identity | identity
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise JobError(
                f"another process is at work on the job in {self.folder}; wait for it, end it, or give another folder"
            ) from None
        try:
            self._prepare(settings, versions)
            yield
        finally:
            lock.release()

    def write(self, number: int, shard: Shard, versions: dict[str, str]) -> None:
        """Store a shard, and its record.

        Raises:
            OSError: it cannot be written; what was there before is as it was.
        """
        name = self.names[number]
        data = self._encoded(shard.table, name)
        write_whole(self._path(name), data)
        own = (sha256(data).hexdigest(), shard.table.num_rows, versions)
        self.records[name] = dict(zip(OWN, own, strict=True)) | shard.record
        self._write_manifest()

    def shards(self) -> list[Shard]:
        """All of them, in order, once they are there.

        Raises:
            JobError: one is damaged.
        """
        shards = []
        for name in self.names:
            table = pq.read_table(pa.BufferReader(self._read_bytes(name)))
            record = {key: value for key, value in self.records[name].items() if key not in OWN}
            shards.append(Shard(table, record))
        return shards

    def _prepare(self, settings: Json, versions: dict[str, str]) -> None:
        for trace in [*self.folder.glob(".*.tmp"), *self.folder.glob("shards/.*.tmp")]:
            trace.unlink()
        manifest = self.folder / "manifest.json"
        if manifest.is_file():
            self.manifest = self._stored()
            if self.manifest["job"] != digest(self.identity) and self._is_without_rows():
                manifest.unlink()
                for name in self.records:
                    self._path(name).unlink(missing_ok=True)
        if manifest.is_file():
            self._compare()
        else:
            begun = {"versions": versions, "settings": settings, "shards": {}}
            self.manifest = {"format": FORMAT, "job": digest(self.identity), **self.identity, **begun}
        there = {name: record for name, record in sorted(self.records.items()) if self._path(name).is_file()}
        self.manifest["shards"] = there  # somebody may have deleted a shard, to have it computed anew
        self._write_manifest()
        self._verify()

    def _is_without_rows(self) -> bool:
        """Whether the stored job failed before it found anything, so that nothing is lost if another begins here."""
        unknown = any(path.stem not in self.records for path in (self.folder / "shards").glob("*.parquet"))
        return not (unknown or any(record["rows"] for record in self.records.values()))

    def _compare(self) -> None:
        """Refuse a stored job that is another one, and say in what: first in its options, which the user gave."""
        stored = self.manifest
        before, now = stored.get("options", {}), self.identity["options"]
        different = [
            f"{name} (stored: {json.dumps(before.get(name))}, given: {json.dumps(now.get(name))})"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        different = different or [
            f"the {name} (stored: {stored.get(name)!r}, now: {value!r})"
            for name, value in self.identity.items()
            if stored.get(name) != value
        ]
        if different:
            raise JobError(
                f"the job in {self.folder} is another one; what differs: {', '.join(different)}. Give what is stored "
                f"to continue it, give another folder, or delete {self.folder} to begin anew"
            )

    def _verify(self) -> None:
        """Every shard that is there is whole and belongs to this job."""
        for path in sorted((self.folder / "shards").glob("*.parquet")):
            if path.stem in self.records:
                self._read_bytes(path.stem)
            elif path.stem not in self.names or _origin(path) != {"job": self.manifest["job"], "shard": path.stem}:
                raise JobError(
                    f"{path} is no shard of this job: the manifest does not know it, and it does not name the job; "
                    f"delete it or move it elsewhere, {AGAIN}"
                )

    def _read_bytes(self, name: str) -> bytes:
        data = self._path(name).read_bytes()
        actual, expected = sha256(data).hexdigest(), self.records[name]["sha256"]
        if actual != expected:
            raise JobError(
                f"the shard {self._path(name)} is damaged: its sha256 is {actual[:12]}..., the manifest has "
                f"{expected[:12]}...; delete it, {AGAIN}: it is then computed anew"
            )
        return data

    def _encoded(self, table: pa.Table, name: str) -> bytes:
        origin = json.dumps({"job": self.manifest["job"], "shard": name})
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: origin}), sink)
        return bytes(sink.getvalue())

    def _path(self, name: str) -> Path:
        return self.folder / "shards" / f"{name}.parquet"

    def _stored(self) -> Json:
        """The manifest that is there, whole and of this version."""
        path = self.folder / "manifest.json"
        try:
            stored: Json = json.loads(path.read_bytes())
            whole = stored.pop("sha256") == digest(stored)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise JobError(f"{path} is damaged; delete it, {AGAIN}: the shards that it records are then computed anew")
        if stored.get("format") != FORMAT:
            version = stored.get("versions", {}).get("ssm_interp", "another version")
            raise JobError(
                f"{self.folder} holds what ssm_interp {version} stored, which this version cannot continue; give "
                f"another folder, or delete it to begin anew (its shards are Parquet tables that pandas reads)"
            )
        return stored

    def _write_manifest(self) -> None:
        content = json.dumps({"sha256": digest(self.manifest), **self.manifest}, indent=1).encode()
        write_whole(self.folder / "manifest.json", content)


def job_folder(folder: str | Path, name: str) -> Path:
    """Where in a folder of jobs that of a model is: its name, with what a file name should not have replaced.

    Example:
        >>> job_folder("out", "state-spaces/mamba-130m-hf").name
        'state-spaces--mamba-130m-hf'
    """
    file_name = re.sub(r"[^\w.-]+", "--", name.strip("/.~"))
    if len(file_name) > 120:
        file_name = f"{file_name[-100:]}-{sha256(name.encode()).hexdigest()[:12]}"
    return Path(folder) / (file_name or "model")


def _origin(path: Path) -> Any:
    """The job and shard that a file says it is of; None if it says nothing."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    return json.loads(metadata.get(METADATA, "null"))
