"""A recipe: one experiment as data, and what each of its keys takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, PrivateAttr, model_validator

from ssm_interp.errors import RecipeError, SsmInterpError
from ssm_interp.flow import Align, Study
from ssm_interp.flow.study import Columns, Dtype, NotOfConv, Source, Stream, Target
from ssm_interp.flow.study_held import OWN_GROUPS, AllUsed, Group, ScaleFeatures, SetDelta, Sets
from ssm_interp.flow.summary import Interval
from ssm_interp.plots import MOST_GROUPS, StatisticName
from ssm_interp.recipes.lines import Key

Format = Literal["png", "svg", "html"]
Name = Annotated[str, Field(min_length=1)]
KINDS = "flow, depth, features, streams or heatmap."
WINDOWS = "Layers per window, each size in turn; absent: three in eight of the model's layers."


class ContradictionError(SsmInterpError, ValueError):
    """Keys of a recipe that are fine alone and do not go together; `key` is the one to blame."""

    def __init__(self, key: Key, message: str) -> None:
        self.key = key
        super().__init__(message)


def _of_study(name: str) -> Any:
    """A field that a study has too, with the default and the description that it has there."""
    field = Study.model_fields[name]
    return Field(field.default, description=field.description)


class Section(BaseModel):
    """A table of a recipe: nothing is converted, and nothing that is unknown passes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Models(Section):
    """`[model]`: which models are asked."""

    names: list[Name] = Field(min_length=1, description="Embedded names, local folders or hub ids.")
    revision: Name = _of_study("revision")
    dtype: Dtype = _of_study("dtype")


class Facts(Section):
    """`[facts]`: what they are asked."""

    source: Name = Field(description="geo (embedded), counterfact, a JSONL, CSV or Parquet file, or a data set.")
    columns: Columns = _of_study("columns")
    skip_bad: bool = _of_study("skip_bad")
    limit: int = Field(
        default=Study.model_fields["limit"].default, ge=0, description=Study.model_fields["limit"].description
    )
    seed: int = _of_study("seed")
    full_answer: bool = _of_study("full_answer")


class Knockout(Section):
    """`[[operation]]` that is made in every layer window, one after the other."""

    kind: Literal["Knockout"] = Field(description="The intervention; edges target <- source are removed.")
    name: str = Field(default="", description="Stands behind the model's name in tables and pictures.")
    sources: list[Source] | None = Field(
        default=None,
        min_length=1,
        description="Roles, or positions, no longer read. A heat map takes every token in turn.",
    )
    targets: list[Target] = Field(min_length=1, description="Roles that no longer read them.")
    groups: Sets = Field(default={}, description=OWN_GROUPS)
    features: Annotated[list[Group], AllUsed] = Field(
        default=["all"], min_length=1, validate_default=True, description="Feature groups, a knockout each."
    )
    through: Annotated[list[Stream] | None, NotOfConv] = Field(
        default=None,
        min_length=1,
        description="Streams in which edges are removed; absent: ssm where the model has it.",
    )


class Sweep(Section):
    """`[sweep]`: the layer windows."""

    windows: list[PositiveInt] | None = Field(default=None, min_length=1, description=WINDOWS)
    align: Align = _of_study("align")


class Metrics(Section):
    """`[metrics]`: what is said over prompts, in the pictures."""

    statistic: StatisticName = Field(
        default="mean", description="mean or median of the relative change, accuracy, or logprob_difference."
    )
    interval: Interval = Field(default="bootstrap", description="Of means: bootstrap, or t.")
    level: float = Field(default=0.95, gt=0, lt=1, description="Of the interval.")
    prompts: Literal["own", "common"] = Field(
        default="own", description="own: those that a model answers. common: those that all of the models answer."
    )


class Lines(Section):
    """`[plot]` of lines: over the layers, one per source (flow), per feature group (features) or per operation
    (streams); or over depth in %, one per model (depth)."""

    kind: Literal["flow", "depth", "features", "streams"] = Field(description=KINDS)
    formats: list[Format] = Field(default=["png", "svg", "html"], min_length=1, description="What is written.")


class HeatMap(Section):
    """`[plot]` of single prompts: a row per source token, a column per window."""

    kind: Literal["heatmap"] = Field(description=KINDS)
    prompts: list[Name] = Field(min_length=1, description="Ids of the prompts.")
    colour_limit: float | None = Field(
        default=None, gt=0, description="The change of probability at which colours end; absent: the largest there is."
    )
    formats: list[Format] = Field(default=["png", "svg", "html"], min_length=1, description="What is written.")


Operation = Annotated[Knockout | ScaleFeatures | SetDelta, Field(discriminator="kind")]
Plot = Annotated[Lines | HeatMap, Field(discriminator="kind")]


class Recipe(Section):
    """One experiment as data: what `ssm-interp run` reads from a TOML file, see `read_recipe`.

    Raises:
        pydantic.ValidationError: a wrong key or value, or keys that do not go together.

    Example:
        >>> Recipe(
        ...     title="Subjects",
        ...     model={"names": ["tiny-mamba1"]},
        ...     facts={"source": "geo"},
        ...     operation=[{"kind": "Knockout", "sources": ["subject"], "targets": ["last"]}],
        ...     plot={"kind": "flow"},
        ... ).operation[0].targets
        ['last']
    """

    title: Name = Field(description="What the experiment is called.")
    description: str = Field(default="", description="What it is about, for readers.")
    model: Models
    facts: Facts
    operation: list[Operation] = Field(min_length=1, description="What is done to the model.")
    sweep: Sweep = Sweep()
    metrics: Metrics = Metrics()
    plot: Plot

    _blame: Callable[[Key, str], RecipeError] | None = PrivateAttr(None)

    @property
    def knockouts(self) -> dict[int, Knockout]:
        """The operations that are swept over the windows, by their place among all operations."""
        return {place: one for place, one in enumerate(self.operation) if isinstance(one, Knockout)}

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        if twice := [name for name, count in Counter(self.model.names).items() if count > 1]:
            raise ContradictionError(("model", "names"), f"{twice[0]!r} occurs more than once; name each model once")
        if not self.knockouts:
            raise ContradictionError(("operation",), 'one must be of kind = "Knockout": it is swept over the windows')
        _check_told_apart(self.knockouts)
        if isinstance(self.plot, HeatMap):
            self._check_heat_map(self.plot)
        else:
            groups = dict.fromkeys(group for knockout in self.knockouts.values() for group in knockout.features)
            if self.plot.kind == "features" and len(groups) > MOST_GROUPS:
                message = f"lines of {len(groups)} feature groups cannot be told apart; draw at most {MOST_GROUPS}"
                raise ContradictionError(("plot", "kind"), message)
            for place, knockout in self.knockouts.items():
                if knockout.sources is None:
                    message = 'it needs sources: roles such as "subject", or positions, no longer read'
                    raise ContradictionError(("operation", place), message)
                if self.plot.kind == "streams" and not knockout.name:
                    message = (
                        'it needs a name, such as "ssm" or "conv": what its line is called in a picture of streams'
                    )
                    raise ContradictionError(("operation", place), message)
        return self

    def _check_heat_map(self, plot: HeatMap) -> None:
        unfit: dict[Key, str] = {
            ("operation", place, "sources"): "a heat map takes each token of a prompt as the source; leave this key out"
            for place, knockout in self.knockouts.items()
            if knockout.sources is not None
        }
        if "limit" in self.facts.model_fields_set:
            unfit["facts", "limit"] = "a heat map asks the prompts that plot.prompts names; leave this key out"
        if "metrics" in self.model_fields_set:
            unfit["metrics",] = "a heat map shows p - p_base of single prompts and no statistic; leave this section out"
        if self.sweep.align == "centre" and len(self.sweep.windows or ()) > 1:
            unfit["sweep", "windows"] = 'of centred windows a heat map shows one size; give one, or align = "left"'
        if len(set(plot.prompts)) < len(plot.prompts):
            unfit["plot", "prompts"] = "a prompt occurs more than once; name each once"
        for key, message in unfit.items():
            raise ContradictionError(key, message)

    def label(self, model: str, knockout: Knockout) -> str:
        """What tables and pictures call a model under a knockout."""
        return f"{model}, {knockout.name}" if knockout.name else model

    def study(self, model: str, knockout: Knockout, *, positions: int = 0, **how: Any) -> Study:
        """The study of one model under one of the knockouts.

        Args:
            model: one of `model.names`.
            knockout: one of `knockouts`.
            positions: for a heat map, how many of them are sources: the number of tokens of the longest prompt.
            how: options that change how a table is computed and not what is in it: device, device_map, batch_size,
                max_memory, workers, gpus_per_worker, address.
        """
        options = {
            "model": model,
            "revision": self.model.revision,
            "dtype": self.model.dtype,
            "facts": self.facts.source,
            "columns": self.facts.columns,
            "skip_bad": self.facts.skip_bad,
            "limit": self.facts.limit,
            "seed": self.facts.seed,
            "full_answer": self.facts.full_answer,
            "sources": knockout.sources,
            "targets": knockout.targets,
            "windows": self.sweep.windows,
            "align": self.sweep.align,
            "groups": knockout.groups,
            "features": knockout.features,
            "through": knockout.through,
            "held": [one for one in self.operation if not isinstance(one, Knockout)],
        }
        if isinstance(self.plot, HeatMap):
            options |= {"sources": range(positions), "limit": 0, "ids": self.plot.prompts, "answered_only": False}
        return Study.model_validate(options | how)


def _check_told_apart(knockouts: Mapping[int, Knockout]) -> None:
    """Knockouts of one name share a table, in which their rows must be told apart."""
    streams: dict[str, list[Stream] | None] = {}
    owners: dict[tuple[str, ...], int] = {}
    for place, one in knockouts.items():
        if one.through != streams.setdefault(one.name, one.through):
            message = "it is through other streams than another operation of this name; give each a name of its own"
            raise ContradictionError(("operation", place), message)
        for source, target, group in product(one.sources or ["each token"], one.targets, one.features):
            if owners.setdefault((one.name, str(source), target, group), place) != place:
                message = f"it knocks out {source} -> {target} as another operation does; give each a name of its own"
                raise ContradictionError(("operation", place), message)
