"""The parts that experiments share, each declared once: which model, which prompts, which edges, where it runs.

A part is a section of a recipe, a panel of a command's help, and a stretch of the fields of a study.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Group as Panel
from cyclopts import Parameter
from pydantic import ByteSize, Field, PositiveInt

from ssm_interp.experiments.declared import Declared, Key, KeyedError, Several, option
from ssm_interp.experiments.values import (
    Align,
    AllUsed,
    Columns,
    Device,
    DeviceMap,
    Dtype,
    Group,
    Interval,
    Name,
    NotOfConv,
    OwnGroups,
    Role,
    Source,
)
from ssm_interp.words import ALL, MetricName, Stream

FACTS = "geo"
EMBEDDED = ("tiny-mamba1", "tiny-mamba2", "tiny-llama")
EMBEDDED_MAMBAS = ("tiny-mamba1", "tiny-mamba2")
DEFAULT_MODEL = "tiny-mamba2"

THREE_IN_EIGHT = "three in eight of the layers"
SSM = "ssm where the model has it"

MODEL, PROMPTS, SWEEP, SHOWN, COMPUTED = (
    Panel.create_ordered(title) for title in ("Model", "Prompts", "Knockouts", "What is shown", "Where it runs")
)


def flag(*names: str, **more: object) -> Parameter:
    """The flags of a field that is not called by its own name alone."""
    return Parameter(name=names or None, **more)  # type: ignore[arg-type]


class Weights(Declared):
    """Of a model, whichever it is."""

    revision: Name = option("main", "Of a hub id: branch, tag or commit.")
    dtype: Dtype = option("float32", "Of the parameters.")


@Parameter(name="*", group=MODEL)
class OneModel(Weights):
    """Which model is asked."""

    model: Name = option(DEFAULT_MODEL, "Embedded name, local folder or hub id.")


@Parameter(name="*", group=MODEL)
class Models(Weights):
    """Which models are asked."""

    names: Annotated[Several[Name], flag("--model", "--models")] = option(
        EMBEDDED, "Embedded names, local folders or hub ids.", min_length=1
    )


@Parameter(name="*", group=PROMPTS)
class Facts(Declared):
    """What models are asked."""

    facts: Annotated[Name, flag("--facts", "--prompts")] = option(
        FACTS, "geo (embedded), counterfact, a JSONL, CSV or Parquet file, or a data set."
    )
    columns: Annotated[
        Columns, flag("--column", "--columns", metavar="FIELD=COLUMN", show_default="the fields' own names")
    ] = option({}, "Field of a prompt (text, subject, answer, relation, id) -> its column in the facts.")
    skip_bad: bool = option(False, "Leave out rows that are no prompt, and count them.")
    limit: int = option(128, "Ask so many prompts, drawn at random; 0: all.", ge=0)
    seed: int = option(0, "Of that draw.")


@Parameter(name="*", group=PROMPTS)
class Prompts(Facts):
    """What models are asked, and which of the answers count."""

    ids: Annotated[Several[Name] | None, flag("--id", "--ids", show_default="all")] = option(
        None, "Ask the prompts with these ids alone.", min_length=1
    )
    full_answer: bool = option(
        False, "Score every token of an answer, not its first one alone; a full forward per knockout."
    )
    all_prompts: bool = option(False, "Keep the prompts that the model answers wrongly, too.")


class Words(Declared):
    """What stands on a command's line by itself."""

    words: Annotated[
        Several[Name],
        Parameter(name=("prompt", "--id"), metavar="ID|TEXT", show_default="drawn from the facts"),
    ] = Field(default=(), description="Prompts, by id; or texts, each with its --answer.")


@Parameter(name="*", group=PROMPTS)
class Picked(Facts, Words):
    """Single prompts: by id, as texts with their answers, or as a file of facts has them."""

    answer: Annotated[Several[Name], flag("--answer", show_default=False)] = option(
        (), "The answer to a text of your own, one per text."
    )
    subject: Annotated[Several[Name], flag("--subject", show_default="the whole text")] = option(
        (), "The subject of a text of your own, one per text; roles such as context are about it."
    )


@Parameter(name="*", group=SWEEP)
class Sweep(Declared):
    """Which edges are knocked out, in which layer windows."""

    sources: Annotated[Several[Source], flag("--source", "--sources")] = option(
        ("subject", "relation", "first", "last"), "Roles, or positions, no longer read.", min_length=1
    )
    targets: Annotated[Several[Role], flag("--target", "--targets")] = option(
        ("last",), "Roles that no longer read them.", min_length=1
    )
    windows: Annotated[Several[PositiveInt] | None, flag("--window", "--windows", show_default=THREE_IN_EIGHT)] = (
        option(None, f"Layers per window, each size in turn; absent: {THREE_IN_EIGHT}.", min_length=1)
    )
    align: Align = option("left", "left: windows are never truncated. centre: truncated at both ends.")
    groups: OwnGroups = option(
        {},
        "Feature groups of your own: name -> layer -> heads (in Mamba-1 channels), or [head, state dimension] pairs.",
    )
    features: Annotated[Several[Group], AllUsed] = option(
        (ALL,), "Feature groups, a knockout each.", min_length=1, validate_default=True
    )
    through: Annotated[Several[Stream] | None, NotOfConv, flag(show_default=SSM)] = option(
        None, f"Streams in which edges are removed; absent: {SSM}.", min_length=1
    )


@Parameter(name="*", group=SHOWN)
class Measured(Declared):
    """What is measured of each answer."""

    metric: Annotated[MetricName | None, flag(show_default="none")] = option(
        None, "Measured besides the answer's probability, in columns of its own; drawn as the statistic metric."
    )


OF_FULL_ANSWERS = ("log_probability", "probability", "accuracy")


def check_measured(metric: str | None, full_answer: bool, key: Key) -> None:
    """Raise KeyedError if a metric of one token is asked of full answers."""
    if full_answer and metric is not None and metric not in OF_FULL_ANSWERS:
        message = f"{metric!r} is about one token; of full answers there are {', '.join(OF_FULL_ANSWERS)}"
        raise KeyedError(key, message)


@Parameter(name="*", group=SHOWN)
class Summary(Declared):
    """What is said over prompts."""

    statistic: Literal["mean", "median", "accuracy", "logprob_difference", "metric"] = option(
        "mean", "What is drawn: mean or median of the relative change, accuracy, logprob_difference, or the metric."
    )
    interval: Interval = option("bootstrap", "Of means: bootstrap, or t.")
    level: float = option(0.95, "Of the interval.", gt=0, lt=1)


@Parameter(name="*", group=COMPUTED)
class OnDevice(Declared):
    """Where a model is."""

    device: Device = option("auto", "auto: a CUDA device where there is one, else the CPU.")
    device_map: DeviceMap | None = option(None, "Spread a model larger than a device over all, as named.")


@Parameter(name="*", group=COMPUTED)
class InBatches(OnDevice):
    """Where a model is, and how many prompts it takes at once."""

    batch_size: PositiveInt = option(32, "Prompts per forward pass.")


@Parameter(name="*", group=COMPUTED)
class AsJob(InBatches):
    """How a stored computation is run: nothing here changes its table, beyond rounding."""

    max_memory: Annotated[ByteSize | None, flag(metavar="BYTES", show_default="a quarter of what is free")] = option(
        None, "For the rows of a step, such as 4GB.", gt=0
    )
    workers: PositiveInt | None = option(
        None, "Processes that share the shards, run by Ray; absent: this one computes them all."
    )
    gpus_per_worker: float = option(0.0, "GPUs that each worker has to itself; 0: they use the CPU.", ge=0)
    address: Name | None = option(None, "Of a Ray cluster: auto, host:port, ray://...; absent: this machine.")


@Parameter(name="*", group=COMPUTED)
class InShards(AsJob):
    """How a stored computation is run, and cut into the files that it is stored in."""

    shard_size: PositiveInt = option(256, "Prompts per file: as many are lost when a run is killed.")
