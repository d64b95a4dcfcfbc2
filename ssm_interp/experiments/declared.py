"""What all declarations share: nothing unknown passes, and nothing heavy is imported until a value has to be checked.

A declaration is a pydantic model whose fields say what an option is, once. The keys of a recipe, the flags of the
command line, their help, their errors and what a study stores as its identity are all read off it.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ssm_interp.errors import SsmInterpError

Key = tuple[str | int, ...]
"""From the top of a declaration down: names of fields, keys of tables, and indices of lists."""

Item = TypeVar("Item")


def _from_list(value: Any) -> Any:
    """TOML, JSON and command lines have lists, and declarations hold tuples, since they are frozen."""
    return tuple(value) if isinstance(value, list | range) else value


Several = Annotated[tuple[Item, ...], BeforeValidator(_from_list)]


class Declared(BaseModel):
    """A declaration, or a part of one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class KeyedError(SsmInterpError, ValueError):
    """What is wrong with values that are fine alone; `key` is the one to blame, from where this is raised."""

    def __init__(self, key: Key, message: str) -> None:
        self.key = key
        super().__init__(message)


def option(default: Any, description: str, **more: Any) -> Any:
    """A field: its default (`...`: it has to be given), and what it says of itself in help and documentation."""
    return Field(default, description=description, kw_only=True, **more)


def same(part: type[Declared], name: str, default: Any = None, **more: Any) -> Any:
    """A field that says what that of another declaration says, with a default of its own."""
    return option(default, part.model_fields[name].description or "", **more)
