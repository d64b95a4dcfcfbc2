"""Reading a recipe, and saying what is wrong with it: file, line, key, what was expected, the nearest valid one."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ssm_interp.errors import RecipeError
from ssm_interp.flow.study import choices, did_you_mean
from ssm_interp.flow.study_held import ScaleFeatures, SetDelta
from ssm_interp.recipes.lines import Key, key_lines
from ssm_interp.recipes.schema import (
    ContradictionError,
    Facts,
    HeatMap,
    Knockout,
    Lines,
    Metrics,
    Models,
    Recipe,
    Sweep,
)

SECTIONS: Mapping[str, type[BaseModel]] = {
    "model": Models,
    "facts": Facts,
    "Knockout": Knockout,
    "ScaleFeatures": ScaleFeatures,
    "SetDelta": SetDelta,
    "sweep": Sweep,
    "metrics": Metrics,
    "flow": Lines,
    "depth": Lines,
    "features": Lines,
    "heatmap": HeatMap,
}
"""By name; operations and plots by their kind."""
KINDS = {
    "operation": ("Knockout", "ScaleFeatures", "SetDelta"),
    "plot": ("flow", "depth", "features", "streams", "heatmap"),
}

EXPECTED = {
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list in [ ]",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "string_too_short": "text that is not empty",
    "too_short": "at least one item",
}
POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)")


@dataclass(frozen=True)
class _Text:
    """A recipe as written: where it is, and what was given in place of some of its keys."""

    path: Path
    text: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def blame(self, key: Key, message: str) -> RecipeError:
        """The error of a key, or of the table that it is missing from."""
        names = ".".join(part for part in key if isinstance(part, str))
        if names in self.given:
            return RecipeError(f"{names} (given in place of the one in {self.path}): {message}")
        lines = key_lines(self.text)
        nearest = next(key[:end] for end in range(len(key), -1, -1) if key[:end] in lines)
        line = f", line {lines[nearest]}" if nearest else ""
        return RecipeError(f"{self.path}{line}: {f'{names}: ' if names else ''}{message}")


def read_recipe(path: str | Path, given: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from its TOML file. It is data: reading it runs nothing and opens no other file.

    Args:
        path: the file.
        given: values in place of the file's, by dotted key, such as `{"facts.limit": 8}`.

    Raises:
        RecipeError: no such file, no UTF-8 text, no TOML; an unknown key, a missing one, a value that it does not take,
            keys that do not go together. Everything that is wrong is named, with its line and the nearest valid name.

    Example:
        >>> read_recipe("hooks/tiny-flow.toml", {"model.names": ["tiny-mamba1"]}).sweep.windows     # doctest: +SKIP
        [3]
    """
    path, given = Path(path), dict(given or {})
    source = _Text(path, _text(path), given)
    data = _data(source)
    for name, value in given.items():
        section, _, key = name.partition(".")
        table = data.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _explained(error, data, source) from None
    recipe._blame = source.blame
    return recipe


def _text(path: Path) -> str:
    if not path.is_file():
        raise RecipeError(f"there is no recipe {str(path)!r}; give a TOML file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _data(source: _Text) -> dict[str, Any]:
    try:
        return tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        found = POSITION.search(str(error))
        line, column = (found[1], found[2]) if found and found[1] else (source.text.count("\n") + 1, "its end")
        message = POSITION.sub("", str(error))
        raise RecipeError(f"{source.path}, line {line}: not TOML ({message}, column {column})") from None
    except RecursionError:
        raise RecipeError(f"{source.path}: not a recipe: its values are nested too deeply") from None
    except ValueError as error:  # such as a number of too many digits
        raise RecipeError(f"{source.path}: not a recipe: {error}") from None


def _explained(error: ValidationError, data: dict[str, Any], source: _Text) -> RecipeError:
    """All problems as one error; those of one key, one for each type that it could have had, as one of them."""
    problems: dict[Key, list[Any]] = {}
    contradiction = None
    for problem in error.errors():
        key = _in_data(problem["loc"], data)
        own = problem.get("ctx", {}).get("error")
        if isinstance(own, ContradictionError):
            contradiction = own
        else:
            last = {"missing": problem["loc"][-1:], "union_tag_invalid": ("kind",)}.get(problem["type"], ())
            problems.setdefault((*key, *last), []).append(problem)
    if contradiction:
        return source.blame(contradiction.key, str(contradiction))
    within, lines = {key[:-1] for key in problems}, key_lines(source.text)
    found = [
        source.blame(key, _message(several))
        for key, several in sorted(problems.items(), key=lambda problem: lines.get(problem[0], 0))
        if not (several[0]["type"] == "too_short" and key in within)  # pydantic does not count items that are wrong
    ]
    first, *others = (str(one) for one in found)
    return RecipeError("; ".join([first, *(one.removeprefix(str(source.path)).lstrip(",: ") for one in others)]))


def _in_data(location: tuple[int | str, ...], data: Any) -> Key:
    """What of pydantic's location is in the recipe: not the names of the types that were tried."""
    key: Key = ()
    for place in location:
        part = str(place) if isinstance(data, dict) else place  # layers, which TOML has as text
        known = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
        if part in known:
            data, key = data[part], (*key, part)
    return key


def _message(problems: list[Any]) -> str:
    problem = problems[0]
    context = problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        return _unknown(problem["loc"])
    if problem["type"] in ("missing", "union_tag_not_found"):
        return _missing(problem)
    if "error" in context:
        return str(context["error"])
    if right := choices(problem):
        got = context.get("tag", problem["input"])
        return f"there is no {_toml(got)}: {did_you_mean(got, right)}it is {_either(map(_toml, right))}"
    expected = [EXPECTED[one["type"]] for one in problems if one["type"] in EXPECTED]
    if expected:
        return f"it takes {_either(dict.fromkeys(expected))}, got {_toml(problem['input'])}"
    return f"{problem['msg'].replace('Input', 'it', 1)}, got {_toml(problem['input'])}"


def _section(location: tuple[int | str, ...]) -> type[BaseModel]:
    """What a key stands in."""
    return next((SECTIONS[str(part)] for part in reversed(location[:-1]) if part in SECTIONS), Recipe)


def _unknown(location: tuple[int | str, ...]) -> str:
    section = _section(location)
    known = list(section.model_fields)
    place = "a recipe" if section is Recipe else f"[{location[0]}]"
    kind = next((f" of kind {part}" for part in location[:-1] if part in KINDS.get(str(location[0]), ())), "")
    return f"there is no such key: {did_you_mean(location[-1], known)}{place}{kind} has {', '.join(known)}"


def _missing(problem: Any) -> str:
    location = problem["loc"]
    if problem["type"] == "union_tag_not_found":
        return f"its kind is missing: it is {_either(map(_toml, KINDS[location[0]]))}"
    if len(location) == 1 and location[0] != "title":
        header = "[[operation]]" if location[0] == "operation" else f"[{location[0]}]"
        return f"this section is missing; a recipe needs {header}"
    return f"this key is missing. {_section(location).model_fields[str(location[-1])].description}"


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _toml(value: Any) -> str:
    """A value much as TOML writes it, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
