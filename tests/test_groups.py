from __future__ import annotations

import pytest
import torch
from test_softmax import transformer
from tiny_hosts import build

import ssm_interp as si
from ssm_interp.features import FeatureError, FeatureGroup, decay_norms, feature_groups

STATISTIC = {0: torch.tensor([0.3, 0.9, 0.1, 0.9, 0.5, 0.2, 0.7]), 3: torch.tensor([1.0, 2.0, 3.0])}


def test_thirds_by_hand() -> None:
    assert FeatureGroup("top", "third").of(STATISTIC) == {0: (1, 3), 3: (2,)}
    assert FeatureGroup("bottom", "third").of(STATISTIC) == {0: (2, 5), 3: (0,)}
    assert FeatureGroup("top", "third", complement=True).of(STATISTIC) == {0: (0, 2, 4, 5, 6), 3: (0, 1)}
    assert FeatureGroup("bottom", "half").of(STATISTIC) == {0: (0, 2, 5), 3: (0,)}


def test_equal_statistics_are_told_apart_by_index() -> None:
    assert FeatureGroup("top", "third").of({0: torch.ones(6)}) == {0: (4, 5)}


@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2", "nemotron_h"])
def test_decay_norms_by_hand(name: str) -> None:
    with si.attach(build(name)) as ssm:
        norms = decay_norms(ssm)
        assert list(norms) == list(ssm.layers)
        for layer, mixer in ssm.mixers.items():
            rows = mixer.A_log.detach().double().reshape(ssm.layers[layer].heads, -1)
            by_hand = [sum(float(torch.exp(-torch.exp(value))) for value in row) for row in rows]
            assert norms[layer].tolist() == pytest.approx(by_hand, rel=1e-12)


def test_groups_of_a_model_partition_its_features() -> None:
    with si.attach(build("mamba2")) as ssm:
        names = ["all", "top third", "all but top third", "bottom quarter"]
        found = feature_groups(ssm, names)
        assert list(found) == names and found["all"] is None
        top, rest = found["top third"], found["all but top third"]
        assert top is not None and rest is not None
        for layer, points in ssm.layers.items():
            assert len(top[layer]) == points.heads // 3
            assert sorted(top[layer] + rest[layer]) == list(range(points.heads))
            norms = decay_norms(ssm)[layer]
            assert norms[list(top[layer])].min() >= norms[list(rest[layer])].max()


def test_bad_groups() -> None:
    with pytest.raises(FeatureError, match="no feature group 'top thrid': did you mean 'top third'"):
        FeatureGroup.named("top thrid")
    with pytest.raises(FeatureError, match="the top or the bottom half, third"):
        FeatureGroup("top", "fifth")
    with pytest.raises(FeatureError, match="layer 2 has 2 features, of which the group 'top third' has none"):
        FeatureGroup("top").of({2: torch.ones(2)})
    with pytest.raises(FeatureError, match="layer 1 is not finite"):
        FeatureGroup("top").of({1: torch.tensor([1.0, float("nan"), 2.0])})
    with si.attach(transformer("gpt2")) as ssm, pytest.raises(FeatureError, match="GPT2LMHeadModel has no SSM layers"):
        feature_groups(ssm, ["top third"])
