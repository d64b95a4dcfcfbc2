"""What is asked for where an answer has several tokens: its first one, which several answers may share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ssm_interp.errors import SharedTokenWarning
from ssm_interp.prompts.roles import TokenizedPrompt

SHOWN = 3


def shared_first_tokens(prompts: Sequence[TokenizedPrompt]) -> dict[str, list[str]]:
    """First tokens with which several of the answers begin, readable -> those answers, the most shared one first.

    Example:
        >>> shared_first_tokens([of_france, of_czechia])           # doctest: +SKIP
        {' P': ['Paris', 'Prague']}
    """
    answers: dict[int, dict[tuple[int, ...], str]] = {}
    names: dict[int, str] = {}
    for row in prompts:
        answers.setdefault(row.answer_id, {}).setdefault(row.answer_ids, row.prompt.answer)
        names.setdefault(row.answer_id, row.answer_tokens[0])
    shared = {names[token]: list(several.values()) for token, several in answers.items() if len(several) > 1}
    return dict(sorted(shared.items(), key=lambda item: -len(item[1])))


def warn_shared(prompts: Sequence[TokenizedPrompt], *, stacklevel: int = 2) -> None:
    """Warn, once for all of them, of prompts whose first answer token does not tell their answer from another's."""
    if not (shared := shared_first_tokens(prompts)):
        return
    token, answers = next(iter(shared.items()))
    some = ", ".join(answers[:SHOWN]) + (", ..." if len(answers) > SHOWN else "")
    others = f"; so do {len(shared) - 1} more tokens begin several answers" if len(shared) > 1 else ""
    words = {answer for several in shared.values() for answer in several}
    count = sum(row.prompt.answer in words for row in prompts)
    warnings.warn(
        f"{count} of {len(prompts)} prompts ask for a first token that does not tell their answer from another answer: "
        f'"{token.replace(" ", "·")}" begins {some}{others}. The option full_answer asks for every token of '
        "an answer",
        SharedTokenWarning,
        stacklevel=stacklevel + 1,
    )
