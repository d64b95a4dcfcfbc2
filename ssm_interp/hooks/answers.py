"""Answers under variants: the one door, behind which they are computed as rows of one step or by full forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from ssm_interp.arguments import as_index, as_list, as_streams
from ssm_interp.errors import HookError, InterventionError, MetricError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.forwards import FullForwards, logits_of_text
from ssm_interp.hooks.inputs import as_inputs
from ssm_interp.hooks.interventions import HasRoles, Intervention, Knockout
from ssm_interp.hooks.masks import Columns, naming, no_edge, reading
from ssm_interp.hooks.metrics import (
    Measured,
    Metric,
    Positions,
    as_measured,
    check_name,
    of_full_answer,
    precise,
)
from ssm_interp.hooks.rows import run_each
from ssm_interp.hooks.trial import obstacle
from ssm_interp.hooks.virtual import refuse_virtual_tokens
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
        metrics: their names; "metric" of a function.
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
        full_answer: ask for every token of the answers, not the first one alone; takes full forwards.
        positions: the logits that a function gets: those at each row's last token, or "all", `[b t v]`, which takes
            full forwards.
        by: "rows" or "forwards" instead of what is best.
        allow_no_edges: whether all knockouts may be without any edge in this batch.
        batch_size: prompts x variants in one full forward.
        max_memory: bytes that the rows of a step may take; None: a quarter of what is free.
        progress: called with the number of answers, prompts x variants, that have come in.

    Raises:
        InterventionError: a layer, stream, feature or position that does not exist; a role, and no batch of prompts;
            the name of a feature group; edges of which none exists, in any prompt and variant.
        MetricError: an unknown name; a name that needs answers, without any; not one finite number per row.
        HookError: no variants; `by="rows"` where that cannot be exact; not enough memory for a single row.

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
    if (size := as_index(batch_size)) is None or size < 1:
        raise HookError(f"batch_size must be a whole number, at least 1, got {describe(batch_size)}")
    several = [metric] if isinstance(metric, str) or callable(metric) else list(metric)
    asked = Asked.of(ssm, batch, full_answer=full_answer)
    sets = list(_resolved(ssm, variants, asked.roles))
    scores = _Scores(asked, several, positions, size)
    slow = _why_forwards(asked, sets, scores, by)
    values = torch.full((len(several), len(sets), len(asked.mask)), torch.nan, dtype=torch.float64)
    fast = [number for number in range(len(sets)) if number not in slow]
    if not allow_no_edges:
        _check_some_edge(asked, sets)
    with torch.no_grad():
        for numbers, rows, scored in scores.of(sets, fast, sorted(slow), max_memory):
            values[:, torch.tensor(numbers)[:, None], torch.tensor(rows)] = scored.double().cpu()
            if progress:
                progress(len(numbers) * len(rows))
    names = tuple(one if isinstance(one, str) else "metric" for one in several)
    one = isinstance(metric, str) or callable(metric)
    words = tuple(map(_in_words, variants))
    return Answers(values[0] if one else values, names, _how(slow, len(sets)), words)


@dataclass(frozen=True)
class Asked:
    """What the answers are of.

    Attributes:
        ssm: the attached model.
        inputs: what it is called with, on its device, `input_ids` among it.
        mask: 0 at padding, `[b t]`, on the CPU.
        roles: the batch that knows where roles are; None: nothing does.
        targets: first tokens of the answers, `[b]`; None: the prompts have none.
        full_answers: all tokens of each answer, where those are asked for.
    """

    ssm: Attachment
    inputs: Mapping[str, Any]
    mask: Int[Tensor, "b t"]
    roles: HasRoles | None = None
    targets: Int[Tensor, " b"] | None = None
    full_answers: Sequence[Sequence[int]] | None = None

    @staticmethod
    def of(ssm: Attachment, batch: Any, *, full_answer: bool = False) -> Asked:
        """A batch as `answers` takes it; raises as that."""
        if not isinstance(ssm, Attachment):
            raise HookError(f"the model must be attached, ssm = attach(model); got {type(ssm).__name__}")
        with_roles = batch if isinstance(batch, HasRoles) else None
        if full_answer:
            if not hasattr(batch, "continued"):
                raise HookError("full answers are those of a Batch of prompts, as pad(...) gives it")
            with_roles = batch = batch.continued()
        refuse_virtual_tokens(ssm.model, "a row must be one whole text, column by column")
        device = device_of(ssm.model)
        given = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in as_inputs(batch, ssm.model).items()
        }
        if "input_ids" not in given:
            raise HookError(f"the inputs must have input_ids [b t]; these have {list(given)}")
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids)).long().cpu()
        targets = getattr(batch, "target_ids", None)
        return Asked(ssm, given, mask, with_roles, targets, batch.answers if full_answer else None)

    @cached_property
    def clean(self) -> Float[Tensor, "b v"]:
        """The logits of the clean run at each row's last token."""
        with torch.no_grad():
            return logits_of_text(self.ssm, self.inputs, self.mask)

    @cached_property
    def obstacle(self) -> str | None:
        """Why rows of one step cannot be exact, whatever the variants; None: they are."""
        return obstacle(self.ssm)


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: with its first weight that is not offloaded."""
    return next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))


def _resolved(
    ssm: Attachment, variants: Sequence[Variant], roles: HasRoles | None
) -> Iterator[tuple[Intervention, ...]]:
    """The interventions of each variant, of which the model has what they name, with positions in place of roles."""
    known: dict[Any, dict[str, Any]] = {}
    checked: set[Any] = set()
    for variant in variants:
        several = tuple(variant) if isinstance(variant, list | tuple) else (variant,)
        for one in several:
            if not isinstance(one, Intervention) or one.kind_of_place not in checked:
                ssm.check(one, whole=True)
                checked.add(one.kind_of_place)
        yield tuple(one if not one.roles else _with_positions(ssm, one, roles, known) for one in several)


def _with_positions(
    ssm: Attachment, intervention: Intervention, roles: HasRoles | None, known: dict[Any, dict[str, Any]]
) -> Intervention:
    """An intervention with the positions of its roles, which others may name too."""
    named = intervention.places, tuple(getattr(intervention, name) for name in intervention.places)
    if named not in known:
        resolved = ssm.resolved(intervention, roles)
        known[named] = {name: getattr(resolved, name) for name in intervention.places}
    return intervention.replace(**known[named])


def _why_forwards(asked: Asked, sets: Sequence[Sequence[Intervention]], scores: _Scores, by: By) -> dict[int, str]:
    """The variants that take full forwards, and why."""
    if by == "forwards":
        return dict.fromkeys(range(len(sets)), "as asked")
    reason = scores.needs_forwards or _unfit(asked) or asked.obstacle
    slow = {number: why for number, several in enumerate(sets) if (why := reason or _no_rectangles(asked.ssm, several))}
    if slow and by == "rows":
        number, why = next(iter(slow.items()))
        raise HookError(f"rows of one step cannot be exact: {why} (variant {number}); leave out by='rows'")
    return slow


def _unfit(asked: Asked) -> str | None:
    """Why the inputs cannot be rows of one step."""
    if more := sorted(set(asked.inputs) - ROW_INPUTS):
        return f"the inputs have {', '.join(more)}"
    spans = asked.mask.argmax(1) + asked.mask.sum(1)
    ends = asked.mask.shape[1] - asked.mask.flip(1).argmax(1)
    return None if bool((spans == ends).all()) else "a row's tokens are not one run of columns"


def _no_rectangles(ssm: Attachment, several: Sequence[Intervention]) -> str | None:
    """Why some interventions are not one knockout of sources x targets at each place."""
    taken: set[tuple[str, int]] = set()
    for one in several:
        if not isinstance(one, Knockout):
            return f"{one.kind} is no Knockout"
        if one.edges is not None:
            return "a Knockout of single edges"
        for stream in as_streams(one.through) or (ssm.default_stream,):
            layers = ssm.streams[stream] if one.layers is None else as_list(one.layers)
            if taken & (places := {(stream, layer) for layer in layers}):
                return "several knockouts at one place"
            taken |= places
    return None


def _check_some_edge(asked: Asked, sets: Sequence[Sequence[Intervention]]) -> None:
    """Refuse knockouts of which no prompt has an edge in any variant, though it has their sources and targets."""
    columns = Columns(len(asked.mask), asked.mask.shape[1], asked.mask)
    knockouts = dict.fromkeys(one for several in sets for one in several if isinstance(one, Knockout))
    known: dict[Any, bool] = {}
    for one in knockouts:
        if (key := (one.sources, one.targets, one.edges)) not in known:
            known[key] = any(reading(*product).any() for product in columns.edges(one, refuse=False))
        if known[key]:
            return
    if knockouts and len({type(one) for several in sets for one in several}) == 1:
        raise InterventionError(no_edge(naming(next(iter(knockouts))), asked.mask.shape[1]))


class _Scores:
    """Metrics of the logits as they come in."""

    def __init__(self, asked: Asked, metrics: Sequence[str | Metric], positions: Positions, batch_size: int) -> None:
        self.asked, self.batch_size = asked, batch_size
        self.full = asked.full_answers is not None
        if self.full:
            for one in metrics:
                if not isinstance(one, str):
                    raise MetricError("of full answers there are metrics by name alone, such as 'log_probability'")
                check_name(one)
            self.metrics = [Measured(str(one), _nothing, "all") for one in metrics]
        else:
            self.metrics = [
                as_measured(one, targets=asked.targets, clean=lambda: precise(asked.clean), positions=positions)
                for one in metrics
            ]
        self.positions: Positions = "all" if any(one.positions == "all" for one in self.metrics) else "last"

    @property
    def needs_forwards(self) -> str | None:
        """Why the logits at the last tokens will not do."""
        if self.full:
            return "every token of the answer is scored"
        return "the metric takes all positions" if self.positions == "all" else None

    def of(
        self, sets: Sequence[Sequence[Intervention]], fast: Sequence[int], slow: Sequence[int], max_memory: int | None
    ) -> Iterator[tuple[list[int], list[int], Float[Tensor, "metric m r"]]]:
        """Variants, rows, and what the metrics say of them."""
        asked, everyone = self.asked, list(range(len(self.asked.mask)))
        if fast:
            knockouts = [sets[number] for number in fast]
            ids, mask = asked.inputs["input_ids"], asked.mask.to(asked.inputs["input_ids"].device)
            for part in run_each(asked.ssm, ids, knockouts, attention_mask=mask, max_memory=max_memory, refuse=False):
                named = [(fast[number], logits) for number, logits in zip(part.variants, part.logits, strict=True)]
                scored = torch.stack([self._of_rows(sets, *one, part.rows) for one in named], dim=1)
                yield [fast[number] for number in part.variants], part.rows, scored
        if slow:
            keep = max(map(len, asked.full_answers)) if asked.full_answers is not None else 0
            alone = asked.obstacle is not None
            forwards = FullForwards(asked.ssm, asked.inputs, asked.mask, self.batch_size, alone, self.positions, keep)
            for number, logits in forwards.logits([sets[number] for number in slow]):
                yield [slow[number]], everyone, self._of_rows(sets, slow[number], logits, everyone)[:, None]

    def _of_all(self, logits: Float[Tensor, "b *t v"]) -> Float[Tensor, "metric b"]:
        """What the metrics say of the logits of all prompts."""
        if self.asked.full_answers is not None:
            return torch.stack([of_full_answer(one.name, logits, self.asked.full_answers) for one in self.metrics])
        last = logits if self.positions == "last" else logits[torch.arange(len(logits)), self._ends()]
        found = []
        for one in self.metrics:
            given = logits if one.positions == self.positions else last
            found.append(one.of(precise(given) if one.name != "metric" else given.double()).double())
        return torch.stack(found)

    def _ends(self) -> Int[Tensor, " b"]:
        mask = self.asked.mask
        return mask.shape[1] - 1 - mask.flip(1).argmax(1)

    def _of_rows(
        self, sets: Sequence[Sequence[Intervention]], number: int, logits: Float[Tensor, "r *t v"], rows: list[int]
    ) -> Float[Tensor, "metric r"]:
        """What the metrics say of the logits of some prompts under a variant: the others stand there with their clean
        ones."""
        try:
            if rows == list(range(len(self.asked.mask))):
                return self._of_all(logits)
            whole = self.asked.clean.to(logits).clone()
            whole[rows] = logits
            return self._of_all(whole)[:, rows]
        except MetricError as error:
            raise MetricError(f"variant {number} ({_in_words(sets[number])}): {error}") from error


def _in_words(variant: Variant) -> str:
    several = [variant] if isinstance(variant, Intervention) else variant
    return ", ".join(map(repr, several)) or "the clean run"


def _nothing(logits: Tensor) -> Tensor:
    raise AssertionError(f"a full answer is scored by its tokens, not by {list(logits.shape)}")


def _how(slow: Mapping[int, str], count: int) -> str:
    """How the answers were computed, and why."""
    if not slow:
        return ROWS
    reasons = list(dict.fromkeys(slow.values()))
    forwards = f"full forwards: {'; '.join(reasons)}"
    return forwards if len(slow) == count else f"{ROWS}; {len(slow)} of {count} variants by {forwards}"
