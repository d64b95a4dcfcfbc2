"""`ssm-interp run`: an experiment from a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ssm_interp.cli.flow import print_flow, tell_dropped
from ssm_interp.cli.output import console, folder, progress_bar, say
from ssm_interp.errors import RecipeError
from ssm_interp.experiments import Run
from ssm_interp.flow.sweep import Progress
from ssm_interp.plots import TokenMap, token_label
from ssm_interp.recipes import Findings, read_recipe, recipe_file, run_recipe, shipped


def run(run: Run) -> None:
    """Prints what the recipe found; writes its table and pictures, and a copy of it."""
    if run.shipped:
        _list()
        return
    if run.recipe is None:
        raise RecipeError(f"name a recipe: a TOML file, or one of {', '.join(shipped())}")
    path, given = recipe_file(run.recipe), _given(run)
    recipe = read_recipe(path, given)
    out = folder(run.out or Path(path.stem), "all files")
    with progress_bar(shown=True) as progress:

        def started(label: str) -> Progress:
            task = progress.add_task(label, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        findings = run_recipe(recipe, out, started=started, **dict(run.computed))
    written = [*findings.write(out), out / "recipe.toml"]
    written[-1].write_text(_copy(path, given), encoding="utf-8")
    _print(findings)
    if not findings.maps and not recipe.prompts.all_prompts and (dropped := tell_dropped(findings.studies, out)):
        written.append(dropped)
    say(f"\nwrote to {out}: {' '.join(file.name for file in written)}")


def _list() -> None:
    table = Table("recipe", "what it shows", "models")
    for name, path in shipped().items():
        recipe = read_recipe(path)
        table.add_row(*map(Text, (name, recipe.title, " ".join(recipe.model.names))))
    console().print(table)


def _given(run: Run) -> dict[str, Any]:
    """What stands in place of the recipe's own values, by their keys there."""
    given = {
        "model.names": run.models,
        "prompts.facts": run.facts,
        "prompts.columns": run.columns if run.columns or run.facts else None,  # other facts have other columns
        "prompts.limit": run.limit,
        "prompts.full_answer": run.full_answer or None,
        "sweep.windows": run.windows,
        "plot.prompts": run.prompts,
    }
    return {key: value for key, value in given.items() if value is not None}


def _copy(recipe: Path, given: Mapping[str, Any]) -> str:
    """The recipe's text, and above it, as comments, what was given in place of some of its values."""
    notes = [f"# run with {key} = {json.dumps(value)}\n" for key, value in given.items() if value != {}]
    return "".join([*notes, recipe.read_text(encoding="utf-8-sig")])


def _print(findings: Findings) -> None:
    if not findings.maps:
        metrics = findings.recipe.metrics
        print_flow(findings.shown, metrics.interval, metrics.level)
        return
    table = Table("model", "prompt", "answer", "p", "needs most", "change of p", "window at layer")
    for label, token_map in findings.maps:
        table.add_row(*map(Text, (label, *_strongest(token_map))))
    console().print(table)


def _strongest(token_map: TokenMap) -> tuple[str, ...]:
    """The prompt, and the token and window whose knockout lowers the answer's probability most."""
    asked = ("".join(token_map.tokens).strip(), token_map.answer, f"{token_map.p_base:.3f}")
    if np.isnan(token_map.values).all():
        return (*asked, "", "no edges", "")
    row, column = divmod(int(np.nanargmin(token_map.values)), token_map.values.shape[1])
    return (
        *asked,
        token_label(token_map.tokens[row]),
        f"{token_map.values[row, column]:+.3f}",
        str(token_map.layers[column]),
    )
