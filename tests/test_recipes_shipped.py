"""The recipes that are shipped: each is run, those for hub models on small random models of the same class."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_recipes import IDS, family, zoo
from typer.testing import CliRunner, Result

from ssm_interp import cli
from ssm_interp.features import FeatureGroup
from ssm_interp.flow import FlowResult
from ssm_interp.models import EMBEDDED
from ssm_interp.recipes import Recipe, key_lines, read_recipe

ROOT = Path(__file__).parents[1]
SHIPPED = {path.stem: path for path in sorted((ROOT / "hooks").glob("*.toml"))}
TINY = [name for name in SHIPPED if name.startswith("tiny-")]
HUB = [name for name in SHIPPED if name not in TINY]


def named(names: Iterable[str], quick: str) -> list[Any]:
    """All of them, and all but one marked as slow."""
    return [pytest.param(name, marks=() if name == quick else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by family, facts.jsonl beside them."""
    return zoo(tmp_path_factory.mktemp("zoo"))


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["run", *map(str, words)])


@pytest.mark.parametrize("name", named(TINY, quick="tiny-flow"))
def test_recipes_for_the_embedded_models_run(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(SHIPPED[name])
    assert set(recipe.model.names) <= set(EMBEDDED)
    less = [] if recipe.plot.kind == "heatmap" else ["--limit", 4]
    check(run(SHIPPED[name], *less, "--out", tmp_path), recipe, recipe.model.names, tmp_path)
    assert (tmp_path / "recipe.toml").read_text().endswith(SHIPPED[name].read_text())


@pytest.mark.parametrize("name", named(HUB, quick="gpt2"))
def test_recipes_for_hub_models_run_on_random_ones_of_the_same_class(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = read_recipe(SHIPPED[name])
    assert recipe.facts.source == "counterfact"
    folders = []
    for hub_id in recipe.model.names:
        folders.append(tmp_path / hub_id.rpartition("/")[2])
        folders[-1].symlink_to(models[family(hub_id)], target_is_directory=True)
    facts = models["mamba"].parent / "facts.jsonl"
    instead = [word for folder in folders for word in ("--model", folder)] + ["--facts", facts]
    less = [] if recipe.plot.kind == "heatmap" else ["--limit", 3]
    out = tmp_path / "out"
    check(run(SHIPPED[name], *instead, *less, "--out", out), recipe, list(map(str, folders)), out)


def check(done: Result, recipe: Recipe, models: list[str], out: Path) -> None:
    """Everything that a recipe names is in the table, on the screen and in the pictures."""
    assert done.exit_code == 0, done.output
    frame = FlowResult.load(out / "table.parquet").frame
    knockouts = recipe.knockouts.values()
    names = dict.fromkeys(one.name for one in knockouts)
    known = [f"{model}, {name}" if name else model for name in names for model in models]
    assert list(frame["model"].unique()) == known
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
    recipes = {name: read_recipe(path) for name, path in SHIPPED.items()}
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
    for name in ("statistics", "tiny-statistics"):
        shares = [FeatureGroup.named(group) for group in recipes[name].knockouts[0].features if group != "all"]
        assert {share.statistic for share in shares} == {"decay norm", "half-life", "mean distance", "dt variation"}
        assert {share.side for share in shares} == {"top", "bottom"}
    assert all(recipe.description for recipe in recipes.values())


def test_the_page_on_recipes_names_every_key_and_its_example_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    example = page.split("```toml\n")[1].split("```")[0]
    (tmp_path / "x.toml").write_text(example)
    assert read_recipe(tmp_path / "x.toml").knockouts
    assert ("plot", "formats") in key_lines(example)
    for section in Recipe.model_json_schema()["$defs"].values():
        for key in section["properties"]:
            assert f"`{key}`" in page, key
    assert all(f"`{path.name}`" in page for path in SHIPPED.values())
