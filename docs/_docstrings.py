"""How the site reads docstrings: what this package writes in its own way, in the words that the parser knows.

`Example:` holds doctests; `Cost:` and `Source:` are sentences; several arguments may share a line; and under `Raises:`
a sentence may stand for a list.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

HEADING = re.compile(r"^([A-Z]\w*):(?: (?=\S)|$)")
ITEM = re.compile(r"^    (?=\S)")
SHARED = re.compile(r"^    (\w+(?:, \w+)+): (.*)$")
RAISED = re.compile(r"^    [\w., ]+: ")
LISTS = ("Args", "Attributes", "Raises", "Returns", "Warns", "Yields")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """A docstring in the parser's words."""
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        if HEADING.match(line):
            sections.append([])
        sections[-1].append(line)
    return "\n".join(line for lines in sections for line in _section(lines))


def _section(lines: list[str]) -> list[str]:
    heading = HEADING.match(lines[0]) if lines else None
    if heading is None or heading[1] in LISTS:
        change = {"Args": _apart, "Attributes": _apart, "Raises": _named}.get(heading[1] if heading else "")
        return [one for line in lines for one in change(line)] if change else lines
    if heading[1] == "Example" and len(lines[0]) == len("Example:"):
        return ["Examples:", *lines[1:]]
    return ["", f"**{heading[1]}:** {lines[0][heading.end() :]}", *(line.strip() for line in lines[1:]), ""]


def _apart(line: str) -> list[str]:
    """An argument per line."""
    shared = SHARED.match(line)
    return [f"    {name}: {shared[2]}" for name in shared[1].split(", ")] if shared else [line]


def _named(line: str) -> list[str]:
    """A sentence among errors is about any of them."""
    return [f"    Exception: {line.strip()}" if ITEM.match(line) and not RAISED.match(line) else line]
