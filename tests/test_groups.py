from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from random_terms import as_users_run_it
from support import edited, logits, relative_error
from test_softmax import transformer
from tiny_flow import world
from tiny_hosts import build, inputs

import ssm_interp as si
from ssm_interp.features import FeatureError, FeatureGroup, check_groups, decay_norms, feature_groups, spectrum
from ssm_interp.flow import sweep

STATISTIC = {0: torch.tensor([0.3, 0.9, 0.1, 0.9, 0.5, 0.2, 0.7]), 3: torch.tensor([1.0, 2.0, 3.0])}


def test_thirds_by_hand() -> None:
    assert FeatureGroup("top", "third").of(STATISTIC) == {0: (1, 3), 3: (2,)}
    assert FeatureGroup("bottom", "third").of(STATISTIC) == {0: (2, 5), 3: (0,)}
    assert FeatureGroup("top", "third", complement=True).of(STATISTIC) == {0: (0, 2, 4, 5, 6), 3: (0, 1)}
    assert FeatureGroup("bottom", "half").of(STATISTIC) == {0: (0, 2, 5), 3: (0,)}


def test_three_thirds_are_a_whole() -> None:
    thirds = [FeatureGroup(side, "third").of(STATISTIC) for side in ("top", "middle", "bottom")]
    assert thirds[1] == {0: (0, 4, 6), 3: (1,)}
    for layer, values in STATISTIC.items():
        assert sorted(sum((third[layer] for third in thirds), ())) == list(range(len(values)))
    assert FeatureGroup("middle", complement=True).of(STATISTIC)[0] == (1, 2, 3, 5)


NAMES = {
    "top third": FeatureGroup("top"),
    "top third by decay norm": FeatureGroup("top"),
    "all but middle third": FeatureGroup("middle", complement=True),
    "bottom tenth by half-life": FeatureGroup("bottom", "tenth", statistic="half-life"),
    "all but top half by dt variation": FeatureGroup("top", "half", complement=True, statistic="dt variation"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_groups(name: str) -> None:
    assert FeatureGroup.named(name) == NAMES[name]
    assert FeatureGroup.named(NAMES[name].name) == NAMES[name]


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


def test_groups_by_data_and_by_numbers_of_a_users_own() -> None:
    with si.attach(build("zamba2")) as ssm:
        found = spectrum(ssm, inputs())
        mine = {layer: np.arange(points.heads)[::-1] for layer, points in ssm.layers.items()}
        names = ["bottom quarter by half-life", "top third", "top quarter by rank"]
        groups: Any = feature_groups(ssm, names, statistics={**found.statistics, "rank": mine})
        assert list(groups) == names
        assert groups["top third"] == feature_groups(ssm, "top third")["top third"]
        for layer, points in ssm.layers.items():
            slowest = found["half-life"][layer].argsort()[: points.heads // 4]
            assert groups["bottom quarter by half-life"][layer] == tuple(sorted(slowest.tolist()))
            assert groups["top quarter by rank"][layer] == (0, 1)


def test_sets_of_a_users_own_act_in_knockouts_and_sweeps() -> None:
    tiny = world("mamba2", count=3)
    with si.attach(tiny.model) as ssm:
        mine = dict.fromkeys(range(4), (1, 3))
        sets = {"mine": mine, "one": {1: [2]}, "pairs": {2: [(0, 5)]}}
        groups = feature_groups(ssm, ["mine", "pairs", "all", "one"], sets=sets)
        assert groups == {
            "mine": dict.fromkeys(range(4), (1, 3)),
            "pairs": {2: ((0, 5),)},
            "all": None,
            "one": {1: (2,)},
        }
        batch = inputs(length=6)
        batch["input_ids"] %= 37
        knockout = si.Knockout(sources=[0, 1], targets=-1, layers=2, features=groups["pairs"][2])
        assert relative_error(edited(ssm, batch, knockout), logits(tiny.model, batch)) > 1e-9
        found = sweep(ssm, tiny.tokenizer, tiny.prompts, windows=2, features={"mine": groups["mine"]}).frame
        heads = [si.Knockout(sources=[0], targets=-1, layers=layer, features=[1, 3]) for layer in (0, 1)]
        ids = tiny.tokenizer(tiny.prompts[0].text, return_tensors="pt")
        target = tiny.tokenizer(tiny.prompts[0].answer)["input_ids"][0]
        p = float(edited(ssm, {"input_ids": ids["input_ids"]}, *heads)[0, -1].softmax(-1)[target])
        rows = found[(found["prompt_id"] == "p0") & (found["source"] == "first") & (found["layer"] == 0)]
        assert rows["p"].item() == pytest.approx(p, rel=1e-5) != rows["p_base"].item()


def test_what_is_disjoint_and_what_overlaps() -> None:
    with si.attach(build("mamba2")) as ssm:
        thirds = feature_groups(ssm, ["top third", "middle third", "bottom third"])
        check_groups(ssm, thirds, disjoint=True)
        check_groups(ssm, {**thirds, "all": None})
        check_groups(ssm, {"a": {0: [(1, 2)]}, "b": {0: [(1, 3)], 2: [1]}, "c": {1: [1]}}, disjoint=True)
        for groups, message in (
            ({"a": {1: [4, 5]}, "b": {1: [3, 5]}}, "groups 'a' and 'b' overlap: both have head 5 of layer 1"),
            ({"a": {1: [4]}, "b": {1: [(4, 7)]}}, "both have head 4 of layer 1, with state dimension 7;"),
            ({"a": None, "b": {2: [6]}}, "groups 'a' and 'b' overlap: both have head 6 of layer 2"),
        ):
            check_groups(ssm, groups)
            with pytest.raises(FeatureError, match=message):
                check_groups(ssm, groups, disjoint=True)


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


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "the feature group 'mine' names no layer; give layer -> features, or None for all"),
        ({0: []}, r"'mine' must name heads or .*, at least one, in layer 0, or leave the layer out; got \[\]"),
        ({0: None}, "'mine' must name heads or .* in layer 0, or leave the layer out; got None"),
        ({7: [0]}, r"'mine' names layer 7; the SSM layers of this model are \[0, 1, 2, 3\]"),
        ({0: [1, 8]}, "layer 0 has no feature 8; it has heads 0 to 7 and state dimensions 0 to 7"),
        ({0: [-1]}, "layer 0 has no feature -1"),
        ({0: [True]}, r"must name heads or .* got \[True\]"),
        ({0: ["a"]}, r"must name heads or .* got \['a'\]"),
        ({0: torch.tensor([1.0])}, r"must name heads or .* got tensor\(\[1.\]\)"),
        ({0: [(1, 8)]}, r"layer 0 has no feature \(1, 8\)"),
        ({0: [(1, 2, 3)]}, r"must name heads or .* got \[\(1, 2, 3\)\]"),
        ({0: [2, 1, 2]}, "names head 2 of layer 0, with state dimension 0, twice; name each feature once"),
        ({0: [1, (2, 3)]}, r"must name heads or .* pairs, .* got \[1, \(2, 3\)\]"),
    ],
)
def test_bad_sets(group: Any, message: str) -> None:
    with si.attach(build("mamba2")) as ssm, as_users_run_it(), pytest.raises(FeatureError, match=message):
        feature_groups(ssm, ["mine"], sets={"mine": group})


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        (
            "top third by half-life",
            None,
            r"half-life depends on what the model reads; give statistics=spectrum\(ssm, in",
        ),
        (
            "top third by scor",
            {"score": {0: [1.0] * 8}},
            "'top third by scor': there is no statistic 'scor': did you",
        ),
        ("upper third", None, "no feature group 'upper third'"),
        ("middle half", None, "no feature group 'middle half'"),
        ("top third by score", {"score": {}}, "statistic 'score' has no layers; give layer -> a number per feature"),
        (
            "top third by score",
            {"score": {9: [1.0] * 8}},
            r"'score' is given for layer 9; the SSM layers .* \[0, 1, 2, 3\]",
        ),
        ("top third by score", {"score": {0: [1.0] * 7}}, r"of layer 0 must be a number per feature, \[8\], got \[7\]"),
        (
            "top third by score",
            {"score": {0: ["high"] * 8}},
            r"must be a number per feature, \[8\], got \['high', ",
        ),
        ("top third by score", {"score": {0: [float("nan")] * 2 + [1.0] * 6}}, "not finite for 2 of its 8 features"),
    ],
)
def test_bad_statistics(name: str, numbers: Any, message: str) -> None:
    with si.attach(build("mamba2")) as ssm, pytest.raises(FeatureError, match=message):
        feature_groups(ssm, [name], statistics=numbers)
