"""Knockouts in softmax attention, through transformers' public registry of attention functions.

While such a knockout is at work the model's attention implementation is one of our own name. It calls the function of
the implementation that was there, with the knocked-out edges added to its mask; where nothing is knocked out it passes
the call on as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssm_interp.hooks.blocks import blocks_of, running_block
from ssm_interp.hooks.errors import HookError, InterventionError
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.plan import attention_heads
from ssm_interp.hooks.routing import host_forward
from ssm_interp.hooks.rowsite import rows_at_work
from ssm_interp.hooks.site import ActiveEdit, active_edits, position_mask

PREFIX = "ssm_interp-"
MASKED = ("eager", "sdpa")

_lock = Lock()
_users: Counter[int] = Counter()


@contextmanager
def knockable(module: nn.Module) -> Iterator[None]:
    """Inside, the attention of a model asks us which edges are knocked out. Nests, also across threads.

    Raises:
        HookError: an attention implementation that takes no mask of single edges; attention outside any model of
            transformers; gradient checkpointing.
    """
    model = _owner(module)
    key = id(model.config)  # models may share one
    with _lock:
        if not _users[key]:
            _switch(model, PREFIX + _supported(model))
        _users[key] += 1
    try:
        yield
    finally:
        with _lock:
            _users[key] -= 1
            if not _users[key]:
                del _users[key]
                _switch(model, _implementation(model))


def _owner(module: nn.Module) -> PreTrainedModel:
    """The innermost model of transformers around the decoder blocks: its config is the one that they look at."""
    blocks = blocks_of(module)
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    around = [model for model in models if any(part is blocks for part in model.modules())]
    if not around:
        raise HookError(
            f"the attention in {type(module).__name__} is part of no model of transformers, whose config says how it "
            "is computed; attach to the model that its blocks come from"
        )
    if any(part.training and getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        raise HookError(
            f"{type(around[0]).__name__} uses gradient checkpointing, which would compute attention again without the "
            "knockout; call model.gradient_checkpointing_disable() or model.eval() first"
        )
    return around[-1]


def _supported(model: PreTrainedModel) -> str:
    name = _implementation(model)
    if name not in MASKED:
        raise HookError(
            f"the attention of {type(model).__name__} is computed by {name!r}, which takes no mask of single edges; "
            f"call model.set_attn_implementation({MASKED[1]!r}) (or {MASKED[0]!r}) first"
        )
    return name


def _implementation(model: PreTrainedModel) -> str:
    """The attention implementation that the model has, or had before we came (a copy made meanwhile has ours)."""
    name: str = model.config._attn_implementation
    return name.removeprefix(PREFIX)


def _switch(model: PreTrainedModel, name: str) -> None:
    if name.startswith(PREFIX) and name not in ALL_ATTENTION_FUNCTIONS:
        original = name.removeprefix(PREFIX)
        AttentionInterface.register(name, _routed(original))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.set_attn_implementation(name)


def _routed(original: str) -> Callable[..., Any]:
    """The attention function that stands in for an original one."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        host = (
            ALL_ATTENTION_FUNCTIONS.get(original) or host_forward(type(module)).__globals__["eager_attention_forward"]
        )
        removed = _removed(module, query, key)
        if removed is None:
            found: tuple[Tensor, Any] = host(module, query, key, value, attention_mask, **options)
            return found
        allowed = _allowed(attention_mask, query, key) & ~removed.to(query.device)
        mask = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
        if attention_mask is not None and attention_mask.is_floating_point():
            mask = mask + attention_mask[..., : key.shape[2]]
        mask = mask.masked_fill(~allowed, torch.finfo(query.dtype).min)
        output, weights = host(module, query, key, value, mask, **options)
        reads = allowed.any(-1).expand(-1, query.shape[1], -1).transpose(1, 2)[..., None]  # b q h 1
        return output.masked_fill(~reads, 0), weights

    return attend


def _allowed(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Which keys the host lets a query read, bool `[#b #h q k]`."""
    q, k = query.shape[2], key.shape[2]
    if mask is None:
        return torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)[None, None]
    mask = mask[..., :k]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _removed(module: nn.Module, query: Tensor, key: Tensor) -> Tensor | None:
    """The knocked-out edges of this call, bool `[b #h q k]`; None if there are none."""
    block = running_block()
    layer: Any = module.layer_idx if block is None else block
    q, k = query.shape[2], key.shape[2]
    if (rows := rows_at_work()) is not None:
        return rows.removed_attention(layer, query.shape[1], q, k)
    found = None
    for edit in active_edits(module):
        knockout = edit.intervention
        if isinstance(knockout, Knockout) and (knockout.layers is None or layer in knockout.layers):
            prompt = _prompt(edit, module, layer, q, k)
            piece = _edges(knockout, query.shape[0], prompt, q, k)[:, None] & attention_heads(
                knockout.features, query.shape[1]
            )
            found = piece if found is None else found | piece
    return found


def _prompt(edit: ActiveEdit, module: nn.Module, layer: int, q: int, k: int) -> int:
    """Positions of the prompt, which is the first call; a later one has q queries and all k keys so far."""
    place = (id(module), layer)
    prompt, seen = (q, 0) if k == q else edit.seen.get(place, (0, 0))
    if not prompt:
        raise InterventionError(
            f"layer {layer}: Knockout names positions of a prompt that this cache read without it; "
            "run the prompt and what follows inside the same `edit`, with a cache that grows (no StaticCache)"
        )
    if k != seen + q:
        raise HookError(
            f"layer {layer}: after {seen} positions this cache gives {k} keys for {q} new ones, so that columns no "
            "longer stand for positions; use a cache that grows and forgets nothing (DynamicCache), and one sequence "
            "at a time inside an `edit`"
        )
    edit.seen[place] = prompt, k
    return prompt


def _edges(knockout: Knockout, batch: int, prompt: int, q: int, k: int) -> Tensor:
    """The edges of a knockout in a call with k keys, of which the last q are its queries, bool `[b q k]`."""
    edges = torch.zeros(batch, k, k, dtype=torch.bool)
    if knockout.edges is None:
        targets, sources = (
            _columns(getattr(knockout, name), batch, prompt, k, f"Knockout.{name}") for name in ("targets", "sources")
        )
        edges = _pairs(targets, sources)
    else:
        for pair in knockout.edges:
            target, source = (_columns((column,), batch, prompt, k, "Knockout.edges") for column in pair)
            edges |= _pairs(target, source)
    return edges[:, k - q :]


def _pairs(targets: Tensor, sources: Tensor) -> Tensor:
    return targets[:, :, None] & sources[:, None, :]


def _columns(positions: Any, batch: int, prompt: int, length: int, what: str) -> Tensor:
    """Named positions of the prompt as a mask over all columns, `[b k]`; None names generated ones too."""
    named = position_mask(positions, batch, prompt, what)
    later = torch.full((batch, length - prompt), positions is None)
    return torch.cat([named, later], dim=1)
