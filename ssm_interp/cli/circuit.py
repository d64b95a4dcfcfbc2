"""`ssm-interp circuit`: which edge groups a behaviour needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from transformers import PreTrainedTokenizerBase

from ssm_interp.cli.options import (
    DEFAULT,
    BatchSize,
    Columns,
    Device,
    Features,
    Ids,
    Limit,
    ModelName,
    OfType,
    Revision,
    Seed,
    SkipBad,
    Spread,
    Through,
    studies,
)
from ssm_interp.cli.output import picture_and_table, progress_bar, wrote
from ssm_interp.errors import FeatureError
from ssm_interp.features import fact_roles, find_circuit
from ssm_interp.flow import Study
from ssm_interp.flow.study_facts import StudyFacts
from ssm_interp.flow.study_job import load_for
from ssm_interp.hooks import attach
from ssm_interp.hooks.answers import device_of
from ssm_interp.models import INDUCTION
from ssm_interp.prompts import (
    Batch,
    Prompt,
    TokenizedPrompt,
    induction_prompts,
    induction_roles,
    pad,
    tokenize,
    with_ids,
)

Roles = Callable[[Batch], dict[str, list[list[int]]]]

FRESH = "induction"
"""The name of facts that are made, not read."""


def circuit(
    model: ModelName = "tiny-induction-mamba1",
    facts: Annotated[
        str | None,
        typer.Option(
            "--facts",
            "--prompts",
            help="induction (fresh prompts), or whatever flow takes.",
            show_default="induction for tiny-induction-*, else geo",
        ),
    ] = None,
    column: Columns = None,
    skip_bad: SkipBad = DEFAULT["skip_bad"],
    limit: Limit = 64,
    seed: Seed = DEFAULT["seed"],
    id: Ids = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role",
            help="Roles, or positions, that share out the tokens.",
            show_default="before trigger answer between query; of facts context subject after last",
        ),
    ] = None,
    metric: Annotated[
        Literal["logprob", "probability", "accuracy"], typer.Option(help="Of the answers; its mean is to stay.")
    ] = "logprob",
    tolerance: Annotated[float, typer.Option(help="How far it may move: a share of what all edges do.", min=0)] = 0.1,
    absolute: Annotated[bool, typer.Option("--absolute", help="The tolerance is in the metric's units.")] = False,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="In which edges are removed.", show_default="all")
    ] = None,
    features: Features = None,
    through: Through = None,
    revision: Revision = DEFAULT["revision"],
    dtype: OfType = DEFAULT["dtype"],
    device: Device = DEFAULT["device"],
    device_map: Spread = DEFAULT["device_map"],
    batch_size: BatchSize = 256,
    out: Annotated[Path, typer.Option(help="Picture (.png, .svg, .pdf); a table goes beside it.")] = Path(
        "circuit.png"
    ),
) -> None:
    """Search for the edge groups that a behaviour needs, by exact knockouts of all the others.

    An edge group is all edges of a layer from one role to another. Those that matter least are removed first, as long
    as the metric stays near its clean value. Prints the groups that are left, what each is worth and how faithful they
    are; writes a picture, and a table with a row per group (--out X.parquet: as Parquet).

    Options that name one thing can be repeated: --role --layer --features --through --id --column.

    Example:  [bold]ssm-interp circuit --model tiny-induction-mamba2[/bold]

    Example:  [bold]ssm-interp circuit --model tiny-mamba2 --limit 32 --out facts.svg[/bold]
    """
    (study,) = studies([model], {**locals(), "facts": facts or (FRESH if model in INDUCTION else DEFAULT["facts"])})
    picture, table = picture_and_table(out, "circuit.png", ".csv")
    host, tokenizer = load_for(study)
    roles = _roles(study.facts, role)
    batch = _batch([tokenize(prompt, tokenizer) for prompt in _prompts(study, tokenizer)], roles)
    with (
        attach(host, own_operator=device_of(host).type == "cpu") as ssm,
        progress_bar(shown=True, unit="trials") as bar,
    ):
        task = bar.add_task(model, total=None)
        found = find_circuit(
            ssm,
            batch,
            roles=roles(batch),
            metric=metric,
            tolerance=tolerance,
            relative=not absolute,
            layers=layer,
            features=features,
            through=through,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    typer.echo(str(found))
    verb = wrote(picture, table)
    picture.parent.mkdir(parents=True, exist_ok=True)
    found.plot().savefig(picture, dpi=200)
    frame = found.frame
    frame.to_csv(table, index=False) if table.suffix == ".csv" else frame.to_parquet(table, index=False)
    typer.echo(f"\n{verb} {picture} and {table} ({len(frame)} edge groups; {found.trials} trials)")


def _prompts(study: Study, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    if study.facts != FRESH:
        return StudyFacts(study).askable(tokenizer, say=True)
    if study.columns or study.skip_bad:
        raise FeatureError("--column and --skip-bad are for facts that are read; those of --facts induction are made")
    made = induction_prompts(study.limit, seed=study.seed)
    return made if study.ids is None else with_ids(made, study.ids)


def _roles(facts: str, names: list[str] | None) -> Roles:
    if not names:
        return induction_roles if facts == FRESH else fact_roles
    named = {name: int(name) if name.isdecimal() else name for name in names}
    return lambda batch: {name: batch.positions(role) for name, role in named.items()}


def _batch(rows: list[TokenizedPrompt], roles: Roles) -> Batch:
    """The prompts in which every role has a token; says how many have not."""
    kept = [row for row in rows if all(columns for (columns,) in roles(pad([row])).values())]
    names = ", ".join(roles(pad(rows[:1])))
    if not kept:
        raise FeatureError(f"none of these {len(rows)} prompts has a token of each role ({names}); give other --role")
    if lacking := len(rows) - len(kept):
        typer.echo(f"left out {lacking} of {len(rows)} prompts, which have no token of one of the roles {names}")
    return pad(kept)
