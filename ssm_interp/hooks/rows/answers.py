"""Answers under variants: the one door, behind which they are computed as rows of one step or by full forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp.arguments import as_index, as_list, as_streams
from ssm_interp.errors import HookError, InterventionError, MetricError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.edits.masks import Columns, last_columns, naming, no_edge, reading
from ssm_interp.hooks.intervention import Intervention
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.rows.asked import Asked
from ssm_interp.hooks.rows.metrics import Metric, Positions, names_of
from ssm_interp.hooks.rows.scores import Interventions, Scores, in_words
from ssm_interp.plots import answers_figure
from ssm_interp.reprs import describe
from ssm_interp.results import Result

Variant: TypeAlias = Intervention | Sequence[Intervention]
"""One intervention, or several that act together; none: the clean run."""
By = Literal["auto", "rows", "forwards"]
ROWS = "rows of one step"
ROW_INPUTS = {"input_ids", "attention_mask"}


@dataclass(frozen=True, eq=False, repr=False)
class Answers(Result):
    """What metrics say of a batch under each of many variants.

    Attributes:
        values: `[m b]`, float64, on the CPU; of several metrics `[metric m b]`.
        metrics: what they are called; a function by its own name.
        how: how they were computed, and why so: as rows of one step, or by full forwards.
        variants: what each of them does, in words.

    Example:
        >>> answers(ssm, batch, [(), Knockout(sources="subject")], ["probability", "rank"]).frame      # doctest: +SKIP
    """

    values: Float[Tensor, "*metric m b"]
    metrics: tuple[str, ...]
    how: str
    variants: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Answers({', '.join(self.metrics)}: {list(self.values.shape)}; {self.how})"

    @property
    def frame(self) -> pd.DataFrame:
        """A row per variant and prompt: `variant`, its number; `intervention`, what it does; `row` of the batch; and a
        column per metric."""
        m, b = self.values.shape[-2:]
        columns = self.values.reshape(-1, m * b).numpy()
        variant, row = np.divmod(np.arange(m * b), b)
        named = np.array(self.variants, dtype=object)[variant]
        frame = pd.DataFrame({"variant": variant, "intervention": named, "row": row})
        return frame.assign(**dict(zip(self.metrics, columns, strict=True)))

    def plot(self) -> Figure:
        """A row per variant, a dot per prompt, and the mean over prompts, see `plots.answers_figure`."""
        return answers_figure(self.frame, self.metrics)


def answers(
    ssm: Attachment,
    batch: Any,
    variants: Sequence[Variant],
    metric: str | Metric | Sequence[str | Metric] = "log_probability",
    *,
    full_answer: bool = False,
    positions: Positions = "last",
    by: By = "auto",
    allow_no_edges: bool = False,
    batch_size: int = 256,
    max_memory: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Answers:
    """What a metric says of every prompt of a batch under each of many variants.

    Variants that are knockouts of sources x targets are computed as rows of one step: the positions before the first
    target are read once, and all variants go on from there. Other interventions, single edges, several knockouts at one
    place, metrics of all positions, and models in which rows would not be exact, take full forwards; sets of knockouts
    then share forwards where that is exact. `Answers.how` says which and why.

    Args:
        ssm: an attached model, in eval mode.
        batch: prompts as `pad` gives them; or `input_ids` `[b t]`, or the mapping of a tokenizer, which know no roles
            and no answers.
        variants: each an intervention or several that act together, none for the clean run; roles are resolved by the
            batch.
        metric: a name ("log_probability", "probability", "logit_difference", "rank", "accuracy", "kl") or a function
            from logits in float64, `[b v]`, to a number per row, `[b]`; or several of them. A row's number may depend
            on that row's logits alone.
        full_answer: ask for every token of the answers, not the first one alone; takes full forwards. Positions stay
            those of the prompts.
        positions: the logits that a function gets: those at each row's last token, or "all", `[b t v]`, which takes
            full forwards.
        by: "rows" or "forwards" instead of what is best.
        allow_no_edges: whether all knockouts may be without any edge in this batch.
        batch_size: prompts x variants in one full forward.
        max_memory: bytes that the rows of a step may take; None: a quarter of what is free.
        progress: called with the number of answers, prompts x variants, that have come in.

    Raises:
        InterventionError: a layer, stream, feature or position that does not exist; a role, and no batch of prompts;
            the name of a feature group; edges of which none exists, in any prompt and variant; single edges under full
            answers.
        MetricError: an unknown name; a name that needs answers, without any; not one finite number per row.
        HookError: no variants; `by="rows"` where that cannot be exact; not enough memory for a single row; under full
            answers an edit at work that names positions.

    Cost: as rows: one forward over the positions before the first target, and for each variant the positions from there
        on, in the layers from its first one on. By full forwards: len(variants) x b rows.
    Source: Mamba Knockout (Endy et al., ACL 2025) for the knockouts; causality and linearity for the rest.

    Example:
        >>> variants = [Knockout(sources="subject", targets="last", layers=layer) for layer in ssm.layers]
        >>> answers(ssm, batch, variants, "probability").values                                     # doctest: +SKIP
    """
    if isinstance(variants, Intervention) or not isinstance(variants, Sequence) or not variants:
        raise HookError(
            f"answers takes a sequence of variants, at least one, got {describe(variants)}; (), no intervention, is "
            "the clean run"
        )
    if by not in ("auto", "rows", "forwards"):
        raise HookError(f"by must be 'auto', 'rows' or 'forwards', got {describe(by)}")
    if positions not in ("last", "all"):
        raise HookError(f"positions must be 'last' or 'all', got {describe(positions)}")
    if progress is not None and not callable(progress):
        raise HookError(f"progress must be a function of a count, got {describe(progress)}")
    if (size := as_index(batch_size)) is None or size < 1:
        raise HookError(f"batch_size must be a whole number, at least 1, got {describe(batch_size)}")
    single = not isinstance(metric, list | tuple)
    metrics: list[Any] = list(metric) if isinstance(metric, list | tuple) else [metric]
    if not metrics:
        raise MetricError("answers needs at least one metric, got an empty sequence")
    asked = Asked.of(ssm, batch, full_answer=full_answer)
    words = tuple(map(in_words, variants))
    resolved = list(_resolved(ssm, variants, asked))
    scores = Scores(asked, metrics, positions, size)
    slow = _why_forwards(asked, resolved, scores, by)
    if not allow_no_edges:
        _check_some_edge(asked, resolved)
    values = torch.full((len(metrics), len(resolved), len(asked.mask)), torch.nan, dtype=torch.float64)
    fast = [number for number in range(len(resolved)) if number not in slow]
    by_rows = partial(scores.by_rows, max_memory=max_memory)
    for numbers, way in ((fast, by_rows), (sorted(slow), scores.by_forwards)):
        with torch.no_grad():
            labels = [f"variant {number} ({words[number]})" for number in numbers]
            for some, rows, scored in way([resolved[number] for number in numbers], labels) if numbers else ():
                chosen = rearrange(torch.tensor(numbers)[some], "m -> m 1")
                values[:, chosen, torch.tensor(rows)] = scored.cpu()
                if progress:
                    progress(len(some) * len(rows))
    return Answers(values[0] if single else values, names_of(metrics), _how(slow, len(resolved)), words)


def _resolved(ssm: Attachment, variants: Sequence[Variant], asked: Asked) -> Iterator[tuple[Intervention, ...]]:
    """The interventions of each variant, of which the model has what they name, with positions in place of roles."""
    known: dict[Any, dict[str, Any]] = {}
    checked: set[Any] = set()
    for variant in variants:
        interventions = tuple(variant) if isinstance(variant, list | tuple) else (variant,)
        for intervention in interventions:
            if not isinstance(intervention, Intervention) or intervention.named_parts not in checked:
                ssm.check(intervention, whole=True)
                checked.add(intervention.named_parts)
        yield tuple(_with_positions(asked, intervention, known) for intervention in interventions)


def _with_positions(asked: Asked, intervention: Intervention, known: dict[Any, dict[str, Any]]) -> Intervention:
    """An intervention with its positions as columns of what is asked, which others may name too."""
    if not intervention.roles and (asked.full_answers is None or not intervention.names_positions):
        return intervention
    named = intervention.position_fields, tuple(getattr(intervention, name) for name in intervention.position_fields)
    if named not in known:
        resolved = asked.in_columns(intervention)
        known[named] = {name: getattr(resolved, name) for name in intervention.position_fields}
    return intervention.replace(**known[named])


def _why_forwards(asked: Asked, variants: Sequence[Interventions], scores: Scores, by: By) -> dict[int, str]:
    """The variants that take full forwards, and why."""
    if by == "forwards":
        return dict.fromkeys(range(len(variants)), "as asked")
    reason = scores.needs_forwards or _unfit(asked) or asked.obstacle
    reasons = [reason or _no_rectangles(asked.ssm, interventions) for interventions in variants]
    slow = {number: why for number, why in enumerate(reasons) if why}
    if slow and by == "rows":
        number, why = next(iter(slow.items()))
        raise HookError(f"rows of one step cannot be exact: {why} (variant {number}); leave out by='rows'")
    return slow


def _unfit(asked: Asked) -> str | None:
    """Why the inputs cannot be rows of one step."""
    if more := sorted(set(asked.inputs) - ROW_INPUTS):
        return f"the inputs have {', '.join(more)}"
    spans = asked.mask.argmax(1) + asked.mask.sum(1)
    return None if bool((spans == last_columns(asked.mask) + 1).all()) else "a row's tokens are not one run of columns"


def _no_rectangles(ssm: Attachment, interventions: Interventions) -> str | None:
    """Why some interventions are not one knockout of sources x targets in each module."""
    taken: set[tuple[str, int]] = set()
    for knockout in interventions:
        if not isinstance(knockout, Knockout):
            return f"{knockout.kind} is no Knockout"
        if knockout.edges is not None:
            return "a Knockout of single edges"
        for stream in as_streams(knockout.through) or (ssm.default_stream,):
            layers = ssm.streams[stream] if knockout.layers is None else as_list(knockout.layers)
            if taken & (modules := {(stream, layer) for layer in layers}):
                return "several knockouts in one module"
            taken |= modules
    return None


def _check_some_edge(asked: Asked, variants: Sequence[Interventions]) -> None:
    """Refuse variants that are knockouts, and of which not one has an edge in any prompt."""
    every = [intervention for interventions in variants for intervention in interventions]
    if not every or not all(isinstance(intervention, Knockout) for intervention in every):
        return
    columns = Columns(len(asked.mask), asked.mask.shape[1], asked.mask)
    by_edges = {(edit.sources, edit.targets, edit.edges): edit for edit in every if isinstance(edit, Knockout)}
    named = None
    for knockout in by_edges.values():
        for targets, sources in columns.edges(knockout, refuse=False):
            if reading(targets, sources).any():
                return
            named = knockout if (targets.any(1) & sources.any(1)).any() else named
    if named is not None:
        raise InterventionError(no_edge(naming(named), columns.length))


def _how(slow: Mapping[int, str], count: int) -> str:
    """How the answers were computed, and why."""
    if not slow:
        return ROWS
    reasons = list(dict.fromkeys(slow.values()))
    forwards = f"full forwards: {'; '.join(reasons)}"
    return forwards if len(slow) == count else f"{ROWS}; {len(slow)} of {count} variants by {forwards}"
