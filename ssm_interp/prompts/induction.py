"""Induction: a pair of symbols occurs once, its first symbol comes again, and the answer is the second.

    l e x f t n e n k w b q d j e b v o f n h k v x   ->   f
        ^ ^                                       ^
  trigger answer                              query

Every prompt pairs other symbols, so nothing but the prompt itself gives the answer. The embedded models
`tiny-induction-mamba1` and `tiny-induction-mamba2` do this and nothing else.
"""

from __future__ import annotations

import random
from string import ascii_lowercase

from ssm_interp.errors import PromptError
from ssm_interp.prompts.prompt import Prompt
from ssm_interp.prompts.roles import Batch

INDUCTION_SYMBOLS = tuple(ascii_lowercase)
GAP = 4  # tokens from the answer to the query, one more than a convolution of four taps looks back
SHORTEST = 3 + GAP


def induction_prompts(count: int, *, length: int = 24, seed: int = 0) -> list[Prompt]:
    """Prompts of single letters; each begins with another letter than its trigger, and its answer is its subject.

    Args:
        count: how many, at least 1.
        length: symbols of a prompt, its query (the last one) included; at least 7. The embedded models were trained on
            up to 32.
        seed: the same seed gives the same prompts.

    Returns:
        Prompts whose answer stands at a random place, at least four symbols before the query: further back than the
        query's convolution reaches. Trigger and answer occur nowhere else; the other symbols may occur several times.

    Raises:
        PromptError: a count below 1, or a length below 7.

    Example:
        >>> induction_prompts(1, length=8)[0].text
        'x k m y d u x m'
    """
    if count < 1 or length < SHORTEST:
        raise PromptError(
            f"induction needs at least 1 prompt of at least {SHORTEST} symbols, got count={count} and length={length}"
        )
    rng = random.Random(seed)
    return [_prompt(rng, length, f"induction/{seed}/{number}") for number in range(count)]


def _prompt(rng: random.Random, length: int, name: str) -> Prompt:
    trigger, answer, *others = rng.sample(INDUCTION_SYMBOLS, len(INDUCTION_SYMBOLS))
    symbols = rng.choices(others, k=length)
    place = rng.randint(1, length - 2 - GAP)
    symbols[place : place + 2] = [trigger, answer]
    symbols[-1] = trigger
    return Prompt(" ".join(symbols), subject=answer, answer=answer, relation="induction", id=name)


def induction_roles(batch: Batch) -> dict[str, list[list[int]]]:
    """Columns of a batch of `induction_prompts` by what they are to the task; every column but padding has one role.

    Returns:
        `before` the trigger, `trigger`, `answer` (the symbol after the trigger), `between` answer and query, and
        `query`, each with a list of columns per row, as `find_circuit(roles=...)` takes them.

    Raises:
        PromptError: a prompt of another kind.

    Example:
        >>> induction_roles(pad([tokenize(prompt, tokenizer) for prompt in induction_prompts(1)]))     # doctest: +SKIP
        {'before': [[0, 1]], 'trigger': [[2]], 'answer': [[3]], 'between': [[4, ..., 22]], 'query': [[23]]}
    """
    if wrong := [row.prompt for row in batch.prompts if row.prompt.relation != "induction"]:
        raise PromptError(f"{wrong[0].text!r} is no prompt of `induction_prompts`; its roles are those of the batch")
    context, answer = batch.positions("context"), batch.positions("subject")
    return {
        "before": [columns[:-1] for columns in context],
        "trigger": [columns[-1:] for columns in context],
        "answer": answer,
        "between": [
            [column for column in columns if column > at]
            for columns, (at,) in zip(batch.positions("relation_minus_last"), answer, strict=True)
        ],
        "query": batch.positions("last"),
    }
