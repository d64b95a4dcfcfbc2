"""What must be remembered between the calls on one cache, kept with the cache itself.

transformers' cache knows the recurrent state, not how many positions made it, nor the part of it that knocked-out
sources wrote. Both are kept on the cache's own layer object; the states as further entries of its `recurrent_states`,
so that whatever reorders, moves or copies the cache does the same to them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_NAME = "ssm_interp_record"


@dataclass
class Record:
    """The history of one cache layer.

    Attributes:
        seen: positions read so far.
        prompt: positions of the first call.
        mask: 0 at its padding, `[b t]`; None: nothing said that there was any.
        known: the interventions that were active at the first call.
        slots: where the states that belong to an intervention are kept.
        kept_at: after how many positions each of them was kept.
    """

    seen: int = 0
    prompt: int = 0
    mask: Tensor | None = None
    known: set[Hashable] = field(default_factory=set)
    slots: dict[Hashable, int] = field(default_factory=dict)
    kept_at: dict[Hashable, int] = field(default_factory=dict)


def has_record(cache: Any, layer: int) -> bool:
    """Whether something is a cache whose layer has a record: a cache of a prompt that was read under edits."""
    layers = getattr(cache, "layers", None)
    return isinstance(layers, list) and layer < len(layers) and hasattr(layers[layer], _NAME)


def record_of(cache: Any, layer: int) -> Record | None:
    """The record of a cache layer; None if others filled it before."""
    cache_layer = cache.layers[layer]
    filled = cache_layer.has_previous_state[0]
    if not filled:
        _forget(cache_layer)
        setattr(cache_layer, _NAME, Record())
    return getattr(cache_layer, _NAME, None)


def _forget(cache_layer: Any) -> None:
    """Drop the states that were kept before a cache was reset."""
    before: Record | None = getattr(cache_layer, _NAME, None)
    for slot in before.slots.values() if before else ():
        for entries in _entries(cache_layer):
            del entries[slot]
        cache_layer.number_of_states -= 1


def _entries(cache_layer: Any) -> tuple[dict[int, Any], ...]:
    """Of each state of a cache layer: itself, that of its convolution, and what is known about the two."""
    return (
        cache_layer.recurrent_states,
        cache_layer.conv_states,
        cache_layer.is_conv_states_initialized,
        cache_layer.conv_kernel_size,
        cache_layer.has_previous_state,
        cache_layer.is_recurrent_states_initialized,
    )


def remembered(cache: Any, layer: int, key: Hashable) -> Tensor | None:
    """The state kept under a key, [b h p n]; None if none was, or if the cache has gone on without it since."""
    record: Record = getattr(cache.layers[layer], _NAME)
    if record.kept_at.get(key) != record.seen:
        return None
    state: Tensor = cache.layers[layer].recurrent_states[record.slots[key]]
    return state


def remember(cache: Any, layer: int, key: Hashable, state: Tensor, length: int) -> None:
    """Keep the state after a call of some length under a key."""
    cache_layer = cache.layers[layer]
    record: Record = getattr(cache_layer, _NAME)
    if key not in record.slots:
        slot = record.slots[key] = cache_layer.number_of_states
        cache_layer.number_of_states += 1
        for entries, value in zip(_entries(cache_layer), (state, None, False, None, True, True), strict=True):
            entries[slot] = value
    cache_layer.recurrent_states[record.slots[key]] = state
    record.kept_at[key] = record.seen + length
