"""On which line a key of a TOML document stands."""

import tomllib
from pathlib import Path

import pytest

from ssm_interp.recipes import key_lines
from ssm_interp.recipes.lines import Key

DOCUMENT = '''# a comment with [brackets] = "and" quotes
title = "x"  # another
"quoted key" = 1
a.b."c.d" = 2

text = """
[not.a.table]
neither = "a key"
"""

[table]
list = [  # not yet
    "one",
    # nothing
    "two", "three",
    """
four""",
]
inline = { x = 1, y = [1, 2] }

  [ table . 'sub table' ]
  deep = [[1], [
      2,
      3,
  ]]

[[many]]
k = 1
[many.inner]
k = 2
[[many]]
k = [{ z = 1 },
     { z = 2 }]
[[many.inner2]]
k = "]"
'''

LINES: dict[Key, int] = {
    (): 1,
    ("title",): 2,
    ("quoted key",): 3,
    ("a",): 4,
    ("a", "b", "c.d"): 4,
    ("text",): 6,
    ("table",): 11,
    ("table", "list"): 12,
    ("table", "list", 0): 13,
    ("table", "list", 1): 15,
    ("table", "list", 2): 15,
    ("table", "list", 3): 17,
    ("table", "inline", "x"): 19,
    ("table", "inline", "y", 1): 19,
    ("table", "sub table"): 21,
    ("table", "sub table", "deep"): 22,
    ("table", "sub table", "deep", 0): 22,
    ("table", "sub table", "deep", 1): 22,
    ("table", "sub table", "deep", 1, 1): 24,
    ("many",): 27,
    ("many", 0): 27,
    ("many", 0, "k"): 28,
    ("many", 0, "inner"): 29,
    ("many", 0, "inner", "k"): 30,
    ("many", 1): 31,
    ("many", 1, "k"): 32,
    ("many", 1, "k", 0, "z"): 32,
    ("many", 1, "k", 1, "z"): 33,
    ("many", 1, "inner2", 0): 34,
    ("many", 1, "inner2", 0, "k"): 35,
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_kind_of_key_is_found(end: str) -> None:
    found = key_lines(DOCUMENT.replace("\n", end))
    assert {key: found[key] for key in LINES} == LINES
    assert ("table", "text") not in found
    assert ("not",) not in found


def every_key(content: object, above: Key = ()) -> list[Key]:
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [above, *(key for name, value in parts for key in every_key(value, (*above, name)))]


@pytest.mark.parametrize("path", ["pyproject.toml", "examples/geo_templates.toml"])
def test_all_keys_of_longer_documents_are_where_their_names_are(path: str) -> None:
    text = (Path(__file__).parents[1] / path).read_text()
    found, lines = key_lines(text), text.split("\n")
    assert found.keys() == set(every_key(tomllib.loads(text)))
    for key, line in found.items():
        if key and isinstance(key[-1], str):
            assert key[-1] in lines[line - 1]


def test_empty_documents_have_their_top() -> None:
    assert key_lines("") == key_lines("# nothing\n\n") == {(): 1}
