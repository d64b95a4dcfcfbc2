"""Induction prompts pose the task that they say, and their roles share out every position."""

from __future__ import annotations

import pytest

import ssm_interp as si
from ssm_interp.prompts import PromptError, induction_prompts, induction_roles, pad, tokenize


def test_the_answer_follows_the_only_earlier_trigger() -> None:
    prompts = induction_prompts(200, length=12, seed=5)
    assert prompts == induction_prompts(200, length=12, seed=5) != induction_prompts(200, length=12, seed=6)
    for prompt in prompts:
        symbols = prompt.text.split()
        place = symbols.index(symbols[-1])
        assert len(symbols) == 12
        assert symbols.count(symbols[-1]) == 2
        assert symbols[place + 1] == prompt.answer == prompt.subject
        assert 1 <= place <= 12 - 6
    assert len({prompt.answer for prompt in prompts}) > 20
    assert len({prompt.id for prompt in prompts}) == 200


def test_roles_share_out_every_position_beside_padding() -> None:
    _, tokenizer = si.load("tiny-induction-mamba1")
    prompts = [*induction_prompts(4, length=9), *induction_prompts(4, length=14, seed=1)]
    batch = pad([tokenize(prompt, tokenizer) for prompt in prompts])
    roles = induction_roles(batch)
    assert list(roles) == ["before", "trigger", "answer", "between", "query"]
    for row, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        assert [c for found in roles.values() for c in found[row]] == mask.nonzero()[:, 0].tolist()
        (trigger,), (answer,), (query,) = (roles[name][row] for name in ("trigger", "answer", "query"))
        assert ids[trigger] == ids[query] and answer == trigger + 1
        assert ids[answer] == batch.answer_ids[row]


def test_what_is_no_induction_is_refused() -> None:
    with pytest.raises(PromptError, match="at least 1 prompt of at least 7 symbols, got count=1 and length=6"):
        induction_prompts(1, length=6)
    with pytest.raises(PromptError, match="got count=0 and length=24"):
        induction_prompts(0)
    _, tokenizer = si.load("tiny-mamba1")
    batch = pad([tokenize(si.load_prompts()[0], tokenizer)])
    with pytest.raises(PromptError, match="is no prompt of `induction_prompts`"):
        induction_roles(batch)
