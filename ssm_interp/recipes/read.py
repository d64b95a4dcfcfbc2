"""Reading a recipe, and saying what is wrong with it: file, line, key, what was expected, the nearest valid one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ssm_interp.errors import RecipeError
from ssm_interp.experiments import Key, did_you_mean, dotted, problems
from ssm_interp.recipes.lines import key_lines
from ssm_interp.recipes.schema import Recipe

POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)")
PACKED, HERE = Path(__file__).parent / "hooks", Path(__file__).parents[2] / "hooks"
"""The recipes that ship with the package: in a wheel, and in a checkout."""


@dataclass(frozen=True)
class _Text:
    """A recipe as written: where it is, and what was given in place of some of its keys."""

    path: Path
    text: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def blame(self, key: Key, message: str) -> RecipeError:
        """The error of a key, or of the table that it is missing from."""
        name = dotted(key)
        if name in self.given:
            return RecipeError(f"{name} (given in place of the one in {self.path}): {message}")
        lines = key_lines(self.text)
        nearest = next(key[:end] for end in range(len(key), -1, -1) if key[:end] in lines)
        line = f", line {lines[nearest]}" if nearest else ""
        return RecipeError(f"{self.path}{line}: {f'{name}: ' if name else ''}{message}")


def shipped() -> dict[str, Path]:
    """The recipes that ship with the package, by name.

    Example:
        >>> "tiny-flow" in shipped()
        True
    """
    folder = PACKED if PACKED.is_dir() else HERE
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def recipe_file(recipe: str | Path) -> Path:
    """The file of a recipe: itself, or of one that ships with the package and has this name.

    Raises:
        RecipeError: there is neither.
    """
    path, known = Path(recipe), shipped()
    if path.is_file():
        return path
    if str(recipe) in known:
        return known[str(recipe)]
    hint = "" if path.suffix else did_you_mean(recipe, known)
    raise RecipeError(f"there is no recipe {str(recipe)!r}: {hint}give a TOML file, or one of {', '.join(known)}")


def read_recipe(recipe: str | Path, given: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from its TOML file. It is data: reading it runs nothing and opens no other file.

    Args:
        recipe: the file, or the name of a recipe that ships with the package.
        given: values in place of the file's, by dotted key, such as `{"prompts.limit": 8}`; of `sweep`, in all of them.

    Raises:
        RecipeError: no such file, no UTF-8 text, no TOML; an unknown key, a missing one, a value that it does not take,
            keys that do not go together. Everything that is wrong is named, with its line and the nearest valid name.

    Example:
        >>> read_recipe("tiny-flow", {"model.names": ["tiny-mamba1"]}).sweep[0].windows
        (3,)
    """
    path, given = recipe_file(recipe), dict(given or {})
    source = _Text(path, _text(path), given)
    data = _data(source)
    for name, value in given.items():
        section, _, key = name.partition(".")
        tables = data.setdefault(section, {})
        for table in tables if isinstance(tables, list) else [tables]:
            if isinstance(table, dict):
                table[key] = value
    try:
        checked = Recipe.model_validate(data, strict=True)
    except ValidationError as error:
        raise _explained(error, source) from None
    checked._blame = source.blame
    return checked


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _data(source: _Text) -> dict[str, Any]:
    try:
        return tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        position = POSITION.search(str(error))
        line, column = (
            (position[1], position[2]) if position and position[1] else (source.text.count("\n") + 1, "its end")
        )
        message = POSITION.sub("", str(error))
        raise RecipeError(f"{source.path}, line {line}: not TOML ({message}, column {column})") from None
    except RecursionError:
        raise RecipeError(f"{source.path}: not a recipe: its values are nested too deeply") from None
    except ValueError as error:  # such as a number of too many digits
        raise RecipeError(f"{source.path}: not a recipe: {error}") from None


def _explained(error: ValidationError, source: _Text) -> RecipeError:
    """All problems as one error, in the order of their lines."""
    lines = key_lines(source.text)
    in_order = sorted(problems(error), key=lambda problem: lines.get(problem.key, 0))
    first, *others = (str(source.blame(problem.key, problem.message)) for problem in in_order)
    return RecipeError("; ".join([first, *(told.removeprefix(str(source.path)).lstrip(",: ") for told in others)]))
