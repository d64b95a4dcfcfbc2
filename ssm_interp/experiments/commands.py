"""The experiments of the command line, one declaration each: what it takes, what it says of itself, where it writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from ssm_interp.experiments.declared import Declared, KeyedError, Several, option, same
from ssm_interp.experiments.parts import (
    DEFAULT_MODEL,
    EMBEDDED_MAMBAS,
    FACTS,
    MODEL,
    PROMPTS,
    SHOWN,
    SSM,
    SWEEP,
    THREE_IN_EIGHT,
    AsJob,
    Facts,
    InBatches,
    InShards,
    Measured,
    Models,
    OnDevice,
    OneModel,
    Picked,
    Prompts,
    Summary,
    Sweep,
    Weights,
    check_measured,
    flag,
)
from ssm_interp.experiments.study import Study
from ssm_interp.experiments.values import Align, Columns, Name, Role, Share, Source, Statistic
from ssm_interp.words import MetricName, Stream

PICTURE = "Picture (.png, .svg, .pdf), or page (.html)."
BESIDE = "Picture (.png, .svg, .pdf), page (.html), or table (.parquet, .csv); picture and table go side by side."


@Parameter(name="*")
class Experiment(Declared):
    """What `ssm-interp NAME` runs; the name is that of the class."""


FIRST_TOKEN = "its number is that of the answer's first token; leave this option out"


def flat(*parts: Declared) -> dict[str, Any]:
    """The values of several parts, side by side."""
    return {name: value for part in parts for name, value in part}


class Flow(Experiment):
    """Draw an information-flow map: where in the layers each part of a prompt reaches the answer.

    Asks each model for facts, keeps those it answers correctly (and lists the others), and knocks out source -> target
    in every layer window. Prints the largest drop of the answer's probability per source; writes figures and a table of
    every number. Interrupted, the same command goes on where it was.

    Example: `ssm-interp flow --model tiny-mamba2 --source subject last --window 3 --out map`
    """

    model: Models = Models()
    prompts: Prompts = Prompts()
    sweep: Sweep = Sweep()
    measured: Measured = Measured()
    summary: Summary = Summary()
    computed: InShards = InShards()
    out: Path = option(Path("flow"), "Folder for figures, tables and what is stored.")

    @model_validator(mode="after")
    def _draws_what_is_measured(self) -> Flow:
        if self.summary.statistic == "metric" and self.measured.metric is None:
            raise KeyedError(("statistic",), "it draws a metric, and none is named: give --metric too")
        check_measured(self.measured.metric, self.prompts.full_answer, ("metric",))
        return self

    def studies(self) -> Iterator[Study]:
        """A study per model, with the same options else."""
        shared = flat(self.prompts, self.sweep, self.measured, self.computed, self.model)
        for name in shared.pop("names"):
            yield Study(model=name, **shared)


class Run(Experiment):
    """Run an experiment from a recipe: a TOML file that says what is asked, knocked out and drawn.

    A recipe is named by its file, or by the name of one that ships with the package (--list shows them). Prints what
    `flow` prints; writes the table, the pictures and a copy of the recipe. Interrupted, the same command goes on where
    it was.

    Example: `ssm-interp run mamba1 --model tiny-mamba1 --facts geo --limit 64`
    """

    recipe: Name | None = Field(default=None, description="A TOML file, or the name of a recipe, such as tiny-flow.")
    shipped: Annotated[bool, flag("--list", show_default=False)] = option(
        False, "Show the recipes that ship with the package."
    )
    models: Annotated[Several[Name] | None, flag("--model", "--models", group=MODEL)] = option(
        None, "Ask these models instead.", min_length=1
    )
    facts: Annotated[Name | None, flag("--facts", "--prompts", group=PROMPTS)] = option(
        None, "Ask these facts instead."
    )
    columns: Annotated[Columns, flag("--column", "--columns", metavar="FIELD=COLUMN", group=PROMPTS)] = option(
        {}, "Field of a prompt -> its column in these facts."
    )
    limit: Annotated[NonNegativeInt | None, flag(group=PROMPTS)] = option(None, "Ask so many prompts; 0: all.")
    full_answer: Annotated[bool, flag(group=PROMPTS, show_default=False)] = option(
        False, "Score every token of an answer, not its first one alone."
    )
    prompts: Annotated[Several[Name] | None, flag("--prompt", group=PROMPTS)] = option(
        None, "Prompts of a heat map, by id.", min_length=1
    )
    windows: Annotated[Several[PositiveInt] | None, flag("--window", "--windows", group=SWEEP)] = option(
        None, "Layers per window.", min_length=1
    )
    computed: AsJob = AsJob()
    out: Annotated[Path | None, flag(show_default="the recipe's name")] = option(None, "Folder for all files.")

    @model_validator(mode="after")
    def _lists_alone(self) -> Run:
        if self.shipped and self.model_fields_set != {"shipped"}:
            raise KeyedError(("shipped",), "it shows the recipes and runs none: give nothing else with it")
        return self


class HeatMapModels(Models):
    """Which models are asked."""

    names: Annotated[Several[Name], flag("--model", "--models")] = same(Models, "names", (DEFAULT_MODEL,), min_length=1)


class HeatMapPrompts(Picked):
    """Single prompts, a panel each."""

    limit: int = option(3, "Without any: draw so many at random.", ge=1)
    full_answer: bool = same(Prompts, "full_answer", False)


class Heatmap(Experiment):
    """Draw which single token of a prompt matters in which layers.

    Each is knocked out alone, in every window of layers.

    Example: `ssm-interp heatmap capital/France/0 capital/Japan/1 --model tiny-mamba1 --window 3`

    Example: `ssm-interp heatmap "The capital of France is" --answer Paris --subject France`
    """

    prompts: HeatMapPrompts = HeatMapPrompts()
    model: HeatMapModels = HeatMapModels()
    reader: Annotated[Role, flag(group=SWEEP)] = option("last", "Role that no longer reads the token.")
    window: Annotated[PositiveInt | None, flag(group=SWEEP, show_default=THREE_IN_EIGHT)] = option(
        None, "Layers per window."
    )
    align: Annotated[Align, flag(group=SWEEP)] = same(Sweep, "align", "left")
    through: Annotated[Several[Stream] | None, flag(group=SWEEP, show_default=SSM)] = same(
        Sweep, "through", min_length=1
    )
    colour_limit: Annotated[float | None, flag(group=SHOWN, show_default="the largest change")] = option(
        None, "Where the colours end.", gt=0
    )
    computed: OnDevice = OnDevice()
    out: Path = option(Path("heatmap.png"), PICTURE)


class FirstToken(Declared):
    """Refuses what is not done for whole answers."""

    full_answer: Annotated[bool, flag(show=False)] = same(Prompts, "full_answer", False)

    @field_validator("full_answer")
    @classmethod
    def _first_token(cls, value: bool) -> bool:
        if value:
            raise ValueError(FIRST_TOKEN)
        return value


class OnePrompt(FirstToken, Picked):
    """A single prompt: by id, as a text with its answer, or as a file of facts has it."""

    limit: Annotated[int, flag(show=False)] = same(Facts, "limit", 0, ge=0)


class Edges(Experiment):
    """Attribute a prompt's answer to every single edge, target <- source, in one backward pass.

    Prints the strongest edges (with --check, by their exact effect, of those knocked out); writes a picture, and a
    table with a row per edge (--out X.csv: as CSV). An edge's number predicts, to first order, how the metric changes
    if the edge is knocked out; --check N compares it with the truth.

    Example: `ssm-interp edges capital/France/0 --model tiny-mamba1 --check 20`

    Example: `ssm-interp edges "The capital of France is" --answer Paris --other Rome --out paris.svg`
    """

    prompts: OnePrompt = OnePrompt()
    model: OneModel = OneModel()
    other: Annotated[Name | None, flag(show_default="the most likely other token")] = option(None, "The wrong answer.")
    metric: Literal["logit_difference", "log_probability"] = option(
        "logit_difference", "logit(answer) - logit(other), or ln p(answer)."
    )
    steps: PositiveInt = option(1, "1: the gradient; more: integrated gradients.")
    top: PositiveInt = option(10, "How many edges to print.")
    check: NonNegativeInt = option(0, "Knock out so many of the strongest edges, and as many random ones.")
    computed: OnDevice = OnDevice()
    out: Path = option(Path("edges.png"), BESIDE)

    @model_validator(mode="after")
    def _has_a_rival(self) -> Edges:
        if self.other is not None and self.metric == "log_probability":
            message = "it is for --metric logit_difference; the log-probability has no wrong answer"
            raise KeyedError(("other",), message)
        return self


class CircuitPrompts(FirstToken, Picked):
    """The prompts that share a behaviour."""

    facts: Annotated[
        Name, flag("--facts", "--prompts", show_default=f"induction for tiny-induction-*, else {FACTS}")
    ] = option(FACTS, f"induction (fresh prompts), or whatever flow takes: {Facts.model_fields['facts'].description}")
    limit: int = same(Facts, "limit", 64, ge=0)


class CircuitBatches(InBatches):
    """Where a model is, and how many sets of knockouts it takes at once."""

    batch_size: PositiveInt = option(256, "Rows per forward pass: prompts x knockouts.")


class Circuit(Experiment):
    """Search for the edge groups that a behaviour needs, by exact knockouts of all the others.

    An edge group is all edges of a layer from one role to another. Those that matter least are removed first, as long
    as the metric stays near its clean value. Prints the groups that are left, what each is worth and how faithful they
    are; writes a picture, and a table with a row per group (--out X.parquet: as Parquet).

    Example: `ssm-interp circuit --model tiny-induction-mamba2`

    Example: `ssm-interp circuit --model tiny-mamba2 --limit 32 --out facts.svg`
    """

    prompts: CircuitPrompts = CircuitPrompts()
    model: OneModel = OneModel()
    roles: Annotated[
        Several[Source] | None,
        flag(
            "--role",
            "--roles",
            group=SWEEP,
            show_default="before trigger answer between query; of facts context subject after last",
        ),
    ] = option(None, "Roles, or positions, that share out the tokens.", min_length=1)
    metric: MetricName = option("log_probability", "Of the answers; its mean is to stay.")
    tolerance: float = option(0.1, "How far it may move: a share of what all edges do.", ge=0)
    absolute: Annotated[bool, flag(show_default=False)] = option(False, "The tolerance is in the metric's units.")
    layers: Annotated[Several[int] | None, flag("--layer", "--layers", group=SWEEP, show_default="all")] = option(
        None, "In which edges are removed.", min_length=1
    )
    features: Annotated[Several[Share] | None, flag(group=SWEEP, show_default="all")] = same(
        Sweep, "features", min_length=1
    )
    through: Annotated[Several[Stream] | None, flag(group=SWEEP, show_default=SSM)] = same(
        Sweep, "through", min_length=1
    )
    computed: CircuitBatches = CircuitBatches()
    out: Path = option(Path("circuit.png"), BESIDE)


class SpectrumModels(Models):
    """Which models are measured."""

    names: Annotated[Several[Name], flag("--model", "--models")] = same(Models, "names", EMBEDDED_MAMBAS, min_length=1)


class SpectrumFacts(Facts):
    """What the models read."""

    ids: Annotated[Several[Name] | None, flag("--id", "--ids", show_default="all")] = same(Prompts, "ids", min_length=1)


class Features(Experiment):
    """Measure what tells the features of each layer apart: decay, half-life, reach, variation of dt.

    Features are channels in Mamba-1 and heads in Mamba-2. Prints the median and 5 to 95 % of them per layer; writes a
    table with a row per feature, and a figure. What these statistics rank, --features of flow knocks out, such as
    "top third by half-life".

    Example: `ssm-interp features --model tiny-mamba2 --statistic half-life --out spectrum`
    """

    model: SpectrumModels = SpectrumModels()
    prompts: SpectrumFacts = SpectrumFacts()
    statistics: Annotated[Several[Statistic] | None, flag("--statistic", "--statistics", show_default="all")] = option(
        None, "Which ones: decay norm, effective decay, half-life, mean distance, mean dt, dt variation.", min_length=1
    )
    computed: InBatches = InBatches()
    out: Path = option(Path("features"), "Folder for table and figures.")


class Attention(Experiment):
    """Draw the SSM attention of one layer on a text as a heat map.

    Example: `ssm-interp attention "The name of the capital city of France is" --layer 4 --reduce mean_abs`
    """

    prompts: OnePrompt = OnePrompt()
    model: OneModel = OneModel()
    layer: Annotated[int | None, flag(show_default="the middle SSM layer")] = option(None, "Which layer.")
    reduce: Annotated[Literal["mean", "mean_abs", "norm"] | None, flag(show_default="mean")] = option(
        None, "How to make one map of all heads."
    )
    head: Annotated[int | None, flag(show_default=False)] = option(None, "One head (in Mamba-1 a channel) instead.")
    computed: OnDevice = OnDevice()
    out: Path = option(Path("attention.png"), PICTURE)

    @model_validator(mode="after")
    def _one_map(self) -> Attention:
        if self.head is not None and self.reduce is not None:
            raise KeyedError(("head",), "give this or --reduce, not both: one head needs no reduction over heads")
        return self


class ModelAlone(Declared):
    """What stands on a command's line by itself."""

    model: Annotated[Name, Parameter(name=("model", "--model"))] = Field(
        default=DEFAULT_MODEL, description=OneModel.model_fields["model"].description
    )


@Parameter(name="*", group=MODEL)
class CheckedModel(Weights, ModelAlone):
    """Which model is checked."""


class Check(Experiment):
    """Attach to a model and prove, on a tiny input, that the hooks tell the truth.

    Exit code 1 if they do not.

    Example: `ssm-interp check tiny-mamba1`
    """

    model: CheckedModel = CheckedModel()
    computed: OnDevice = OnDevice()


COMMANDS: tuple[type[Experiment], ...] = (Flow, Run, Heatmap, Edges, Circuit, Features, Attention, Check)
"""In the order in which they are listed."""
