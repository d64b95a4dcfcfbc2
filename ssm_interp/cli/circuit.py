"""`ssm-interp circuit`: which edge groups a behaviour needs."""

from __future__ import annotations

from collections.abc import Callable

from ssm_interp.circuits import fact_roles, find_circuit
from ssm_interp.cli.ask import loaded, picked, tokenized
from ssm_interp.cli.output import draw, picture_and_table, progress_bar, say, write_table, wrote
from ssm_interp.errors import FeatureError
from ssm_interp.experiments import Circuit
from ssm_interp.experiments.parts import Picked
from ssm_interp.hooks import attach
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.models import INDUCTION
from ssm_interp.prompts import Batch, Prompt, TokenizedPrompt, induction_prompts, induction_roles, pad, with_ids

Roles = Callable[[Batch], dict[str, list[list[int]]]]

FRESH = "induction"
"""The name of facts that are made, not read."""


def run(circuit: Circuit) -> None:
    """Prints the groups that are left; writes a picture, and a table of all groups."""
    picture, table = picture_and_table(circuit.out, "circuit.png", ".csv")
    name, asked = circuit.model.model, circuit.prompts
    chosen = "facts" in asked.model_fields_set
    fresh = asked.facts == FRESH if chosen else name in INDUCTION and not asked.answer
    prompts = _made(asked) if fresh else picked(asked)
    host, tokenizer = loaded(name, circuit.model, circuit.computed)
    rows = tokenized(prompts, tokenizer, skip_bad=asked.skip_bad)
    roles = _roles(induction_roles if fresh else fact_roles, circuit.roles, rows)
    batch = _batch(rows, roles)
    with (
        attach(host, own_operator=device_of(host).type == "cpu") as ssm,
        progress_bar(shown=True, unit="trials") as bar,
    ):
        task = bar.add_task(name, total=None)
        result = find_circuit(
            ssm,
            batch,
            roles=roles(batch),
            metric=circuit.metric,
            tolerance=circuit.tolerance,
            relative=not circuit.absolute,
            layers=circuit.layers,
            features=circuit.features,
            through=circuit.through,
            batch_size=circuit.computed.batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    say(str(result))
    verb = wrote(picture, table)
    draw(picture, result.plot, result.page)
    frame = result.frame
    write_table(frame, table)
    say(f"\n{verb} {picture} and {table} ({len(frame)} edge groups; {result.trials} trials)")


def _made(asked: Picked) -> list[Prompt]:
    if asked.columns or asked.skip_bad:
        raise FeatureError("--column and --skip-bad are for facts that are read; those of --facts induction are made")
    made = induction_prompts(asked.limit, seed=asked.seed)
    return with_ids(made, asked.words) if asked.words else made


def _roles(default: Roles, names: tuple[str | int, ...] | None, rows: list[TokenizedPrompt]) -> Roles:
    """The roles that are asked for; else the default ones, but for those that none of the prompts has a token of."""
    if names is not None:
        return lambda batch: {str(name): batch.positions(name) for name in names}
    there = {name for row in rows for name, (columns,) in default(pad([row])).items() if columns}
    if missing := [name for name in default(pad(rows[:1])) if name not in there]:
        say(f"none of these prompts has a token that is {' or '.join(missing)}, so these are no roles here")
    return lambda batch: {name: columns for name, columns in default(batch).items() if name in there}


def _batch(rows: list[TokenizedPrompt], roles: Roles) -> Batch:
    """The prompts in which every role has a token; says which have not, and which role it is."""
    lacking = [[name for name, (columns,) in roles(pad([row])).items() if not columns] for row in rows]
    kept = [row for row, names in zip(rows, lacking, strict=True) if not names]
    examples: dict[str, list[TokenizedPrompt]] = {}
    for row, names in zip(rows, lacking, strict=True):
        for name in names:
            examples.setdefault(name, []).append(row)
    why = "; ".join(f"in {len(some)} no token is {name}, such as {_shown(some[0])}" for name, some in examples.items())
    if not kept:
        others = ", ".join(roles(pad(rows[:1])))
        raise FeatureError(
            f"none of these {len(rows)} prompts has a token of each role ({others}): {why}. Give other --role, or "
            "prompts whose subject stands elsewhere"
        )
    if len(kept) < len(rows):
        say(f"left out {len(rows) - len(kept)} of {len(rows)} prompts: {why}")
    return pad(kept)


def _shown(row: TokenizedPrompt) -> str:
    return f"{row.prompt.text!r} (subject {row.prompt.subject!r})"
