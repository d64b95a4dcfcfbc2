"""Studies: their options, their table, and what they refuse."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import disk_offload
from pydantic import ValidationError
from tiny_study import Scene, manifest, same, scene, shards

import ssm_interp as si
from ssm_interp.features import FeatureError, feature_groups
from ssm_interp.flow import (
    FlowError,
    NothingAnswered,
    Study,
    StudyError,
    check_study,
    explain,
    run_study,
    sweep,
)
from ssm_interp.flow import study_job as working
from ssm_interp.jobs import JobError
from ssm_interp.models import weights_hash
from ssm_interp.prompts import PromptError, load_prompts, save_prompts

CPU = {"model": "tiny-mamba2"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("study"))


def test_a_study_is_a_sweep_over_all_its_prompts(tiny: Scene) -> None:
    model, tokenizer = si.load(tiny.options["model"], dtype=torch.float64)
    with si.attach(model) as ssm:
        expected = sweep(
            ssm,
            tokenizer,
            load_prompts(tiny.options["facts"]),
            sources=["subject", "last"],
            windows=[1, 2],
            features=feature_groups(ssm, ["all", "top half"]),
            name=tiny.options["model"],
        )
    pd.testing.assert_frame_equal(tiny.result.frame, expected.frame, rtol=1e-9, atol=1e-9)
    assert tiny.result.runs == expected.runs
    assert (expected.runs[0].asked, expected.runs[0].kept) == (10, 8)


def test_shards_are_stored_with_what_the_study_is(tiny: Scene, tmp_path: Path) -> None:
    """Those without a right answer, too."""
    seen: list[tuple[int, int]] = []
    study = tiny.study(shard_size=1)
    result = run_study(study, tmp_path, progress=lambda done, total: seen.append((done, total)))
    pd.testing.assert_frame_equal(result.frame, tiny.result.frame, rtol=1e-9, atol=1e-9)
    stored = manifest(study, tmp_path)
    assert (stored["experiment"], stored["options"]["windows"]) == ("flow", [1, 2])
    assert len(stored["weights"]) == len(stored["prompts"]) == len(stored["measured features"]) == 64
    assert [path.stem for path in shards(study, tmp_path)] == list(stored["shards"])
    records = stored["shards"].values()
    assert [(record["asked"], record["kept"]) for record in records] == [(1, int(kept)) for kept in "1110011111"]
    assert sum(record["rows"] for record in records) == len(tiny.result.frame)
    assert seen == sorted(seen)
    assert seen[-1] == (10, 10)


def test_a_finished_study_is_read_and_not_computed(tiny: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "sweep", None)
    same(run_study(tiny.study(), tiny.folder), tiny.result)
    same(run_study(tiny.study(batch_size=1, max_memory="1GB", device="auto"), tiny.folder), tiny.result)


def test_a_study_without_any_right_answer_is_an_error(tiny: Scene, tmp_path: Path) -> None:
    save_prompts([prompt for prompt in load_prompts(tiny.options["facts"]) if "wrong" in prompt.id], tmp_path / "p")
    for _ in range(2):
        with pytest.raises(NothingAnswered, match="answers none of the 2 prompts correctly"):
            run_study(tiny.study(facts=str(tmp_path / "p"), shard_size=1), tmp_path)


def test_changed_options_are_refused_with_what_differs(tiny: Scene) -> None:
    with pytest.raises(JobError, match="what differs") as refusal:
        run_study(tiny.study(windows=[1, 3], align="centre", batch_size=3), tiny.folder)
    message = str(refusal.value)
    assert "windows (stored: [1, 2], given: [1, 3])" in message
    assert 'align (stored: "left", given: "centre")' in message
    assert "batch_size" not in message
    assert "sources" not in message


def test_changed_weights_and_prompts_are_refused(tiny: Scene, tmp_path: Path) -> None:
    model, tokenizer = si.load(tiny.options["model"], dtype=torch.float64)
    prompts = load_prompts(tiny.options["facts"])
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    save_prompts(prompts, tmp_path / "p")
    study = tiny.study(model=str(tmp_path / "tiny"), facts=str(tmp_path / "p"))
    run_study(study, tmp_path)
    save_prompts(prompts[1:], tmp_path / "p")
    with pytest.raises(JobError, match="what differs: the prompts"):
        run_study(study, tmp_path)
    save_prompts(prompts, tmp_path / "p")
    next(model.parameters()).data[0, 0] += 1
    model.save_pretrained(tmp_path / "tiny")
    with pytest.raises(JobError, match="what differs: the weights"):
        run_study(study, tmp_path)


def test_a_study_that_found_nothing_makes_room_for_another(tiny: Scene, tmp_path: Path) -> None:
    wrong = tiny.study(ids=["wrong p0", "wrong p1"])
    with pytest.raises(NothingAnswered):
        run_study(wrong, tmp_path)
    assert len(shards(wrong, tmp_path)) == 1
    same(run_study(tiny.study(), tmp_path), tiny.result)
    with pytest.raises(JobError, match="is another one; what differs: ids"):
        run_study(wrong, tmp_path)
    same(run_study(tiny.study(), tmp_path), tiny.result)


def test_a_study_keeps_the_memory_that_it_began_with(
    tiny: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def spy(*positional: Any, **options: Any) -> Any:
        given.append(options["max_memory"])
        return sweep(*positional, **options)

    monkeypatch.setattr(working, "sweep", spy)
    for free, study in ((10**6, tiny.study()), (10**7, tiny.study()), (10**7, tiny.study(max_memory="2MB"))):
        monkeypatch.setattr(working, "default_memory", lambda device, free=free: free)
        run_study(study, tmp_path)
        shards(study, tmp_path)[4].unlink()
    assert given == [10**6] * 6 + [2 * 10**6]


def test_rows_that_are_no_prompts_are_left_out_on_request(
    tiny: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Path(tiny.options["facts"]).read_text().splitlines()
    bad = ['{"text": "ban kit", "subject": "dus", "answer": "lox"}', '{"text": "ban", "subject": "ban", "answer": "q"}']
    (tmp_path / "p").write_text("\n".join([bad[0], *lines, bad[1]]))
    with pytest.raises(PromptError, match="p, line 1: the subject 'dus' occurs 0 times"):
        run_study(tiny.study(facts=str(tmp_path / "p")), tmp_path)
    with caplog.at_level(logging.WARNING):
        found = run_study(tiny.study(facts=str(tmp_path / "p"), skip_bad=True), tmp_path)
    assert "left out 1 rows that are no prompts and 1 prompts that the tokenizer cannot take" in caplog.messages[0]
    same(found, tiny.result)


def test_nothing_is_written_before_the_options_are_known_to_fit(tiny: Scene, tmp_path: Path) -> None:
    with pytest.raises(FlowError, match="a window of 9 layers does not fit"):
        run_study(tiny.study(windows=[1, 9]), tmp_path / "new")
    with pytest.raises(PromptError, match="there is no prompt file"):
        run_study(tiny.study(facts="missing.csv"), tmp_path / "new")
    with pytest.raises(StudyError, match="there is no device 'cuda:99'"):
        run_study(tiny.study(device="cuda:99"), tmp_path / "new")
    with pytest.raises(FeatureError, match="'mine' names no features for layer 1; give some for each"):
        run_study(tiny.study(groups={"mine": {0: [1]}}, features=["mine"]), tmp_path / "new")
    with pytest.raises(PromptError, match="prompts must have distinct ids; these occur more than once: a"):
        save_prompts([si.Prompt("ban dus", "dus", "lot", id="a")] * 2, tmp_path / "p")
        run_study(tiny.study(facts=str(tmp_path / "p")), tmp_path / "new")
    with pytest.raises(si.InterventionError, match="two SetDelta set the same step"):
        held = [{"kind": "SetDelta", "value": 0.5}, {"kind": "SetDelta", "value": 0.1}]
        run_study(tiny.study(held=held), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "tiny-mamba9"}, si.LoadError, "did you mean the embedded 'tiny-mamba"),
        ({"facts": "missing.csv"}, PromptError, "there is no prompt file"),
        ({"windows": [9]}, FlowError, "a window of 9 layers does not fit"),
        ({"through": ["attention"]}, si.InterventionError, "has no attention layers"),
        ({"groups": {"mine": {0: [1]}}, "features": ["mine"]}, FeatureError, "'mine' names no features for layer 1"),
        ({"groups": {"mine": {0: [9]}}, "features": ["mine"]}, FeatureError, "layer 0 has no feature 9"),
        ({"address": "auto"}, JobError, "address is given without workers"),
        ({"model": "tiny-llama", "facts": "geo", "features": ["top half"]}, FeatureError, "has no SSM layers"),
        ({"held": [{"kind": "SetDelta", "value": 1, "layers": [7]}]}, si.InterventionError, r"no such layer \[7\]"),
    ],
)
def test_a_study_is_checked_without_its_weights(
    tiny: Scene, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(working, "load", None)
    held = [{"kind": "ScaleFeatures", "factor": 0.5, "features": "top half by half-life"}]
    check_study(tiny.study(features=["top half by half-life"], held=held))
    with pytest.raises(error, match=message):
        check_study(tiny.study(**{"features": ["all"]} | options))


def test_studies_survive_json() -> None:
    study = Study(**CPU, windows=[3], sources=["subject", "4"], max_memory="4GB", columns={"text": "question"})
    assert Study.model_validate_json(study.model_dump_json()) == study
    assert study.sources == ("subject", 4)
    assert study.max_memory == 4_000_000_000
    how = {"device", "device_map", "batch_size", "max_memory", "workers", "gpus_per_worker", "address"}
    assert study.options().keys() == Study.model_fields.keys() - how


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": -1}, "limit: it should be greater than or equal to 0, got -1"),
        ({"windos": [3]}, "windos: there is no such key: did you mean 'windows'? a study has revision, dtype, facts,"),
        ({"window": 3}, "window: there is no such key: did you mean 'windows'?"),
        ({"sources": [True]}, "sources: it is a role, or a position counted from 0, not true"),
        ({"features": ["top half"], "through": ["conv"]}, "through: the convolution feeds all features together"),
        ({"groups": {"mine": {0: [1]}}}, "features: the group 'mine' is given and not used: name it in features"),
        ({"held": [{"kind": "SetDelta", "vlaue": 1}]}, "held.vlaue: there is no such key: did you mean 'value'?"),
        ({"workers": 0}, "workers: it should be greater than 0, got 0"),
        ({"gpus_per_worker": -1}, "gpus_per_worker: it should be greater than or equal to 0, got -1"),
        ({"windows": [0]}, "windows: it should be greater than 0, got 0"),
        ({"windows": []}, "windows: it should have at least 1 item"),
        ({"sources": ["subjct"]}, "sources: there is no role 'subjct': did you mean 'subject'?"),
        ({"sources": [-1]}, "sources: there is no position -1"),
        ({"targets": [3]}, "targets: it should be a valid string, got 3"),
        ({"features": ["tpo third"]}, "features: there is no feature group 'tpo third'"),
        ({"through": ["ss"]}, 'through: there is no "ss": did you mean \'ssm\'? it is "ssm", "conv" or "attention"'),
        ({"device": "gpu"}, "device: there is no device 'gpu'; give auto, cpu"),
        ({"device_map": "all"}, 'device_map: there is no "all": it is "auto", "balanced"'),
        ({"columns": {"txt": "a"}}, "columns: a prompt has no field 'txt' to read a column into: did you mean 'text'?"),
        ({"max_memory": "4XB"}, "max_memory: could not interpret byte unit: XB"),
    ],
)
def test_wrong_options_are_explained_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Study(**CPU | options)
    assert explain(error.value).startswith(message)
    assert "\n" not in explain(error.value)


def test_weights_have_one_hash_wherever_they_are(tmp_path: Path) -> None:
    model, tokenizer = si.load("tiny-mamba2")
    expected = weights_hash(model)
    assert weights_hash(si.load("tiny-mamba2", device_map="auto")[0]) == expected
    assert weights_hash(si.load("tiny-mamba2", dtype=torch.float64)[0]) != expected
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    assert weights_hash(model) == expected
    prompts = load_prompts()[:3]
    with si.attach(model) as ssm:
        found = sweep(ssm, tokenizer, prompts, sources=["subject"])
    model, tokenizer = si.load("tiny-mamba2")
    with si.attach(model) as ssm:
        pd.testing.assert_frame_equal(found.frame, sweep(ssm, tokenizer, prompts, sources=["subject"]).frame)
