"""On which line of a TOML file each key stands, which `tomllib` does not tell."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

from ssm_interp.experiments.declared import Key

DEEPEST = 3
"""Arrays in arrays, over several lines, whose items are told apart."""


def key_lines(text: str) -> dict[Key, int]:
    """The line, counted from 1, that first gives each key, table and array item of a TOML document.

    A table that others imply (`a` in `[a.b]`) is on the line of the first of them. An item of an array is on the line
    on which it ends (an array in an array: on which it begins); all else on the line on which its statement begins.

    Args:
        text: a valid document.

    Cost: a statement is at its end exactly where the document so far parses, and so the parser itself is asked, at
        every line: quadratic in the number of lines, some milliseconds for 100.

    Example:
        >>> key_lines('title = "x"\\n\\n[sweep]\\nwindows = [\\n  3,\\n  5,\\n]')[("sweep", "windows")]
        4
        >>> key_lines('title = "x"\\n\\n[sweep]\\nwindows = [\\n  3,\\n  5,\\n]')[("sweep", "windows", 1)]
        6
    """
    lines = text.replace("\r\n", "\n").split("\n")
    begins: dict[Key, int] = {(): 1}
    before, begin = frozenset[Key](begins), 1
    for line in range(1, len(lines) + 1):
        so_far = "\n".join(lines[:line])
        whole, *cut = (_parsed(f"{so_far}\n{']' * opened}") for opened in range(DEEPEST + 1))
        content = whole if whole is not None else next((part for part in cut if part is not None), None)
        for key in _keys(content):
            begins.setdefault(key, line if _in_array(key, before) else begin)
        if whole is not None:
            before, begin = frozenset(begins), line + 1
    return begins


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _keys(content: Any, above: Key = ()) -> Iterator[Key]:
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in parts:
        yield (*above, name)
        yield from _keys(value, (*above, name))


def _in_array(key: Key, before: frozenset[Key]) -> bool:
    """Whether a key is, or is in, an array item that the statements before did not give."""
    return any(isinstance(part, int) and key[: end + 1] not in before for end, part in enumerate(key))
