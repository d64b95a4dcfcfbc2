"""Metrics per prompt, against numpy by hand."""

import numpy as np
import torch

from ssm_interp.flow import changes, outcome


def test_outcomes_and_changes_are_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 63, 17, generator=generator, dtype=torch.float64) * 5
    ids = torch.randint(17, (63,), generator=generator)
    logprob, hit = outcome(logits, ids)
    p_base, p = ((np.exp(x) / np.exp(x).sum(1, keepdims=True))[np.arange(63), ids.numpy()] for x in logits.numpy())
    found = changes(logprob[1].numpy(), logprob[0].numpy())
    np.testing.assert_allclose(found["p"], p, rtol=1e-12)
    np.testing.assert_allclose(found["p_base"], p_base, rtol=1e-12)
    np.testing.assert_allclose(found["relative_change"], 100 * (p - p_base) / p_base, rtol=1e-9)
    np.testing.assert_allclose(found["logprob_difference"], np.log(p) - np.log(p_base), rtol=1e-9)
    assert hit.tolist() == (logits.argmax(2) == ids).tolist()
    single = outcome(logits.float(), ids).logprob
    assert float((single - logprob).abs().max()) < 1e-5


def test_no_change_is_exactly_none_and_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0], [0.0, 1.0, 2.0]]])
    same, gone = (outcome(x, torch.tensor([0, 2])).logprob.numpy() for x in (logits, -logits))
    assert changes(same, same)["relative_change"].tolist() == [[0.0, 0.0]]
    found = changes(gone, same)
    assert found["relative_change"][0, 0] == -100
    assert np.isfinite(found["logprob_difference"]).all()


def test_a_tie_for_the_first_place_is_a_hit() -> None:
    logits = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]])
    assert outcome(logits, torch.tensor([0, 1, 2])).hit.tolist() == [[True, True, False]]
