"""Logits under each of many knockouts, for about the cost of reading the prompts.

Removing edges into a position changes nothing before it. So the positions before the first target are read once, and
every variant goes on from there as rows of one batched step. The step is read-only: no state is updated, and rows share
the few states that differ (the clean one, and those without each set of sources).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssm_interp.errors import HookError, InterventionError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.blocks import blocks_of, entering
from ssm_interp.hooks.cache import CACHES, cache_in, cache_parameter
from ssm_interp.hooks.inputs import check_ids
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.memory import free_memory
from ssm_interp.hooks.obstacles import obstacles
from ssm_interp.hooks.plan import Plan, resolve
from ssm_interp.hooks.rowsite import Rows, rows_at_work
from ssm_interp.hooks.softmax import knockable
from ssm_interp.reprs import describe

FRACTION = 4  # of the free memory, one part in so many
CPU_ROWS = 512  # more rows in a step, or more bytes of states, make a CPU no faster
CPU_STATES = 2**28
TRIAL_MEMORY = 2**30  # bytes, far more than a trial takes
TRIAL_ERROR = 1e-3  # of the largest logit: far above rounding, far below what blocks give that rows do not fit
BATCH_ERROR = 1e-5  # of the largest logit, beside rounding, that the other rows of a batch may make

_tried: WeakKeyDictionary[Attachment, tuple[int, str | None]] = WeakKeyDictionary()


class Answers(NamedTuple):
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
        return f"Answers({len(self.variants)} variants, {len(self.rows)} rows, logits {list(self.logits.shape)})"


def run_each(
    ssm: Attachment,
    input_ids: Int[Tensor, ...],
    variants: Sequence[Any],
    *,
    attention_mask: Int[Tensor, "b s"] | None = None,
    max_memory: int | None = None,
) -> Iterator[Answers]:
    """Logits at the last token of every row under each of many knockouts, equal to those of a full forward for each.

    Args:
        ssm: an attached model, in eval mode.
        input_ids: `[b t]`.
        variants: each a Knockout, or several that act together in different layers or streams (none: the clean run).
            They name sources and targets, not single edges.
        attention_mask: 0 at padding, on the left or on the right; rows of one length are computed together, unpadded.
            Where a mixer's `in_proj` has a bias, a host's own forward of a left-padded row differs from that of the
            same row unpadded (its convolution sees the bias at the padding); what is given here is the unpadded one.
        max_memory: bytes that states and rows may take; None: a quarter of what is free.

    Yields:
        Answers to some variants for some rows, in any order; every (variant, row) once.

    Raises:
        HookError: something that the batched step cannot be exact with (`obstacle` says what), then or before a later
            step; no variants; a mask that is not one run of ones; not enough memory for a single row.
        InterventionError: a stream, layer, feature or position that does not exist; two knockouts of one variant in
            the same stream of a layer.

    Cost: one forward pass over the positions before the first target (for each set of variants that agree on it), and
        for each variant the positions from there on, in the layers from its first one on.
    Source: Mamba Knockout (Endy et al., ACL 2025) for the knockouts; causality and linearity for the rest.

    Example:
        >>> every_layer = [Knockout(sources=[2, 3], targets=-1, layers=layer) for layer in ssm.layers]
        >>> for answers in run_each(ssm, ids, every_layer):
        ...     print(answers.variants, answers.logits.shape)
    """
    _check_exact(ssm)
    if isinstance(variants, Knockout):
        raise HookError("run_each takes a sequence of variants, got one Knockout; write [knockout]")
    if max_memory is not None and (not isinstance(max_memory, int) or max_memory < 1):
        raise HookError(f"max_memory must be a whole number of bytes, at least 1, got {describe(max_memory)}")
    sets = [tuple(variant) if isinstance(variant, list | tuple) else (variant,) for variant in variants]
    if not sets:
        raise HookError("run_each needs at least one variant; an empty one, (), is the clean run")
    if wrong := [knockout for group in sets for knockout in group if not isinstance(knockout, Knockout)]:
        raise InterventionError(f"run_each takes knockouts, got {describe(wrong[0])}")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        got = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise HookError(f"input_ids must be [b t] with at least one token, got {got}")
    check_ids(input_ids, ssm.model)
    for knockout in {(one.layers, one.features, one.through): one for group in sets for one in group}.values():
        ssm.check(knockout)  # which looks at nothing else of it
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise HookError(f"the attention mask is {got}, but input_ids are {list(input_ids.shape)}")
    plan = resolve(sets, ssm.streams, mask, ssm.default_stream)
    return _each_length(ssm, input_ids, mask, plan, max_memory or default_memory(input_ids.device))


def _check_exact(ssm: Attachment) -> None:
    if reason := obstacle(ssm):
        raise HookError(f"run_each cannot be exact here: {reason}; use one forward per knockout inside ssm.edit(...)")


def obstacle(ssm: Attachment) -> str | None:
    """Why `run_each` cannot stand in for full forwards here; None: it can.

    What cannot be seen is tried, once for an attachment (and again when modules or dtypes of its model change): whether
    a row comes out the same whatever else is in its batch, and whether rows of variants are what full forwards give.
    """
    if reason := next(obstacles(ssm), None):
        return reason
    made_of = _made_of(ssm)
    known = _tried.get(ssm)
    if known is None or known[0] != made_of:
        _tried[ssm] = made_of, None  # a trial does not ask for another
        try:
            _tried[ssm] = made_of, _trial(ssm)
        except BaseException:
            del _tried[ssm]
            raise
    return _tried[ssm][1]


def _made_of(ssm: Attachment) -> int:
    """Tells one model from the same model with other layers in it (quantised in place, say) or in another dtype."""
    parts = tuple(
        (type(part), *(weight.dtype for weight in part._parameters.values() if weight is not None))
        for part in ssm.model.modules()
    )
    return hash(parts)


def _trial(ssm: Attachment) -> str | None:
    """Why rows do not fit a model, found by trying (there are too many to know them all); None: they fit."""
    try:
        return depends_on_batch(ssm) or _rows_are_off(ssm)
    except HookError:
        raise
    except Exception as error:  # whatever a model raises that needs more than token ids
        if _out_of_memory(error):
            raise
        return f"{type(ssm.model).__name__} does not run on token ids alone ({type(error).__name__}: {error})"


def _some_ids(ssm: Attachment, rows: int, length: int) -> Tensor:
    weights = [weight for weight in ssm.model.parameters() if not weight.is_meta]
    device = weights[0].device if weights else torch.device("cpu")
    vocabulary = cast(Any, ssm.model).get_input_embeddings().num_embeddings
    some = torch.tensor([[5, 6, 7, 8], [8, 5, 7, 9], [1, 3, 2, 4]], device=device)
    return some[:rows, :length].remainder(vocabulary)


@torch.no_grad()
def depends_on_batch(ssm: Attachment) -> str | None:
    """Whether what a row gives depends on the other rows, in batches of one size (so that rounding is the same)."""
    ids = _some_ids(ssm, 3, 4)
    together = ssm.model(input_ids=ids, use_cache=False).logits
    off = 0.0
    for row, found in zip(ids, together, strict=True):
        alone = ssm.model(input_ids=row.expand_as(ids).contiguous(), use_cache=False).logits[0]
        off = max(off, float((found - alone).float().abs().max()))
    largest = float(together.float().abs().max())
    if off <= largest * (BATCH_ERROR + 2 * precision(ssm, together)):
        return None
    return (
        f"a row of {type(ssm.model).__name__} depends on the others in its batch, by {off / largest:.0e} of the "
        "largest logit (activations that are quantised per batch do that)"
    )


@torch.no_grad()
def _rows_are_off(ssm: Attachment) -> str | None:
    """Whether rows of variants give something else than full forwards under their knockouts, or nothing."""
    ids = _some_ids(ssm, 2, 3)
    variants = [
        (),
        (Knockout(sources=0, targets=1),),
        (Knockout(sources=0, targets=-1, layers=max(ssm.layers_with())),),
    ]
    full = []
    for knockouts in variants:
        with ssm.edit(*knockouts):
            full.append(ssm.model(input_ids=ids, use_cache=False).logits[:, -1].float())
    off, largest = 0.0, float(torch.stack(full).abs().max())
    plan = resolve(variants, ssm.streams, torch.ones_like(ids), ssm.default_stream)
    try:
        for variants_here, rows, logits in _each_length(ssm, ids, torch.ones_like(ids), plan, TRIAL_MEMORY):
            for variant, found in zip(variants_here, logits.float(), strict=True):
                off = max(off, float((found - full[variant][rows]).abs().max()))
    except Exception as error:  # whatever its blocks raise when they get more rows than the model does
        if _out_of_memory(error):
            raise
        return f"the blocks of {type(ssm.model).__name__} take no rows of variants ({type(error).__name__}: {error})"
    if off <= largest * max(TRIAL_ERROR, min(0.2, 32 * precision(ssm, logits))):
        return None
    return f"rows of variants through {type(ssm.model).__name__} are off by {off / largest:.0e} of the largest logit"


def precision(ssm: Attachment, logits: Tensor) -> float:
    """The spacing of the numbers that a forward computes in (many hosts give logits in fp32 whatever that is)."""
    embedding = cast(Any, ssm.model).get_input_embeddings().weight
    dtypes = [logits.dtype, embedding.dtype if embedding.is_floating_point() else logits.dtype]
    if torch.is_autocast_enabled(logits.device.type):
        dtypes.append(torch.get_autocast_dtype(logits.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _each_length(ssm: Attachment, ids: Tensor, mask: Tensor, plan: Plan, memory: int) -> Iterator[Answers]:
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
                group = _Group(ssm, ids[rows[some]][:, columns], part.narrow(some, slice(None), members), start, memory)
                for answers in group.answers(members):
                    yield Answers(answers.variants, rows[some][answers.rows].tolist(), answers.logits)


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

    def __init__(self, ssm: Attachment, ids: Tensor, plan: Plan, start: int, memory: int) -> None:
        self.ssm, self.model = ssm, cast(Any, ssm.model)
        self.ids, self.plan, self.start, self.memory = ids, plan, start, memory
        self.blocks = blocks_of(ssm.model)
        self.takes = inspect.signature(ssm.model.forward).parameters
        self.cache_name = cache_parameter(ssm.model.forward) or CACHES[0]
        self.attends = any(stream == "attention" and found for (stream, _), found in plan.cells.items())
        asked = [points.asked for points in ssm.layers.values()]
        self.rows = Rows(plan, len(ids), ids.shape[1], start, asked)

    def answers(self, variants: list[int]) -> Iterator[Answers]:
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
                if not _out_of_memory(error):
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
                yield Answers(idle, prompts, logits[:1].expand(len(idle), -1, -1))
            if some:
                yield Answers(list(self.rows.members), prompts, logits[1:])
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
        return logits.reshape(-1, len(ids), logits.shape[-1])

    def _call(self, ids: Tensor, start: int, **options: Any) -> Any:
        _check_exact(self.ssm)  # since the last answers somebody may have hooked, edited or detached
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
        if rows_at_work() is not self.rows:
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
        found = copy.copy(layer)
        for name in ("keys", "values"):
            if isinstance(tensor := getattr(layer, name, None), Tensor) and tensor.numel():
                setattr(found, name, _for_blocks(tensor, self.rows.prompts, blocks))
        if hasattr(layer, "recurrent_states"):
            shared = 1 if self.rows.is_single else blocks
            found.conv_states = _for_blocks(layer.conv_states, self.rows.prompts, shared)
            found.update_recurrent_state = lambda state, *_args, **_kwargs: state
        return found


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


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)
