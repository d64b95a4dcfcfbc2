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
from ssm_interp.cli.options import (
    DEFAULT,
    Alignment,
    Columns,
    Device,
    Facts,
    FullAnswer,
    ModelName,
    OfType,
    Revision,
    Spread,
    Through,
    columns_of,
    loaded,
)
from ssm_interp.cli.output import console, picture, wrote
from ssm_interp.errors import HookError
from ssm_interp.features import attention_views
from ssm_interp.flow import Study, check_edges_exist, token_map
from ssm_interp.hooks import Attachment, attach
from ssm_interp.hooks.answers import device_of
from ssm_interp.hooks.check import check as check_model
from ssm_interp.prompts import (
    Prompt,
    TokenizedPrompt,
    check_role,
    encode,
    load_prompts,
    tokenize,
    warn_shared,
    with_ids,
)

Reduction = Literal["mean", "mean_abs", "norm"]


def check(
    model: Annotated[str, typer.Argument(help=Study.model_fields["model"].description)],
    revision: Revision = DEFAULT["revision"],
    dtype: OfType = DEFAULT["dtype"],
    device: Device = DEFAULT["device"],
    device_map: Spread = DEFAULT["device_map"],
) -> None:
    """Attach to a model and prove, on a tiny input, that the hooks tell the truth.

    Exit code 1 if they do not.

    Example:  [bold]ssm-interp check tiny-mamba1[/bold]
    """
    rows = check_model(loaded(model, revision, dtype, device, device_map)[0])
    table = Table(title=model)
    for name in ("check", "measured", "", "detail"):
        table.add_column(name)
    for row in rows:
        verdict = "passed" if row.passed else "[bold red]FAILED[/bold red]"
        table.add_row(row.name, f"{row.value:.3g}", verdict, row.detail)
    console().print(table)
    if not all(row.passed for row in rows):
        raise typer.Exit(1)


def attention(
    text: Annotated[str, typer.Argument(help="What the model reads.")],
    model: ModelName = "tiny-mamba1",
    layer: Annotated[int | None, typer.Option(help="Which layer.", show_default="the middle SSM layer")] = None,
    reduce: Annotated[
        Reduction | None, typer.Option(help="How to make one map of all heads.", show_default="mean")
    ] = None,
    head: Annotated[int | None, typer.Option(help="One head (in Mamba-1 a channel) instead.")] = None,
    revision: Revision = DEFAULT["revision"],
    dtype: OfType = DEFAULT["dtype"],
    device: Device = DEFAULT["device"],
    device_map: Spread = DEFAULT["device_map"],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("attention.png"),
) -> None:
    """Draw the SSM attention of one layer on a text as a heat map.

    Example:  [bold]ssm-interp attention "The name of the capital city of France is" --layer 4 --reduce mean_abs[/bold]
    """
    if head is not None and reduce is not None:
        raise HookError("give --head or --reduce, not both: one head needs no reduction over heads")
    out = picture(out, "attention.png")
    host, tokenizer = loaded(model, revision, dtype, device, device_map)
    encoding = encode(text, tokenizer)
    with attach(host) as ssm:
        layers = ssm.streams["ssm"]
        if not layers:
            raise HookError(f"{model} has no SSM layers: this command draws SSM attention; see heatmap and flow for it")
        number = layers[len(layers) // 2] if layer is None else layer
        inputs = {"input_ids": torch.tensor([encoding.ids], device=device_of(host))}
        shown, label = _one_map(ssm, inputs, number, head, reduce or "mean")
    figure = plots.attention_figure(shown, encoding.tokens, title=f"{model}, layer {number}", label=label)
    verb = wrote(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    typer.echo(f"{verb} {out}: layer {number} of {model}, {label}")


def heatmap(
    id: Annotated[list[str], typer.Argument(help="Ids of prompts, a panel each.", metavar="ID...")],
    model: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="tiny-mamba2")] = None,
    facts: Facts = DEFAULT["facts"],
    column: Columns = None,
    full_answer: FullAnswer = DEFAULT["full_answer"],
    target: Annotated[str, typer.Option(help="Role that no longer reads the token.")] = "last",
    window: Annotated[int | None, typer.Option(help="Layers per window.", show_default="three in eight")] = None,
    align: Alignment = DEFAULT["align"],
    through: Through = None,
    limit: Annotated[float | None, typer.Option(help="Where the colours end.", show_default="the largest")] = None,
    revision: Revision = DEFAULT["revision"],
    dtype: OfType = DEFAULT["dtype"],
    device: Device = DEFAULT["device"],
    device_map: Spread = DEFAULT["device_map"],
    out: Annotated[Path, typer.Option(help="The picture (.png, .svg, .pdf) or page (.html).")] = Path("heatmap.png"),
) -> None:
    """Draw which single token of a prompt matters in which layers.

    Each is knocked out alone, in every window of layers.

    Example:  [bold]ssm-interp heatmap capital/France/0 capital/Japan/1 --model tiny-mamba1 --window 3[/bold]
    """
    check_role(target)
    prompts = with_ids(load_prompts(facts, columns=columns_of(column)), id)
    out = picture(out, "heatmap.png")
    maps = []
    for name in model or ["tiny-mamba2"]:
        host, tokenizer = loaded(name, revision, dtype, device, device_map)
        with attach(host) as ssm:
            if not full_answer:
                warn_shared([tokenize(prompt, tokenizer) for prompt in prompts])
            drawn = _with_edges([tokenize(prompt, tokenizer) for prompt in prompts], target)
            maps += [
                token_map(
                    ssm,
                    tokenizer,
                    prompt,
                    target=target,
                    window=window,
                    align=align,
                    through=through,
                    full_answer=full_answer,
                    name=name,
                )
                for prompt in drawn
            ]
    verb = wrote(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".html":
        out.write_text(plots.heatmap_page(*maps, limit=limit), encoding="utf-8")
    else:
        plots.heatmap_figure(*maps, limit=limit).savefig(out, dpi=200)
    answers = ", ".join(dict.fromkeys(one.answer for one in maps))
    typer.echo(f"{verb} {out}: {len(maps)} heat map{'s' if len(maps) > 1 else ''}, token -> {target}; asked: {answers}")


def _with_edges(rows: list[TokenizedPrompt], target: str) -> list[Prompt]:
    """The prompts that have the target; says which have not."""
    check_edges_exist(rows, range(max(map(len, rows))), [target])
    without = [row.prompt.id or row.prompt.text for row in rows if not row.positions(target)]
    if without:
        typer.echo(
            f"left out {len(without)} of {len(rows)} prompts, in which no token is {target}: {', '.join(without)}"
        )
    return [row.prompt for row in rows if row.positions(target)]


def _one_map(
    ssm: Attachment, inputs: dict[str, Tensor], layer: int, head: int | None, reduction: Reduction
) -> tuple[Float[Tensor, "t s"], str]:
    heads = ssm.layers[layer].heads if layer in ssm.layers else 0
    if head is not None and heads and not 0 <= head < heads:
        raise HookError(f"there is no head {head}: this layer has {heads}, numbered 0 to {heads - 1}")
    view = attention_views(ssm, inputs, reduction=reduction, layers=layer, heads=head)[layer]
    labels = {
        "mean": f"mean attention of {heads} heads",
        "mean_abs": f"mean |attention| of {heads} heads",
        "norm": f"norm of the attention of {heads} heads",
    }
    return view.values[0].cpu(), labels[reduction] if head is None else f"attention of head {head}"
