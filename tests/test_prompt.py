"""Prompts, and the files that hold them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_terms import as_users_run_it

from ssm_interp.prompts import Fact, Prompt, PromptError, load_prompts, save_prompts, with_ids

FRANCE = Prompt("The capital of France is", "France", "Paris", "capital", "capital/France")


def test_subject_span_is_where_the_subject_stands() -> None:
    start, end = FRANCE.subject_span
    assert FRANCE.text[start:end] == "France"
    assert Prompt("France has as capital", "France", "Paris").subject_span == (0, 6)


@pytest.mark.parametrize(
    ("text", "subject", "answer", "message"),
    [
        ("", "France", "Paris", "empty text"),
        ("Fran\ud800ce is", "is", "x", "half of a surrogate pair"),
        ("The capital of France is", " ", "Paris", "empty subject"),
        ("The capital of France is", "France", "", "empty answer"),
        ("The capital of France is ", "France", "Paris", "ends in white space"),
        ("The capital of France is", "France", " Paris", "answer ' Paris' .* white space"),
        ("The capital of France is", "Spain", "Madrid", "'Spain' occurs 0 times"),
        ("France, the capital of France is", "France", "Paris", "'France' occurs 2 times"),
        ("anana is", "ana", "fruit", "'ana' occurs 2 times"),
    ],
)
def test_what_is_no_prompt_is_refused(text: str, subject: str, answer: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Prompt(text, subject, answer)


BAD: dict[str, Callable[[], Any]] = {
    "a prompt's text must be text, got int": lambda: Prompt(3, "a", "b"),  # type: ignore[arg-type]
    "a prompt's answer must be text, got NoneType": lambda: Prompt("a b", "b", None),  # type: ignore[arg-type]
    "a prompt's relation must be text, got int": lambda: Prompt("a b", "b", "c", relation=3),  # type: ignore[arg-type]
    "and a Fact, got str and NoneType": lambda: Prompt.from_template("{} is", None),  # type: ignore[arg-type]
    "a fact's subject must be text": lambda: Prompt.from_template("a {}", Fact("a", 1, "b")),  # type: ignore[arg-type]
    "ids must be a sequence of str, got str": lambda: with_ids([FRANCE], "capital/France"),
    "prompts must be a sequence of Prompt, got list": lambda: with_ids(["text"], ["a"]),  # type: ignore[list-item]
    "no prompt 'a' among these 0$": lambda: with_ids([], ["a"]),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_text_is_refused(message: str) -> None:
    with as_users_run_it(), pytest.raises(PromptError, match=message):
        BAD[message]()


def test_template_begins_with_a_capital_and_leaves_the_subject_alone() -> None:
    fact = Fact("maker", "iPhone", "Apple")
    assert Prompt.from_template("the maker of the {} is", fact).text == "The maker of the iPhone is"
    assert Prompt.from_template("{} is made by", fact).text == "iPhone is made by"
    with pytest.raises(PromptError, match="has no {}"):
        Prompt.from_template("the maker is", fact)


def test_embedded_prompts_cover_at_least_600_facts_in_several_templates() -> None:
    prompts = load_prompts("geo")
    facts = {(p.relation, p.subject, p.answer) for p in prompts}
    assert len(facts) >= 600
    assert {p.relation for p in prompts} == {"capital", "continent", "country", "currency"}
    assert len(prompts) == 3 * len(facts) == len({p.id for p in prompts})


@given(
    st.lists(
        st.builds(
            lambda before, answer, relation: Prompt(f"{before}Xanadu is", "Xanadu", answer, relation),
            st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "Xanadu" not in text),
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t == t.strip()),
            st.text(st.characters(exclude_categories=["Cs"])),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt]) -> None:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    save_prompts(prompts, path)
    assert load_prompts(path) == prompts


def test_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    save_prompts([FRANCE], path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert load_prompts(str(path)) == [FRANCE]


GOOD = json.dumps({"text": "The capital of France is", "subject": "France", "answer": "Paris"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ('["a"]', "line 2: a prompt is a JSON object"),
        ('{"text": "x"}', "line 2: a prompt is a JSON object with text, subject and answer"),
        (GOOD.replace("}", ', "label": "x"}'), r"line 2: unknown keys \['label'\]"),
        (GOOD.replace('"Paris"', "7"), r"line 2: \['answer'\] must be text"),
        (GOOD.replace('"France"', '"Spain"'), "line 2: the subject 'Spain' occurs 0 times"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(PromptError, match=message):
        load_prompts(path)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="there is no prompt file .* 'geo' for the embedded one"):
        load_prompts(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(PromptError, match="holds no prompt"):
        load_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes("São".encode("latin-1"))
    with pytest.raises(PromptError, match="is not UTF-8"):
        load_prompts(tmp_path / "latin.jsonl")


def test_prompts_are_found_by_their_ids() -> None:
    prompts = [
        Prompt("ban dus", "dus", "lox", id="a"),
        Prompt("kit dus", "dus", "lox"),
        Prompt("x y", "x", "z", id="b"),
    ]
    assert with_ids(prompts, ["b", "kit dus"]) == [prompts[2], prompts[1]]
    with pytest.raises(PromptError, match="there is no prompt 'kit dun' among these 3; there are 'kit dus'"):
        with_ids(prompts, ["b", "kit dun"])
    with pytest.raises(PromptError, match="2 of these 4 prompts have the id 'a'; ids must be distinct"):
        with_ids([*prompts, prompts[0]], ["a"])
