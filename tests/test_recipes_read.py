"""Recipes that are read, and those that are refused: with file, line, key, what was expected, the nearest name."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import ssm_interp as si
from ssm_interp.experiments import Study
from ssm_interp.recipes import Recipe, RecipeError, read_recipe

GOOD = """\
title = "A title"

[model]
names = ["tiny-mamba1"]

[prompts]
facts = "geo"

[[sweep]]
sources = [
    "subject",
    "last",
]
targets = ["last"]
windows = [3]

[plot]
kind = "flow"
"""
HEAT_MAP = GOOD.replace('sources = [\n    "subject",\n    "last",\n]\n', "").replace(
    'kind = "flow"', 'kind = "heatmap"\nprompts = ["a"]'
)


def written(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text)
    return path


def test_a_recipe_is_read_as_it_stands_with_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD))
    assert recipe.title == "A title"
    (sweep,) = recipe.sweep
    assert (sweep.sources, sweep.features, sweep.windows, sweep.align) == (("subject", "last"), ("all",), (3,), "left")
    assert (recipe.metrics.statistic, recipe.metrics.interval, recipe.metrics.prompts) == ("mean", "bootstrap", "own")
    assert recipe.plot.formats == ("png", "svg", "html")
    study = recipe.study("tiny-mamba1", sweep, batch_size=2)
    assert study == Study(model="tiny-mamba1", sources=["subject", "last"], windows=[3], batch_size=2)


def test_what_is_held_on_are_interventions(tmp_path: Path) -> None:
    held = (
        '[[held]]\nkind = "ScaleFeatures"\nfactor = 0\nfeatures = [[0, 5]]\n\n[[held]]\nkind = "SetDelta"\nvalue = 1\n'
    )
    recipe = read_recipe(written(tmp_path, GOOD.replace("[plot]", f'{held}features = "top half"\n\n[plot]')))
    assert recipe.held == (si.ScaleFeatures(factor=0, features=[(0, 5)]), si.SetDelta(value=1, features="top half"))
    (sweep,) = recipe.sweep
    assert recipe.study("a", sweep).held == recipe.held
    assert recipe.label("a", sweep) == "a, under ScaleFeatures features 0:5 factor 0.0, " + (
        "under SetDelta features top half value 1.0"
    )
    assert recipe.panel("a", sweep) == "a, edited"


def test_given_values_stand_in_for_written_ones(tmp_path: Path) -> None:
    given = {"model.names": ["a", "b"], "prompts.limit": 7, "sweep.windows": [1, 2]}
    text = GOOD.replace("[plot]", '[[sweep]]\nname = "x"\n[plot]')
    recipe = read_recipe(written(tmp_path, text), given)
    assert (recipe.model.names, recipe.prompts.limit) == (("a", "b"), 7)
    assert [sweep.windows for sweep in recipe.sweep] == [(1, 2), (1, 2)]


def test_reading_opens_nothing_else(tmp_path: Path) -> None:
    text = GOOD.replace("tiny-mamba1", "no/such-model").replace("geo", "no-such-file.jsonl")
    assert read_recipe(written(tmp_path, text)).prompts.facts == "no-such-file.jsonl"


MISTAKES: list[tuple[str, str, list[str]]] = [
    ('title = "A title"', 'titel = "A title"', ["line 1: titel: there is no such key: did you mean 'title'?"]),
    ('title = "A title"', "", ["title: this key is missing. What the experiment is called."]),
    ('title = "A title"', "title = 3", ["line 1: title: it should be a valid string, got 3"]),
    ('title = "A title"', 'title = ""', ["line 1: title: it should have at least 1 character, got "]),
    ('title = "A title"', 'title = "A title', ["line 1: not TOML (Illegal character '\\n', column 17)"]),
    ("[plot]", "[plot", ["line 17: not TOML (Expected ']' at the end of a table declaration, column 6)"]),
    ('kind = "flow"', "kind = [", ["line 19: not TOML (Invalid value, column its end)"]),
    ("[prompts]", "[prompts]\n[prompts]", ["line 7: not TOML (Cannot declare ('prompts',) twice, column 9)"]),
    ('[prompts]\nfacts = "geo"', "", ["prompts: this section is missing; a recipe needs [prompts]"]),
    ("[prompts]", "[promts]", ["line 6: promts: there is no such key: did you mean 'prompts'?"]),
    ('[plot]\nkind = "flow"', "", ["plot: this section is missing; a recipe needs [plot]"]),
    ("[[sweep]]", "[[sweeep]]", ["sweep: this section is missing; a recipe needs [[sweep]]", "did you mean 'sweep'?"]),
    ("[[sweep]]", "[sweep]", ["line 9: sweep: write its header in two brackets, [[sweep]]: there can be several"]),
    ("[model]", "model = 3\n[modell]", ["line 3: model: it should be a table, got 3", "did you mean 'model'?"]),
    ('names = ["tiny-mamba1"]', "", ["line 3: model.names: this key is missing. Embedded names, local folders"]),
    ('["tiny-mamba1"]', '"tiny-mamba1"', ['line 4: model.names: it should be a list, got "tiny-mamba1"']),
    ('["tiny-mamba1"]', '["a", "b", "a"]', ["line 4: model.names: 'a' occurs more than once"]),
    ('["tiny-mamba1"]', "[]", ["line 4: model.names: it should have at least 1 item, got []"]),
    ('"geo"', '"geo"\nlimit = -1', ["line 8: prompts.limit: it should be greater than or equal to 0, got -1"]),
    ('"geo"', '"geo"\nlimit = "8"', ['line 8: prompts.limit: it should be a valid integer, got "8"']),
    ('"geo"', '"geo"\nskip_bad = 1', ["line 8: prompts.skip_bad: it should be a valid boolean, got 1"]),
    (
        '"geo"',
        '"geo"\ncolumns.txt = "a"',
        ["line 8: prompts.columns: a prompt has no field 'txt'"],
    ),
    (
        "windows",
        'window = 3\nalign = "center"\nwindows',
        ["line 15: sweep.window: there is no such key: did you mean 'windows'? [[sweep]] has sources, targets, windows"]
        + ['line 16: sweep.align: there is no "center": did you mean \'centre\'? it is "left" or "centre"'],
    ),
    ("[3]", "[3, 0]", ["line 15: sweep.windows: it should be greater than 0, got 0"]),
    ("[3]", "[nan]", ["line 15: sweep.windows: it should be a valid integer, got NaN"]),
    ("[3]", "[2020-01-01]", ['line 15: sweep.windows: it should be a valid integer, got "2020-01-01"']),
    ('    "last"', '    "lst"', ["line 12: sweep.sources: there is no role 'lst': did you mean 'last'? the roles are"]),
    ('    "last"', "    3.5", ["line 12: sweep.sources: it should be a valid string or a valid integer, got 3.5"]),
    ('    "last"', "    -1", ["line 12: sweep.sources: there is no position -1"]),
    ('targets = ["last"]', 'targets = ["lats"]', ["line 14: sweep.targets: there is no role 'lats'"]),
    (
        "[plot]",
        'features = ["top thrd"]\n[plot]',
        ["line 17: sweep.features: there is no feature group 'top thrd'"],
    ),
    (
        "[plot]",
        'features = ["all", "top half"]\nthrough = ["ssm", "conv"]\n[plot]',
        ["line 18: sweep.through: the convolution feeds all features together, so a knockout through it takes"],
    ),
    ("[plot]", 'through = ["smm"]\n[plot]', ["sweep.through: there is no \"smm\": did you mean 'ssm'?"]),
    ("[plot]", "[metrics]\nlevel = nan\n[plot]", ["line 18: metrics.level: it should be less than 1, got NaN"]),
    ("[plot]", '[metrics]\nstatistic = "means"\n[plot]', ["line 18: metrics.statistic:", "did you mean 'mean'?"]),
    ('"flow"', '"flwo"', ['line 18: plot.kind: there is no "flwo": did you mean \'flow\'? it is "flow", "depth"']),
    ('kind = "flow"', 'knd = "flow"', ["line 18: plot.knd: there is no such key: did you mean 'kind'? it is \"flow\""]),
    ("[plot]", '[held]\nkind = "SetDelta"\n[plot]', ["line 17: held: write its header in two brackets, [[held]]"]),
    ("[plot]", '[[held]]\nknd = "SetDelta"\n[plot]', ["line 18: held.knd: there is no such key: did you mean 'kind'?"]),
    ('kind = "flow"', "", ['line 17: plot: its kind is missing: it is "flow", "depth", "features", "streams" or']),
    (
        '"flow"',
        '"flow"\nprompts = ["a"]',
        ["plot.prompts: there is no such key", "[plot] of kind flow has kind"],
    ),
    ('"flow"', '"streams"\ncolour = 1', ["plot.colour: there is no such key", "[plot] of kind streams has"]),
    ('"flow"', '"flow"\nformats = ["pgn"]', ["line 19: plot.formats: there is no \"pgn\": did you mean 'png'?"]),
    ('"flow"', '"streams"', ["line 9: sweep: it needs a name"]),
    ('"flow"', '"heatmap"', ["line 17: plot.prompts: this key is missing. Ids of the prompts."]),
    (
        "[plot]",
        '[[sweep]]\nsources = ["last"]\nwindows = [3]\n[plot]',
        ["line 17: sweep: it knocks out last -> last as another sweep does; give each a name of its own"],
    ),
    (
        "[plot]",
        '[[sweep]]\nsources = ["all"]\nwindows = [3]\nthrough = ["attention"]\n[plot]',
        ["line 17: sweep: its through is not that of another sweep of this name"],
    ),
    ("[plot]", '[[sweep]]\nsources = ["all"]\n[plot]', ["line 17: sweep: its windows is not that of another sweep"]),
    (
        "[plot]",
        '[[held]]\nkind = "ScaleFeatures"\nfacter = 0.5\n[plot]',
        ["line 19: held.facter: there is no such key: did you mean 'factor'? ScaleFeatures has kind, layers, features"],
    ),
    (
        "[plot]",
        '[[held]]\nkind = "SetDelta"\nvalue = -1\n[plot]',
        ["line 19: held.value: SetDelta.value must be"],
    ),
    (
        "[plot]",
        "[[held]]\nvalue = -1\n[plot]",
        ['line 17: held: its kind is missing: it is "Knockout"'],
    ),
    ("[plot]", '[[held]]\nkind = "SetDleta"\n[plot]', ['line 18: held.kind: there is no "SetDleta" to hold on: did']),
]


@pytest.mark.parametrize(("before", "after", "messages"), MISTAKES)
def test_mistakes_are_named_with_their_line(tmp_path: Path, before: str, after: str, messages: list[str]) -> None:
    assert GOOD.count(before) == 1
    path = written(tmp_path, GOOD.replace(before, after))
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(str(path))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("windows", 'sources = ["all"]\nwindows', "line 11: sweep.sources: a heat map takes each"),
        ('"geo"', '"geo"\nlimit = 3', "line 8: prompts.limit: a heat map asks the prompts that"),
        ("[plot]", "[metrics]\n[plot]", "line 13: metrics: a heat map shows p - p_base of single prompts"),
        ("[3]", '[3, 5]\nalign = "centre"', "line 11: sweep.windows: of centred windows a heat map shows one size"),
        ('["a"]', '["a", "a"]', "line 15: plot.prompts: a prompt occurs more than once"),
        ('["a"]', '["a"]\ncolour_limit = 0', "line 16: plot.colour_limit: it should be greater than 0, got 0"),
    ],
)
def test_what_does_not_fit_a_heat_map_is_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert HEAT_MAP.count(before) == 1
    assert read_recipe(written(tmp_path, HEAT_MAP)).plot.kind == "heatmap"
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, HEAT_MAP.replace(before, after)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "features", "found"),
    [
        ("[sweep.groups.mine]\n0 = [1, 2]\n3 = [4]", "mine", {"mine": {0: [1, 2], 3: [4]}}),
        ("[sweep.groups.mine]\n0 = [[1, 2]]", "mine", {"mine": {0: [(1, 2)]}}),
        ("", "all but top tenth by mean distance", {}),
        ("[sweep.groups.mine]\n0 = [1.5]", "mine", "line 19: sweep.groups.mine.0: it should be a valid integer"),
        ("[sweep.groups.mine]\na = [1]", "mine", 'sweep.groups.mine.a: it should be a valid integer, got "a"'),
        ("[sweep.groups.mine]\n0 = []", "mine", "sweep.groups.mine.0: it should have at least 1 item, got []"),
        ("[sweep.groups.mine]", "mine", "line 18: sweep.groups.mine: it should have at least 1 item, got {}"),
        ("[sweep.groups]\nmine = 3", "mine", "line 19: sweep.groups.mine: it should be a table, got 3"),
        ("[sweep.groups.mine]\n0 = [1]", "mien", "line 17: sweep.features: there is no feature group 'mien'"),
        ("[sweep.groups.mine]\n0 = [1]", "mien", ", or one of its own groups: mine"),
        ('[sweep.groups."top half"]\n0 = [1]', "all", "sweep.groups: 'top half' is the name of a group by rank"),
        ("[sweep.groups.mine]\n0 = [1]\n00 = [2]", "mine", 'groups.mine.00: it should be a valid integer, got "00"'),
        ("[sweep.groups.mine]\n0 = [1]", "all", "line 17: sweep.features: the group 'mine' is given and not"),
        ("", "top half by halflife", "there is no statistic 'halflife': did you mean 'half-life'?"),
    ],
)
def test_feature_groups_of_ones_own_and_by_statistics(tmp_path: Path, groups: str, features: str, found: Any) -> None:
    path = written(tmp_path, GOOD.replace("[plot]", f'features = ["{features}"]\n{groups}\n[plot]'))
    if not isinstance(found, str):
        (sweep,) = read_recipe(path).sweep
        assert (sweep.features, sweep.groups) == ((features,), found)
        return
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert found in str(caught.value)


def test_no_more_feature_groups_than_can_be_told_apart(tmp_path: Path) -> None:
    groups = [f"{side} {part} by half-life" for side in ("top", "bottom") for part in ("half", "third", "tenth")]
    groups += [f"all but {name}" for name in groups[:4]]
    text = GOOD.replace("[plot]", f"features = {groups}\n[plot]").replace('"flow"', '"features"')
    with pytest.raises(RecipeError, match="line 19: plot.kind: lines of 10 feature groups cannot be told apart"):
        read_recipe(written(tmp_path, text))
    assert read_recipe(written(tmp_path, text.replace(f"'{groups[-1]}'", '"all"').replace(f"'{groups[-2]}', ", "")))


def test_all_mistakes_are_told_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = GOOD.replace('"A title"', "1").replace("geo", "").replace('"flow"', '"bars"')
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, text))
    parts = str(caught.value).split("; line ")
    assert [part.split(": ")[1 if number == 0 else 0] for number, part in enumerate(parts)] == ["title", "7", "18"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts.limit": -1}, r"^prompts.limit \(given in place of the one in .*x.toml\): it should be greater"),
        ({"plot.prompts": ["a"]}, r"^plot.prompts \(given .*\): there is no such key"),
    ],
)
def test_mistakes_in_given_values_name_no_line(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(written(tmp_path, GOOD), given)


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe '.*y.toml': give a TOML file, or one of families"):
        read_recipe(tmp_path / "y.toml")
    (tmp_path / "x.toml").write_bytes(b'title = "\xff"')
    with pytest.raises(RecipeError, match=r"x.toml is not UTF-8 text \(byte 9\)"):
        read_recipe(tmp_path / "x.toml")
    with pytest.raises(RecipeError, match=r"x.toml: not a recipe: its values are nested too deeply"):
        read_recipe(written(tmp_path, f"a = {'[' * 10_000}"))
    with pytest.raises(RecipeError, match=r"x.toml: not a recipe: Exceeds the limit"):
        read_recipe(written(tmp_path, f"a = {'9' * 5_000}"))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("before", "after"), [(b"", b""), (b"\n", b"\r\n"), (b"    ", b"\t"), (b" = ", b"\t=\t")])
def test_lines_are_counted_however_a_file_is_written(tmp_path: Path, start: bytes, before: bytes, after: bytes) -> None:
    for text, place in ((GOOD.replace('"last",', '"lst",'), "12: sweep.sources"), (f"{GOOD}[a", "19: not TOML")):
        (tmp_path / "x.toml").write_bytes(start + text.encode().replace(before, after or before))
        with pytest.raises(RecipeError, match=f"x.toml, line {place}"):
            read_recipe(tmp_path / "x.toml")


def test_a_recipe_can_be_made_in_python() -> None:
    parts: dict[str, Any] = {
        "title": "x",
        "model": {"names": ["tiny-mamba1"]},
        "prompts": {"facts": "geo"},
        "sweep": [{"sources": ["subject"]}],
        "held": [si.SetDelta(value=0)],
        "plot": {"kind": "flow"},
    }
    assert Recipe(**parts).sweep[0].targets == ("last",)
    with pytest.raises(ValidationError, match="there is no role 'lsat'"):
        Recipe(**parts | {"sweep": [{"sources": ["lsat"]}]})
