"""Options that several commands have, each stated once; those of a study say what its fields say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssm_interp.errors import StudyError
from ssm_interp.flow import Align, Study
from ssm_interp.flow.study import DeviceMap, Dtype
from ssm_interp.flow.study_job import load_for


def option(field: str, *names: str, **more: Any) -> Any:
    """An option of a study, with the description that it has there."""
    return typer.Option(*names, help=Study.model_fields[field].description, **more)


DEFAULT: dict[str, Any] = {name: field.default for name, field in Study.model_fields.items()}

ModelName = Annotated[str, option("model")]
Facts = Annotated[str, option("facts", "--facts", "--prompts")]
Columns = Annotated[
    list[str] | None, option("columns", "--column", metavar="FIELD=COLUMN", show_default="the fields' own names")
]
SkipBad = Annotated[bool, option("skip_bad", "--skip-bad")]
Limit = Annotated[int, option("limit", min=0)]
FullAnswer = Annotated[bool, option("full_answer", "--full-answer")]
Seed = Annotated[int, option("seed")]
Ids = Annotated[list[str] | None, option("ids", "--id", show_default="all")]
Alignment = Annotated[Align, option("align")]
Features = Annotated[list[str] | None, option("features", "--features", show_default="all")]
Through = Annotated[list[str] | None, option("through", "--through", show_default="ssm where the model has it")]
Revision = Annotated[str, option("revision")]
OfType = Annotated[Dtype, option("dtype")]
Device = Annotated[str, option("device")]
Spread = Annotated[DeviceMap | None, option("device_map")]
BatchSize = Annotated[int, option("batch_size", min=1)]
MaxMemory = Annotated[str | None, option("max_memory", metavar="BYTES")]
Workers = Annotated[int | None, option("workers", min=1)]
GpusPerWorker = Annotated[float, option("gpus_per_worker", min=0)]
Address = Annotated[str | None, option("address")]

FIELDS = {"column": "columns", "id": "ids", "source": "sources", "target": "targets", "window": "windows"}
"""Options that are named in the singular, since each of their values has its own; and the fields that have them all."""


def studies(models: Sequence[str], options: Mapping[str, Any]) -> list[Study]:
    """A study per model, from a command's parameters: those that are a study's and were given.

    Raises:
        StudyError: a model twice; a column that is no FIELD=COLUMN.
        pydantic.ValidationError: as `Study`.
    """
    if len(set(models)) < len(models):
        raise StudyError(f"give each --model once, got {', '.join(models)}")
    named = {FIELDS.get(name, name): value for name, value in options.items() if value is not None}
    given = {name: value for name, value in named.items() if name in Study.model_fields and name != "model"}
    if "columns" in given:
        given["columns"] = columns_of(given["columns"])
    return [Study.model_validate({**given, "model": model}) for model in models]


def columns_of(pairs: list[str] | None) -> dict[str, str] | None:
    """FIELD=COLUMN options as a mapping; None stays None."""
    if pairs is None:
        return None
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise StudyError(f"--column {wrong[0]}: give FIELD=COLUMN, such as text=question")
    return {field: column for field, _, column in (pair.partition("=") for pair in pairs)}


def loaded(
    model: str, revision: str, dtype: Dtype, device: str, device_map: DeviceMap | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, where and as the options say; raises as `Study` and `load_for`."""
    given = {"revision": revision, "dtype": dtype, "device": device, "device_map": device_map}
    return load_for(Study.model_validate({"model": model, **given}))
