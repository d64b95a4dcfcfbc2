"""Recipes that are read, and those that are refused: with file, line, key, what was expected, the nearest name."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ssm_interp.recipes import Recipe, RecipeError, read_recipe

GOOD = """\
title = "A title"

[model]
names = ["tiny-mamba1"]

[facts]
source = "geo"

[[operation]]
kind = "Knockout"
sources = [
    "subject",
    "last",
]
targets = ["last"]

[sweep]
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
    assert recipe.knockouts[0].sources == ["subject", "last"]
    assert recipe.knockouts[0].features == ["all"]
    assert (recipe.sweep.windows, recipe.sweep.align) == ([3], "left")
    assert (recipe.metrics.statistic, recipe.metrics.interval, recipe.metrics.prompts) == ("mean", "bootstrap", "own")
    assert recipe.plot.formats == ["png", "svg", "html"]
    study = recipe.study("tiny-mamba1", recipe.knockouts[0], batch_size=2)
    assert (study.model, study.facts, study.sources, study.targets) == (
        "tiny-mamba1",
        "geo",
        ("subject", "last"),
        ("last",),
    )
    assert (study.windows, study.features, study.batch_size, study.held) == ((3,), ("all",), 2, ())


def test_given_values_stand_in_for_written_ones(tmp_path: Path) -> None:
    given = {"model.names": ["a", "b"], "facts.limit": 7, "sweep.windows": [1, 2]}
    recipe = read_recipe(written(tmp_path, GOOD), given)
    assert (recipe.model.names, recipe.facts.limit, recipe.sweep.windows) == (["a", "b"], 7, [1, 2])
    assert read_recipe(written(tmp_path, GOOD.replace("[sweep]\nwindows = [3]\n", "")), given).sweep.windows == [1, 2]


def test_reading_opens_nothing_else(tmp_path: Path) -> None:
    text = GOOD.replace("tiny-mamba1", "no/such-model").replace("geo", "no-such-file.jsonl")
    assert read_recipe(written(tmp_path, text)).facts.source == "no-such-file.jsonl"


@pytest.mark.parametrize(
    ("before", "after", "messages"),
    [
        ('title = "A title"', 'titel = "A title"', ["line 1: titel: there is no such key: did you mean 'title'?"]),
        ('title = "A title"', "", ["title: this key is missing. What the experiment is called."]),
        ('title = "A title"', "title = 3", ["line 1: title: it takes text in quotes, got 3"]),
        ('title = "A title"', 'title = ""', ["line 1: title: it takes text that is not empty, got "]),
        ('title = "A title"', 'title = "A title', ["line 1: not TOML (Illegal character '\\n', column 17)"]),
        ("[plot]", "[plot", ["line 20: not TOML (Expected ']' at the end of a table declaration, column 6)"]),
        ('kind = "flow"', "kind = [", ["line 22: not TOML (Invalid value, column its end)"]),
        ("[facts]", "[facts]\n[facts]", ["line 7: not TOML (Cannot declare ('facts',) twice, column 7)"]),
        ('[facts]\nsource = "geo"', "", ["facts: this section is missing; a recipe needs [facts]"]),
        ("[facts]", "[fact]", ["line 6: fact: there is no such key: did you mean 'facts'?", "[facts]"]),
        ('[plot]\nkind = "flow"', "", ["plot: this section is missing; a recipe needs [plot]"]),
        ("[model]", "model = 3\n[modell]", ["line 3: model: it takes a table, got 3", "did you mean 'model'?"]),
        ('names = ["tiny-mamba1"]', "", ["line 3: model.names: this key is missing. Embedded names, local folders"]),
        ('["tiny-mamba1"]', '"tiny-mamba1"', ['line 4: model.names: it takes a list in [ ], got "tiny-mamba1"']),
        ('["tiny-mamba1"]', '["a", "b", "a"]', ["line 4: model.names: 'a' occurs more than once"]),
        ('["tiny-mamba1"]', "[]", ["line 4: model.names: it takes at least one item, got []"]),
        (
            'source = "geo"',
            'source = "geo"\nlimit = -1',
            ["line 8: facts.limit: it should be greater than or equal to 0"],
        ),
        ('source = "geo"', 'source = "geo"\nlimit = "8"', ['line 8: facts.limit: it takes a whole number, got "8"']),
        ('source = "geo"', 'source = "geo"\nskip_bad = 1', ["line 8: facts.skip_bad: it takes true or false, got 1"]),
        (
            'source = "geo"',
            'source = "geo"\ncolumns.txt = "a"',
            ["line 8: facts.columns: a prompt has no field 'txt' to read a column into: did you mean 'text'?"],
        ),
        (
            "[sweep]",
            '[sweep]\nwindow = 3\nalign = "center"',
            ["line 18: sweep.window: there is no such key: did you mean 'windows'? [sweep] has windows, align"]
            + ['line 19: sweep.align: there is no "center": did you mean \'centre\'? it is "left" or "centre"'],
        ),
        ("[3]", "[3, 0]", ["line 18: sweep.windows: it should be greater than 0, got 0"]),
        ('kind = "Knockout"', "kind = 3", ['line 10: operation.kind: there is no "3": it is "Knockout"']),
        ("[3]", "[nan]", ["line 18: sweep.windows: it takes a whole number, got NaN"]),
        ("[3]", "[2020-01-01]", ['line 18: sweep.windows: it takes a whole number, got "2020-01-01"']),
        ("[sweep]", "[metrics]\nlevel = nan\n[sweep]", ["line 18: metrics.level: it should be less than 1, got NaN"]),
        ('kind = "Knockout"', "", ['line 9: operation: its kind is missing: it is "Knockout", "ScaleFeatures" or']),
        ('"Knockout"', '"Knockot"', ["line 10: operation.kind: there is no \"Knockot\": did you mean 'Knockout'?"]),
        (
            '"Knockout"',
            '"PatchState"',
            ['operation.kind: there is no "PatchState": it is "Knockout", "ScaleFeatures" or "SetDelta"'],
        ),
        (
            '    "last"',
            '    "lst"',
            ["line 13: operation.sources: there is no role 'lst': did you mean 'last'? the roles are first, last,"],
        ),
        ('    "last"', "    3.5", ["line 13: operation.sources: it takes text in quotes or a whole number, got 3.5"]),
        ('    "last"', "    -1", ["line 13: operation.sources: there is no position -1"]),
        ('targets = ["last"]', 'targets = ["lats"]', ["line 15: operation.targets: there is no role 'lats'"]),
        ('targets = ["last"]', "", ["line 9: operation.targets: this key is missing"]),
        (
            'targets = ["last"]',
            'target = ["last"]',
            ["line 15: operation.target: there is no such key: did you mean 'targets'? [operation] of kind Knockout"],
        ),
        (
            "[sweep]",
            'features = ["top thrd"]\n[sweep]',
            ["line 17: operation.features: there is no feature group 'top thrd': did you mean 'top third'"],
        ),
        (
            "[sweep]",
            'features = ["all", "top half"]\nthrough = ["ssm", "conv"]\n[sweep]',
            ["line 18: operation.through: the convolution feeds all features together, so a knockout through it takes"],
        ),
        (
            "[sweep]",
            '[[operation]]\nkind = "SetDelta"\nvalue = 1\nlayers = [1, 1]\n[sweep]',
            ["line 20: operation.layers: layer 1 occurs more than once; name each layer once"],
        ),
        ("[sweep]", 'through = ["smm"]\n[sweep]', ["operation.through: there is no \"smm\": did you mean 'ssm'?"]),
        ("[[operation]]", "[operation]", ["line 9: operation: it takes a list in [ ], got"]),
        ("[plot]", '[metrics]\nstatistic = "means"\n[plot]', ["line 21: metrics.statistic:", "did you mean 'mean'?"]),
        ("[plot]", "[metrics]\nlevel = 95\n[plot]", ["line 21: metrics.level: it should be less than 1, got 95"]),
        (
            '"flow"',
            '"flwo"',
            ['line 21: plot.kind: there is no "flwo": did you mean \'flow\'? it is "flow", "depth", "features"'],
        ),
        ('kind = "flow"', "", ['line 20: plot: its kind is missing: it is "flow", "depth", "features", "streams" or']),
        ('"flow"', '"flow"\nprompts = ["a"]', ["plot.prompts: there is no such key", "[plot] of kind flow has"]),
        ('"flow"', '"flow"\nformats = ["pgn"]', ["line 22: plot.formats: there is no \"pgn\": did you mean 'png'?"]),
        ('"flow"', '"streams"', ["line 9: operation: it needs a name"]),
        ('"flow"', '"heatmap"', ["line 20: plot.prompts: this key is missing. Ids of the prompts."]),
        ('sources = [\n    "subject",\n    "last",\n]\n', "", ["line 9: operation: it needs sources"]),
        (
            "[sweep]",
            '[[operation]]\nkind = "Knockout"\nsources = ["last"]\ntargets = ["last"]\n[sweep]',
            ["line 17: operation: it knocks out last -> last as another operation does; give each a name of its own"],
        ),
        (
            "[sweep]",
            '[[operation]]\nkind = "Knockout"\nsources = ["all"]\ntargets = ["last"]\nthrough = ["attention"]\n[sweep]',
            ["line 17: operation: it is through other streams than another operation of this name"],
        ),
        (
            "[sweep]",
            '[[operation]]\nkind = "ScaleFeatures"\nfacter = 0.5\n[sweep]',
            ["line 17: operation.factor: this key is missing. The multiplier: 0 silences"]
            + ["line 19: operation.facter: there is no such key: did you mean 'factor'? [operation] of kind Sc"],
        ),
        (
            "[sweep]",
            '[[operation]]\nkind = "SetDelta"\nvalue = -1\n[sweep]',
            ["line 19: operation.value: it should be greater than or equal to 0, got -1"],
        ),
    ],
)
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
        (
            'targets = ["last"]',
            'targets = ["last"]\nsources = ["all"]',
            "line 12: operation.sources: a heat map takes each",
        ),
        ('source = "geo"', 'source = "geo"\nlimit = 3', "line 8: facts.limit: a heat map asks the prompts that"),
        ("[plot]", "[metrics]\n[plot]", "line 16: metrics: a heat map shows p - p_base of single prompts"),
        ("[3]", '[3, 5]\nalign = "centre"', "line 14: sweep.windows: of centred windows a heat map shows one size"),
        ('["a"]', '["a", "a"]', "line 18: plot.prompts: a prompt occurs more than once"),
        ('["a"]', '["a"]\ncolour_limit = 0', "line 19: plot.colour_limit: it should be greater than 0, got 0"),
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
        ("[operation.groups.mine]\n0 = [1, 2]\n3 = [4]", "mine", {"mine": {0: [1, 2], 3: [4]}}),
        ("[operation.groups.mine]\n0 = [[1, 2]]", "mine", {"mine": {0: [(1, 2)]}}),
        ("", "all but top tenth by mean distance", {}),
        (
            "[operation.groups.mine]\n0 = [1.5]",
            "mine",
            "line 19: operation.groups.mine.0: it takes a whole number",
        ),
        ("[operation.groups.mine]\na = [1]", "mine", 'operation.groups.mine.a: it takes a whole number, got "a"'),
        ("[operation.groups.mine]\n0 = []", "mine", "operation.groups.mine.0: it takes at least one item, got []"),
        ("[operation.groups.mine]", "mine", "line 18: operation.groups.mine: it takes at least one item, got {}"),
        ("[operation.groups]\nmine = 3", "mine", "line 19: operation.groups.mine: it takes a table, got 3"),
        ("[operation.groups.mine]\n0 = [1]", "mien", "line 17: operation.features: there is no feature group 'mien'"),
        ("[operation.groups.mine]\n0 = [1]", "mien", ", or one of its own groups: mine"),
        (
            '[operation.groups."top half"]\n0 = [1]',
            "all",
            "operation.groups: 'top half' is the name of a group by rank",
        ),
        ("[operation.groups.mine]\n0 = [1]\n00 = [2]", "mine", 'groups.mine.00: it takes a whole number, got "00"'),
        ("[operation.groups.mine]\n0 = [1]", "all", "line 17: operation.features: the group 'mine' is given and not"),
        ("", "top half by halflife", "there is no statistic 'halflife': did you mean 'half-life'?"),
    ],
)
def test_feature_groups_of_ones_own_and_by_statistics(tmp_path: Path, groups: str, features: str, found: Any) -> None:
    path = written(tmp_path, GOOD.replace("[sweep]", f'features = ["{features}"]\n{groups}\n[sweep]'))
    if not isinstance(found, str):
        knockout = read_recipe(path).knockouts[0]
        assert (knockout.features, knockout.groups) == ([features], found)
        return
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert found in str(caught.value)


def test_no_more_feature_groups_than_can_be_told_apart(tmp_path: Path) -> None:
    groups = [f"{side} {part} by half-life" for side in ("top", "bottom") for part in ("half", "third", "tenth")]
    groups += [f"all but {name}" for name in groups[:4]]
    text = GOOD.replace("[sweep]", f"features = {groups}\n[sweep]").replace('"flow"', '"features"')
    with pytest.raises(RecipeError, match="line 22: plot.kind: lines of 10 feature groups cannot be told apart"):
        read_recipe(written(tmp_path, text))
    assert read_recipe(written(tmp_path, text.replace(f"'{groups[-1]}'", '"all"').replace(f"'{groups[-2]}', ", "")))


def test_one_operation_must_be_a_knockout(tmp_path: Path) -> None:
    start, end = GOOD.index("[[operation]]"), GOOD.index("[sweep]")
    text = f'{GOOD[:start]}[[operation]]\nkind = "SetDelta"\nvalue = 0\n\n{GOOD[end:]}'
    with pytest.raises(RecipeError, match=r'line 9: operation: one must be of kind = "Knockout"'):
        read_recipe(written(tmp_path, text))


def test_all_mistakes_are_told_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = GOOD.replace('"A title"', "1").replace("geo", "").replace('"flow"', '"bars"')
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, text))
    parts = str(caught.value).split("; line ")
    assert [part.split(": ")[1 if number == 0 else 0] for number, part in enumerate(parts)] == ["title", "7", "21"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"facts.limit": -1}, r"^facts.limit \(given in place of the one in .*x.toml\): it should be greater"),
        ({"plot.prompts": ["a"]}, r"^plot.prompts \(given .*\): there is no such key"),
    ],
)
def test_mistakes_in_given_values_name_no_line(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(written(tmp_path, GOOD), given)


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe '.*y.toml'; give a TOML file"):
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
    for text, place in ((GOOD.replace('"last",', '"lst",'), "13: operation.sources"), (f"{GOOD}[a", "22: not TOML")):
        (tmp_path / "x.toml").write_bytes(start + text.encode().replace(before, after or before))
        with pytest.raises(RecipeError, match=f"x.toml, line {place}"):
            read_recipe(tmp_path / "x.toml")


def test_a_recipe_can_be_made_in_python() -> None:
    parts: dict[str, Any] = {
        "title": "x",
        "model": {"names": ["tiny-mamba1"]},
        "facts": {"source": "geo"},
        "operation": [{"kind": "Knockout", "sources": ["subject"], "targets": ["last"]}],
        "plot": {"kind": "flow"},
    }
    assert Recipe(**parts).knockouts[0].targets == ["last"]
    with pytest.raises(ValidationError, match="there is no role 'lsat'"):
        Recipe(**parts | {"operation": [{"kind": "Knockout", "sources": ["lsat"], "targets": ["last"]}]})
