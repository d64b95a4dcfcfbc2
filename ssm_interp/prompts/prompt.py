"""What is asked of a model: a fact, and a prompt that asks for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ssm_interp.errors import PromptError


@dataclass(frozen=True)
class Fact:
    """`subject` stands in `relation` to `answer`: (France, capital, Paris)."""

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """A text whose continuation is `answer`, about a `subject` that occurs in it exactly once.

    `text` ends where the answer's leading space begins; `answer` is given without that space.

    Attributes:
        relation: what the subject is asked for (a label, free).
        id: the prompt's name in tables of results; its text where it is empty.

    Raises:
        PromptError: `text`, `subject` or `answer` is empty; `text` ends in a space; `answer` begins or ends in one;
            `subject` does not occur in `text`, or more than once; something that is no character (half of a surrogate
            pair, as broken JSON has).

    Example:
        >>> Prompt("The capital of France is", subject="France", answer="Paris").subject_span
        (15, 21)
    """

    text: str
    subject: str
    answer: str
    relation: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "subject", "answer", "relation", "id"):
            if not isinstance(value := getattr(self, name), str):
                raise PromptError(f"a prompt's {name} must be text, got {type(value).__name__}")
        for name in ("text", "subject", "answer"):
            if not getattr(self, name).strip():
                raise PromptError(f"the prompt {self.id or self.text!r} has an empty {name}: it needs one")
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, name)):
                raise PromptError(f"the {name} {getattr(self, name)!r} has half of a surrogate pair, no character")
        if self.text != self.text.rstrip():
            raise PromptError(
                f"the prompt {self.text!r} ends in white space; end it where the answer's leading space begins"
            )
        if self.answer != self.answer.strip():
            raise PromptError(
                f"the answer {self.answer!r} of the prompt {self.text!r} begins or ends in white space; give it without"
            )
        if (times := sum(self.text.startswith(self.subject, start) for start in range(len(self.text)))) != 1:
            raise PromptError(
                f"the subject {self.subject!r} occurs {times} times in the prompt {self.text!r}; it must occur once"
            )

    @property
    def subject_span(self) -> tuple[int, int]:
        """First and one-past-last character of the subject in the text."""
        start = self.text.index(self.subject)
        return start, start + len(self.subject)

    @classmethod
    def from_template(cls, template: str, fact: Fact, id: str = "") -> Prompt:
        """Put a fact's subject in the place of `{}` in a template, and begin the template with a capital letter.

        Raises:
            PromptError: the template has no `{}`, or the result is no prompt.

        Example:
            >>> Prompt.from_template("the capital of {} is", Fact("capital", "France", "Paris")).text
            'The capital of France is'
        """
        if not isinstance(template, str) or not isinstance(fact, Fact):
            got = f"{type(template).__name__} and {type(fact).__name__}"
            raise PromptError(f"from_template takes a text with {{}}, the place of the subject, and a Fact, got {got}")
        if not isinstance(fact.subject, str):
            raise PromptError(f"a fact's subject must be text, got {type(fact.subject).__name__}")
        if "{}" not in template:
            raise PromptError(f"the template {template!r} has no {{}}, the place of the subject")
        text = (template[0].upper() + template[1:]).replace("{}", fact.subject, 1)
        return cls(text, fact.subject, fact.answer, fact.relation, id)


def with_ids(prompts: Sequence[Prompt], ids: Sequence[str]) -> list[Prompt]:
    """The prompts that have these ids, in their order; a prompt without an id has its text as one.

    Raises:
        PromptError: no prompt has one of them (the message gives the nearest), or several have.

    Example:
        >>> [prompt.id for prompt in with_ids(load_prompts("geo"), ["capital/France/0"])]       # doctest: +SKIP
        ['capital/France/0']
    """
    for what, kind, given in (("prompts", Prompt, prompts), ("ids", str, ids)):
        if (
            isinstance(given, str)
            or not isinstance(given, Sequence)
            or not all(isinstance(item, kind) for item in given)
        ):
            raise PromptError(f"{what} must be a sequence of {kind.__name__}, got {type(given).__name__}")
    by_id = {prompt.id or prompt.text: prompt for prompt in prompts}
    times = Counter(prompt.id or prompt.text for prompt in prompts)
    for name in ids:
        if name not in by_id:
            near = get_close_matches(name, by_id, n=3, cutoff=0.4) or list(by_id)[:3]
            there = f"; there are {', '.join(map(repr, near))}, ..." if near else ""
            raise PromptError(f"there is no prompt {name!r} among these {len(prompts)}{there}")
        if times[name] > 1:
            raise PromptError(
                f"{times[name]} of these {len(prompts)} prompts have the id {name!r}; ids must be distinct"
            )
    return [by_id[name] for name in ids]
