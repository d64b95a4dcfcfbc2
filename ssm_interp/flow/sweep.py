"""The sweep: one knockout per window, source and target role, over many prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssm_interp.flow.metrics import answer_metrics, hits
from ssm_interp.flow.result import FlowResult, FlowRun
from ssm_interp.flow.windows import Align, FlowError, Window, default_size, windows
from ssm_interp.hooks import Attachment, Knockout
from ssm_interp.prompts import Batch, Prompt, TokenizedPrompt, check_role, pad, tokenize

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Variant:
    """One thing to do to every prompt of a batch: remove the edges target <- source in a window of layers.

    Attributes:
        source: role that is no longer read.
        target: role that no longer reads it.
        window: the layers; one without layers is the clean run.
    """

    source: str
    target: str
    window: Window


CLEAN = Variant("all", "all", Window(at=-1, layers=()))


# How answers are computed: yields the logits at the last token of every row, [b, v], for each variant in turn.
Engine = Callable[[Attachment, Batch, Sequence[Variant]], Iterator[Tensor]]


def knockout_engine(ssm: Attachment, batch: Batch, variants: Sequence[Variant]) -> Iterator[Float[Tensor, "b v"]]:
    """The plain engine: one forward pass of the model per variant, with the knockout in place.

    Cost: len(variants) forward passes of the batch; memory of one.
    """
    for variant in variants:
        edits = []
        if variant.window.layers:
            sources, targets = batch.positions(variant.source), batch.positions(variant.target)
            edits = [Knockout(sources=sources, targets=targets, layers=variant.window.layers)]
        with ssm.edit(*edits):
            output = ssm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        yield output.logits[:, -1]


def sweep(
    ssm: Attachment,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    sources: Sequence[str] = ("subject", "relation", "first", "last"),
    targets: Sequence[str] = ("last",),
    window: int | None = None,
    align: Align = "left",
    batch_size: int = 32,
    progress: Progress | None = None,
    engine: Engine = knockout_engine,
    name: str | None = None,
) -> FlowResult:
    """Knock out each source -> target in every layer window, for the prompts that the model answers correctly.

    Args:
        ssm: an attached model, in eval mode.
        tokenizer: the model's own; a fast one.
        prompts: with distinct ids (or texts).
        sources: roles whose writings are no longer read, see `ssm_interp.prompts.ROLES`.
        targets: roles that no longer read them.
        window: layers per window; None: three in eight of the SSM layers, as `default_size` gives.
        align: `"left"` (never truncated, drawn at its first layer) or `"centre"` (truncated, drawn at its centre).
        batch_size: prompts per forward pass; batches are padded on the left, prompts of similar length together.
        progress: called with (done, total), counted in prompts x forward passes.
        engine: computes the answers.
        name: the model's name in the result; None: its `name_or_path`, or its class.

    Raises:
        PromptError: an unknown role; a prompt that this tokenizer cannot tokenize as asked.
        FlowError: no prompts, or prompts with the same id; no role; no prompt answered correctly; a window that does
            not fit; a batch size below 1; a model in training mode; logits that are not numbers.

    Cost: (1 + windows x sources x targets) forward passes per kept prompt, one per prompt that is not kept.
    Source: Mamba Knockout (Endy et al., ACL 2025), section 3.

    Example:
        >>> model, tokenizer = si.load("tiny-mamba1")                   # doctest: +SKIP
        >>> with si.attach(model) as ssm:                               # doctest: +SKIP
        ...     result = sweep(ssm, tokenizer, load_prompts()[:100])
        >>> result.plot().savefig("flow.png")                           # doctest: +SKIP
    """
    layers = tuple(sorted(ssm.layers))
    size = default_size(layers) if window is None else window
    places = windows(layers, size, align)
    _check(ssm.model, sources, targets, batch_size)
    variants = [Variant(s, t, w) for t in dict.fromkeys(targets) for s in dict.fromkeys(sources) for w in places]
    asked = _tokenized(prompts, tokenizer)
    run = _Run(ssm, engine, batch_size, progress)
    kept = run.answered(asked, per_kept=1 + len(variants))
    model = name or getattr(getattr(ssm.model, "config", None), "name_or_path", "") or type(ssm.model).__name__
    frame = run.knocked_out(kept, variants)
    frame.insert(1, "model", model)
    return FlowResult(frame, (FlowRun(model, layers, size, align, len(asked), len(kept)),))


def _check(model: nn.Module, sources: Sequence[str], targets: Sequence[str], batch_size: int) -> None:
    for kind, roles in (("sources", sources), ("targets", targets)):
        if isinstance(roles, str) or not roles:
            raise FlowError(f"{kind} must be a sequence of at least one role, such as ('last',), got {roles!r}")
        for role in roles:
            check_role(role)
    if batch_size < 1:
        raise FlowError(f"the batch size must be at least 1, got {batch_size}")
    if model.training:
        raise FlowError(f"{type(model).__name__} is in training mode; call .eval() on it first")


def _tokenized(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedPrompt]:
    if not prompts:
        raise FlowError("a sweep needs at least one prompt, got none")
    times = Counter(_id(prompt) for prompt in prompts)
    if twice := [name for name, count in times.items() if count > 1]:
        raise FlowError(f"prompts must have distinct ids; these occur more than once: {', '.join(twice[:5])}")
    return [tokenize(prompt, tokenizer) for prompt in prompts]


def _id(prompt: Prompt) -> str:
    return prompt.id or prompt.text


class _Run:
    """Batches of prompts through an engine, with a count of what is done."""

    def __init__(self, ssm: Attachment, engine: Engine, batch_size: int, progress: Progress | None) -> None:
        self.ssm, self.engine, self.batch_size, self.progress = ssm, engine, batch_size, progress
        self.done = self.total = 0

    def answered(self, prompts: list[TokenizedPrompt], per_kept: int) -> list[TokenizedPrompt]:
        """The prompts whose target is the most likely next token, in their order."""
        self.total = len(prompts)
        right: set[int] = set()
        for indices, batch in self._batches(prompts):
            (logits,) = self._logits(batch, [CLEAN])
            right |= {index for index, hit in zip(indices, hits(logits, batch.target_ids).tolist(), strict=True) if hit}
        if not right:
            raise FlowError(
                f"the model answers none of the {len(prompts)} prompts correctly (its most likely next token is never "
                "the target's first one), so there is nothing to knock out; is this the model's own tokenizer?"
            )
        self.total += per_kept * len(right)
        return [prompt for index, prompt in enumerate(prompts) if index in right]

    def knocked_out(self, prompts: list[TokenizedPrompt], variants: list[Variant]) -> pd.DataFrame:
        """One row per variant and prompt, sorted so."""
        parts = []
        for indices, batch in self._batches(prompts):
            answers = self._logits(batch, [CLEAN, *variants])
            base = next(answers)
            for number, (variant, logits) in enumerate(zip(variants, answers, strict=True)):
                metrics = answer_metrics(logits, base, batch.target_ids)
                columns = _labels(batch, variant) | {key: value.cpu().numpy() for key, value in metrics.items()}
                parts.append(pd.DataFrame(columns | {"variant": number, "index": indices}))
        rows = pd.concat(parts, ignore_index=True).sort_values(["variant", "index"], ignore_index=True)
        return rows.drop(columns=["variant", "index"])

    def _batches(self, prompts: list[TokenizedPrompt]) -> Iterator[tuple[list[int], Batch]]:
        device = next(self.ssm.model.parameters()).device
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(prompts), self.batch_size):
            indices = by_length[start : start + self.batch_size]
            yield indices, pad([prompts[index] for index in indices]).to(device)

    def _logits(self, batch: Batch, variants: Sequence[Variant]) -> Iterator[Float[Tensor, "b v"]]:
        answers = self.engine(self.ssm, batch, variants)
        for variant in variants:
            with torch.no_grad():  # entered anew for each: a generator would leave it on for its caller
                logits = next(answers)
            if logits.isnan().any():
                where = f"with {variant.source} -> {variant.target} knocked out in layers {variant.window.layers}"
                row = batch.prompts[int(logits.isnan().any(1).nonzero()[0])]
                raise FlowError(
                    f"the model's logits are not numbers {where if variant.window.layers else 'as it is'} "
                    f"for the prompt {row.prompt.text!r}; try a wider dtype than {logits.dtype}"
                )
            self.done += len(batch.prompts)
            if self.progress:
                self.progress(self.done, self.total)
            yield logits


def _labels(batch: Batch, variant: Variant) -> dict[str, object]:
    pairs = zip(batch.positions(variant.target), batch.positions(variant.source), strict=True)
    return {
        "prompt_id": [_id(row.prompt) for row in batch.prompts],
        "source": variant.source,
        "target": variant.target,
        "layer": variant.window.at,
        "window_start": variant.window.layers[0],
        "window_size": len(variant.window.layers),
        "n_edges": [sum(s <= t for t in targets for s in sources) for targets, sources in pairs],
    }
