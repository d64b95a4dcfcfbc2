"""Whether the edges that a sweep names exist: a target reads what stands at or before it, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ssm_interp.errors import NoEdgesError, NoEdgesWarning
from ssm_interp.prompts import TokenizedPrompt


def edge_count(row: TokenizedPrompt, source: str | int, target: str) -> int:
    """How many edges target <- source a prompt has."""
    return sum(s <= t for t in row.positions(target) for s in row.positions(source))


def check_edges_exist(
    prompts: Sequence[TokenizedPrompt],
    sources: Sequence[str | int],
    targets: Sequence[str],
    *,
    warn: bool = True,
    stacklevel: int = 2,
) -> None:
    """Refuse knockouts of which no prompt has an edge; warn of those of them that have none, though others have.

    Args:
        prompts: tokenized, all that are asked.
        sources: roles, or positions; of a position that is no warning (it may come after every target).
        targets: roles.
        warn: whether to.

    Raises:
        NoEdgesError: no prompt has any edge from one of the sources to one of the targets.

    Example:
        >>> check_edges_exist([tokenize(prompt, tokenizer)], ["last"], ["subject"])          # doctest: +SKIP
        Traceback (most recent call last):
        ssm_interp.flow.windows.NoEdgesError: there is no edge last -> subject in any of the 1 prompts: ...
    """
    pairs = [(source, target) for target in targets for source in sources]
    missing = [pair for pair in pairs if not any(edge_count(row, *pair) for row in prompts)]
    if missing and len(missing) == len(pairs):
        raise NoEdgesError(_none(prompts, missing))
    if warn and (roles := [f"{source} -> {target}" for source, target in missing if isinstance(source, str)]):
        warnings.warn(
            f"none of the {len(prompts)} prompts has an edge {', '.join(roles)} (a target reads only what stands at or "
            "before it): these knockouts change nothing",
            NoEdgesWarning,
            stacklevel=stacklevel + 1,
        )


def _none(prompts: Sequence[TokenizedPrompt], pairs: Sequence[tuple[str | int, str]]) -> str:
    row, (source, target) = prompts[0], pairs[0]
    named = ", ".join(f"{role} -> {reader}" for role, reader in pairs[:4]) + (", ..." if len(pairs) > 4 else "")
    back = [prompt for prompt in prompts if isinstance(source, str) and edge_count(prompt, target, source)]
    advice = f"did you swap source and target? {target} -> {source} has edges" if back else "name other roles"
    return (
        f"there is no edge {named} in any of the {len(prompts)} prompts: a target reads only what stands at or before "
        f"it, and in {row.prompt.text!r} {_where(row, source)}, {_where(row, target)}; {advice}"
    )


def _where(row: TokenizedPrompt, role: str | int) -> str:
    """Where a role stands, in words."""
    positions = ", ".join(map(str, row.positions(role)))
    name = f"the token {role}" if isinstance(role, int) else f"the role {role}"
    return f"{name} is at {'position ' + positions if positions else 'no position'}"
