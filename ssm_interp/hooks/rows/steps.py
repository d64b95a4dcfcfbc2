"""The steps of `run_each`: prompts of one length are read up to the first target, and all variants go on from there.

The step is read-only: no state is updated, and rows share the few states that differ (the clean one, and those without
each set of sources).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ssm_interp.errors import HookError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.rows.memory import free_memory
from ssm_interp.hooks.rows.plan import Plan
from ssm_interp.hooks.rows.site import Rows
from ssm_interp.hooks.seam.blocks import blocks_of, entering
from ssm_interp.hooks.seam.cache import CACHES, cache_in, cache_parameter
from ssm_interp.hooks.seam.serving import server_here
from ssm_interp.hooks.seam.softmax import knockable

FRACTION = 4  # of the free memory, one part in so many
CPU_ROWS = 512  # more rows in a step, or more bytes of states, make a CPU no faster
CPU_STATES = 2**28

Check = Callable[[], None]
"""Raises if somebody has hooked, edited or detached the model since the last step."""


class RowLogits(NamedTuple):
    """Logits at the last token of some rows of a batch under some variants.

    Attributes:
        variants: indices of the variants.
        rows: indices of the rows.
        logits: `[m r v]`.
    """

    variants: list[int]
    rows: list[int]
    logits: Float[Tensor, "m r v"]

    def __repr__(self) -> str:
        return f"RowLogits({len(self.variants)} variants, {len(self.rows)} rows, logits {list(self.logits.shape)})"


def each_length(
    ssm: Attachment, ids: Tensor, mask: Tensor, plan: Plan, memory: int, check: Check
) -> Iterator[RowLogits]:
    """Rows of the same length, without padding, together; and of their variants those with the same first target."""
    for rows, columns in _unpadded(mask):
        part = plan.narrow(rows.cpu(), columns)
        length = columns.stop - columns.start
        starts: dict[int, list[int]] = {}
        first = {variant: part.first_target(variant) for variant in range(plan.variants)}
        for variant, start in first.items():
            starts.setdefault(length - 1 if start is None else start, []).append(variant)
        for start, members in starts.items():
            room = min(memory // 2, CPU_STATES) if ids.device.type == "cpu" else memory // 2
            each = max(1, room // max(1, _state_bytes(ssm, part, set(members))))
            for some in (torch.arange(first, min(first + each, len(rows))) for first in range(0, len(rows), each)):
                group = _Group(
                    ssm, ids[rows[some]][:, columns], part.narrow(some, slice(None), members), start, memory, check
                )
                for answers in group.answers(members):
                    yield RowLogits(answers.variants, rows[some][answers.rows].tolist(), answers.logits)


def _unpadded(mask: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Rows that have the same run of columns, and those columns."""
    spans: dict[tuple[int, int], list[int]] = {}
    for row, kept in enumerate(mask.bool().cpu()):
        columns = kept.nonzero()[:, 0]
        if not len(columns) or len(columns) != columns[-1] - columns[0] + 1:
            where = f"{len(columns)} from column {columns[0]} to {columns[-1]}" if len(columns) else "none"
            raise HookError(f"row {row} of the attention mask is not one run of ones: it has {where}")
        spans.setdefault((int(columns[0]), int(columns[-1]) + 1), []).append(row)
    for (begin, end), rows in spans.items():
        yield torch.tensor(rows, device=mask.device), slice(begin, end)


class _Group:
    """Prompts of one length and variants with one first target."""

    def __init__(self, ssm: Attachment, ids: Tensor, plan: Plan, start: int, memory: int, check: Check) -> None:
        self.ssm, self.model = ssm, cast(Any, ssm.model)
        self.ids, self.plan, self.start, self.memory, self.check = ids, plan, start, memory, check
        self.blocks = blocks_of(ssm.model)
        self.takes = inspect.signature(ssm.model.forward).parameters
        self.cache_name = cache_parameter(ssm.model.forward) or CACHES[0]
        self.attends = any(stream == "attention" and by_variant for (stream, _), by_variant in plan.cells.items())
        asked = [points.asked for points in ssm.layers.values()]
        self.rows = Rows(plan, len(ids), ids.shape[1], start, asked)

    def answers(self, variants: list[int]) -> Iterator[RowLogits]:
        """The answers to some variants, in as many steps as the memory asks for."""
        prompts = list(range(len(self.ids)))
        idle = [variant for variant in variants if self.plan.first_layer(variant) is None]
        left = [variant for variant in variants if self.plan.first_layer(variant) is not None]
        cache = self._prefill()
        most = self.memory // 2 // self._row_bytes()
        each = max(1, (min(most, CPU_ROWS) if self.ids.device.type == "cpu" else most) // len(prompts))
        while left or idle:
            some = left[:each]
            try:
                logits = self._step(cache, some)  # 1+m n v
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(some) <= 1:
                    raise HookError(
                        f"out of memory with {len(prompts)} prompts and {len(some)} variant in a step; "
                        "set a smaller batch size, or max_memory to less than is free"
                    ) from error
                each = len(some) // 2
                continue
            assert self.rows.members is not None
            if idle:
                yield RowLogits(idle, prompts, logits[:1].expand(len(idle), -1, -1))
            if some:
                yield RowLogits(list(self.rows.members), prompts, logits[1:])
            left, idle = left[each:], []

    @torch.no_grad()
    def _prefill(self) -> Any:
        """The cache after the columns before the start; None if there are none."""
        if not self.start:
            return None
        with self.rows.prefill():
            output = self._call(self.ids[:, : self.start], 0, use_cache=True)
        cache = cache_in(output)
        if cache is None:
            raise HookError(f"{type(self.model).__name__} gave no cache back, though it was called with use_cache=True")
        return cache

    @torch.no_grad()
    def _step(self, cache: Any, variants: Sequence[int]) -> Tensor:
        """Logits at the last column, `[1+m n v]`: of the clean run, and of the variants as `rows.members` has them."""
        rows, ids = self.rows, self.ids[:, self.start :]
        assert self.blocks is not None
        options: dict[str, Any] = {"use_cache": False}
        growing = _Growing(rows, None)
        if cache is not None:
            growing = _Growing(rows, cache)
            options = {"use_cache": True, self.cache_name: growing.cache}
        with rows.step(variants, growing.cache), entering(self.blocks, growing.enter):
            if self.attends:
                with knockable(self.model):
                    output = self._call(ids, self.start, **options)
            else:
                output = self._call(ids, self.start, **options)
        if cache is not None and cache_in(output) is not growing.cache:
            raise HookError(f"{type(self.model).__name__} did not go on from the cache given as {self.cache_name!r}")
        logits: Tensor = output.logits[:, -1]
        return rearrange(logits, "(m n) v -> m n v", n=len(ids))

    def _call(self, ids: Tensor, start: int, **options: Any) -> Any:
        self.check()
        if "logits_to_keep" in self.takes:
            options["logits_to_keep"] = 1
        if "position_ids" in self.takes:
            options["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
        return self.model(input_ids=ids, **options)

    def _row_bytes(self) -> int:
        """What a row takes, about: its logits three times over, and its activations in one layer."""
        config = self.model.config.get_text_config()
        columns = self.ids.shape[1] - self.start
        states = max((start.state[0].numel() for start in self.rows.starts.values()), default=0)
        wide = 40 * config.hidden_size * columns + (4 * states if columns > 1 else 0)
        attended = 4 * config.hidden_size * self.ids.shape[1]
        return int(4 * (3 * config.vocab_size + wide + attended))


class _Growing:
    """Lets the variants join the batch of a step at the block where they begin, and the cache's layers grow with it."""

    def __init__(self, rows: Rows, cache: Any) -> None:
        self.rows, self._filled = rows, cache
        self.cache = copy.copy(cache)
        if cache is not None:
            self.cache.layers = [self._repeated(layer, 1) for layer in cache.layers]

    def enter(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if server_here() is not self.rows:
            return None  # another thread calls the same model
        before, now = self.rows.blocks(index - 1) if index else 1, self.rows.blocks(index)
        if self.cache is not None:
            self.cache.layers[index] = self._repeated(self._filled.layers[index], now)
            if index:
                self.cache.layers[index - 1] = self._filled.layers[index - 1]
        named = not args
        hidden: Tensor = kwargs["hidden_states"] if named else args[0]
        n = self.rows.prompts
        clean = hidden[:n]
        hidden = torch.cat([hidden, clean.repeat(now - before, *[1] * (hidden.ndim - 1))]) if now > before else hidden
        grown = {name: _for_blocks(value, n, now) for name, value in kwargs.items() if name != "hidden_states"}
        if named:
            return args, grown | {"hidden_states": hidden}
        return (hidden, *(_for_blocks(value, n, now) for value in args[1:])), grown

    def _repeated(self, layer: Any, blocks: int) -> Any:
        """A layer of the cache for every block of the prompts. Its recurrent state stays as it is, and is not updated;
        nor are the convolution's inputs where the step is one position, which all blocks share."""
        repeated = copy.copy(layer)
        for name in ("keys", "values"):
            if isinstance(tensor := getattr(layer, name, None), Tensor) and tensor.numel():
                setattr(repeated, name, _for_blocks(tensor, self.rows.prompts, blocks))
        if hasattr(layer, "recurrent_states"):
            shared = 1 if self.rows.is_single else blocks
            repeated.conv_states = _for_blocks(layer.conv_states, self.rows.prompts, shared)
            repeated.update_recurrent_state = lambda state, *_args, **_kwargs: state
        return repeated


def _for_blocks(value: Any, n: int, blocks: int) -> Any:
    """An argument that is given per prompt, for every block of the prompts."""
    if isinstance(value, Tensor):
        batched = value.ndim >= 2 and value.shape[0] == n
        return value.repeat(blocks, *[1] * (value.ndim - 1)) if batched else value
    if isinstance(value, tuple | list):
        return type(value)(_for_blocks(part, n, blocks) for part in value)
    if isinstance(value, dict):
        return {name: _for_blocks(part, n, blocks) for name, part in value.items()}
    return value


def _state_bytes(ssm: Attachment, plan: Plan, members: set[int]) -> int:
    """What the states of one prompt take, over all layers: the clean one, and one per set of sources."""
    total = 0
    for layer, points in ssm.layers.items():
        sources = {cell.sources for variant, cell in plan.at("ssm", layer).items() if variant in members}
        total += 4 * points.heads * points.head_dim * points.state_size * (2 + len(sources))
    return total


def default_memory(device: torch.device) -> int:
    """Bytes that states and rows may take on a device where nobody says: a quarter of what is free."""
    return free_memory(device) // FRACTION


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)
