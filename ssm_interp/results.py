"""What verbs return: one base for all of it, with a table, a picture, and a file that holds everything."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from pydantic import BaseModel
from safetensors.torch import load as tensors_from
from safetensors.torch import save as bytes_of
from torch import Tensor

from ssm_interp.errors import MissingError, ResultError
from ssm_interp.reprs import describe, short_repr

Tokens = tuple[tuple[str, ...], ...]
"""A readable token per column of the input ids, row by row; "" at padding."""

KEY, TENSORS = b"ssm_interp.result", b"ssm_interp.result.tensors"
OF_0_1 = b"ssm_interp.flow"
SUFFIXES = ("", ".parquet", ".pq")
LARGEST = 2**30  # bytes of the tensors in one file; the metadata of Parquet end at 2 GiB

R = TypeVar("R", bound="Result")


class Result(ABC):
    """A dataclass that a verb returns: a tidy table, a picture, and a file from which it comes back whole.

    Columns that mean the same have the same name in every table: `model`, `layer`, `feature_group`, `row` (of the
    batch), `target` and `source` (positions, or roles), `target_token` and `source_token`.

    Attributes:
        frame: the table.
        holds: the dataclasses, named tuples and pydantic models that its fields hold beside numbers, texts, tensors,
            tables, and sequences and mappings of these.
        version: of its file; raised when its fields change.

    Example:
        >>> sweep(ssm, tokenizer, prompts).save("flow.parquet")            # doctest: +SKIP
        >>> FlowResult.load("flow.parquet").plot()                         # doctest: +SKIP
    """

    holds: ClassVar[tuple[type, ...]] = ()
    version: ClassVar[int] = 1

    if TYPE_CHECKING:  # a property or a field of the dataclass, which would take a property here for its default

        @property
        def frame(self) -> pd.DataFrame: ...

    __repr__ = short_repr

    @abstractmethod
    def plot(self) -> Figure:
        """The result as a picture; save it with `.savefig(path)`."""

    def save(self, path: str | Path) -> None:
        """Write one Parquet file: the table, which anything reads that reads Parquet, and all else in its metadata.

        Beyond about 75 MB of tensors most readers find the metadata too large; `load` does not.

        Raises:
            ResultError: a path with the suffix of another format; tensors too large for one file; a field that holds
                something that no result may.
            OSError: the path cannot be written.
        """
        name = type(self).__name__
        if Path(path).suffix not in SUFFIXES:
            raise ResultError(
                f"save writes Parquet, which keeps all that {name} holds; name {str(path)!r} .parquet, or write the "
                "table alone with result.frame.to_csv(...)"
            )
        tensors: dict[str, Tensor] = {}
        names = [field for field in _names(type(self)) if field != "frame"]
        held = {field: _plain(getattr(self, field), tensors) for field in names}
        raw = bytes_of(tensors) if tensors else b""
        packed = pa.compress(raw, "zstd", asbytes=True) if raw else b""
        if len(packed) > LARGEST:
            raise ResultError(
                f"{name} holds {len(packed) / 2**30:.1f} GiB of tensors, and a file takes {LARGEST / 2**30:.0f}; "
                "ask for fewer layers or rows, or write the table alone with result.frame.to_parquet(...)"
            )
        origin = {"class": name, "version": self.version, "bytes": len(raw), "fields": held}
        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({KEY: json.dumps(origin).encode(), TENSORS: b64encode(packed)})

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what `save` wrote; tensors come back on the CPU.

        Raises:
            ResultError: no such file; one that holds another result, was written by another version, or that `save` did
                not write.
        """
        table, metadata = _read(path)
        origin = _origin(path, metadata, cls)
        try:
            packed = b64decode(metadata[TENSORS])
            raw = pa.decompress(packed, origin["bytes"], "zstd", asbytes=True) if packed else b""
            tensors, known = tensors_from(raw) if raw else {}, _known(cls)
            held = {field: _whole(value, tensors, known) for field, value in origin["fields"].items()}
            if "frame" in _names(cls):
                held["frame"] = table.to_pandas()
            return cls(**held)
        except (LookupError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
            raise ResultError(f"{str(path)!r} is damaged: its {cls.__name__} cannot be read ({error!r:.200})") from None


@dataclass(frozen=True, eq=False, repr=False)
class ByLayer(Result, Mapping[int, R], Generic[R]):
    """Results of several layers as one: layer -> result.

    Attributes:
        layers: the results, in the order of the layers that were asked for.
    """

    layers: Mapping[int, R]

    def __getitem__(self, layer: int) -> R:
        if layer not in self.layers:
            raise MissingError(f"layer {describe(layer)} was not asked for; there are layers {list(self.layers)}")
        return self.layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def frame(self) -> pd.DataFrame:
        """The tables of all layers, one below the other."""
        return pd.concat([result.frame for result in self.layers.values()], ignore_index=True)


def with_tokens(frame: pd.DataFrame, tokens: Tokens | None) -> pd.DataFrame:
    """A table of rows and of positions `target` and `source`, with the tokens that stand there, if they are known."""
    if tokens is None:
        return frame
    named, row = np.array(tokens, dtype=object), frame["row"].to_numpy(int)
    columns = {}
    for name in ("target", "source"):
        if name in frame:
            position = frame[name].astype("Int64")
            words = named[row, position.fillna(0).to_numpy(int)]
            columns[f"{name}_token"] = pd.Series(words, index=frame.index).mask(position.isna())
    return frame.assign(**columns)


def labels(tokens: Tokens | None, row: int, length: int) -> Sequence[str]:
    """The tokens of a row for a picture; positions where no tokens are known."""
    return [str(position) for position in range(length)] if tokens is None else tokens[row]


def _names(kind: type) -> list[str]:
    if issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [field.name for field in fields(kind)] if is_dataclass(kind) else list(getattr(kind, "_fields", ()))


def _known(kind: type) -> dict[str, type]:
    """The parts of a result, and theirs, by name."""
    known: dict[str, type] = {}
    for part in getattr(kind, "holds", ()):
        known |= {part.__name__: part} | _known(part)
    return known


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value for JSON: sequences as lists, all else as an object of one key that says its kind; tensors stay outside.

    Args:
        value: what a field of a result holds.
        tensors: gets the tensors, arrays and tables of the value, by number.

    Raises:
        ResultError: a value of another kind.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if names := _names(type(value)):
        return {"part": [type(value).__name__, {name: _plain(getattr(value, name), tensors) for name in names}]}
    if isinstance(value, Mapping):
        return {"mapping": [[_plain(key, tensors), _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(item, tensors) for item in value]
    kind, tensor = _as_tensor(value)
    tensors[str(len(tensors))] = tensor
    return {kind: str(len(tensors) - 1)}


def _as_tensor(value: Any) -> tuple[str, Tensor]:
    match value:
        case Tensor():
            return "tensor", value.detach().cpu().clone(memory_format=torch.contiguous_format)
        case np.ndarray():
            return "array", torch.from_numpy(np.array(value))
        case pd.DataFrame():
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pandas(value, preserve_index=False), sink)
            return "table", torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)
    raise ResultError(f"a result cannot be saved with a {type(value).__name__} in it")


_FROM_TENSOR: Mapping[str, Callable[[Tensor], Any]] = {
    "tensor": lambda tensor: tensor,
    "array": Tensor.numpy,
    "table": lambda tensor: pq.read_table(pa.BufferReader(tensor.numpy().tobytes())).to_pandas(),
}


def _whole(value: Any, tensors: Mapping[str, Tensor], known: Mapping[str, type]) -> Any:
    """What `_plain` was given; sequences come back as tuples."""
    if isinstance(value, list):
        return tuple(_whole(item, tensors, known) for item in value)
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "mapping":
        return {_whole(key, tensors, known): _whole(item, tensors, known) for key, item in inner}
    if kind == "part":
        name, held = inner
        return known[name](**{field: _whole(item, tensors, known) for field, item in held.items()})
    return _FROM_TENSOR[kind](tensors[inner])


def _read(path: str | Path) -> tuple[pa.Table, dict[bytes, bytes]]:
    if not Path(path).is_file():
        raise ResultError(f"there is no file {str(path)!r}")
    most = 2**31 - 1
    try:
        with pq.ParquetFile(path, thrift_string_size_limit=most, thrift_container_size_limit=most) as file:
            return file.read(), file.metadata.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise ResultError(f"{str(path)!r} is not a Parquet file: {' '.join(str(error).split())}") from None


def _origin(path: str | Path, metadata: Mapping[bytes, bytes], wanted: type[Result]) -> dict[str, Any]:
    """What a file says that it holds, if that is what is wanted."""
    if KEY not in metadata and OF_0_1 in metadata:
        raise ResultError(
            f"{str(path)!r} was written by ssm_interp 0.1, whose files this version does not read; sweep again, or "
            "read the table alone with pandas.read_parquet"
        )
    if KEY not in metadata:
        raise ResultError(
            f"{str(path)!r} is a Parquet file, but not one that {wanted.__name__}.save wrote; read its table with "
            "pandas.read_parquet"
        )
    try:
        origin: dict[str, Any] = json.loads(metadata[KEY])
        name, version = origin["class"], origin["version"]
    except (ValueError, LookupError, TypeError) as error:
        raise ResultError(f"{str(path)!r} is damaged: it does not say what it holds ({error!r:.200})") from None
    if name != wanted.__name__:
        raise ResultError(f"{str(path)!r} holds {name}, not {wanted.__name__}; read it with {name}.load(...)")
    if version != wanted.version:
        raise ResultError(
            f"{str(path)!r} holds version {version} of {name}, but this ssm_interp reads version {wanted.version}; "
            "make the result again, or read the table alone with pandas.read_parquet"
        )
    return origin
