"""The recipes that are shipped: each is run, those for hub models on small random models of the same class."""

import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from commands import Done
from pydantic import BaseModel
from tiny_recipes import IDS, family, zoo

from ssm_interp.features import FeatureGroup
from ssm_interp.flow import FlowResult
from ssm_interp.models import EMBEDDED
from ssm_interp.recipes import Recipe, key_lines, read, read_recipe, schema, shipped

ROOT = Path(__file__).parents[1]
SHIPPED = shipped()
TINY = [name for name in SHIPPED if name.startswith("tiny-")]
HUB = [name for name in SHIPPED if name not in TINY]


def named(names: Iterable[str], quick: str) -> list[Any]:
    """All of them, and all but one marked as slow."""
    return [pytest.param(name, marks=() if name == quick else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by family, facts.jsonl beside them."""
    return zoo(tmp_path_factory.mktemp("zoo"))


run = partial(commands.run, "run")


@pytest.mark.parametrize("name", named(TINY, quick="tiny-flow"))
def test_recipes_for_the_embedded_models_run(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(SHIPPED[name])
    assert set(recipe.model.names) <= set(EMBEDDED)
    less = [] if recipe.plot.kind == "heatmap" else ["--limit", 4]
    check(run(name, *less, "--out", tmp_path), recipe, recipe.model.names, tmp_path)
    assert (tmp_path / "recipe.toml").read_text().endswith(SHIPPED[name].read_text())


@pytest.mark.parametrize("name", named(HUB, quick="gpt2"))
def test_recipes_for_hub_models_run_on_random_ones_of_the_same_class(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = read_recipe(SHIPPED[name])
    assert recipe.prompts.facts == "counterfact"
    folders = []
    for hub_id in recipe.model.names:
        folders.append(tmp_path / hub_id.rpartition("/")[2])
        folders[-1].symlink_to(models[family(hub_id)], target_is_directory=True)
    facts = models["mamba"].parent / "facts.jsonl"
    instead = [word for folder in folders for word in ("--model", folder)] + ["--facts", facts]
    less = [] if recipe.plot.kind == "heatmap" else ["--limit", 3]
    out = tmp_path / "out"
    check(run(SHIPPED[name], *instead, *less, "--out", out), recipe, list(map(str, folders)), out)


def check(done: Done, recipe: Recipe, models: list[str], out: Path) -> None:
    """Everything that a recipe names is in the table, on the screen and in the pictures."""
    assert done.exit_code == 0, done.output
    frame = FlowResult.load(out / "table.parquet").frame
    knockouts = recipe.sweep
    names = dict.fromkeys(one.name for one in knockouts)
    known = [f"{model}, {name}" if name else model for name in names for model in models]
    assert list(frame["model"].unique()) == known
    edges = {(source, target) for one in knockouts for source in one.sources for target in one.targets}
    if recipe.plot.kind == "heatmap":
        edges = {(str(position), "last") for position in range(int(frame["source"].astype(int).max()) + 1)}
        assert set(frame["prompt_id"]) == set(recipe.plot.prompts)
    assert set(zip(frame["source"], frame["target"], strict=True)) == edges
    assert set(frame["feature_group"]) == {group for one in knockouts for group in one.features}
    assert set(frame["window_size"]) == {size for one in knockouts for size in one.windows or ()}
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
        assert recipes[name].sweep[0].sources == ("subject", "relation", "first", "last")
        assert recipes[name].sweep[0].windows == (9,)
    assert recipes["windows"].sweep[0].windows == (1, 3, 5, 9, 12, 15)
    assert {target for one in recipes["targets"].sweep for target in one.targets} == {
        "subject",
        "relation",
    }
    assert recipes["heatmaps"].plot.prompts == tuple(IDS[:4])
    for name in ("features", "tiny-features"):
        groups = {"all", "top third", "bottom third", "all but top third", "all but bottom third"}
        assert set(recipes[name].sweep[0].features) == groups
    for name in ("statistics", "tiny-statistics"):
        shares = [FeatureGroup.named(group) for group in recipes[name].sweep[0].features if group != "all"]
        assert {share.statistic for share in shares} == {"decay norm", "half-life", "mean distance", "dt variation"}
        assert {share.side for share in shares} == {"top", "bottom"}
    assert all(recipe.description for recipe in recipes.values())


def test_they_are_listed_and_found_by_name(tmp_path: Path) -> None:
    assert {path.name for path in SHIPPED.values()} == {path.name for path in (ROOT / "hooks").iterdir()}
    listed = run("--list").stdout
    assert all(f" {name} " in listed for name in SHIPPED)
    assert "Source tokens over the layers" in listed
    commands.refused(run("tiny-flwo"), "there is no recipe 'tiny-flwo': did you mean 'tiny-flow'? give a TOML file, or")
    commands.refused(run(), "name a recipe: a TOML file, or one of families, features,")
    commands.refused(run("tiny-flow", "--list"), "--list: it shows the recipes and runs none")
    commands.refused(run("tiny-flow", "--out", tmp_path / "x.png"), "it is a folder here, for all files; name one")


def test_a_wheel_has_them(tmp_path: Path) -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    (place,) = [place for source, place in config["force-include"].items() if source == "hooks"]
    assert ROOT / place == read.PACKED
    assert not read.PACKED.exists()  # in a checkout they are at the top alone


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A declaration and those in it."""
    yield model
    for field in model.model_fields.values():
        for part in re.findall(r"[A-Z]\w+", str(field.annotation).replace(f"{schema.__name__}.", "")):
            if isinstance(found := getattr(schema, part, None), type) and issubclass(found, BaseModel):
                yield from sections(found)


def test_the_page_on_recipes_names_every_key_and_its_example_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    example = page.split("```toml\n")[1].split("```")[0]
    (tmp_path / "x.toml").write_text(example)
    assert read_recipe(tmp_path / "x.toml").held
    assert ("plot", "formats") in key_lines(example)
    found = list(sections(Recipe))
    assert {schema.NamedModels, schema.NamedPrompts, schema.NamedSweep, schema.Metrics, schema.Lines} < set(found)
    for section in found:
        for key in section.model_fields:
            assert any(f"`{name}`" in page for name in (key, f"[{key}]", f"[[{key}]]")), key
    assert all(f"`{name}`" in page for name in SHIPPED)
