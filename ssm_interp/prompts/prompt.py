"""What is asked of a model: a fact, and a prompt that asks for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path

EMBEDDED = "geo"


class PromptError(ValueError):
    """A prompt, or a file of prompts, that cannot be used as it is."""


@dataclass(frozen=True)
class Fact:
    """`subject` stands in `relation` to `target`: (France, capital, Paris)."""

    relation: str
    subject: str
    target: str


@dataclass(frozen=True)
class Prompt:
    """A text whose continuation is `target`, about a `subject` that occurs in it exactly once.

    `text` ends where the target's leading space begins; `target` is given without that space.

    Attributes:
        relation: what the subject is asked for (a label, free).
        id: the prompt's name in tables of results; its text where it is empty.

    Raises:
        PromptError: `text`, `subject` or `target` is empty; `text` ends in a space; `target` begins or ends in one;
            `subject` does not occur in `text`, or more than once.

    Example:
        >>> Prompt("The capital of France is", subject="France", target="Paris").subject_span
        (15, 21)
    """

    text: str
    subject: str
    target: str
    relation: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "subject", "target"):
            if not getattr(self, name).strip():
                raise PromptError(f"the prompt {self.id or self.text!r} has an empty {name}: it needs one")
        if self.text != self.text.rstrip():
            raise PromptError(
                f"the prompt {self.text!r} ends in white space; end it where the target's leading space begins"
            )
        if self.target != self.target.strip():
            raise PromptError(
                f"the target {self.target!r} of the prompt {self.text!r} begins or ends in white space; give it without"
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
        if "{}" not in template:
            raise PromptError(f"the template {template!r} has no {{}}, the place of the subject")
        text = (template[0].upper() + template[1:]).replace("{}", fact.subject, 1)
        return cls(text, fact.subject, fact.target, fact.relation, id)


def load_prompts(source: str | Path = EMBEDDED) -> list[Prompt]:
    """Read prompts from a JSONL file: a line is an object with `text`, `subject`, `target`, and maybe `relation`, `id`.

    Args:
        source: path of the file, or `"geo"` for the embedded one (geography; the held-out templates of the embedded
            models; data from GeoNames, CC BY 4.0).

    Raises:
        PromptError: no such file, not UTF-8, no prompt in it, or a line that is not a prompt (the line is named).

    Example:
        >>> load_prompts("geo")[0].text
        'The name of the capital city of Afghanistan is'
    """
    path = Path(str(files("ssm_interp.prompts") / "data" / "geo.jsonl")) if source == EMBEDDED else Path(source)
    if not path.is_file():
        raise PromptError(
            f"there is no prompt file {str(path)!r}; give a JSONL file, or {EMBEDDED!r} for the embedded one"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt file {str(path)!r} is not UTF-8 text (byte {error.start})") from None
    prompts = list(_parse(text.split("\n"), path))
    if not prompts:
        raise PromptError(f"the prompt file {str(path)!r} holds no prompt")
    return prompts


def save_prompts(prompts: Iterable[Prompt], path: str | Path) -> None:
    """Write prompts as JSONL, the format that `load_prompts` reads."""
    lines = (json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    Path(path).write_text("".join(lines), encoding="utf-8")


def _parse(lines: Iterable[str], path: Path) -> Iterator[Prompt]:
    known = {field.name for field in fields(Prompt)}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(row, dict) or not {"text", "subject", "target"} <= row.keys():
            raise PromptError(f"{where}: a prompt is a JSON object with text, subject and target, not {line[:80]!r}")
        if unknown := row.keys() - known:
            raise PromptError(f"{where}: unknown keys {sorted(unknown)}; a prompt has {sorted(known)}")
        if wrong := [key for key, value in row.items() if not isinstance(value, str)]:
            raise PromptError(f"{where}: {wrong} must be text (JSON strings)")
        try:
            yield Prompt(**row)
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from None
