"""A recipe: one experiment as data, made of the parts that every experiment has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from ssm_interp.errors import RecipeError
from ssm_interp.experiments import Declared, Key, KeyedError, Several, Study, option, same
from ssm_interp.experiments.commands import flat
from ssm_interp.experiments.held import Held, under
from ssm_interp.experiments.parts import Measured, Models, Prompts, Summary, Sweep, check_measured
from ssm_interp.experiments.values import Name
from ssm_interp.plots import MOST_GROUPS

Format = Literal["png", "svg", "html"]
FORMATS: tuple[Format, ...] = ("png", "svg", "html")
KINDS = "flow, depth, features, streams or heatmap."


class NamedModels(Models):
    """`[model]`: which models are asked."""

    names: Several[Name] = same(Models, "names", ..., min_length=1)


class NamedPrompts(Prompts):
    """`[prompts]`: what they are asked."""

    facts: Name = same(Prompts, "facts", ...)


class NamedSweep(Sweep):
    """`[[sweep]]`: knockouts in every layer window, one after the other."""

    name: str = option("", "Stands behind the model's name in tables and pictures.")


class Metrics(Measured, Summary):
    """`[metrics]`: what is said over prompts, in the pictures."""

    prompts: Literal["own", "common"] = option(
        "own", "own: those that a model answers. common: those that all of the models answer."
    )


class Lines(Declared):
    """`[plot]` of lines: over the layers, one per source (flow), per feature group (features) or per sweep (streams);
    or over depth in %, one per model (depth)."""

    kind: Literal["flow", "depth", "features", "streams"] = option(..., KINDS)
    formats: Several[Format] = option(FORMATS, "What is written.", min_length=1)


class HeatMap(Declared):
    """`[plot]` of single prompts: a row per source token, a column per window."""

    kind: Literal["heatmap"] = option(..., KINDS)
    prompts: Several[Name] = option(..., "Ids of the prompts.", min_length=1)
    colour_limit: float | None = option(
        None, "The change of probability at which colours end; absent: the largest there is.", gt=0
    )
    formats: Several[Format] = same(Lines, "formats", FORMATS, min_length=1)


class Recipe(Declared):
    """One experiment as data: what `ssm-interp run` reads from a TOML file, see `read_recipe`.

    Raises:
        pydantic.ValidationError: a wrong key or value, or keys that do not go together.

    Example:
        >>> Recipe(
        ...     title="Subjects",
        ...     model={"names": ["tiny-mamba1"]},
        ...     prompts={"facts": "geo"},
        ...     sweep=[{"sources": ["subject"], "targets": ["last"]}],
        ...     plot={"kind": "flow"},
        ... ).sweep[0].targets
        ('last',)
    """

    title: Name = option(..., "What the experiment is called.")
    description: str = option("", "What it is about, for readers.")
    model: NamedModels
    prompts: NamedPrompts
    sweep: Several[NamedSweep] = option(..., "Which edges are knocked out, in which windows.", min_length=1)
    held: Several[Held] = same(Study, "held", ())
    metrics: Metrics = Metrics()
    plot: Annotated[Lines | HeatMap, Field(discriminator="kind")]

    _blame: Callable[[Key, str], RecipeError] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        if twice := [name for name, count in Counter(self.model.names).items() if count > 1]:
            raise KeyedError(("model", "names"), f"{twice[0]!r} occurs more than once; name each model once")
        _check_told_apart(self.sweep)
        check_measured(self.metrics.metric, self.prompts.full_answer, ("metrics", "metric"))
        if self.metrics.statistic == "metric" and self.metrics.metric is None:
            raise KeyedError(("metrics", "statistic"), "it draws a metric, and none is named: give metric too")
        if isinstance(self.plot, HeatMap):
            self._check_heat_map(self.plot)
        elif self.plot.kind == "features":
            groups = dict.fromkeys(group for sweep in self.sweep for group in sweep.features)
            if len(groups) > MOST_GROUPS:
                message = f"lines of {len(groups)} feature groups cannot be told apart; draw at most {MOST_GROUPS}"
                raise KeyedError(("plot", "kind"), message)
        elif self.plot.kind == "streams":
            for number, sweep in enumerate(self.sweep):
                if not sweep.name:
                    message = (
                        "it needs a name, such as 'ssm' or 'conv': what its line is called in a picture of streams"
                    )
                    raise KeyedError(("sweep", number), message)
        return self

    def _check_heat_map(self, plot: HeatMap) -> None:
        unfit: dict[Key, str] = {
            ("sweep", number, "sources"): "a heat map takes each token of a prompt as the source; leave this key out"
            for number, sweep in enumerate(self.sweep)
            if "sources" in sweep.model_fields_set
        }
        for name in ("limit", "ids", "all_prompts"):
            if name in self.prompts.model_fields_set:
                unfit["prompts", name] = "a heat map asks the prompts that plot.prompts names; leave this key out"
        if "metrics" in self.model_fields_set:
            unfit["metrics",] = "a heat map shows p - p_base of single prompts and no statistic; leave this section out"
        for number, sweep in enumerate(self.sweep):
            if sweep.align == "centre" and len(sweep.windows or ()) > 1:
                message = 'of centred windows a heat map shows one size; give one, or align = "left"'
                unfit["sweep", number, "windows"] = message
        if len(set(plot.prompts)) < len(plot.prompts):
            unfit["plot", "prompts"] = "a prompt occurs more than once; name each once"
        for key, message in unfit.items():
            raise KeyedError(key, message)

    def label(self, model: str, sweep: NamedSweep) -> str:
        """What tables and pictures call a model in a sweep."""
        return ", ".join([model, *([sweep.name] if sweep.name else []), *under(self.held)])

    def panel(self, model: str, sweep: NamedSweep | None = None) -> str:
        """What pictures call it, which say elsewhere how it is edited."""
        name = [sweep.name] if sweep and sweep.name else []
        return ", ".join([model, *name, *(["edited"] if self.held else [])])

    def study(self, model: str, sweep: NamedSweep, *, positions: int = 0, **computed: Any) -> Study:
        """The study of one model in one of the sweeps.

        Args:
            model: one of `model.names`.
            sweep: one of `sweep`.
            positions: for a heat map, how many of them are sources: the number of tokens of the longest prompt.
            computed: options that change how a table is computed and not what is in it, such as batch_size.
        """
        shared = {"model": model, "held": self.held, "metric": self.metrics.metric}
        options = flat(self.model, self.prompts, sweep) | shared
        if isinstance(self.plot, HeatMap):
            options |= {"sources": range(positions), "limit": 0, "ids": self.plot.prompts, "all_prompts": True}
        del options["names"], options["name"]
        return Study.model_validate(options | computed)


def _check_told_apart(sweeps: Sequence[NamedSweep]) -> None:
    """Sweeps of one name share a table, in which their rows must be told apart, and a panel with one axis."""
    shared: dict[str, NamedSweep] = {}
    owners: dict[tuple[str, ...], int] = {}
    for number, sweep in enumerate(sweeps):
        first = shared.setdefault(sweep.name, sweep)
        for field in ("through", "windows", "align"):
            if getattr(sweep, field) != getattr(first, field):
                message = f"its {field} is not that of another sweep of this name; give each a name of its own"
                raise KeyedError(("sweep", number), message)
        for source, target, group in product(sweep.sources, sweep.targets, sweep.features):
            if owners.setdefault((sweep.name, str(source), target, group), number) != number:
                message = f"it knocks out {source} -> {target} as another sweep does; give each a name of its own"
                raise KeyedError(("sweep", number), message)
