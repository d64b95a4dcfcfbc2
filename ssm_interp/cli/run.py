"""`ssm-interp run`: an experiment from a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from ssm_interp.cli.flow import print_flow
from ssm_interp.cli.options import Address, Columns, GpusPerWorker, MaxMemory, Spread, Workers, columns_of, option
from ssm_interp.cli.output import check_folder, console, progress_bar
from ssm_interp.flow.sweep import Progress
from ssm_interp.plots import TokenMap, token_label
from ssm_interp.recipes import Findings, read_recipe, run_recipe

AS_WRITTEN = "as the recipe says"


def _instead(description: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=description, show_default=AS_WRITTEN, **more)


def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, such as hooks/tiny-flow.toml.")],
    model: Annotated[list[str] | None, _instead("Ask these models instead.", "--model")] = None,
    facts: Annotated[str | None, _instead("Ask these facts instead.", "--facts")] = None,
    column: Columns = None,
    limit: Annotated[int | None, _instead("Ask so many prompts; 0: all.", "--limit", min=0)] = None,
    full_answer: Annotated[
        bool | None, _instead("Score every token of an answer, not its first one alone.", "--full-answer")
    ] = None,
    window: Annotated[list[int] | None, _instead("Layers per window.", "--window")] = None,
    prompt: Annotated[list[str] | None, _instead("Prompts of a heat map, by id.", "--prompt")] = None,
    device: Annotated[str | None, option("device", show_default="auto")] = None,
    device_map: Spread = None,
    batch_size: Annotated[int | None, option("batch_size", min=1, show_default="32")] = None,
    max_memory: MaxMemory = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    address: Address = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all files.", show_default="the recipe's name")] = None,
) -> None:
    """Run an experiment from a recipe: a TOML file that says what is asked, knocked out and drawn.

    Prints what `flow` prints; writes the table, the pictures and a copy of the recipe. Interrupted, the same command
    goes on where it was; with --workers, processes share the prompts.

    Options that name one thing can be repeated: --model --column --window --prompt.

    Example:  [bold]ssm-interp run hooks/mamba1.toml --model tiny-mamba1 --facts geo --limit 64[/bold]
    """
    given = {
        "model.names": model,
        "facts.source": facts,
        "facts.columns": columns_of(column) if column or not facts else {},
        "facts.limit": limit,
        "facts.full_answer": full_answer,
        "sweep.windows": window,
        "plot.prompts": prompt,
    }
    how: dict[str, Any] = {
        "device": device,
        "device_map": device_map,
        "batch_size": batch_size,
        "max_memory": max_memory,
    }
    how |= {"workers": workers, "gpus_per_worker": gpus_per_worker or None, "address": address}
    chosen = read_recipe(recipe, {key: value for key, value in given.items() if value is not None})
    copy = _copy(recipe, given)
    folder = out or Path(recipe.stem)
    check_folder(folder)
    with progress_bar(shown=True) as progress:

        def started(label: str) -> Progress:
            task = progress.add_task(label, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        used = {key: value for key, value in how.items() if value is not None}
        findings = run_recipe(chosen, folder, started=started, **used)
    written = findings.write(folder)
    (folder / "recipe.toml").write_text(copy, encoding="utf-8")
    _print(findings)
    names = " ".join(path.name for path in [*written, folder / "recipe.toml"])
    typer.echo(f"\nwrote to {folder}: {names}")


def _copy(recipe: Path, given: Mapping[str, Any]) -> str:
    """The recipe's text, and above it, as comments, what was given in place of some of its values."""
    notes = [f"# run with {key} = {json.dumps(value)}\n" for key, value in given.items() if value not in (None, {})]
    return "".join([*notes, recipe.read_text(encoding="utf-8-sig")])


def _print(findings: Findings) -> None:
    if not findings.maps:
        print_flow(findings.shown)
        return
    table = Table("model", "prompt", "answer", "p", "needs most", "change of p", "window at layer")
    for label, one in findings.maps:
        table.add_row(*map(Text, (label, *_strongest(one))))
    console().print(table)


def _strongest(one: TokenMap) -> tuple[str, ...]:
    """The prompt, and the token and window whose knockout lowers the answer's probability most."""
    asked = ("".join(one.tokens).strip(), one.answer, f"{one.p_base:.3f}")
    if np.isnan(one.values).all():
        return (*asked, "", "no edges", "")
    row, column = divmod(int(np.nanargmin(one.values)), one.values.shape[1])
    return (*asked, token_label(one.tokens[row]), f"{one.values[row, column]:+.3f}", str(one.layers[column]))
