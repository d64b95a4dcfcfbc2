"""What running a recipe finds and writes, and what it refuses."""

from functools import partial
from pathlib import Path

import commands
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_recipes import zoo

import ssm_interp as si
from ssm_interp.flow import FlowResult, summarise, sweep
from ssm_interp.prompts import load_prompts, save_prompts
from ssm_interp.recipes import RecipeError, read_recipe, run_recipe

ROOT = Path(__file__).parents[1]
RECIPE = """\
title = "A title"

[model]
names = ["tiny-mamba2"]

[prompts]
facts = "geo"
limit = 6

[[sweep]]
sources = ["subject"]
targets = ["last"]
windows = [4]

[plot]
kind = "flow"
formats = ["svg"]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by family, facts.jsonl beside them."""
    return zoo(tmp_path_factory.mktemp("zoo"))


run = partial(commands.run, "run")


def written(folder: Path, text: str, name: str = "x.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_sweeps_of_one_model_make_one_table(tmp_path: Path) -> None:
    more = '[[sweep]]\nsources = ["context"]\ntargets = ["subject"]\nwindows = [4]\n\n[plot]'
    findings = run_recipe(read_recipe(written(tmp_path, RECIPE.replace("[plot]", more))), tmp_path / "out")
    model, tokenizer = si.load("tiny-mamba2")
    asked = [prompt for prompt in load_prompts() if prompt.id in set(findings.result.frame["prompt_id"])]
    with si.attach(model) as ssm:
        parts = [
            sweep(ssm, tokenizer, asked, sources=[source], targets=[target], windows=4, name="tiny-mamba2").frame
            for source, target in (("subject", "last"), ("context", "subject"))
        ]
    pd.testing.assert_frame_equal(findings.result.frame, pd.concat(parts, ignore_index=True))
    assert len(findings.result.runs) == 1


def test_named_sweeps_stand_beside_each_other(tmp_path: Path) -> None:
    other = '[[sweep]]\nname = "itself"\nsources = ["last"]\nwindows = [2]\n\n[plot]'
    findings = run_recipe(read_recipe(written(tmp_path, RECIPE.replace("[plot]", other))), tmp_path)
    assert [run.model for run in findings.result.runs] == ["tiny-mamba2", "tiny-mamba2, itself"]
    assert findings.result.frame.groupby("model")["source"].unique().map(list).to_dict() == {
        "tiny-mamba2": ["subject"],
        "tiny-mamba2, itself": ["last"],
    }
    assert [run.windows for run in findings.result.runs] == [(4,), (2,)]


def test_edits_that_are_held_on_are_at_work_in_every_run(tmp_path: Path) -> None:
    held = '[[held]]\nkind = "ScaleFeatures"\nfactor = 0.3\nfeatures = "top third"\nlayers = [1, 2]\n\n'
    held += '[[held]]\nkind = "SetDelta"\nvalue = 0.01\nlayers = [0]\n\n[plot]'
    text = RECIPE.replace("[plot]", held).replace('["svg"]', '["svg", "html"]')
    findings = run_recipe(read_recipe(written(tmp_path, text)), tmp_path / "out")
    found = findings.result
    label = (
        "tiny-mamba2, under ScaleFeatures layers 1 2 features top third factor 0.3, under SetDelta layers 0 value 0.01"
    )
    _, svg, page = findings.write(tmp_path / "out")
    assert "edited: ScaleFeatures layers 1 2 features top third factor 0.3; SetDelta" in svg.read_text()
    assert "tiny-mamba2, edited" in svg.read_text()
    assert "edited: ScaleFeatures" in page.read_text()
    assert found.runs[0].engine == "full forwards: other edits are at work"
    model, tokenizer = si.load("tiny-mamba2")
    asked = [prompt for prompt in load_prompts() if prompt.id in set(found.frame["prompt_id"])]
    with si.attach(model) as ssm:
        top = si.features.feature_groups(ssm, ["top third"])["top third"]
        edits = [si.ScaleFeatures(factor=0.3, features=top[layer], layers=layer) for layer in (1, 2)]
        plain = sweep(ssm, tokenizer, asked, sources=["subject"], windows=4)
        with ssm.edit(*edits, si.SetDelta(value=0.01, layers=0)):
            expected = sweep(ssm, tokenizer, asked, sources=["subject"], windows=4, name=label)
    pd.testing.assert_frame_equal(found.frame, expected.frame)
    assert not np.allclose(plain.frame["p_base"].mean(), found.frame["p_base"].mean())


def test_metrics_say_what_is_drawn(models: dict[str, Path], tmp_path: Path) -> None:
    facts = load_prompts(models["mamba"].parent / "facts.jsonl")
    own = '[metrics]\nstatistic = "median"\ninterval = "bootstrap"\nlevel = 0.8\n\n[plot]'
    recipe = read_recipe(
        written(tmp_path, RECIPE.replace("[plot]", own)),
        {"model.names": [str(models["mamba"])], "prompts.facts": str(models["mamba"].parent / "facts.jsonl")},
    )
    findings = run_recipe(recipe, tmp_path / "out")
    expected = summarise(findings.result.frame, level=0.8, interval="bootstrap")
    pd.testing.assert_frame_equal(findings.summary(), expected)
    assert expected["n"].eq(len(facts)).all()
    assert "median over prompts" in findings.write(tmp_path / "out")[1].read_text()


def test_a_picture_of_streams_has_a_line_per_sweep(tmp_path: Path) -> None:
    start, end = RECIPE.index("[[sweep]]"), RECIPE.index("[plot]")
    parts = [f'name = "{name}"\nthrough = ["{name}"]\n\n' for name in ("ssm", "conv")]
    text = RECIPE[:start] + "".join(RECIPE[start:end].rstrip() + "\n" + part for part in parts) + RECIPE[end:]
    recipe = read_recipe(written(tmp_path, text.replace('"flow"', '"streams"')))
    findings = run_recipe(recipe, tmp_path / "out")
    svg = findings.write(tmp_path / "out")[1]
    assert svg.name == "streams.svg"
    (figure,) = findings._figures().values()
    assert figure.get_suptitle() == "tiny-mamba2   (6 prompts, 3 by first token)"
    summary = findings.summary()
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    for name in ("ssm", "conv"):
        expected = summary.loc[summary["model"] == f"tiny-mamba2, {name}", "mean"]
        np.testing.assert_allclose(lines[name].get_ydata(), expected)


def test_common_prompts_are_those_that_all_models_answer(models: dict[str, Path], tmp_path: Path) -> None:
    shared = load_prompts(models["mamba"].parent / "facts.jsonl")
    model, tokenizer = si.load(models["mamba"])
    words = ["ban", "bas", "bat", "bal", "bax"]
    answers = {
        text: "" for text in (f"{a} {b} {c}" for a in words for b in words for c in words if len({a, b, c}) == 3)
    }
    for text in answers:
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        answers[text] = tokenizer.convert_ids_to_tokens(int(logits[1:].argmax()) + 1)
    more = [si.Prompt(text, text.split()[0], answer, id=text) for text, answer in answers.items()]
    save_prompts([*shared, *more], tmp_path / "facts.jsonl")
    text = RECIPE.replace("[plot]", '[metrics]\nprompts = "common"\n\n[plot]').replace("limit = 6", "limit = 0")
    names = [str(models[name]) for name in ("mamba", "gpt2")]
    given = {"model.names": names, "prompts.facts": str(tmp_path / "facts.jsonl")}
    recipe = read_recipe(written(tmp_path, text), given)
    findings = run_recipe(recipe, tmp_path / "out")
    answered = [set(part["prompt_id"]) for _, part in findings.result.frame.groupby("model")]
    assert answered[0] != answered[1]
    assert set(findings.shown.frame["prompt_id"]) == answered[0] & answered[1]
    assert findings.summary()["n"].eq(len(answered[0] & answered[1])).all()
    assert {run.kept for run in findings.shown.runs} == {len(answered[0] & answered[1])}


def test_no_common_prompt_is_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    own = {}
    for name in ("mamba", "mamba2"):
        model, tokenizer = si.load(models[name])
        own[name] = tokenizer.convert_ids_to_tokens(
            int(model(**tokenizer("ban bas", return_tensors="pt")).logits[0, -1].argmax())
        )
    assert len(set(own.values())) == 2
    save_prompts([si.Prompt("ban bas", "bas", word, id=word) for word in own.values()], tmp_path / "facts.jsonl")
    text = RECIPE.replace("[plot]", '[metrics]\nprompts = "common"\n\n[plot]')
    names = [str(models[name]) for name in own]
    given = {"model.names": names, "prompts.facts": str(tmp_path / "facts.jsonl")}
    findings = run_recipe(read_recipe(written(tmp_path, text), given), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"line 16: metrics.prompts: no prompt is answered by all of the models"):
        findings.summary()


def test_a_heat_map_shows_each_token_of_a_prompt(tmp_path: Path) -> None:
    ids = ["capital/France/0", "capital/Japan/1"]
    text = RECIPE.replace('sources = ["subject"]\n', "").replace("limit = 6\n", "").replace("[4]", "[3, 5]")
    text = text.replace('"flow"', f'"heatmap"\nprompts = ["{ids[0]}", "{ids[1]}"]')
    findings = run_recipe(read_recipe(written(tmp_path, text)), tmp_path / "out")
    assert [(label, "windows of 3" in one.title) for label, one in findings.maps] == [
        ("tiny-mamba2", size == 3) for _ in ids for size in (3, 5)
    ]
    one = findings.maps[2][1]
    assert one.tokens[:2] == ("In", " Japan")
    assert list(one.subject) == [1]
    model, tokenizer = si.load("tiny-mamba2")
    inputs = tokenizer("In Japan the seat of government is the capital, the city of", return_tensors="pt")
    target = tokenizer(" Tokyo")["input_ids"][0]
    assert one.values.shape == (inputs["input_ids"].shape[1], 8)
    with torch.no_grad(), si.attach(model) as ssm, ssm.edit(si.Knockout(sources=1, targets=-1, layers=[2, 3, 4])):
        p = float(model(**inputs).logits[0, -1].softmax(-1)[target])
    np.testing.assert_allclose(one.values[1, 2], p - one.p_base, atol=1e-5)


def test_a_heat_map_shows_prompts_that_are_answered_wrongly_too(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = load_prompts(models["mamba"].parent / "facts.jsonl")
    word = next(word for word in ("ban", "bas") if word != prompts[0].answer)
    wrong = si.Prompt(prompts[0].text, prompts[0].subject, word, id="wrong")
    save_prompts([prompts[0], wrong], tmp_path / "facts.jsonl")
    options = ["--model", models["mamba"], "--facts", tmp_path / "facts.jsonl"]
    done = run(ROOT / "hooks" / "heatmaps.toml", *options, "--prompt", "wrong", "--prompt", "18566", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    frame = FlowResult.load(tmp_path / "table.parquet").frame
    assert set(frame["prompt_id"]) == {"18566", "wrong"}
    assert f" {word} " in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            RECIPE.replace("[4]", "[4, 11]"),
            "line 13: sweep.windows: tiny-mamba2: a window of 11 layers does not fit: this model has 10",
        ),
        (RECIPE.replace("tiny-mamba2", "./nowhere"), "line 4: model.names: './nowhere' is not a folder"),
        (RECIPE.replace('"geo"', '"nowhere.csv"'), "line 7: prompts.facts: there is no prompt file 'nowhere.csv'"),
        (
            RECIPE.replace("tiny-mamba2", "tiny-llama").replace("[plot]", 'features = ["top third"]\n[plot]'),
            "line 15: sweep.features: tiny-llama: LlamaForCausalLM has no SSM layers",
        ),
        (
            RECIPE.replace("[plot]", 'through = ["attention"]\n[plot]'),
            "line 15: sweep.through: tiny-mamba2: Mamba2ForCausalLM has no attention layers",
        ),
        (
            RECIPE.replace('sources = ["subject"]\n', "")
            .replace("limit = 6\n", "")
            .replace('"flow"', '"heatmap"\nprompts = ["capital/Frnce/0"]'),
            "line 15: plot.prompts: there is no prompt 'capital/Frnce/0' among these 2571; there are 'capital/Fra",
        ),
        (
            RECIPE.replace("[plot]", '[[held]]\nkind = "SetDelta"\nvalue = 0\nlayers = [10]\n[plot]'),
            "line 15: held: tiny-mamba2: SetDelta: no such layer [10]",
        ),
        (
            RECIPE.replace("[plot]", '[[held]]\nkind = "SetDelta"\nvalue = 0\n' * 2 + "[plot]"),
            "line 15: held: tiny-mamba2, under SetDelta value 0.0, under SetDelta value 0.0: layer 0: two",
        ),
        (RECIPE.replace('mamba2"', 'mamba2", "tiny-mamba3"'), "line 4: model.names: there is no model 'tiny-mamba3'"),
        (
            RECIPE.replace(
                "[plot]",
                '[[sweep]]\nsources = ["first"]\nwindows = [4]\nfeatures = ["mine"]\ngroups.mine = {0 = [1]}\n[plot]',
            ),
            "line 18: sweep.features: tiny-mamba2: the feature group 'mine' names no features for layer 1",
        ),
    ],
)
def test_what_only_the_model_or_the_facts_forbid_names_its_line_too(tmp_path: Path, text: str, message: str) -> None:
    done = run(written(tmp_path, text), "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_answers_nothing_is_named(tmp_path: Path) -> None:
    save_prompts([si.Prompt("The name of the capital city of France is", "France", "Rome")], tmp_path / "facts.jsonl")
    recipe = read_recipe(written(tmp_path, RECIPE), {"prompts.facts": str(tmp_path / "facts.jsonl")})
    with pytest.raises(RecipeError, match="line 4: model.names: tiny-mamba2: the model answers none of the 1 prompts"):
        run_recipe(recipe, tmp_path / "out")


def test_the_command_takes_the_place_of_what_is_written(tmp_path: Path) -> None:
    path = written(tmp_path, RECIPE)
    done = run(path, "--model", "tiny-mamba1", "--limit", 3, "--window", 2, "--window", 3, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "of 3 prompts answered" in done.stdout
    frame = FlowResult.load(tmp_path / "out" / "table.parquet").frame
    assert (set(frame["model"]), set(frame["window_size"])) == ({"tiny-mamba1"}, {2, 3})
    copy = (tmp_path / "out" / "recipe.toml").read_text()
    assert copy.splitlines()[:2] == ['# run with model.names = ["tiny-mamba1"]', "# run with prompts.limit = 3"]
    assert copy.endswith(RECIPE)
    refused = run(path, "--prompt", "x", "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "plot.prompts (given in place of the one in" in refused.stderr


def test_the_same_command_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, RECIPE)
    monkeypatch.chdir(tmp_path)
    first = run(path)
    assert first.exit_code == 0, first.output
    table = (tmp_path / "x" / "table.parquet").read_bytes()
    shard = next((tmp_path / "x" / "sweep-1" / "tiny-mamba2" / "shards").glob("*"))
    made = shard.stat().st_mtime_ns
    again = run(path)
    assert again.stdout == first.stdout
    assert shard.stat().st_mtime_ns == made
    assert (tmp_path / "x" / "table.parquet").read_bytes() == table
    changed = run(path, "--window", 2)
    assert changed.exit_code == 2
    assert "windows (stored: [4], given: [2])" in changed.stderr
