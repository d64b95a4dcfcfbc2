"""`ssm-interp edges`: what every single edge of a prompt is worth."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Int
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ssm_interp.attribution import EdgeAttribution, EdgeCheck, check_edges, edge_attribution
from ssm_interp.cli.ask import loaded, picked_alone
from ssm_interp.cli.output import console, draw, picture_and_table, say, write_table, wrote
from ssm_interp.errors import FeatureError
from ssm_interp.experiments import Edges
from ssm_interp.hooks import Attachment, Metric, attach, log_probability, logit_difference
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.plots import token_label
from ssm_interp.prompts import Prompt, TokenizedPrompt, tokenize

EDGE = ["row", "layer", "target", "source"]
ARROW = "\N{LEFTWARDS ARROW}"


def run(edges: Edges) -> None:
    """Prints the strongest edges; writes a picture and a table of all."""
    picture, table = picture_and_table(edges.out, "edges.png", ".parquet")
    asked, name = picked_alone(edges.prompts), edges.model.model
    host, tokenizer = loaded(name, edges.model, edges.computed)
    row = tokenize(asked, tokenizer)
    rival = None if edges.other is None else _rival(asked, row, edges.other, tokenizer)
    ids, asked_for = torch.tensor([row.ids], device=device_of(host)), row.asked
    with attach(host) as ssm:
        likely = _likely(ssm, ids)
        number: Metric = log_probability(row.answer_id)
        label = f"ln p({asked_for})"
        if edges.metric == "logit_difference":
            against = next(token for token in likely if token != row.answer_id) if rival is None else rival.answer_id
            number = logit_difference(row.answer_id, against)
            wrong = _word(tokenizer, against) if rival is None else rival.asked
            label = f"logit({asked_for}) - logit({wrong})"
        attribution = edge_attribution(ssm, ids, number, steps=edges.steps, tokens=row.tokens)
        count = edges.check
        checked = check_edges(ssm, ids, number, attribution, top=count, random=count) if count else None
    frame = _with_exact(attribution.frame, checked)
    if likely[0] != row.answer_id:
        said = _word(tokenizer, likely[0])
        say(f"{name} answers {said}, not {asked_for}; what follows is about {asked_for} all the same")
    _print(attribution, row, frame, label, edges.top)
    if checked is not None:
        _print_correlation(checked)
    verb = wrote(picture, table)
    draw(picture, attribution.plot, attribution.page, title=f"{name}: {label} = {float(attribution.metric):.3g}")
    write_table(frame, table)
    say(f"\n{verb} {picture} and {table} ({len(frame)} edges)")


def _rival(asked: Prompt, row: TokenizedPrompt, other: str, tokenizer: PreTrainedTokenizerBase) -> TokenizedPrompt:
    rival = tokenize(replace(asked, answer=other), tokenizer)
    if rival.answer_id == row.answer_id:
        raise FeatureError(
            f"--other {other}: it begins with the same token as the answer {asked.answer!r}, "
            f"{_word(tokenizer, rival.answer_id)!r}, so their logits do not differ; give one with another first token"
        )
    return rival


@torch.no_grad()
def _likely(ssm: Attachment, ids: Int[Tensor, "1 t"]) -> list[int]:
    """The two most likely next tokens."""
    likely: list[int] = ssm.run(ids, use_cache=False).logits[0, -1].topk(2).indices.tolist()
    return likely


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return token_label(str(tokenizer.decode([token])))


def _with_exact(frame: pd.DataFrame, checked: EdgeCheck | None) -> pd.DataFrame:
    return frame if checked is None else frame.merge(checked.frame[[*EDGE, "exact"]], on=EDGE, how="left")


def _print(attribution: EdgeAttribution, row: TokenizedPrompt, frame: pd.DataFrame, label: str, top: int) -> None:
    say(f"{label} = {float(attribution.metric):.4g}; {len(frame)} edges in {len(attribution.layers)} layers")
    if attribution.without is not None:
        say(
            f"without any of them {float(attribution.without):.4g}; their attributions sum to the difference up to "
            f"{float(attribution.gap):.2g}, and the closer, the more --steps"
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
    say(f"rank correlation with exact knockouts: {', '.join(parts)}")
