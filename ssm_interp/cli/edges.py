"""`ssm-interp edges`: what every single edge of a prompt is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import typer
from jaxtyping import Int
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ssm_interp.cli.options import (
    DEFAULT,
    Columns,
    Device,
    Facts,
    ModelName,
    OfType,
    Revision,
    Spread,
    columns_of,
    loaded,
)
from ssm_interp.cli.output import console, picture_and_table, wrote
from ssm_interp.errors import FeatureError, PromptError
from ssm_interp.features import (
    EdgeAttribution,
    EdgeCheck,
    check_edges,
    edge_attribution,
)
from ssm_interp.hooks import Attachment, Metric, attach, log_probability, logit_difference
from ssm_interp.hooks.asked import device_of
from ssm_interp.plots import token_label
from ssm_interp.prompts import Prompt, TokenizedPrompt, load_prompts, tokenize, with_ids

EDGE = ["row", "layer", "target", "source"]
ARROW = "\N{LEFTWARDS ARROW}"


def edges(
    prompt: Annotated[str, typer.Argument(help="Id of a prompt; or a text, with --target.", metavar="ID|TEXT")],
    model: ModelName = "tiny-mamba2",
    facts: Facts = DEFAULT["facts"],
    column: Columns = None,
    target: Annotated[str | None, typer.Option(help="The answer to a text of your own.")] = None,
    other: Annotated[
        str | None, typer.Option(help="The wrong answer.", show_default="the most likely other token")
    ] = None,
    metric: Annotated[
        Literal["difference", "logprob"], typer.Option(help="logit(answer) - logit(other), or ln p(answer).")
    ] = "difference",
    steps: Annotated[int, typer.Option(help="1: the gradient; more: integrated gradients.", min=1)] = 1,
    top: Annotated[int, typer.Option(help="How many edges to print.", min=1)] = 10,
    check: Annotated[
        int, typer.Option(help="Knock out so many of the strongest edges, and as many random ones.", min=0)
    ] = 0,
    revision: Revision = DEFAULT["revision"],
    dtype: OfType = DEFAULT["dtype"],
    device: Device = DEFAULT["device"],
    device_map: Spread = DEFAULT["device_map"],
    out: Annotated[Path, typer.Option(help="Picture (.png, .svg, .pdf); a table goes beside it.")] = Path("edges.png"),
) -> None:
    """Attribute a prompt's answer to every single edge, target <- source, in one backward pass.

    Prints the strongest edges (with --check, by their exact effect, of those knocked out); writes a picture, and a
    table with a row per edge (--out X.csv: as CSV). An edge's number predicts, to first order, how the metric changes
    if the edge is knocked out; --check N compares it with the truth.

    Example:  [bold]ssm-interp edges capital/France/0 --model tiny-mamba1 --check 20[/bold]

    Example:  [bold]ssm-interp edges "The capital of France is" --target Paris --other Rome --out paris.svg[/bold]
    """
    picture, table = picture_and_table(out, "edges.png", ".parquet")
    if other is not None and metric == "logprob":
        raise FeatureError("--other is for --metric difference; the log-probability has no wrong answer")
    asked = _prompt(prompt, target, facts, columns_of(column))
    host, tokenizer = loaded(model, revision, dtype, device, device_map)
    row = tokenize(asked, tokenizer)
    rival = None if other is None else _rival(asked, row, other, tokenizer)
    ids, asked_for = torch.tensor([row.ids], device=device_of(host)), row.asked
    with attach(host) as ssm:
        likely = _likely(ssm, ids)
        number: Metric = log_probability(row.target_id)
        label = f"ln p({asked_for})"
        if metric == "difference":
            against = next(token for token in likely if token != row.target_id) if rival is None else rival.target_id
            number = logit_difference(row.target_id, against)
            wrong = _word(tokenizer, against) if rival is None else rival.asked
            label = f"logit({asked_for}) - logit({wrong})"
        found = edge_attribution(ssm, ids, number, steps=steps, tokens=row.tokens)
        checked = check_edges(ssm, ids, number, found, top=check, random=check) if check else None
    frame = _with_exact(found.frame, checked)
    if likely[0] != row.target_id:
        said = _word(tokenizer, likely[0])
        typer.echo(f"{model} answers {said}, not {asked_for}; what follows is about {asked_for} all the same")
    _print(found, row, frame, label, top)
    if checked is not None:
        _print_correlation(checked)
    verb = wrote(picture, table)
    picture.parent.mkdir(parents=True, exist_ok=True)
    found.plot(title=f"{model}: {label} = {float(found.metric):.3g}").savefig(picture, dpi=200)
    frame.to_csv(table, index=False) if table.suffix == ".csv" else frame.to_parquet(table, index=False)
    typer.echo(f"\n{verb} {picture} and {table} ({len(frame)} edges)")


def _prompt(words: str, target: str | None, facts: str, columns: dict[str, str] | None) -> Prompt:
    """A prompt of the facts by its id; or, with a target, a text as a prompt that is all subject."""
    if target is not None:
        if words in {prompt.id for prompt in load_prompts(facts, columns=columns)}:
            raise FeatureError(f"{words} is the id of a prompt, which has its own answer; leave --target out")
        return Prompt(words, subject=words, target=target)
    try:
        return with_ids(load_prompts(facts, columns=columns), [words])[0]
    except PromptError as error:
        error.add_note("For a text of your own, give its answer too: --target Paris")
        raise


def _rival(asked: Prompt, row: TokenizedPrompt, other: str, tokenizer: Any) -> TokenizedPrompt:
    found = tokenize(replace(asked, target=other), tokenizer)
    if found.target_id == row.target_id:
        raise FeatureError(
            f"--other {other}: it begins with the same token as the answer {asked.target!r}, "
            f"{_word(tokenizer, found.target_id)!r}, so their logits do not differ; give one with another first token"
        )
    return found


@torch.no_grad()
def _likely(ssm: Attachment, ids: Int[Tensor, "1 t"]) -> list[int]:
    """The two most likely next tokens."""
    found: list[int] = ssm.run(ids, use_cache=False).logits[0, -1].topk(2).indices.tolist()
    return found


def _word(tokenizer: Any, token: int) -> str:
    return token_label(tokenizer.decode([token]))


def _with_exact(frame: pd.DataFrame, checked: EdgeCheck | None) -> pd.DataFrame:
    return frame if checked is None else frame.merge(checked.frame[[*EDGE, "exact"]], on=EDGE, how="left")


def _print(found: EdgeAttribution, row: TokenizedPrompt, frame: pd.DataFrame, label: str, top: int) -> None:
    typer.echo(f"{label} = {float(found.metric):.4g}; {len(frame)} edges in {len(found.layers)} layers")
    if found.without is not None:
        typer.echo(
            f"without any of them {float(found.without):.4g}; their attributions sum to the difference up to "
            f"{float(found.gap):.2g}, and the closer, the more --steps"
        )
    table = Table("layer", f"target {ARROW} source", "attribution", *(["exact"] if "exact" in frame else []))
    by = "exact" if "exact" in frame else "attribution"
    strongest = frame.reindex(frame[by].abs().sort_values(ascending=False, kind="stable", na_position="last").index)
    for edge in strongest[:top].to_dict("records"):
        names = [f"{token_label(row.tokens[edge[name]])} {edge[name]}" for name in ("target", "source")]
        cells = [str(edge["layer"]), f" {ARROW} ".join(names), f"{edge['attribution']:+.4g}"]
        if "exact" in edge:
            cells.append("" if pd.isna(edge["exact"]) else f"{edge['exact']:+.4g}")
        table.add_row(*map(Text, cells))
    console().print(table)


def _print_correlation(checked: EdgeCheck) -> None:
    counts = checked.frame["chosen"].value_counts()
    parts = [f"{checked.correlation():.2f} over {len(checked.frame)} edges"]
    parts += [f"{checked.correlation(str(chosen)):.2f} over the {count} {chosen}" for chosen, count in counts.items()]
    typer.echo(f"rank correlation with exact knockouts: {', '.join(parts)}")
