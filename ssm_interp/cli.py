"""The command line: `ssm-interp flow`, `check` and `attention`."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from huggingface_hub.utils import logging as hub_logging
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from ssm_interp import __version__, plots
from ssm_interp.flow import Align, FlowError, FlowResult, sweep
from ssm_interp.hooks import HookError, attach
from ssm_interp.hooks.check import check as check_model
from ssm_interp.models import EMBEDDED, load
from ssm_interp.prompts import Prompt, check_role, encode, load_prompts

SOURCES = ("subject", "relation", "first", "last")
EXPECTED = (ValueError, RuntimeError, OSError, ImportError)
INTERRUPTED = 130

Reduction = Literal["mean", "mean_abs", "norm"]


class _Commands(TyperGroup):
    """Every error is one line on stderr and exit code 2; with `--debug`, wherever it stands, its traceback."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        try:
            code = super().main([word for word in given if word != "--debug"] or ["--help"], *positional, **options)
        except typer.Abort:
            code = INTERRUPTED
        except Exception as error:
            explain = getattr(
                error, "format_message", None
            )  # misuse of the command line; typer exports no class for it
            if "--debug" in given or not (explain or isinstance(error, EXPECTED)):
                raise
            message = explain() if explain else str(error)
            typer.echo(f"error: {' '.join(message.split()) or type(error).__name__}", err=True)
            code = 2
        if code == INTERRUPTED:
            typer.echo("interrupted", err=True)
        sys.exit(code or 0)


app = typer.Typer(cls=_Commands, add_completion=False, rich_markup_mode="rich")


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"ssm-interp {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Mechanistic interpretability of Mamba-1 and Mamba-2 language models."""
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@app.command()
def flow(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Embedded name, local folder or hub id; repeatable.", show_default="both embedded ones"),
    ] = None,
    prompts: Annotated[str, typer.Option(help="geo (embedded), or a JSONL file of text, subject, target.")] = "geo",
    limit: Annotated[int, typer.Option(min=0, help="Ask so many prompts, drawn at random; 0: all.")] = 128,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Role no longer read; repeatable.", show_default="subject relation first last"),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Role that no longer reads it; repeatable.", show_default="last")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Layers per window.", show_default="three in eight of the model's SSM layers")
    ] = None,
    align: Annotated[Align, typer.Option(help="left: never truncated. centre: truncated at both ends.")] = "left",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder for flow.png and flow.parquet.")] = Path("flow"),
) -> None:
    """Draw an information-flow map: where in the layers each part of a prompt reaches the answer.

    Asks each model for facts, keeps those it answers correctly, and knocks out source -> target in every layer window.
    Prints the largest drop of the answer's probability per source; writes a figure and a table of every number.

    Example:  [bold]ssm-interp flow --model tiny-mamba2 --source subject --source last --window 3 --out map[/bold]
    """
    names, sources, targets = model or list(EMBEDDED), source or list(SOURCES), target or ["last"]
    for role in sources + targets:
        check_role(role)
    if len(set(names)) < len(names):
        raise FlowError(f"give each --model once, got {', '.join(names)}")
    asked = _draw(load_prompts(prompts), limit, seed)
    _check_folder(out)
    results = []
    with _progress() as progress:
        for name in names:
            task = progress.add_task(name, total=None)

            def report(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            loaded, tokenizer = load(name)
            with attach(loaded) as ssm:
                results.append(
                    sweep(
                        ssm,
                        tokenizer,
                        asked,
                        sources=sources,
                        targets=targets,
                        window=window,
                        align=align,
                        batch_size=batch_size,
                        progress=report,
                        name=name,
                    )
                )
    result = FlowResult.join(results)
    out.mkdir(parents=True, exist_ok=True)
    result.save(out / "flow.parquet")
    result.plot().savefig(out / "flow.png", dpi=200)
    _print_flow(result)
    typer.echo(f"\nwrote {out / 'flow.png'} and {out / 'flow.parquet'} ({len(result.frame)} rows)")


def _check_folder(folder: Path) -> None:
    """Raise OSError, before the work, if files cannot be written to a folder that may not exist yet."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"cannot write to {folder}: no permission to write in {nearest}")


def _draw(prompts: list[Prompt], limit: int, seed: int) -> list[Prompt]:
    if not 0 < limit < len(prompts):
        return prompts
    return [prompts[index] for index in sorted(random.Random(seed).sample(range(len(prompts)), limit))]


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _console() -> Console:
    """On stdout, wide enough not to break the lines of a table that is piped into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _print_flow(result: FlowResult) -> None:
    """A table per model: the window with the largest drop for each source and target."""
    drops = result.largest_drops()
    for run in result.runs:
        rows = drops[drops["model"] == run.model]
        typer.echo(
            f"\n{run.model}: {run.kept} of {run.asked} prompts answered correctly and kept; "
            f"windows of {run.window} of its {len(run.layers)} SSM layers"
        )
        headers = ["largest\ndrop %", "95 %\ninterval", "\nmedian %", "still\nright %", "in\nlayers"]
        if some_empty := bool(rows["n_empty"].any()):
            headers.append("without\nsource")
        table = Table("\nsource \N{RIGHTWARDS ARROW} target")
        for header in headers:
            table.add_column(header, justify="right", no_wrap=True)
        for _, row in rows.iterrows():
            first = run.layers.index(row["window_start"])
            last = run.layers[first + row["window_size"] - 1]
            cells = [
                _signed(row["mean"]),
                f"{_signed(row['low'])} to {_signed(row['high'])}" if row["n"] > 1 else "(one prompt)",
                _signed(row["median"]),
                f"{100 * row['accuracy']:.0f}",
                f"{row['window_start']} to {last}" if row["window_size"] > 1 else str(last),
            ]
            if some_empty:
                cells.append(f"{row['n_empty']} of {row['n']}")
            table.add_row(f"{row['source']} \N{RIGHTWARDS ARROW} {row['target']}", *cells)
        _console().print(table)


def _signed(percent: float) -> str:
    text = f"{percent:+.1f}"
    return text if float(text) else "0.0"


@app.command()
def check(model: Annotated[str, typer.Argument(help="Embedded name, local folder or hub id.")]) -> None:
    """Attach to a model and prove, on a tiny input, that the hooks tell the truth. Exit code 1 if they do not.

    Example:  [bold]ssm-interp check tiny-mamba1[/bold]
    """
    rows = check_model(load(model)[0])
    table = Table(title=model)
    for name in ("check", "measured", "", "detail"):
        table.add_column(name)
    for row in rows:
        verdict = "passed" if row.passed else "[bold red]FAILED[/bold red]"
        table.add_row(row.name, f"{row.value:.3g}", verdict, row.detail)
    _console().print(table)
    if not all(row.passed for row in rows):
        raise typer.Exit(1)


@app.command()
def attention(
    text: Annotated[str, typer.Argument(help="What the model reads.")],
    model: Annotated[str, typer.Option(help="Embedded name, local folder or hub id.")] = "tiny-mamba1",
    layer: Annotated[int | None, typer.Option(help="Which layer.", show_default="the middle SSM layer")] = None,
    reduce: Annotated[
        Reduction | None, typer.Option(help="How to make one map of all heads.", show_default="mean")
    ] = None,
    head: Annotated[int | None, typer.Option(help="One head (in Mamba-1 a channel) instead.")] = None,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("attention.png"),
) -> None:
    """Draw the SSM attention of one layer on a text as a heat map.

    Example:  [bold]ssm-interp attention "The name of the capital city of France is" --layer 4 --reduce mean_abs[/bold]
    """
    if head is not None and reduce is not None:
        raise HookError("give --head or --reduce, not both: one head needs no reduction over heads")
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; name a picture, such as {out / 'attention.png'}")
    out = out if out.suffix else out.with_suffix(".png")
    _check_folder(out.parent)
    loaded, tokenizer = load(model)
    encoding = encode(text, tokenizer)
    with attach(loaded) as ssm:
        layers = sorted(ssm.layers)
        number = layers[len(layers) // 2] if layer is None else layer
        inputs = {"input_ids": torch.tensor([encoding.ids])}
        matrix = ssm.run(inputs, read=["attn"], layers=[number])["attn", number][0]
    shown, label = _one_map(matrix, head, reduce or "mean")
    figure = plots.attention_figure(shown, encoding.tokens, title=f"{model}, layer {number}", label=label)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    typer.echo(f"wrote {out}: layer {number} of {model}, {label}")


def _one_map(
    matrix: Float[Tensor, "h t s"], head: int | None, reduction: Reduction
) -> tuple[Float[Tensor, "t s"], str]:
    heads = matrix.shape[0]
    if head is not None:
        if not 0 <= head < heads:
            raise HookError(f"there is no head {head}: this layer has {heads}, numbered 0 to {heads - 1}")
        return matrix[head], f"attention of head {head}"
    if reduction == "mean":
        return matrix.mean(0), f"mean attention of {heads} heads"
    if reduction == "mean_abs":
        return matrix.abs().mean(0), f"mean |attention| of {heads} heads"
    return matrix.norm(dim=0), f"norm of the attention of {heads} heads"


def main() -> None:
    """Entry point of the `ssm-interp` command."""
    app(prog_name="ssm-interp")


if __name__ == "__main__":
    main()
