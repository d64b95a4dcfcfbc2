"""Metrics per prompt, against numpy by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssm_interp.errors import SsmInterpError
from ssm_interp.flow import changes
from ssm_interp.hooks import accuracy, kl_divergence, log_probability, logit_difference, rank
from ssm_interp.hooks.rows.metrics import as_measured, of_full_answer

ROWS, VOCABULARY = 63, 17


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * 5


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(1)).tolist()


def test_metrics_and_changes_are_the_definitions(logits: torch.Tensor, ids: list[int]) -> None:
    logprob = [log_probability(ids)(each) for each in logits]
    p_base, p = ((np.exp(x) / np.exp(x).sum(1, keepdims=True)) for x in logits.numpy())
    rows = np.arange(ROWS)
    found = changes(logprob[1].numpy(), logprob[0].numpy())
    np.testing.assert_allclose(found["p"], p[rows, ids], rtol=1e-12)
    np.testing.assert_allclose(found["p_base"], p_base[rows, ids], rtol=1e-12)
    np.testing.assert_allclose(found["relative_change"], 100 * (p / p_base - 1)[rows, ids], rtol=1e-9)
    np.testing.assert_allclose(found["logprob_difference"], np.log(p / p_base)[rows, ids], rtol=1e-9)
    assert float((log_probability(ids)(logits[0].float()) - logprob[0]).abs().max()) < 1e-5
    assert (accuracy(ids)(logits[0]) > 0).tolist() == (logits[0].argmax(1).numpy() == ids).tolist()
    order = (-logits[0].numpy()).argsort(1)
    assert rank(ids)(logits[0]).tolist() == [int(np.flatnonzero(row == one)[0]) for row, one in zip(order, ids)]  # noqa: B905
    np.testing.assert_allclose(kl_divergence(logits[0])(logits[1]), (p_base * np.log(p_base / p)).sum(1), rtol=1e-9)
    difference = logit_difference(ids, 3)(logits[0]).numpy()
    np.testing.assert_allclose(difference, logits[0].numpy()[rows, ids] - logits[0].numpy()[:, 3], rtol=1e-12)


def test_the_named_logit_difference_is_from_the_most_likely_other_token(logits: torch.Tensor, ids: list[int]) -> None:
    clean = logits[0]
    named = as_measured("logit_difference", answer_ids=torch.tensor(ids), clean=lambda: clean)
    others = clean.scatter(1, torch.tensor(ids)[:, None], -torch.inf).argmax(1)
    rows = torch.arange(ROWS)
    expected = logits[1][rows, ids] - logits[1][rows, others]
    np.testing.assert_allclose(named.of(logits[1]), expected, rtol=1e-12)


def test_no_change_is_exactly_none_and_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1.0, 2.0]])
    same, gone = (log_probability([0, 2])(x).double().numpy() for x in (logits, -logits))
    assert changes(same, same)["relative_change"].tolist() == [0.0, 0.0]
    found = changes(gone, same)
    assert found["relative_change"][0] == -100
    assert np.isfinite(found["logprob_difference"]).all()


def test_a_tie_for_the_first_place_is_a_hit() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    assert accuracy([0, 1, 2])(logits).tolist() == [1, 1, 0]
    assert rank([0, 1, 2])(logits).tolist() == [0, 0, 2]


def test_full_answers_are_products_of_their_tokens(logits: torch.Tensor) -> None:
    text, answer = logits[:, :5], [[3, 0, 7], [2]]
    p = torch.softmax(text, -1)
    expected = [p[0, 2, 3] * p[0, 3, 0] * p[0, 4, 7], p[1, 4, 2]]
    np.testing.assert_allclose(of_full_answer("probability", text, answer), expected, rtol=1e-12)
    best = [text[0, 2:].argmax(1).tolist(), [int(text[1, 4].argmin())]]
    assert of_full_answer("accuracy", text, best).tolist() == [1, 0]
    with pytest.raises(SsmInterpError, match="'rank' is about one token"):
        of_full_answer("rank", text, answer)
