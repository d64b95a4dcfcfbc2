"""`ssm-interp check`, `attention` and `heatmap`: a look at one model, one layer, single prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from ssm_interp import plots
from ssm_interp.cli.app import app, check_folder, console
from ssm_interp.cli.flow import Columns, Through, columns_of, option
from ssm_interp.flow import Align, token_map
from ssm_interp.hooks import HookError, attach
from ssm_interp.hooks.check import check as check_model
from ssm_interp.models import load
from ssm_interp.prompts import check_role, encode, load_prompts, with_ids

Reduction = Literal["mean", "mean_abs", "norm"]


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
    console().print(table)
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
    out = _picture(out, "attention.png")
    loaded, tokenizer = load(model)
    encoding = encode(text, tokenizer)
    with attach(loaded) as ssm:
        layers = ssm.streams["ssm"]
        if not layers:
            raise HookError(f"{model} has no SSM layers: this command draws SSM attention; see heatmap and flow for it")
        number = layers[len(layers) // 2] if layer is None else layer
        inputs = {"input_ids": torch.tensor([encoding.ids])}
        matrix = ssm.run(inputs, read=["attn"], layers=[number])["attn", number][0]
    shown, label = _one_map(matrix, head, reduce or "mean")
    figure = plots.attention_figure(shown, encoding.tokens, title=f"{model}, layer {number}", label=label)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    typer.echo(f"wrote {out}: layer {number} of {model}, {label}")


@app.command()
def heatmap(
    id: Annotated[list[str], typer.Argument(help="Ids of prompts, a panel each.", metavar="ID...")],
    model: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="tiny-mamba2")] = None,
    facts: Annotated[str, option("facts", "--facts", "--prompts")] = "geo",
    column: Columns = None,
    target: Annotated[str, typer.Option(help="Role that no longer reads the token.")] = "last",
    window: Annotated[int | None, typer.Option(help="Layers per window.", show_default="three in eight")] = None,
    align: Annotated[Align, option("align")] = "left",
    through: Through = None,
    limit: Annotated[float | None, typer.Option(help="Where the colours end.", show_default="the largest")] = None,
    out: Annotated[Path, typer.Option(help="The picture (.png, .svg, .pdf) or page (.html).")] = Path("heatmap.png"),
) -> None:
    """Draw which single token of a prompt matters in which layers: each is knocked out alone, in every window.

    Example:  [bold]ssm-interp heatmap capital/France/0 capital/Japan/1 --model tiny-mamba1 --window 3[/bold]
    """
    check_role(target)
    prompts = with_ids(load_prompts(facts, columns=columns_of(column)), id)
    out = _picture(out, "heatmap.png")
    maps = []
    for name in model or ["tiny-mamba2"]:
        loaded, tokenizer = load(name)
        with attach(loaded) as ssm:
            maps += [
                token_map(ssm, tokenizer, prompt, target=target, window=window, align=align, through=through, name=name)
                for prompt in prompts
            ]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".html":
        out.write_text(plots.heatmap_page(*maps, limit=limit), encoding="utf-8")
    else:
        plots.heatmap_figure(*maps, limit=limit).savefig(out, dpi=200)
    typer.echo(f"wrote {out}: {len(maps)} heat map{'s' if len(maps) > 1 else ''}, token -> {target}")


def _picture(out: Path, example: str) -> Path:
    """A file to draw into: with a suffix, in a folder that can be written."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; name a picture, such as {out / example}")
    check_folder(out.parent)
    return out if out.suffix else out.with_suffix(".png")


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
