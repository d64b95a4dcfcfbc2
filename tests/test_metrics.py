"""Metrics per prompt, against numpy by hand."""

import numpy as np
import torch

from ssm_interp.flow import answer_metrics, hits


def test_answer_metrics_are_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(63, 17, generator=generator) * 5
    base = torch.randn(63, 17, generator=generator) * 5
    ids = torch.randint(17, (63,), generator=generator)
    found = answer_metrics(logits, base, ids)
    p, p_base = (
        (np.exp(x) / np.exp(x).sum(1, keepdims=True))[np.arange(63), ids.numpy()]
        for x in (logits.double().numpy(), base.double().numpy())
    )
    np.testing.assert_allclose(found["p"], p, rtol=1e-12)
    np.testing.assert_allclose(found["p_base"], p_base, rtol=1e-12)
    np.testing.assert_allclose(found["relative_change"], 100 * (p - p_base) / p_base, rtol=1e-9)
    np.testing.assert_allclose(found["logprob_difference"], np.log(p) - np.log(p_base), rtol=1e-9)
    assert found["hit"].tolist() == (logits.argmax(1) == ids).tolist()


def test_no_change_is_exactly_none_and_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1.0, 2.0]])
    same = answer_metrics(logits, logits, torch.tensor([0, 2]))
    assert same["relative_change"].tolist() == same["logprob_difference"].tolist() == [0.0, 0.0]
    gone = answer_metrics(-logits, logits, torch.tensor([0, 2]))
    assert gone["relative_change"][0] == -100
    assert gone["logprob_difference"].isfinite().all()


def test_a_tie_for_the_first_place_is_a_hit() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert hits(logits, torch.tensor([0, 1, 2])).tolist() == [True, True, False]
