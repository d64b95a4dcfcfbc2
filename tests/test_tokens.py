"""Single tokens of a prompt, against knockouts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_flow import LAYERS, World, world

import ssm_interp as si
from ssm_interp.flow import token_map
from ssm_interp.prompts import tokenize


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def scene(request: pytest.FixtureRequest) -> World:
    return world(request.param, count=2)


@pytest.mark.parametrize("which", ["prompts", "wrong"])
def test_every_cell_is_a_knockout_by_hand(scene: World, which: str) -> None:
    prompt = getattr(scene, which)[0]
    row = tokenize(prompt, scene.tokenizer)
    ids = torch.tensor([row.ids])

    def p() -> float:
        return float(scene.model(ids).logits[0, -1].softmax(0)[row.answer_id])

    with si.attach(scene.model) as ssm, torch.no_grad():
        found = token_map(ssm, scene.tokenizer, prompt, window=2, name="tiny")
        expected = np.zeros((len(row), LAYERS - 1))
        for token in range(len(row)):
            for start in range(LAYERS - 1):
                with ssm.edit(si.Knockout(sources=token, targets=-1, layers=[start, start + 1])):
                    expected[token, start] = p() - found.p_base
        assert found.p_base == pytest.approx(p(), rel=1e-5)
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3 * found.p_base
    assert list(found.tokens) == list(row.tokens)
    assert set(found.subject) == set(row.roles["subject"])
    assert found.title == "tiny: token \N{RIGHTWARDS ARROW} last, windows of 2 layers"


def test_tokens_after_every_target_have_no_edges(scene: World) -> None:
    prompt = next(prompt for prompt in scene.prompts if len(prompt.text.split()) > 3)
    row = tokenize(prompt, scene.tokenizer)
    with si.attach(scene.model) as ssm:
        found = token_map(ssm, scene.tokenizer, prompt, target="first", window=1)
    assert np.isnan(found.values[1:]).all() and not np.isnan(found.values[0]).any()
    assert len(found.values) == len(row)
