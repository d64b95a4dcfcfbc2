"""What is wrong with a declaration: the key, what was expected there, and the nearest right one, in a line.

All of it is read off the declarations themselves; see `problems`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ssm_interp.experiments.declared import Declared, Key, KeyedError


class Problem(NamedTuple):
    """One thing that is wrong.

    Attributes:
        key: where.
        message: what, and what was expected.
        fields: the fields on the way there, outermost first.
    """

    key: Key
    message: str
    fields: tuple[FieldInfo, ...] = ()

    @property
    def name(self) -> str:
        return dotted(self.key)


def dotted(key: Key) -> str:
    """A key in words, without its indices.

    Example:
        >>> dotted(("sweep", 0, "windows", 1))
        'sweep.windows'
    """
    return ".".join(part for part in key if isinstance(part, str))


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """The start of a hint at the nearest known name; empty where none is near.

    Example:
        >>> did_you_mean("windos", ["windows", "align"])
        "did you mean 'windows'? "
    """
    near = get_close_matches(str(value), known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""


def mistyped_kind(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The key of a table without a kind that may be meant for it; none where none is near."""
    return tuple(get_close_matches("kind", given, n=1, cutoff=0.6))


def explain(error: ValidationError) -> str:
    """What is wrong with the options of a declaration, in a line.

    Example:
        >>> from ssm_interp.experiments import Study
        >>> try:
        ...     Study(model="tiny-mamba1", limit=-1)
        ... except ValidationError as error:
        ...     explain(error)
        'limit: it should be greater than or equal to 0, got -1'
    """
    return "; ".join(
        f"{problem.name}: {problem.message}" if problem.key else problem.message for problem in problems(error)
    )


def problems(error: ValidationError) -> list[Problem]:
    """Everything that is wrong, once per key; where values do not go together, that alone."""
    top = next(model for model in _declarations(Declared) if model.__name__ == error.title)
    by_key: dict[Key, list[tuple[_Spot, Any]]] = {}
    for wrong in error.errors():
        spot = _walk(top, wrong["loc"])
        own = wrong.get("ctx", {}).get("error")
        if isinstance(own, KeyedError):
            spot = _walk(top, (*wrong["loc"], *own.key))._replace(key=(*spot.key, *own.key))
        elif wrong["type"] == "union_tag_invalid":
            spot = _walk(top, (*wrong["loc"], "kind"))
        elif wrong["type"] == "union_tag_not_found":
            spot = spot._replace(key=(*spot.key, *mistyped_kind(wrong["input"])))
        by_key.setdefault(spot.key, []).append((spot, wrong))
    within = {key[:end] for key in by_key for end in range(len(key))}
    return [
        Problem(key, _message(several, top), several[0][0].fields)
        for key, several in by_key.items()
        if not (several[0][1]["type"] == "too_short" and key in within)  # pydantic does not count items that are wrong
    ]


class _Spot(NamedTuple):
    """What one of pydantic's errors is about."""

    key: Key  # its location without the names of the types that were tried
    section: type[BaseModel]  # the declaration that its last field stands in
    kind: str  # which of several sections it is, if there are several
    fields: tuple[FieldInfo, ...]


def _declarations(of: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield of
    for model in of.__subclasses__():
        yield from _declarations(model)


def _walk(top: type[BaseModel], location: tuple[int | str, ...]) -> _Spot:
    key: Key = ()
    section, kind, kinds = top, "", ""
    fields: tuple[FieldInfo, ...] = ()
    types: list[Any] = [top]
    for part in location:
        if models := [annotation for annotation in types if _is_declaration(annotation)]:
            tagged = [model for model in models if part in _kinds(model)]
            if tagged and part not in models[0].model_fields:
                types, kinds = tagged, str(part)
                continue
            section, kind = models[0], kinds
            info = section.model_fields.get(str(part))
            key, kinds = (*key, part), ""
            fields = (*fields, info) if info else fields
            types = _members(info.annotation) if info else []
        elif (inner := _inside(types, part)) is not None:
            in_table = any(get_origin(annotation) is dict for annotation in types)
            types, key = inner, (*key, str(part) if in_table else part)
    return _Spot(key, section, kind, fields)


def _is_declaration(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _members(annotation: Any) -> list[Any]:
    """What a value may be, as types without their annotations."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part) if member is not NoneType]
    return [annotation]


def _inside(types: Sequence[Any], part: int | str) -> list[Any] | None:
    """What the items of lists, or the values of tables, may be; None where the part is no index or key."""
    for annotation in types:
        if get_origin(annotation) in (tuple, list) and isinstance(part, int):
            return _members(get_args(annotation)[0])
        if get_origin(annotation) is dict and not str(part).startswith("["):
            return _members(get_args(annotation)[1])
    return None


def _kinds(section: type[BaseModel]) -> tuple[str, ...]:
    """The names of a section that is one of several."""
    info = section.model_fields.get("kind")
    return get_args(info.annotation) if info and get_origin(info.annotation) is Literal else ()


def _message(several: Sequence[tuple[_Spot, Any]], top: type[BaseModel]) -> str:
    """What is wrong with one key: several errors of it are one for each type that it could have had."""
    spot, wrong = several[0]
    context = wrong.get("ctx", {})
    special: dict[str, Callable[[_Spot, type[BaseModel]], str]] = {
        "extra_forbidden": _unknown,
        "missing": _missing,
        "union_tag_not_found": _kindless,
    }
    if wrong["type"] in special:
        return special[wrong["type"]](spot, top)
    if "error" in context:
        return str(context["error"])
    got = context.get("tag", wrong["input"])
    if choices := re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags") or "")):
        return f"there is no {written(got)}: {did_you_mean(got, choices)}it is {either(map(written, choices))}"
    if wrong["type"] == "tuple_type" and any(_is_declaration(item) or item is Any for item in _items(spot)):
        return f"write its header in two brackets, [[{spot.key[-1]}]]: there can be several"
    first, *others = dict.fromkeys(_expected(wrong) for _, wrong in several)
    return f"{either([first, *(other.removeprefix('it should be ') for other in others)])}, got {written(got)}"


def _expected(wrong: Any) -> str:
    """One of pydantic's messages, in the words of TOML."""
    words = {"tuple_type": "list", "dict_type": "table", "model_type": "table", "model_attributes_type": "table"}
    if wrong["type"] in words:
        return f"it should be a {words[wrong['type']]}"
    message = re.sub(r"^(Input|Tuple|List|Dictionary|Value|String) should", "it should", wrong["msg"])
    return re.sub(r", (unable|got) .*| after validation.*", "", message)


def _kindless(spot: _Spot, _: type[BaseModel]) -> str:
    kinds = [kind for member in _members(spot.fields[-1].annotation) for kind in _kinds(member)]
    wrong = "there is no such key: did you mean 'kind'?" if len(spot.key) > len(spot.fields) else "its kind is missing:"
    return f"{wrong} it is {either(map(written, kinds))}"


def _items(spot: _Spot) -> list[Any]:
    return [item for member in _members(spot.fields[-1].annotation) for item in _inside([member], 0) or []]


def _unknown(spot: _Spot, top: type[BaseModel]) -> str:
    known = [name for name in spot.section.model_fields]
    return f"there is no such key: {did_you_mean(spot.key[-1], known)}{_section(spot, top)} has {', '.join(known)}"


def _section(spot: _Spot, top: type[BaseModel]) -> str:
    """A section in the words of TOML."""
    if spot.section is top:
        return f"a {top.__name__.lower()}"
    header = f"[[{spot.key[0]}]]" if isinstance(spot.key[1], int) else f"[{spot.key[0]}]"
    return f"{header} of kind {spot.kind}" if spot.kind else header


def _missing(spot: _Spot, top: type[BaseModel]) -> str:
    info = spot.fields[-1]
    if any(map(_is_declaration, _members(info.annotation))):
        return f"this section is missing; a {top.__name__.lower()} needs [{spot.key[-1]}]"
    if any(map(_is_declaration, _items(spot))):
        return f"this section is missing; a {top.__name__.lower()} needs [[{spot.key[-1]}]]"
    return f"this key is missing. {info.description}"


def either(words: Iterable[str]) -> str:
    """Words as alternatives: a, b or c."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def written(value: Any) -> str:
    """A value much as TOML writes it, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
