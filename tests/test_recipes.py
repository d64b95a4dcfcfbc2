"""The recipes that are shipped: each is run, those for hub models on small random models of the same class."""

import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_recipes import IDS, family, zoo
from typer.testing import CliRunner, Result

import ssm_interp as si
from ssm_interp import cli
from ssm_interp.flow import FlowResult, summarise, sweep
from ssm_interp.models import EMBEDDED
from ssm_interp.prompts import load_prompts, save_prompts
from ssm_interp.recipes import Recipe, RecipeError, key_lines, read_recipe, run_recipe

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "hooks").glob("*.toml"))
RECIPE = """\
title = "A title"

[model]
names = ["tiny-mamba2"]

[facts]
source = "geo"
limit = 6

[[operation]]
kind = "Knockout"
sources = ["subject"]
targets = ["last"]

[sweep]
windows = [4]

[plot]
kind = "flow"
formats = ["svg"]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by family, facts.jsonl beside them."""
    return zoo(tmp_path_factory.mktemp("zoo"))


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["run", *map(str, words)])


def written(folder: Path, text: str, name: str = "x.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path.stem.startswith("tiny-")], ids=lambda path: path.stem
)
def test_recipes_for_the_embedded_models_run(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    assert set(recipe.model.names) <= set(EMBEDDED)
    less = [] if recipe.plot.kind == "heatmap" else ["--limit", 4]
    check(run(path, *less, "--out", tmp_path), recipe, recipe.model.names, tmp_path)
    assert (tmp_path / "recipe.toml").read_text().endswith(path.read_text())


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if not path.stem.startswith("tiny-")], ids=lambda path: path.stem
)
def test_recipes_for_hub_models_run_on_random_ones_of_the_same_class(
    path: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = read_recipe(path)
    assert recipe.facts.source == "counterfact"
    folders = []
    for hub_id in recipe.model.names:
        folders.append(tmp_path / hub_id.rpartition("/")[2])
        folders[-1].symlink_to(models[family(hub_id)], target_is_directory=True)
    facts = models["mamba"].parent / "facts.jsonl"
    instead = [word for folder in folders for word in ("--model", folder)] + ["--facts", facts]
    less = [] if recipe.plot.kind == "heatmap" else ["--limit", 3]
    out = tmp_path / "out"
    check(run(path, *instead, *less, "--out", out), recipe, list(map(str, folders)), out)


def check(done: Result, recipe: Recipe, models: list[str], out: Path) -> None:
    """Everything that a recipe names is in the table, on the screen and in the pictures."""
    assert done.exit_code == 0, done.output
    frame = FlowResult.load(out / "table.parquet").frame
    assert list(frame["model"].unique()) == models
    knockouts = recipe.knockouts.values()
    edges = {(source, target) for one in knockouts for source in one.sources or () for target in one.targets}
    if recipe.plot.kind == "heatmap":
        edges = {(str(position), "last") for position in range(int(frame["source"].astype(int).max()) + 1)}
        assert set(frame["prompt_id"]) == set(recipe.plot.prompts)
    assert set(zip(frame["source"], frame["target"], strict=True)) == edges
    assert set(frame["feature_group"]) == {group for one in knockouts for group in one.features}
    assert set(frame["window_size"]) == set(recipe.sweep.windows or ())
    assert np.isfinite(frame["p"]).all()
    assert frame["p"].ne(frame["p_base"]).any()
    for suffix, start in {"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!DOCTYPE html>"}.items():
        files = list(out.glob(f"{recipe.plot.kind}*.{suffix}"))
        assert len(files) == (len(models) if recipe.plot.kind == "heatmap" and suffix != "html" else 1)
        assert all(file.read_bytes().startswith(start) for file in files)
    assert recipe.title in (out / f"{recipe.plot.kind}.html").read_text()
    for model in models:
        assert model[:20] in done.stdout


def test_the_papers_studies_are_all_there() -> None:
    recipes = {path.stem: read_recipe(path) for path in SHIPPED}
    assert 10 <= len(recipes) <= 14
    sizes = {name: recipes[name].model.names for name in ("mamba1", "mamba2", "gpt2")}
    assert {name: len(hub_ids) for name, hub_ids in sizes.items()} == {"mamba1": 4, "mamba2": 3, "gpt2": 3}
    for name in sizes:
        assert recipes[name].knockouts[0].sources == ["subject", "relation", "first", "last"]
        assert recipes[name].sweep.windows == [9]
    assert recipes["windows"].sweep.windows == [1, 3, 5, 9, 12, 15]
    assert {target for one in recipes["targets"].knockouts.values() for target in one.targets} == {
        "subject",
        "relation",
    }
    assert recipes["heatmaps"].plot.prompts == IDS[:4]
    for name in ("features", "tiny-features"):
        groups = {"all", "top third", "bottom third", "all but top third", "all but bottom third"}
        assert set(recipes[name].knockouts[0].features) == groups
    assert all(recipe.description for recipe in recipes.values())


def test_operations_of_one_model_make_one_table(tmp_path: Path) -> None:
    more = '[[operation]]\nkind = "Knockout"\nsources = ["context"]\ntargets = ["subject"]\n\n[sweep]'
    findings = run_recipe(read_recipe(written(tmp_path, RECIPE.replace("[sweep]", more))), tmp_path / "out")
    model, tokenizer = si.load("tiny-mamba2")
    asked = [prompt for prompt in load_prompts() if prompt.id in set(findings.result.frame["prompt_id"])]
    with si.attach(model) as ssm:
        parts = [
            sweep(ssm, tokenizer, asked, sources=[source], targets=[target], window=4, name="tiny-mamba2").frame
            for source, target in (("subject", "last"), ("context", "subject"))
        ]
    pd.testing.assert_frame_equal(findings.result.frame, pd.concat(parts, ignore_index=True))
    assert len(findings.result.runs) == 1


def test_named_operations_stand_beside_each_other(tmp_path: Path) -> None:
    other = '[[operation]]\nname = "itself"\nkind = "Knockout"\nsources = ["last"]\ntargets = ["last"]\n\n[sweep]'
    findings = run_recipe(read_recipe(written(tmp_path, RECIPE.replace("[sweep]", other))), tmp_path)
    assert [run.model for run in findings.result.runs] == ["tiny-mamba2", "tiny-mamba2, itself"]
    assert findings.result.frame.groupby("model")["source"].unique().map(list).to_dict() == {
        "tiny-mamba2": ["subject"],
        "tiny-mamba2, itself": ["last"],
    }


def test_edits_that_are_held_on_are_at_work_in_every_run(tmp_path: Path) -> None:
    held = '[[operation]]\nkind = "ScaleFeatures"\nfactor = 0.3\nfeatures = "top third"\nlayers = [1, 2]\n\n'
    held += '[[operation]]\nkind = "SetDelta"\nvalue = 0.01\nlayers = [0]\n\n[sweep]'
    findings = run_recipe(read_recipe(written(tmp_path, RECIPE.replace("[sweep]", held))), tmp_path / "out")
    found = findings.result
    assert found.runs[0].engine == "full forwards: other edits are at work"
    model, tokenizer = si.load("tiny-mamba2")
    asked = [prompt for prompt in load_prompts() if prompt.id in set(found.frame["prompt_id"])]
    with si.attach(model) as ssm:
        top = si.features.feature_groups(ssm, ["top third"])["top third"]
        edits = [si.ScaleFeatures(factor=0.3, features=top[layer], layers=layer) for layer in (1, 2)]
        plain = sweep(ssm, tokenizer, asked, sources=["subject"], window=4)
        with ssm.edit(*edits, si.SetDelta(value=0.01, layers=0)):
            expected = sweep(ssm, tokenizer, asked, sources=["subject"], window=4, name="tiny-mamba2")
    pd.testing.assert_frame_equal(found.frame, expected.frame)
    assert not np.allclose(plain.frame["p_base"].mean(), found.frame["p_base"].mean())


def test_metrics_say_what_is_drawn(models: dict[str, Path], tmp_path: Path) -> None:
    facts = load_prompts(models["mamba"].parent / "facts.jsonl")
    own = '[metrics]\nstatistic = "median"\ninterval = "bootstrap"\nlevel = 0.8\n\n[plot]'
    recipe = read_recipe(
        written(tmp_path, RECIPE.replace("[plot]", own)),
        {"model.names": [str(models["mamba"])], "facts.source": str(models["mamba"].parent / "facts.jsonl")},
    )
    findings = run_recipe(recipe, tmp_path / "out")
    expected = summarise(findings.result.frame, level=0.8, interval="bootstrap")
    pd.testing.assert_frame_equal(findings.summary(), expected)
    assert expected["n"].eq(len(facts)).all()
    assert "median over prompts" in findings.write(tmp_path / "out")[1].read_text()


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
    given = {"model.names": names, "facts.source": str(tmp_path / "facts.jsonl")}
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
    given = {"model.names": names, "facts.source": str(tmp_path / "facts.jsonl")}
    findings = run_recipe(read_recipe(written(tmp_path, text), given), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"line 19: metrics.prompts: no prompt is answered by all of the models"):
        findings.summary()


def test_a_heat_map_shows_each_token_of_a_prompt(tmp_path: Path) -> None:
    ids = ["capital/France/0", "capital/Japan/1"]
    text = RECIPE.replace('sources = ["subject"]\n', "").replace("limit = 6\n", "").replace("[4]", "[3, 5]")
    text = text.replace('"flow"', f'"heatmap"\nprompts = ["{ids[0]}", "{ids[1]}"]')
    findings = run_recipe(read_recipe(written(tmp_path, text)), tmp_path / "out")
    assert findings.unanswered == ()
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
    with si.attach(model) as ssm, ssm.edit(si.Knockout(sources=1, targets=-1, layers=[2, 3, 4])):
        p = float(model(**inputs).logits[0, -1].softmax(-1)[target])
    np.testing.assert_allclose(one.values[1, 2], p - one.p_base, atol=1e-5)


def test_prompts_that_a_heat_map_cannot_show_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = load_prompts(models["mamba"].parent / "facts.jsonl")
    wrong = si.Prompt(prompts[0].text, prompts[0].subject, "dun", id="wrong")
    save_prompts([prompts[0], wrong], tmp_path / "facts.jsonl")
    options = ["--model", models["mamba"], "--facts", tmp_path / "facts.jsonl"]
    done = run(ROOT / "hooks" / "heatmaps.toml", *options, "--prompt", "18566", "--prompt", "wrong", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert f"not shown, since it is answered wrongly: {models['mamba']}: wrong" in done.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            RECIPE.replace("[4]", "[4, 11]"),
            "line 16: sweep.windows: a window of 11 layers does not fit: this model has 10",
        ),
        (RECIPE.replace("tiny-mamba2", "./nowhere"), "line 4: model.names: './nowhere' is not a folder"),
        (RECIPE.replace('"geo"', '"nowhere.csv"'), "line 7: facts.source: there is no prompt file 'nowhere.csv'"),
        (
            RECIPE.replace("tiny-mamba2", "tiny-llama").replace("[sweep]", 'features = ["top third"]\n[sweep]'),
            "line 15: operation.features: LlamaForCausalLM has no SSM layers",
        ),
        (
            RECIPE.replace("[sweep]", 'through = ["attention"]\n[sweep]'),
            "line 15: operation.through: Mamba2ForCausalLM has no attention layers",
        ),
        (
            RECIPE.replace('sources = ["subject"]\n', "")
            .replace("limit = 6\n", "")
            .replace('"flow"', '"heatmap"\nprompts = ["capital/Frnce/0"]'),
            "line 18: plot.prompts: there is no prompt 'capital/Frnce/0' among these 2571; there are 'capital/Fra",
        ),
        (
            RECIPE.replace("[sweep]", '[[operation]]\nkind = "SetDelta"\nvalue = 0\nlayers = [10]\n[sweep]'),
            "operation.through: SetDelta: no such layer [10]",
        ),
    ],
)
def test_what_only_the_model_or_the_facts_forbid_names_its_line_too(tmp_path: Path, text: str, message: str) -> None:
    done = run(written(tmp_path, text), "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_place_of_what_is_written(tmp_path: Path) -> None:
    path = written(tmp_path, RECIPE)
    done = run(path, "--model", "tiny-mamba1", "--limit", 3, "--window", 2, "--window", 3, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "of 3 prompts answered" in done.stdout
    frame = FlowResult.load(tmp_path / "out" / "table.parquet").frame
    assert (set(frame["model"]), set(frame["window_size"])) == ({"tiny-mamba1"}, {2, 3})
    copy = (tmp_path / "out" / "recipe.toml").read_text()
    assert copy.splitlines()[:2] == ['# run with model.names = ["tiny-mamba1"]', "# run with facts.limit = 3"]
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
    shard = next((tmp_path / "x" / "operation-1" / "tiny-mamba2" / "shards").glob("*"))
    made = shard.stat().st_mtime_ns
    again = run(path)
    assert again.stdout == first.stdout
    assert shard.stat().st_mtime_ns == made
    assert (tmp_path / "x" / "table.parquet").read_bytes() == table
    changed = run(path, "--window", 2)
    assert changed.exit_code == 2
    assert "windows (stored: [4], given: [2])" in changed.stderr


def test_the_page_on_recipes_names_every_key_and_its_example_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    example = page.split("```toml\n")[1].split("```")[0]
    assert read_recipe(written(tmp_path, example)).knockouts
    assert ("plot", "formats") in key_lines(example)
    for section in Recipe.model_json_schema()["$defs"].values():
        for key in section["properties"]:
            assert f"`{key}`" in page, key
    for path in SHIPPED:
        assert f"`{path.name}`" in page
        assert tomllib.loads(path.read_text())
