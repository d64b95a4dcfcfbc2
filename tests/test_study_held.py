"""Feature groups of a study: by statistics that depend on its prompts, and of a user's own."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError
from tiny_study import Scene, rewrite, scene

import ssm_interp as si
from ssm_interp.features import FeatureError, feature_groups, spectrum
from ssm_interp.features.groups import DECAY_NORM
from ssm_interp.flow import Study, explain, run_study, sweep
from ssm_interp.flow.study_held import ScaleFeatures, held_on, measured
from ssm_interp.jobs import JobError
from ssm_interp.models import load
from ssm_interp.prompts import load_prompts, pad, tokenize

BY_DATA = "top half by half-life"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("study"))


def test_groups_by_data_are_ranked_on_the_prompts_that_are_asked(tiny: Scene, tmp_path: Path) -> None:
    names = ["all", BY_DATA, "bottom half by dt variation"]
    found = run_study(tiny.study(features=names), tmp_path).frame
    model, tokenizer = load(tiny.options["model"])
    prompts = load_prompts(tiny.options["facts"])
    with si.attach(model.double()) as ssm:
        statistics = spectrum(ssm, pad([tokenize(prompt, tokenizer) for prompt in prompts])).statistics
        groups = feature_groups(ssm, names, statistics=statistics)
        assert groups[BY_DATA] != feature_groups(ssm, ["top half"])["top half"]
        whole = sweep(ssm, tokenizer, prompts, sources=["subject", "last"], windows=[1, 2], features=groups).frame
    keys = ["source", "feature_group", "window_size", "layer", "prompt_id"]
    both = found.merge(whole, on=keys, validate="one_to_one")
    assert len(both) == len(found) == len(whole)
    pd.testing.assert_series_equal(both["p_x"], both["p_y"], check_names=False, rtol=1e-9)


def test_other_features_in_a_group_are_another_study(tiny: Scene, tmp_path: Path) -> None:
    study = tiny.study(features=[BY_DATA], limit=4)
    run_study(study, tmp_path)
    rewrite(study, tmp_path, lambda stored: stored.update({"job": "0", "measured features": "0" * 64}))
    with pytest.raises(JobError, match="the measured features .stored: '0000"):
        run_study(study, tmp_path)


def test_groups_of_a_users_own(tiny: Scene, tmp_path: Path) -> None:
    """Through JSON and back: a study that is stored and goes on."""
    sets = {"mine": {"0": [1], "1": [0, 2], "2": [3], "3": [1]}, "pairs": {str(layer): [[0, 3]] for layer in range(4)}}
    study = tiny.study(groups=sets, features=["mine", "pairs"])
    assert study.groups == {
        "mine": {0: [1], 1: [0, 2], 2: [3], 3: [1]},
        "pairs": {layer: [(0, 3)] for layer in range(4)},
    }
    assert Study.model_validate_json(study.model_dump_json()) == study
    found = run_study(study, tmp_path)
    assert run_study(study, tmp_path).frame.equals(found.frame)
    model, tokenizer = load(tiny.options["model"])
    with si.attach(model.double()) as ssm:
        prompts = load_prompts(tiny.options["facts"])
        whole = sweep(ssm, tokenizer, prompts, sources=["subject", "last"], windows=[1, 2], features=study.groups).frame
    keys = ["source", "feature_group", "window_size", "layer", "prompt_id"]
    both = found.frame.merge(whole, on=keys, validate="one_to_one")
    assert len(both) == len(whole)
    pd.testing.assert_series_equal(both["p_x"], both["p_y"], check_names=False, rtol=1e-9)


def test_edits_that_are_held_on_take_both_kinds_of_groups(tiny: Scene) -> None:
    model, tokenizer = load(tiny.options["model"])
    asked = [tokenize(prompt, tokenizer) for prompt in load_prompts(tiny.options["facts"])]
    own = ScaleFeatures(kind="ScaleFeatures", factor=0.5, groups={"mine": {2: [1, 3]}}, features="mine")
    ranked = ScaleFeatures(kind="ScaleFeatures", factor=0.0, features=BY_DATA, layers=[1])
    with si.attach(model) as ssm:
        statistics = measured(ssm, asked, [BY_DATA, "mine", "top third"])
        assert list(statistics) == ["half-life"] and DECAY_NORM not in statistics
        assert measured(ssm, asked, ["all", "top third"]) == {}
        slow = feature_groups(ssm, [BY_DATA], statistics=statistics)[BY_DATA]
        assert held_on([own, ranked], ssm, statistics) == [
            si.ScaleFeatures(factor=0.5, features=[1, 3], layers=2),
            si.ScaleFeatures(factor=0.0, features=slow[1], layers=1),
        ]
        elsewhere = own.model_copy(update={"layers": [0]})
        with pytest.raises(FeatureError, match="ScaleFeatures: the feature group 'mine' names no features for layer 0"):
            held_on([elsewhere], ssm, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"features": ["top half by halflife"]},
            "features.0: 'top half by halflife': there is no statistic 'half",
        ),
        ({"groups": {"mine": {0: [1]}}, "features": ["mien"]}, "features.0: there is no feature group 'mien'"),
        ({"groups": {"mine": {0: [1]}}, "features": ["mien"]}, ", or one of its own groups: mine"),
        ({"groups": {"top third": {0: [1]}}}, "groups: 'top third' is the name of a group by rank; give yours another"),
        ({"groups": {"all": {0: [1]}}}, "groups: 'all' is the name of a group by rank"),
        ({"groups": {"mine": {}}, "features": ["mine"]}, "groups.mine: value should have at least 1 item"),
        ({"groups": {"mine": {"a": [1]}}}, "groups.mine.a"),
        ({"groups": {"mine": {0: []}}}, "groups.mine.0"),
        ({"groups": {"mine": {0: [1, [2, 3]]}}}, "groups.mine.0"),
    ],
)
def test_what_is_no_group(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Study(model="tiny-mamba2", **options)
    assert message in explain(caught.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({0: [4]}, "the feature group 'mine': layer 0 has no feature 4; it has heads 0 to 3"),
        ({4: [1]}, "'mine' names layer 4; the SSM layers of this model are"),
    ],
)
def test_groups_that_the_model_does_not_have(
    tiny: Scene, tmp_path: Path, group: dict[int, list[int]], message: str
) -> None:
    with pytest.raises(FeatureError, match=message):
        run_study(tiny.study(groups={"mine": group}, features=["mine"]), tmp_path)
    assert not any(tmp_path.iterdir())
