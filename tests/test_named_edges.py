"""Edges that no prompt has: a swapped source and target is an error, not a table of zeros."""

from pathlib import Path

import numpy as np
import pytest
from commands import run
from tiny_flow import World, world

import ssm_interp as si
from ssm_interp.flow import FlowError, NoEdgesError, NoEdgesWarning, Study, check_study, run_study, sweep, token_map
from ssm_interp.prompts import save_prompts

SWAPPED = "no edge last -> subject in any of the 6 prompts: .* did you swap source and target\\? subject -> last has"


@pytest.fixture(scope="module")
def scene() -> World:
    """No subject at the end, so that no subject token reads the last one."""
    tiny = world("mamba2", count=14)
    prompts = [p for p in tiny.prompts if not p.text.endswith(p.subject)][:6]
    assert len(prompts) == 6 and {p.subject_span[0] == 0 for p in prompts} == {True, False}
    return World(tiny.model, tiny.tokenizer, prompts, [])


@pytest.fixture(scope="module")
def folder(scene: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("swap")
    scene.model.save_pretrained(place / "tiny")
    scene.tokenizer.save_pretrained(place / "tiny")
    save_prompts(scene.prompts, place / "facts.jsonl")
    return place


def test_a_sweep_of_edges_that_no_prompt_has_is_refused(scene: World) -> None:
    with si.attach(scene.model) as ssm:
        with pytest.raises(NoEdgesError, match=SWAPPED) as caught:
            sweep(ssm, scene.tokenizer, scene.prompts, sources=["last"], targets=["subject"])
        assert isinstance(caught.value, FlowError)
        text = scene.prompts[0].text
        end = len(text.split()) - 1
        assert f"in {text!r} the role last is at position {end}, the role subject is at position" in str(caught.value)
        with pytest.raises(NoEdgesError, match="no edge 40 -> last .* token 40 is at no position, .* name other roles"):
            sweep(ssm, scene.tokenizer, scene.prompts, sources=[40])
        first = next(p for p in scene.prompts if p.subject_span[0] == 0)
        with pytest.raises(NoEdgesError, match="the role context is at no position"):
            token_map(ssm, scene.tokenizer, first, target="context")
        with pytest.raises(NoEdgesError, match=SWAPPED):
            sweep(ssm, scene.tokenizer, scene.prompts, sources=["last"], targets=["subject"], full_answer=True)


def test_edges_that_some_have_are_swept_and_those_that_none_has_are_named(scene: World) -> None:
    options = {"sources": ["subject", "last"], "targets": ["subject"], "windows": 2}
    with si.attach(scene.model) as ssm:
        with pytest.warns(NoEdgesWarning, match="none of the 6 prompts has an edge last -> subject "):
            frame = sweep(ssm, scene.tokenizer, scene.prompts, **options).frame
        alone = sweep(
            ssm, scene.tokenizer, scene.prompts, sources=["last"], targets=["subject"], allow_no_edges=True, windows=2
        ).frame
        some = sweep(ssm, scene.tokenizer, scene.prompts, sources=["context"], windows=2, batch_size=1)
    assert (frame[frame["source"] == "last"]["n_edges"] == 0).all()
    assert (frame[frame["source"] == "subject"]["n_edges"] > 0).all()
    np.testing.assert_allclose(alone["p"], alone["p_base"], rtol=1e-9)
    without = sum(p.subject_span[0] == 0 for p in scene.prompts)
    assert set(some.summary()["n_empty"]) == {without} and 0 < without < 6


def test_a_study_is_refused_before_anything_is_written_and_a_shard_without_edges_is_not(
    folder: Path, scene: World, tmp_path: Path
) -> None:
    options = {"model": str(folder / "tiny"), "facts": str(folder / "facts.jsonl"), "device": "cpu", "windows": [2]}
    swapped = Study(**options, sources=["last"], targets=["subject"])
    with pytest.raises(NoEdgesError, match=SWAPPED):
        run_study(swapped, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(NoEdgesError, match=SWAPPED):
        check_study(swapped)
    context = Study(**options, sources=["context"], shard_size=1)
    found = run_study(context, tmp_path / "out")
    assert sorted(found.frame["n_edges"].gt(0).unique()) == [False, True]


def test_the_command_line_says_so(folder: Path, scene: World, tmp_path: Path) -> None:
    model = ["--model", folder / "tiny", "--facts", folder / "facts.jsonl", "--window", 2]
    swapped = run("flow", *model, "--source", "last", "--target", "subject", "--out", tmp_path / "a")
    assert (swapped.exit_code, swapped.stdout) == (2, "")
    assert swapped.stderr.startswith("error: there is no edge last -> subject in any of the 6 prompts")
    some = run(
        "flow", *model, "--source", "subject", "--source", "last", "--target", "subject", "--out", tmp_path / "b"
    )
    assert some.exit_code == 0, some.output
    assert some.stderr.startswith("warning: none of the 6 prompts has an edge last -> subject")
    assert "6 of 6" in some.stdout and "without" in some.stdout
    starts = [p.id for p in scene.prompts if p.subject_span[0] == 0]
    others = [p.id for p in scene.prompts if p.subject_span[0]]
    out = ["--reader", "context", "--out", tmp_path / "x.png"]
    none = run("heatmap", *starts, *model, *out)
    assert none.exit_code == 2 and "the role context is at no position" in none.stderr
    two = run("heatmap", starts[0], others[0], *model, *out)
    assert two.exit_code == 0, two.output
    assert two.stdout.startswith(f"left out 1 of 2 prompts, in which no token is context: {starts[0]}\nwrote ")


def test_a_recipe_names_the_key(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "x.toml"
    recipe.write_text(f"""title = "x"

[model]
names = ["{folder / "tiny"}"]

[prompts]
facts = "{folder / "facts.jsonl"}"

[[sweep]]
sources = ["last"]
targets = ["subject"]

[plot]
kind = "flow"
""")
    found = run("run", recipe, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert found.stderr.startswith(f"error: {recipe}, line 10: sweep.sources: ")
    assert "there is no edge last -> subject in any of the 6 prompts" in found.stderr
    assert not (tmp_path / "out").exists()
