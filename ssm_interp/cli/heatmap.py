"""`ssm-interp heatmap`: which single token of a prompt matters, in which layers."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ssm_interp import plots
from ssm_interp.cli.ask import check_once, loaded, picked
from ssm_interp.cli.output import PAGE, picture, say, wrote
from ssm_interp.experiments import Heatmap
from ssm_interp.flow import check_edges_exist, token_map
from ssm_interp.hooks import Attachment, attach
from ssm_interp.plots import TokenMap
from ssm_interp.prompts import Prompt, TokenizedPrompt, tokenize, warn_shared


def run(heatmap: Heatmap) -> None:
    out = picture(heatmap.out, "heatmap.png")
    check_once(heatmap.model.names)
    prompts = picked(heatmap.prompts)
    maps: list[TokenMap] = []
    for name in heatmap.model.names:
        host, tokenizer = loaded(name, heatmap.model, heatmap.computed)
        with attach(host) as ssm:
            maps += _maps(heatmap, ssm, tokenizer, prompts, name)
    verb = wrote(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == PAGE:
        out.write_text(plots.heatmap_page(*maps, limit=heatmap.colour_limit), encoding="utf-8")
    else:
        plots.heatmap_figure(*maps, limit=heatmap.colour_limit).savefig(out, dpi=200)
    answers = ", ".join(dict.fromkeys(token_map.answer for token_map in maps))
    count = f"{len(maps)} heat map{'s' if len(maps) > 1 else ''}"
    say(f"{verb} {out}: {count}, token -> {heatmap.reader}; asked: {answers}")


def _maps(
    heatmap: Heatmap, ssm: Attachment, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], name: str
) -> list[TokenMap]:
    rows = [tokenize(prompt, tokenizer) for prompt in prompts]
    if not heatmap.prompts.full_answer:
        warn_shared(rows)
    return [
        token_map(
            ssm,
            tokenizer,
            prompt,
            target=heatmap.reader,
            window=heatmap.window,
            align=heatmap.align,
            through=heatmap.through,
            full_answer=heatmap.prompts.full_answer,
            name=name,
        )
        for prompt in _with_edges(rows, heatmap.reader)
    ]


def _with_edges(rows: list[TokenizedPrompt], reader: str) -> list[Prompt]:
    """The prompts that have a token of the role; says which have not."""
    check_edges_exist(rows, range(max(map(len, rows))), [reader])
    without = [row.prompt.id or row.prompt.text for row in rows if not row.positions(reader)]
    if without:
        say(f"left out {len(without)} of {len(rows)} prompts, in which no token is {reader}: {', '.join(without)}")
    return [row.prompt for row in rows if row.positions(reader)]
