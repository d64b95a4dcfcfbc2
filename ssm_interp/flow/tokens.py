"""Which single token of a prompt matters, in which layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ssm_interp.flow.sweep import sweep
from ssm_interp.hooks import Attachment
from ssm_interp.plots import TokenMap
from ssm_interp.prompts import Prompt, tokenize


def token_map(
    ssm: Attachment,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    target: str = "last",
    window: int | None = None,
    name: str | None = None,
    **options: Any,
) -> TokenMap:
    """Knock out each single token of a prompt in every layer window; draw it with `plots.heatmap_figure`.

    Args:
        ssm: an attached model, in eval mode.
        tokenizer: the model's own; a fast one.
        prompt: the model need not answer it correctly.
        target: role that no longer reads the token.
        window: layers per window; None: three in eight of the layers.
        name: the model's name in the title.
        options: as of `sweep`: align, through, full_answer, max_memory, engine.

    Returns:
        p - p_base of the prompt's answer, `[token, window]`; NaN where a token comes after all targets.

    Raises:
        As `sweep`.

    Cost: one forward pass of the prompt, and a token per window and token of it.
    Source: Mamba Knockout (Endy et al., ACL 2025), appendix (heat maps).

    Example:
        >>> maps = [token_map(ssm, tokenizer, prompt) for prompt in load_prompts()[:3]]     # doctest: +SKIP
        >>> heatmap_figure(*maps).savefig("tokens.png", dpi=200)                             # doctest: +SKIP
    """
    row = tokenize(prompt, tokenizer)
    result = sweep(
        ssm,
        tokenizer,
        [prompt],
        sources=range(len(row)),
        targets=[target],
        windows=window,
        answered_only=False,
        name=name,
        **options,
    )
    answer = str(result.frame["answer"].iloc[0])
    token_map = TokenMap.of(result.frame, row.tokens, subject=row.roles["subject"], answer=answer)
    (size,) = result.runs[0].windows
    return replace(token_map, title=f"{token_map.title}, windows of {size} layer{'' if size == 1 else 's'}")
