"""Feature groups of a study: by statistics that depend on its prompts, and of a user's own."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from tiny_study import Scene, rewrite, scene

import ssm_interp as si
from ssm_interp.features import FeatureError, feature_groups, spectrum
from ssm_interp.flow import Study, explain, run_study, sweep
from ssm_interp.flow.study_held import held_on, measured
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


def test_edits_that_are_held_on_act_on_features_and_on_groups_of_them(tiny: Scene) -> None:
    model, tokenizer = load(tiny.options["model"])
    asked = [tokenize(prompt, tokenizer) for prompt in load_prompts(tiny.options["facts"])]
    own = si.ScaleFeatures(factor=0.5, features=[1, 3], layers=2)
    ranked = si.ScaleFeatures(factor=0.0, features=BY_DATA, layers=[1])
    study = tiny.study(held=[own.to_dict(), ranked, {"kind": "SetDelta", "value": 1, "features": "top half"}])
    assert study.held[:2] == (own, ranked)
    assert Study.model_validate_json(study.model_dump_json()) == study
    with si.attach(model) as ssm:
        statistics = measured(ssm, asked, [edit.features for edit in study.held])
        assert list(statistics) == ["half-life"]
        assert measured(ssm, asked, ["all", "top third"]) == {}
        slow = feature_groups(ssm, [BY_DATA], statistics=statistics)[BY_DATA]
        top = feature_groups(ssm, ["top half"])["top half"]
        assert held_on(study.held, ssm, statistics) == [
            own,
            si.ScaleFeatures(factor=0.0, features=slow[1], layers=1),
            *(si.SetDelta(value=1.0, features=top[layer], layers=layer) for layer in range(4)),
        ]


def test_the_table_says_what_was_held_on(tiny: Scene, tmp_path: Path) -> None:
    edit = si.Knockout(sources=-2, targets=-1, layers=[0])
    study = tiny.study(held=[edit], sources=["subject"], windows=[2], features=["all"])
    found = run_study(study, tmp_path)
    assert set(found.frame["model"]) == {f"{tiny.options['model']}, under Knockout layers 0 sources -2 targets -1"}
    model, tokenizer = load(tiny.options["model"], dtype=torch.float64)
    with si.attach(model) as ssm, ssm.edit(edit):
        prompts = load_prompts(tiny.options["facts"])
        whole = sweep(ssm, tokenizer, prompts, sources=["subject"], windows=2, name=study.label).frame
    labels = ["prompt_id", "model", "source", "target", "layer", "n_edges"]
    pd.testing.assert_frame_equal(found.frame[labels], whole[labels])
    for name in ("p_base", "p"):  # the host computes in fp32 in places
        pd.testing.assert_series_equal(found.frame[name], whole[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"features": ["top half by halflife"]},
            "features: 'top half by halflife': there is no statistic 'half",
        ),
        ({"groups": {"mine": {0: [1]}}, "features": ["mien"]}, "features: there is no feature group 'mien'"),
        ({"groups": {"mine": {0: [1]}}, "features": ["mien"]}, ", or one of its own groups: mine"),
        ({"groups": {"top third": {0: [1]}}}, "groups: 'top third' is the name of a group by rank; give yours another"),
        ({"groups": {"all": {0: [1]}}}, "groups: 'all' is the name of a group by rank"),
        ({"groups": {"mine": {}}, "features": ["mine"]}, "groups.mine: it should have at least 1 item"),
        ({"groups": {"mine": {"a": [1]}}}, "groups.mine.a"),
        ({"groups": {"mine": {0: []}}}, "groups.mine.0"),
        ({"groups": {"mine": {0: [1, [2, 3]]}}}, "groups.mine.0"),
        ({"held": [{"kind": "SetDleta"}]}, "held.kind: there is no \"SetDleta\" to hold on: did you mean 'SetDelta'?"),
        ({"held": [{"factor": 1}]}, 'held: its kind is missing: it is "Knockout", "ScaleFeatures", "SetDelta" or'),
        ({"held": [{"kind": "PatchState", "position": -1, "state": 0}]}, 'held.kind: there is no "PatchState" to hold'),
        ({"held": [{"kind": "SetDelta", "value": -1}]}, "held.value: SetDelta.value must be a step >= 0, got -1"),
        ({"held": [{"kind": "SetDelta", "value": 1, "features": "top thrd"}]}, "held.features: there is no feature"),
        ({"held": [{"kind": "Knockout", "sources": 3}]}, "held.sources: 3 is not at one place in prompts of several"),
        ({"held": ["SetDelta"]}, "held: it should be a table with a kind, such as ScaleFeatures, got "),
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
