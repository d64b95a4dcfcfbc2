"""A study: every option of one model's sweep over a file of facts, as data that can be stored and compared."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ssm_interp.features.groups import ALL
from ssm_interp.flow.study_held import OWN_GROUPS, AllUsed, Group, Held, Sets
from ssm_interp.flow.windows import Align
from ssm_interp.prompts import check_role
from ssm_interp.prompts.facts_file import EMBEDDED, check_columns

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Stream = Literal["ssm", "conv", "attention"]

WITHOUT_EFFECT = frozenset(
    {"device", "device_map", "batch_size", "max_memory", "workers", "gpus_per_worker", "address"}
)
"""Options that change how a table is computed and not what is in it, beyond rounding."""


def _target(value: Any) -> Any:
    if isinstance(value, str):
        check_role(value)
    return value


def _source(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, bool):
        raise ValueError(f"a source is a role, or a position counted from 0, not {str(value).lower()}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"there is no position {value}: positions in a prompt count from 0")
    return _target(value)


def _device(value: str) -> str:
    if value != "auto":
        try:
            torch.device(value)
        except RuntimeError:
            raise ValueError(f"there is no device {value!r}; give auto, cpu, cuda, cuda:1, ...") from None
    return value


def _fields(value: dict[str, str]) -> dict[str, str]:
    check_columns(value)
    return value


def _through(value: Any, info: Any) -> Any:
    groups = [name for name in info.data.get("features", ()) if name != ALL]
    if groups and "conv" in (value or ()):
        raise ValueError(
            f"the convolution feeds all features together, so a knockout through it takes no group such as "
            f"{groups[0]!r}; leave out the features, or conv"
        )
    return value


Source = Annotated[str | int, BeforeValidator(_source)]
Target = Annotated[str, AfterValidator(_target)]
Columns = Annotated[dict[str, str], AfterValidator(_fields)]
NotOfConv = AfterValidator(_through)
"""Of streams: where conv is one of them, the field `features`, which stands before, has no group but "all"."""


class Study(BaseModel):
    """One model asked for facts, under knockouts in every layer window; `run_study` runs it.

    Raises:
        pydantic.ValidationError: an unknown or a wrong option; `explain` says in a line what is wrong.

    Example:
        >>> Study(model="tiny-mamba2", windows=[1, 3], limit=64).model_dump_json(include={"model", "windows"})
        '{"model":"tiny-mamba2","windows":[1,3]}'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1, description="Embedded name, local folder or hub id.")
    revision: str = Field("main", min_length=1, description="Of a hub id: branch, tag or commit.")
    dtype: Dtype = Field("float32", description="Of the parameters.")
    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto", description="auto: a CUDA device where there is one, else the CPU. Each worker takes its own."
    )
    device_map: DeviceMap | None = Field(None, description="Spread a model larger than a device over all, as named.")
    facts: str = Field(
        EMBEDDED, min_length=1, description="geo (embedded), counterfact, a JSONL, CSV or Parquet file, or a data set."
    )
    columns: Columns = Field(
        {}, description="Field of a prompt (text, subject, target, relation, id) -> its column in the facts."
    )
    skip_bad: bool = Field(False, description="Leave out rows that are no prompt, and count them.")
    limit: int = Field(128, ge=0, description="Ask so many prompts, drawn at random; 0: all.")
    seed: int = Field(0, description="Of that draw.")
    ids: tuple[str, ...] | None = Field(None, min_length=1, description="Ask the prompts with these ids alone.")
    answered_only: bool = Field(True, description="Leave out the prompts that the model answers wrongly.")
    full_answer: bool = Field(
        False, description="Score every token of an answer, not its first one alone; a full forward per knockout."
    )
    sources: tuple[Source, ...] = Field(
        ("subject", "relation", "first", "last"), min_length=1, description="Roles, or positions, no longer read."
    )
    targets: tuple[Target, ...] = Field(("last",), min_length=1, description="Roles that no longer read them.")
    windows: tuple[PositiveInt, ...] | None = Field(
        None, min_length=1, description="Layers per window, each size in turn; none: three in eight of the layers."
    )
    align: Align = Field("left", description="left: never truncated. centre: truncated at both ends.")
    groups: Sets = Field({}, description=OWN_GROUPS)
    features: Annotated[tuple[Group, ...], AllUsed] = Field(
        (ALL,), min_length=1, validate_default=True, description="Feature groups, a knockout each."
    )
    through: Annotated[tuple[Stream, ...] | None, NotOfConv] = Field(
        None, min_length=1, description="Streams in which edges are removed; none: ssm where the model has it."
    )
    held: tuple[Held, ...] = Field(
        (), description="Edits held on in the clean run and under every knockout, which each take a full forward then."
    )
    batch_size: PositiveInt = Field(32, description="Prompts per forward pass.")
    shard_size: PositiveInt = Field(256, description="Prompts per file: as many are lost when a run is killed.")
    max_memory: ByteSize | None = Field(
        None, gt=0, description="For the rows of a step, such as 4GB; none: a quarter of what is free."
    )

    workers: PositiveInt | None = Field(
        None, description="Processes that share the shards, run by Ray; none: this one computes them all."
    )
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each worker has to itself; 0: they use the CPU.")
    address: str | None = Field(
        None, min_length=1, description="Of a Ray cluster: auto, host:port, ray://...; none: workers on this machine."
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        known = cls.model_fields
        if unknown := [name for name in given if name not in known] if isinstance(given, dict) else ():
            hint = did_you_mean(unknown[0], known)
            raise ValueError(f"there is no option {unknown[0]!r}: {hint}a study has {', '.join(known)}")
        return given

    def options(self) -> dict[str, Any]:
        """What the table depends on, as JSON values: all options but those in `WITHOUT_EFFECT`."""
        return self.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))


def explain(error: ValidationError) -> str:
    """What is wrong with the options of a study, in a line.

    Example:
        >>> try:
        ...     Study(model="tiny-mamba1", limit=-1)
        ... except ValidationError as error:
        ...     explain(error)
        'limit: input should be greater than or equal to 0, got -1'
    """
    problems = []
    within = {problem["loc"][:-1] for problem in error.errors()}
    for problem in error.errors():
        if problem["type"] == "too_short" and problem["loc"] in within:
            continue  # pydantic does not count items that are wrong
        own = problem.get("ctx", {}).get("error")
        message = str(own) if own else f"{problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
        hint = did_you_mean(problem["input"], choices(problem))
        where = f"{'.'.join(map(str, problem['loc']))}: " if problem["loc"] else ""
        problems.append(f"{where}{message}{hint and f'; {hint.strip()}'}")
    return "; ".join(problems)


def choices(problem: Any) -> list[str]:
    """Of one of pydantic's errors, the words that would have been right; none where they cannot be listed."""
    context = problem.get("ctx", {})
    return re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags") or ""))


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """The start of a hint at the nearest known name; empty where none is near.

    Example:
        >>> did_you_mean("windos", ["windows", "align"])
        "did you mean 'windows'? "
    """
    near = get_close_matches(str(value), known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""
