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
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssm_interp.errors import HookError, InterventionError
from ssm_interp.hooks.active import ActiveEdit, active_edits, edits_here
from ssm_interp.hooks.edits.masks import Columns, as_matrix, attention_heads
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.seam.blocks import blocks_of, running_block
from ssm_interp.hooks.seam.callers import chunks_of_prompt, prompt_mask
from ssm_interp.hooks.seam.checkpointing import is_checkpointed
from ssm_interp.hooks.seam.routing import host_forward
from ssm_interp.hooks.seam.serving import server_here
from ssm_interp.hooks.seam.virtual import check_columns

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
            attended: tuple[Tensor, Any] = host(module, query, key, value, attention_mask, **options)
            return attended
        columns, edges = removed
        allowed = _allowed(attention_mask, query, key, columns) & ~edges.to(query.device)
        mask = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
        if attention_mask is not None and attention_mask.is_floating_point():
            mask = mask + _rows_of(attention_mask, columns)[..., : key.shape[2]]
        mask = mask.masked_fill(~allowed, torch.finfo(query.dtype).min)
        output, weights = host(module, query[:, :, columns], key, value, mask, **options)
        reads = rearrange(allowed.any(-1).expand(-1, query.shape[1], -1), "b h q -> b q h 1")
        output = output.masked_fill(~reads, 0)
        if len(columns) == query.shape[2]:
            return output, weights
        whole, all_weights = host(module, query, key, value, attention_mask, **options)
        if weights is not None and all_weights is not None:
            all_weights = all_weights.index_copy(2, columns, weights)
        return whole.index_copy(1, columns, output), all_weights

    return attend


def _allowed(mask: Tensor | None, query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """Which keys the host lets some queries read, bool `[#b #h q k]`."""
    q, k = query.shape[2], key.shape[2]
    if mask is None:
        return (torch.arange(k, device=query.device) <= (columns + k - q)[:, None])[None, None]
    mask = _rows_of(mask, columns)[..., :k]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _rows_of(mask: Tensor, columns: Tensor) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, columns]


def _removed(module: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
    """The queries of this call that lose edges, and those edges, bool `[b #h q k]`; None if there are none."""
    block = running_block()
    layer: Any = module.layer_idx if block is None else block
    heads, q, k = query.shape[1], query.shape[2], key.shape[2]
    if (server := server_here()) is not None:
        edges = server.removed_attention(layer, heads, q, k)
        return None if edges is None else (torch.arange(q, device=query.device), edges)
    products = []
    for edit in active_edits(module):
        knockout = edit.intervention
        if isinstance(knockout, Knockout) and knockout.acts_at(layer):
            prompt = _prompt(edit, module, layer, q, k)
            chosen = attention_heads(knockout.features, heads)
            columns = Columns(query.shape[0], prompt, prompt_mask(query.shape[0], prompt))
            products += [(t[:, k - q :], s, chosen) for t, s in columns.edges_over(knockout, k)]
    _check_copy(module)
    queries = torch.stack([targets.any(0) for targets, _, _ in products]).any(0).nonzero()[:, 0] if products else None
    if queries is None or not len(queries):
        return None
    if is_checkpointed():
        raise HookError(
            f"layer {layer} attends inside a gradient checkpoint, whose backward pass would compute it again without "
            "the knockout; call it without torch.utils.checkpoint"
        )
    edges = torch.zeros(query.shape[0], 1, len(queries), k, dtype=torch.bool)
    for targets, sources, chosen in products:
        edges = edges | (rearrange(as_matrix(targets[:, queries], sources), "b q k -> b 1 q k") & chosen)
    return queries.to(query.device), edges


def _check_copy(module: nn.Module) -> None:
    """Refuse the attention of a copy of a model that is being edited: nothing connects it with the original."""
    edited = any("attention" in edit.streams for edit in edits_here())
    if edited and not active_edits(module):
        config = getattr(module, "config", None)
        if getattr(module, "_is_replica", False) or (config is not None and id(config) not in _users):
            raise HookError(
                f"{type(module).__name__} belongs to a copy of a model, made while a Knockout was at work in the "
                "attention of the original, which does not reach it; copy first, attach to the copy, and edit it there"
            )


def _prompt(edit: ActiveEdit, module: nn.Module, layer: int, q: int, k: int) -> int:
    """Positions of the prompt, which is the first call; a later one has q queries and all k keys so far."""
    at = (id(module), layer)
    if k == q or at not in edit.seen:
        check_columns(f"layer {layer}: Knockout", q)
        if (chunks := chunks_of_prompt()) > 1:
            raise InterventionError(
                f"layer {layer}: Knockout names positions of the prompt, which `generate` reads in {chunks} chunks, so "
                "that its end is not yet known; call generate without prefill_chunk_size"
            )
    prompt, seen = (q, 0) if k == q else edit.seen.get(at, (0, 0))
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
    edit.seen[at] = prompt, k
    return prompt
