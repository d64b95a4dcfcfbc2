"""Many variants of a batch as rows: what each layer computes for them, from states that are shared by the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from ssm_interp.errors import HookError
from ssm_interp.hooks.edits.masks import as_matrix, as_taps, attention_heads, feature_mask
from ssm_interp.hooks.own import Asked, asking
from ssm_interp.hooks.points import HookPoints
from ssm_interp.hooks.rows.plan import Cell, Plan
from ssm_interp.hooks.seam.convolution import Convolution
from ssm_interp.hooks.seam.operators import Operands, Operator
from ssm_interp.hooks.seam.serving import serving
from ssm_interp.scan import Terms, leave, one_step, read_initial, removed, scan


@dataclass(frozen=True)
class Start:
    """Where a layer stands after the prefill of n prompts.

    Attributes:
        state: the state, `[n h p n]`.
        written: index of a source mask -> the part of the state that those sources wrote.
        dt_limit: the range that the host clamps steps to (some of its updates do not).
    """

    state: Tensor
    written: dict[int, Tensor]
    dt_limit: Sequence[float]


class Rows:
    """A clean prefill of some prompts, then steps in which every variant of every prompt is a row.

    In a step of m variants the rows are (1 + m) blocks of the n prompts; the first is the clean run. A variant joins at
    the first layer in which it knocks something out: before, its stream is the clean one.

    Attributes:
        plan: the variants.
        prompts: n.
        length: how many columns they have.
        start: first column of the step; the prefill read those before it.
    """

    def __init__(self, plan: Plan, prompts: int, length: int, start: int, asked: Sequence[Asked]) -> None:
        self._asked = asked
        self.plan, self.prompts, self.length, self.start = plan, prompts, length, start
        self.cache: Any = None  # that the step goes on from
        self.members: list[int] | None = None  # the variants of the step, by the layer that they join at
        self._joins: list[int] = []
        self.starts: dict[tuple[int, int], Start] = {}

    @property
    def is_single(self) -> bool:
        """Whether the step reads one column."""
        return self.start == self.length - 1

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """Inside, the model reads the columns before the start."""
        self.members = None
        with self._at_work():
            yield

    @contextmanager
    def step(self, variants: Sequence[int], cache: Any) -> Iterator[None]:
        """Inside, the model reads the columns from the start on, as rows of these variants, on a cache."""
        self.cache = cache
        first = {variant: self.plan.first_layer(variant) or 0 for variant in variants}
        self.members = sorted(variants, key=lambda variant: first[variant])
        self._joins = [first[variant] for variant in self.members]
        with self._at_work():
            yield

    def blocks(self, layer: int) -> int:
        """How many blocks of n rows pass through a layer."""
        return 1 + sum(join <= layer for join in self._joins)

    def at(self, mixer: Any, cache: Any) -> RowSite:
        """This work at one mixer.

        Raises:
            HookError: the cache that the step goes on from did not reach the mixer.
        """
        if self.members is not None and cache is not self.cache:
            raise HookError(
                f"layer {mixer.layer_idx} was given {'no' if cache is None else 'another'} cache in a step that goes "
                "on from one; the model does not hand on the cache that it is called with"
            )
        return RowSite(self, mixer.layer_idx, mixer.ssm)

    def cells(self, stream: str, layer: int) -> Iterator[tuple[int, Cell]]:
        """(block, what it knocks out) of the variants that have joined by this layer."""
        by_variant = self.plan.at(stream, layer)
        assert self.members is not None
        for block, variant in enumerate(self.members[: self.blocks(layer) - 1], start=1):
            if variant in by_variant:
                yield block, by_variant[variant]

    def removed_attention(self, layer: int, heads: int, queries: int, keys: int) -> Tensor | None:
        """The edges knocked out in the softmax attention of a layer, bool `[rows #h q k]`; None if there are none."""
        if self.members is None:
            return None
        cells = list(self.cells("attention", layer))
        if not cells:
            return None
        whole = all(self.plan.features[cell.features] is None for _, cell in cells)
        closed = torch.zeros(self.blocks(layer), self.prompts, 1 if whole else heads, queries, keys, dtype=torch.bool)
        for block, cell in cells:
            targets, sources = self.plan.positions[cell.targets], self.plan.positions[cell.sources]
            edges = as_matrix(targets[:, -queries:], sources[:, -keys:])  # n q k
            closed[block] = rearrange(edges, "n q k -> n 1 q k") & attention_heads(
                self.plan.features[cell.features], closed.shape[2]
            )
        return rearrange(closed, "blocks n h q k -> (blocks n) h q k")

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with serving(self), asking(self._asked):
            yield


class RowSite:
    """One forward of one hooked mixer in the prefill or the step of some rows."""

    def __init__(self, rows: Rows, layer: int, points: HookPoints) -> None:
        self.rows, self.layer, self.points = rows, layer, points
        self._heads_done = 0
        self._masks: dict[int, Tensor] = {}

    def serve(self, operator: Operator) -> Any:
        """Do one operator call; its result is what the host's operator returns."""
        count = operator.operands.x.shape[2]
        heads = slice(self._heads_done, self._heads_done + count)
        self._heads_done += count
        return (self._prefill if self.rows.members is None else self._step)(operator, heads)

    def convolve(self, call: Convolution) -> Tensor:
        """Do one call of the convolution; its result is what the host's function returns."""
        rows = self.rows
        if rows.members is None:
            return call.run()
        run = Convolution.run if call.cached is None else Convolution.run_shared
        cells: dict[Cell, list[int]] = {}
        for block, cell in rows.cells("conv", self.layer):
            cells.setdefault(cell, []).append(block)
        if not cells:
            return run(call)
        removed = []
        for cell, blocks in cells.items():
            taps = as_taps(self._targets(cell), rows.plan.positions[cell.sources], rows.start, call.taps)
            device = call.inputs.device
            removed.append((self._rows(blocks, device), taps.repeat(1, len(blocks), 1).to(device)))
        return call.without(removed, run)

    def close(self) -> None:
        if self._heads_done != self.points.heads:
            raise HookError(
                f"layer {self.layer} computed {self._heads_done} of its {self.points.heads} heads through the "
                "operator; this configuration of the host takes a path that ssm_interp cannot follow"
            )

    def _prefill(self, operator: Operator, heads: slice) -> Any:
        operands, plan = operator.operands, self.rows.plan
        wanted = sorted({cell.sources for cell in plan.at("ssm", self.layer).values()})
        masks = [plan.positions[index][:, : self.rows.start].to(operands.x.device) for index in wanted]
        y, state = self._scan(operator)
        written = self._written(operator, masks)
        self.rows.starts[self.layer, heads.start] = Start(
            state, dict(zip(wanted, written, strict=True)), operator.dt_limit
        )
        return operator.finish(y, state, operands.x, operator.z)

    def _scan(self, operator: Operator) -> tuple[Tensor, Tensor]:
        """y and the final state."""
        return scan(operator.operands.terms()) if self._is_own(operator) else _run(operator, operator.operands)

    def _written(self, operator: Operator, masks: list[Tensor]) -> Sequence[Tensor]:
        """The part of the final state that each set of positions wrote."""
        operands = operator.operands
        if not masks:
            return ()
        if self._is_own(operator):
            return leave(operands.terms(), torch.stack(masks).to(operands.x.device, torch.float32)).unbind()
        kept = [torch.where(rearrange(mask, "n t -> n t 1 1"), operands.x, 0) for mask in masks]
        return [_run(operator, replace(operands, x=x))[1] for x in kept]

    def _is_own(self, operator: Operator) -> bool:
        """Whether our own recurrence runs: it is quicker than a host's reference, and slower than its kernels."""
        return self.points.own_operator or operator.is_reference

    def _step(self, operator: Operator, heads: slice) -> Any:
        rows, operands = self.rows, operator.operands
        terms = operands.terms()
        start = rows.starts.get((self.layer, heads.start))
        if start is not None:
            low, high = start.dt_limit
            terms = replace(terms, dt=terms.dt.clamp(low, high))
        cells: dict[Cell, list[int]] = {}
        for block, cell in rows.cells("ssm", self.layer):
            cells.setdefault(cell, []).append(block)
        y = _own(terms)
        if start is not None:
            y += self._from_start(terms, start, cells, heads)
        for cell, blocks in cells.items():
            self._without_step_sources(y, terms, cell, blocks, heads)
        state = None if operator.updates else y.new_zeros(()).expand(*y.shape[:1], *y.shape[2:], terms.state_size)
        return operator.finish(y, state, operands.x, operator.z)

    def _from_start(self, terms: Terms, start: Start, cells: dict[Cell, list[int]], heads: slice) -> Tensor:
        """What the rows read of the prefill's states: in a knockout's targets of the state without its sources."""
        knocked = {block for cell, blocks in cells.items() if self._targets(cell).all() for block in blocks}
        others = [block for block in range(terms.batch // self.rows.prompts) if block not in knocked]
        y = terms.x.new_empty(terms.x.shape)
        if others:
            chosen = self._rows(others, y.device)
            y[chosen] = read_initial(_take(terms, chosen), start.state)
        for cell, blocks in cells.items():
            features = self._features(cell, terms, heads)
            chosen = self._rows(blocks, y.device)
            state = torch.where(
                rearrange(features, "h n -> h 1 n"), start.state - start.written[cell.sources], start.state
            )
            from_state, targets = read_initial(_take(terms, chosen), state), self._targets(cell).to(y.device)
            y[chosen] = from_state if targets.all() else torch.where(_each(targets, blocks), from_state, y[chosen])
        return y

    def _without_step_sources(self, y: Tensor, terms: Terms, cell: Cell, blocks: list[int], heads: slice) -> None:
        """Take out of y what a knockout's targets read from those of its sources that lie in the step."""
        sources = self.rows.plan.positions[cell.sources][:, self.rows.start :].to(y.device)
        if not sources.any():
            return
        chosen, features = self._rows(blocks, y.device), self._features(cell, terms, heads)
        edges = (self._targets(cell).to(y.device).repeat(len(blocks), 1), sources.repeat(len(blocks), 1))
        restricted = None if features.all() else features[:, 0] if features.shape[1] == 1 else features
        y[chosen] -= removed(_take(terms, chosen), edges, restricted, operator=_own)

    def _targets(self, cell: Cell) -> Tensor:
        return self.rows.plan.positions[cell.targets][:, self.rows.start :]

    def _features(self, cell: Cell, terms: Terms, heads: slice) -> Tensor:
        if cell.features not in self._masks:
            features = self.rows.plan.features[cell.features]
            size = self.points.heads, self.points.state_size
            self._masks[cell.features] = feature_mask(features, *size, terms.x.device)
        return self._masks[cell.features][heads]

    def _rows(self, blocks: list[int], device: torch.device) -> Tensor:
        n = self.rows.prompts
        return (torch.tensor(blocks, device=device)[:, None] * n + torch.arange(n, device=device)).flatten()


def _run(operator: Operator, operands: Operands) -> tuple[Tensor, Tensor]:
    y, state = operator.run(operands)
    assert state is not None  # a prefill fills a cache
    return y, state


def _own(terms: Terms) -> Tensor:
    return one_step(terms) if terms.length == 1 else scan(terms)[0]


def _take(terms: Terms, rows: Tensor) -> Terms:
    return Terms(terms.x[rows], terms.dt[rows], terms.A, terms.B[rows], terms.C[rows])


def _each(targets: Tensor, blocks: list[int]) -> Tensor:
    return repeat(targets, "n t -> (blocks n) t 1 1", blocks=len(blocks))
