"""Running a recipe: its studies one after the other, what they found together, and the files that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from ssm_interp import plots
from ssm_interp.errors import (
    FeatureError,
    InterventionError,
    LoadError,
    NoEdgesError,
    NothingAnswered,
    PromptError,
    RecipeError,
    WindowError,
)
from ssm_interp.experiments import Key, Study, dotted
from ssm_interp.experiments.held import described
from ssm_interp.flow import FlowResult, check_study, run_study, summarise
from ssm_interp.flow.study_held import check_held
from ssm_interp.flow.sweep import Progress
from ssm_interp.hooks import attach
from ssm_interp.jobs import job_folder
from ssm_interp.models import load_outline, load_tokenizer
from ssm_interp.plots import TokenMap
from ssm_interp.prompts import TokenizedPrompt, load_prompts, tokenize, with_ids
from ssm_interp.recipes.schema import HeatMap, Recipe
from ssm_interp.reprs import short_repr

Started = Callable[[str], Progress]
"""Called with the name of a study as it begins; gives what is told of its progress."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What a recipe found.

    Attributes:
        recipe: as it was run.
        result: every model's rows, a run for each model and name of a sweep.
        maps: of a heat map: what a model is called, and the map of a prompt, target, feature group and window size.
        studies: each study, and what it found.
    """

    recipe: Recipe
    result: FlowResult
    maps: tuple[tuple[str, TokenMap], ...] = ()
    studies: tuple[tuple[Study, FlowResult], ...] = ()

    __repr__ = short_repr

    @property
    def shown(self) -> FlowResult:
        """The part of the result that pictures show: all of it, or the prompts that all models answer.

        Raises:
            RecipeError: there is no such prompt.
        """
        if self.recipe.metrics.prompts == "own":
            return self.result
        frame = self.result.frame
        models = frame.groupby("prompt_id", sort=False)["model"].nunique()
        common = models.index[models == len(self.result.runs)]
        if common.empty:
            message = 'no prompt is answered by all of the models; "own" shows those that each of them answers'
            raise blamed(self.recipe, ("metrics", "prompts"), message)
        runs = tuple(replace(run, kept=len(common)) for run in self.result.runs)
        return FlowResult(frame[frame["prompt_id"].isin(common)].reset_index(drop=True), runs)

    def summary(self) -> pd.DataFrame:
        """Over prompts, with the recipe's interval; see `summarise`."""
        metrics = self.recipe.metrics
        return summarise(self.shown.frame, level=metrics.level, interval=metrics.interval)

    def write(self, folder: str | Path) -> list[Path]:
        """Write `table.parquet` (every row), and the picture in the recipe's formats; a heat map's, one per model.

        Returns:
            The files, the table first.

        Raises:
            RecipeError: no prompt is answered by all models, where those were asked for.
            OSError: the folder cannot be written.
        """
        folder, plot = Path(folder), self.recipe.plot
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "table.parquet"]
        self.result.save(written[0])
        figures = self._figures()
        saving: dict[str, Any] = {"dpi": 200, "metadata": {"Title": self.recipe.title}}
        if self.recipe.held:  # said in a line above, for which the picture grows
            saving["bbox_inches"] = "tight"
            for figure in figures.values():
                figure.text(0.5, 1.02, fill(self._edited, 100), ha="center", va="bottom", fontsize="small")
        for suffix in plot.formats:
            if suffix == "html":
                written.append(folder / f"{plot.kind}.html")
                written[-1].write_text(self._page(), encoding="utf-8")
                continue
            for name, figure in figures.items():
                written.append(folder / f"{name}.{suffix}")
                figure.savefig(written[-1], **saving)
        return written

    @property
    def _edited(self) -> str:
        """What is held on, if anything is."""
        return f"edited: {'; '.join(map(described, self.recipe.held))}" if self.recipe.held else ""

    def _figures(self) -> dict[str, Figure]:
        """By file name."""
        plot, statistic = self.recipe.plot, self.recipe.metrics.statistic
        if plot.kind == "flow":
            return {"flow": plots.flow_figure(self._drawn(), x_labels=self._x_labels(), statistic=statistic)}
        if plot.kind == "features":
            figure = plots.features_figure(self._drawn(), x_labels=self._x_labels(), statistic=statistic)
            return {"features": figure}
        if plot.kind == "streams":
            return {"streams": plots.stream_figure(self._by_sweep(), statistic=statistic)}
        if plot.kind == "depth":
            return {"depth": plots.depth_figure(self._drawn(), statistic=statistic)}
        labels = dict.fromkeys(label for label, _ in self.maps)
        return {
            f"heatmap-{job_folder('', label)}": plots.heatmap_figure(
                *(token_map for name, token_map in self.maps if name == label), limit=plot.colour_limit
            )
            for label in labels
        }

    def _page(self) -> str:
        recipe = self.recipe
        title = f"{recipe.title} ({self._edited})" if recipe.held else recipe.title
        if isinstance(recipe.plot, HeatMap):
            maps = (token_map for _, token_map in self.maps)
            return plots.heatmap_page(*maps, limit=recipe.plot.colour_limit, title=title)
        statistic = recipe.metrics.statistic
        return plots.flow_page(self._drawn(), x_labels=self._x_labels(), statistic=statistic, title=title)

    def _by_sweep(self) -> pd.DataFrame:
        """The summary, with the name of the sweep as what was knocked out `through`."""
        recipe, summary = self.recipe, self.summary()
        pairs = [(model, sweep) for sweep in recipe.sweep for model in recipe.model.names]
        models = {recipe.label(model, sweep): recipe.panel(model) for model, sweep in pairs}
        names = {recipe.label(model, sweep): sweep.name for model, sweep in pairs}
        return summary.assign(model=summary["model"].map(models), through=summary["model"].map(names))

    def _drawn(self) -> pd.DataFrame:
        """The summary, with what pictures call the models."""
        return self.summary().replace({"model": self._panels()})

    def _panels(self) -> dict[str, str]:
        """What tables call a model in a sweep -> what pictures call it, which is shorter."""
        recipe = self.recipe
        pairs = [(model, sweep) for sweep in recipe.sweep for model in recipe.model.names]
        return {recipe.label(model, sweep): recipe.panel(model, sweep) for model, sweep in pairs}

    def _x_labels(self) -> dict[str, str]:
        panels = self._panels()
        return {panels[run.model]: run.x_label for run in self.result.runs}


def run_recipe(recipe: Recipe, folder: str | Path, *, started: Started | None = None, **computed: Any) -> Findings:
    """Run the studies of a recipe, one per model and sweep, or what is left of them.

    Each is stored in `folder/sweep-<number>/<model>` as soon as it is there, see `run_study`: interrupted, the same
    call goes on where it was.

    Args:
        recipe: from `read_recipe`, or made in Python.
        folder: for the studies.
        started: called as a study begins, with what it is called.
        computed: options of a study that change how it is computed and not what is found: device, device_map,
            batch_size, max_memory, workers, ...

    Raises:
        RecipeError: what the models or the facts do not allow: a model or a file that cannot be loaded, a window of
            more layers than there are, a stream, a feature group or a prompt that does not exist. All models are tried
            first, without their weights, see `check_study`.
        Else as `run_study`.

    Cost: that of `run_study`, for each model and sweep.

    Example:
        >>> run_recipe(read_recipe("tiny-flow"), "out").write("out")        # doctest: +SKIP
    """
    results: dict[str, list[FlowResult]] = {}
    maps: list[tuple[str, TokenMap]] = []
    studies: list[tuple[Study, FlowResult]] = []
    for planned in list(_checked(recipe, computed)):
        with _blaming(recipe, planned.number, planned.label):
            progress = started(planned.label) if started else None
            result = run_study(planned.study, Path(folder) / f"sweep-{planned.number + 1}", progress=progress)
        studies.append((planned.study, result))
        results.setdefault(planned.label, []).append(result)
        maps += [(planned.panel, drawn) for prompt in planned.prompts for drawn in _maps(result, prompt, planned.panel)]
    joined = FlowResult.join([_as_one(label, parts) for label, parts in results.items()])
    return Findings(recipe, joined, tuple(maps), tuple(studies))


class _Planned(NamedTuple):
    number: int  # of the sweep
    label: str
    panel: str
    study: Study
    prompts: list[TokenizedPrompt]  # of a heat map


def _checked(recipe: Recipe, computed: Mapping[str, Any]) -> Iterator[_Planned]:
    """A study per sweep and model, each of which its model's config and tokenizer, and the facts, allow."""
    for number, sweep in enumerate(recipe.sweep):
        for model in recipe.model.names:
            label = recipe.label(model, sweep)
            _check_held(recipe, model)
            with _blaming(recipe, number, label):
                prompts = _prompts(recipe, model) if isinstance(recipe.plot, HeatMap) else []
                longest = max((len(prompt) for prompt in prompts), default=0)
                study = recipe.study(model, sweep, positions=longest, **computed)
                check_study(study)
            yield _Planned(number, label, recipe.panel(model, sweep), study, prompts)


def _check_held(recipe: Recipe, model: str) -> None:
    """Raise, of each edit that is held on, what the model's config does not allow."""
    if not recipe.held:
        return
    with _blaming(recipe, 0, model), attach(load_outline(model, revision=recipe.model.revision)) as ssm:
        for number, edit in enumerate(recipe.held):
            try:
                check_held([edit], ssm)
            except (FeatureError, InterventionError) as error:
                raise blamed(recipe, ("held", number), f"{model}: {error}") from error


def _as_one(label: str, parts: list[FlowResult]) -> FlowResult:
    """The results of several operations on one model, under one name."""
    frame = pd.concat([part.frame for part in parts], ignore_index=True).assign(model=label)
    runs = [part.runs[0] for part in parts]
    engine = "; ".join(dict.fromkeys(run.engine for run in runs))
    return FlowResult(frame, (replace(runs[0], model=label, engine=engine),))


def _prompts(recipe: Recipe, model: str) -> list[TokenizedPrompt]:
    """A heat map's prompts, in the model's tokens."""
    plot, asked = recipe.plot, recipe.prompts
    tokenizer = load_tokenizer(model, revision=recipe.model.revision)
    prompts = load_prompts(asked.facts, columns=asked.columns, on_bad=_leave_out if asked.skip_bad else None)
    try:
        chosen = with_ids(prompts, plot.prompts if isinstance(plot, HeatMap) else ())
    except PromptError as error:
        raise blamed(recipe, ("plot", "prompts"), str(error)) from error
    return [tokenize(prompt, tokenizer) for prompt in chosen]


def _leave_out(_: PromptError) -> None:
    """`run_study` says how many."""


def _maps(result: FlowResult, prompt: TokenizedPrompt, label: str) -> Iterator[TokenMap]:
    """A map per target, feature group and window size."""
    frame, run = result.frame, result.runs[0]
    rows = frame[frame["prompt_id"] == (prompt.prompt.id or prompt.prompt.text)].assign(model=label)
    several = rows["feature_group"].nunique() > 1
    for (_, group), part in rows.groupby(["target", "feature_group"], sort=False):
        for size in run.windows:
            of_size = part if len(run.windows) == 1 else part[part["window_size"] == size]
            drawn = TokenMap.of(
                of_size, prompt.tokens, subject=prompt.roles["subject"], answer=str(part["answer"].iloc[0])
            )
            title = f"{drawn.title}, windows of {size} layer{'' if size == 1 else 's'}"
            yield replace(drawn, title=f"{title}\nfeatures: {group}" if several else title)


@contextmanager
def _blaming(recipe: Recipe, number: int, label: str) -> Iterator[None]:
    """Errors that only the models or the facts bring to light become those of the key that they come from."""
    keys: dict[type[Exception], Key] = {
        LoadError: ("model", "names"),
        WindowError: ("sweep", number, "windows"),
        FeatureError: ("sweep", number, "features"),
        InterventionError: ("held",) if recipe.held else ("sweep", number, "through"),
        PromptError: ("prompts", "facts"),
        NoEdgesError: ("sweep", number, "targets" if isinstance(recipe.plot, HeatMap) else "sources"),
        NothingAnswered: ("model", "names"),
    }
    try:
        yield
    except tuple(keys) as error:
        key = next(key for kind, key in keys.items() if isinstance(error, kind))
        told = blamed(recipe, key, str(error) if isinstance(error, LoadError | PromptError) else f"{label}: {error}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error


def blamed(recipe: Recipe, key: Key, message: str) -> RecipeError:
    """The error of a key of a recipe, with its file and line where it was read from one."""
    if recipe._blame:
        return recipe._blame(key, message)
    return RecipeError(f"{dotted(key)}: {message}")
