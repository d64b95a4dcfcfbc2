"""Reading prompts from files of facts: JSONL, CSV, Parquet, data sets; and writing them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ssm_interp.errors import PromptError
from ssm_interp.prompts import counterfact
from ssm_interp.prompts.prompt import Prompt

EMBEDDED = "geo"
FIELDS = tuple(field.name for field in fields(Prompt))
REQUIRED = ("text", "subject", "answer")
FORMER = "target"  # what 0.1 called the answer
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILE_NAME = re.compile(r".*\.(jsonl?|ndjson|csv|tsv|parquet|pq|txt)", re.IGNORECASE)


class _Row(NamedTuple):
    where: str  # the file and the line or row, as errors name it
    cells: dict[str, Any]


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Raise PromptError, with the nearest valid name, if a key of a column mapping is no field of a prompt."""
    for name in columns or ():
        if name not in FIELDS:
            near = ["answer"] if name == FORMER else get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PromptError(f"a prompt has no field {name!r} to read a column into: {hint}it has {', '.join(FIELDS)}")


def load_prompts(
    source: str | Path = EMBEDDED,
    *,
    columns: Mapping[str, str] | None = None,
    on_bad: Callable[[PromptError], object] | None = None,
) -> list[Prompt]:
    """Read prompts from a file or a data set: a row has `text`, `subject`, `answer`, and maybe `relation` and `id`.

    Args:
        source: what to read:
            `"geo"`: the embedded facts (geography, in templates that the embedded models were not trained on; data from
            GeoNames, CC BY 4.0);
            a file: `.csv`, `.tsv` (with a header) and `.parquet` are tables, others JSONL, an object a line;
            a folder that `datasets` can read, or `"owner/name"`, a data set on the hub; `":split"` behind it names one
            of several splits;
            `"counterfact"`: the hub's NeelNanda/counterfact-tracing. Its layout is known wherever it is met, and its
            prompts' ids are their `original_idx`, see `ssm_interp.prompts.hub_row` (row numbers in a file of only
            some of its rows, unless that has a column `original_idx`).
        columns: field of a prompt -> name of its column; then other columns are ignored.
        on_bad: called with the error of a row that is no prompt (its subject does not occur once in its text, ...),
            which is then left out; None: raise it.

    Raises:
        PromptError: no such file, not readable as what it is, without the columns of a prompt, or without any prompt;
            or a row that is no prompt (file and row are named).
        ImportError: a data set is asked for, and the package `datasets` is not installed.

    Example:
        >>> load_prompts("geo")[0].text
        'The name of the capital city of Afghanistan is'
        >>> skipped = []
        >>> load_prompts("facts.csv", columns={"text": "question"}, on_bad=skipped.append)     # doctest: +SKIP
    """
    check_columns(columns)
    rows = _rows(source)
    prompts = []
    for number, row in enumerate(rows):
        cells = _prompt_cells(row, number, len(rows), columns)
        try:
            prompts.append(_prompt(row.where, cells))
        except PromptError as error:
            if on_bad is None:
                raise
            on_bad(error)
    if not prompts:
        raise PromptError(f"{_named(source)} holds no prompt")
    return prompts


def save_prompts(prompts: Iterable[Prompt], path: str | Path) -> None:
    """Write prompts as JSONL, one of the formats that `load_prompts` reads."""
    lines = (json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    Path(path).write_text("".join(lines), encoding="utf-8")


def _named(source: str | Path) -> str:
    return f"the prompt file {str(source)!r}"


def _rows(source: str | Path) -> list[_Row]:
    path = Path(str(files("ssm_interp.prompts") / "data" / "geo.jsonl")) if source == EMBEDDED else Path(source)
    if path.is_file():
        readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows, ".pq": _parquet_rows}
        return list(readers.get(path.suffix.lower(), _json_rows)(path))
    name = str(source)
    data_set, _, split = (name, "", "") if path.is_dir() else name.partition(":")
    if data_set == counterfact.NAME:
        return _dataset_rows(counterfact.HUB_NAME, split)
    if Path(data_set).is_dir() or (HUB_NAME.fullmatch(data_set) and not FILE_NAME.fullmatch(data_set)):
        return _dataset_rows(data_set, split)
    raise PromptError(
        f"there is no prompt file {name!r}; give a JSONL, CSV or Parquet file, a data set (owner/name), "
        f"{counterfact.NAME!r}, or {EMBEDDED!r} for the embedded one"
    )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{_named(path)} is not UTF-8 text (byte {error.start})") from None


def _json_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(row, dict):
            raise PromptError(f"{where}: a prompt is a JSON object with text, subject and answer, not {line[:80]!r}")
        yield _Row(where, row)


def _csv_rows(path: Path) -> Iterator[_Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if None in cells:
                raise PromptError(f"{where}: more cells than the {len(reader.fieldnames or ())} columns of the header")
            yield _Row(where, dict(cells))
    except csv.Error as error:
        raise PromptError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[_Row]:
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise PromptError(f"{_named(path)} is not a Parquet file: {' '.join(str(error).split())}") from None
    for number, cells in enumerate(table.to_pylist(), start=1):
        yield _Row(f"{path}, row {number}", cells)


def _dataset_rows(data_set: str, split: str) -> list[_Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{data_set!r} is a data set, and the package datasets, which reads it, is not installed: "
            "pip install 'ssm-interp[datasets]'"
        ) from error
    saved = any((Path(data_set) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        data = datasets.load_from_disk(data_set) if saved else datasets.load_dataset(data_set)
    except Exception as error:  # whatever the hub, the network or a damaged file make it raise
        raise PromptError(f"cannot load the data set {data_set!r}: {' '.join(str(error).split())[:300]}") from error
    if isinstance(data, dict):
        data = data[_split(data, split, data_set)]
    return [_Row(f"{data_set}, row {number}", cells) for number, cells in enumerate(data.to_list(), start=1)]


def _split(splits: Mapping[str, object], wanted: str, data_set: str) -> str:
    names = list(splits)
    if wanted in names or (not wanted and len(names) == 1):
        return wanted or names[0]
    problem = f"has no split {wanted!r}" if wanted else "has several splits"
    raise PromptError(f"the data set {data_set!r} {problem}: name one of {names}, as in {f'{data_set}:{names[0]}'!r}")


def _prompt_cells(row: _Row, number: int, rows: int, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The fields of a prompt from the columns of a row."""
    cells = row.cells
    if not columns and cells.keys() >= counterfact.COLUMNS:
        return counterfact.as_prompt(cells, number, rows)
    names = {name: name for name in FIELDS} | dict(columns or {})
    needed = {*REQUIRED, *(columns or ())}
    if missing := {name: column for name, column in names.items() if name in needed and column not in cells}:
        lacking = ", ".join(f"{column!r} for {name}" if column != name else name for name, column in missing.items())
        hint = "Map columns to fields as in text=question"
        if missing.get("answer") == "answer" and FORMER in cells:
            hint = f"0.1 called the answer {FORMER}: rename it, or map it, answer={FORMER}"
        raise PromptError(
            f"{row.where}: a prompt is a JSON object with text, subject and answer, or a row with such columns. "
            f"There is no {lacking}; there are {sorted(cells)}. {hint}"
        )
    if not columns and (unknown := cells.keys() - set(FIELDS)):
        raise PromptError(
            f"{row.where}: unknown keys {sorted(unknown)}; a prompt has {sorted(FIELDS)}. To leave out other columns, "
            "say which to read, as in text=text"
        )
    return {name: cells[column] for name, column in names.items() if column in cells}


def _prompt(where: str, cells: dict[str, Any]) -> Prompt:
    if isinstance(number := cells.get("id"), int):
        cells["id"] = str(number)
    if wrong := [key for key, value in cells.items() if not isinstance(value, str)]:
        raise PromptError(f"{where}: {wrong} must be text (in JSON, strings)")
    try:
        return Prompt(**cells)
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from None
