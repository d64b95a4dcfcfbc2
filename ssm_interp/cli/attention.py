"""`ssm-interp attention`: the SSM attention of one layer."""

from __future__ import annotations

import torch

from ssm_interp.attribution import attention_views
from ssm_interp.cli.ask import loaded, picked_alone
from ssm_interp.cli.output import draw, picture, say, wrote
from ssm_interp.errors import HookError
from ssm_interp.experiments import Attention
from ssm_interp.experiments.parts import Picked
from ssm_interp.hooks import attach
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.prompts import encode, load_prompts

LABELS = {"mean": "mean attention", "mean_abs": "mean |attention|", "norm": "norm of the attention"}


def run(attention: Attention) -> None:
    """Draws it; of many heads never more than a few are in memory at once."""
    out = picture(attention.out, "attention.png")
    text, name, head = _text(attention.prompts), attention.model.model, attention.head
    host, tokenizer = loaded(name, attention.model, attention.computed)
    encoding = encode(text, tokenizer)
    with attach(host) as ssm:
        layers = ssm.streams["ssm"]
        if not layers:
            raise HookError(f"{name} has no SSM layers: this command draws SSM attention; see heatmap and flow for it")
        layer = layers[len(layers) // 2] if attention.layer is None else attention.layer
        reduction = attention.reduce or "mean"  # of one head: itself
        ids = torch.tensor([encoding.ids], device=device_of(host))
        with torch.no_grad():
            views = attention_views(ssm, ids, reduction=reduction, layers=[layer], heads=head, tokens=encoding.tokens)
        label = (
            f"{LABELS[reduction]} of {ssm.layers[layer].heads} heads" if head is None else f"attention of head {head}"
        )
    verb = wrote(out)
    draw(out, views[layer].plot, views[layer].page, title=f"{name}, layer {layer}", label=label)
    say(f"{verb} {out}: layer {layer} of {name}, {label}")


def _text(asked: Picked) -> str:
    """The text of the prompt that is picked; a text of the user's own needs no answer here."""
    alone = len(asked.words) == 1 and not asked.answer
    if alone and " " in asked.words[0]:
        ids = {prompt.id for prompt in load_prompts(asked.facts, columns=asked.columns)}
        if asked.words[0] not in ids:
            return asked.words[0]
    return picked_alone(asked).text
