"""The causal convolution before the operator: its inputs pass a hook point, and knocked-out edges lose their taps.

Every mixer calls one of two functions: a convolution over positions, whose inputs may begin with cached ones, and an
update by one position, whose cached inputs are an argument of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from transformers.activations import ACT2FN

from ssm_interp.hooks.edits.forward import Forward
from ssm_interp.hooks.edits.masks import as_taps
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.seam.through import through_point

OVER_POSITIONS = "causal_conv1d_fn"
UPDATE = "causal_conv1d_update"


@dataclass(frozen=True)
class Convolution:
    """One call of a host's causal convolution.

    Attributes:
        host: the function.
        inputs: `[b d w]`; the positions of the call come last.
        cached: the inputs before them, `[b d k]`, where they are an argument of their own; the call updates them.
        weight: `[d k]`.
        bias: `[d]` or None.
        activation: its name, or None.
        options: whatever else the host was given.
    """

    host: Callable[..., Tensor]
    inputs: Tensor
    cached: Tensor | None
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    options: dict[str, Any]

    @property
    def taps(self) -> int:
        """k: how many positions one output reads."""
        return self.weight.shape[-1]

    def run(self) -> Tensor:
        """The host's own call, `[b d w]`."""
        cached = () if self.cached is None else (self.cached,)
        return self.host(self.inputs, *cached, self.weight, self.bias, activation=self.activation, **self.options)

    def run_shared(self) -> Tensor:
        """An update for rows `[blocks n, d, 1]` that share n rows of cached inputs, which are not updated.

        Cost: one multiplication per row and channel, in place of a convolution over a copy of every row's inputs.
        """
        assert self.cached is not None
        before = (self.cached[..., self.cached.shape[-1] - (self.taps - 1) :] * self.weight[:, :-1]).sum(-1)  # n d
        before = before if self.bias is None else before + self.bias
        rows = self.inputs.reshape(-1, *before.shape)  # blocks n d
        return self.activate((before + rows * self.weight[:, -1]).reshape(self.inputs.shape)).to(self.inputs.dtype)

    def activate(self, outputs: Tensor) -> Tensor:
        """What the host does to the outputs of the convolution itself."""
        return outputs if self.activation is None else ACT2FN[self.activation](outputs)

    def without(self, removed: Iterable[tuple[Tensor | None, Tensor]], call: Callable[[Convolution], Tensor]) -> Tensor:
        """The outputs of a call in which some taps are removed.

        Args:
            removed: rows (None: all) and the taps that their last positions lose, bool `[k b t]`.
            call: does the convolution.
        """
        parts = [(rows, taps, self._kept(taps, rows)) for rows, taps in removed]  # before the call updates a cache
        outputs = call(replace(self, activation=None))
        for rows, taps, other in parts:
            first = outputs.shape[-1] - taps.shape[-1]
            before = outputs if rows is None else outputs[rows]
            kept = torch.where(rearrange(taps.any(0), "b t -> b 1 t"), other.to(outputs), before[..., first:])
            changed = torch.cat([before[..., :first], kept], dim=-1)
            outputs = changed if rows is None else outputs.index_copy(0, rows, changed)
        return self.activate(outputs)

    def _kept(self, removed: Tensor, rows: Tensor | None) -> Tensor:
        """What the other taps carry, and the bias, in fp32 at least, `[b d t]`."""
        window = self.window(removed.shape[-1], rows)
        precise = torch.promote_types(window.dtype, torch.float32)
        kept = carry(window.to(precise), self.weight.to(precise), ~removed)
        return kept if self.bias is None else kept + rearrange(self.bias, "d -> d 1")

    def window(self, length: int, rows: Tensor | None = None) -> Tensor:
        """The inputs that the last outputs read, `[b d (k-1)+length]`; of some rows, which may share cached ones."""
        inputs = self.inputs if rows is None else self.inputs[rows]
        if self.cached is not None:
            before = self.cached if rows is None else self.cached[rows % len(self.cached)]
            inputs = torch.cat([before.to(inputs), inputs], dim=-1)
        wanted = self.taps - 1 + length
        return pad(inputs, (max(0, wanted - inputs.shape[-1]), 0))[..., -wanted:]


def bind(name: str, host: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Convolution:
    """The call of a host's convolution, by the name of the function."""

    def over_positions(
        inputs: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **options: Any
    ) -> Convolution:
        return Convolution(host, inputs, None, weight, bias, activation, options)

    def update(
        inputs: Tensor,
        cached: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> Convolution:
        return Convolution(host, inputs, cached, weight, bias, activation, options)

    return (update if name == UPDATE else over_positions)(*args, **kwargs)


def convolve(call: Convolution, forward: Forward) -> Tensor:
    """Do one convolution of a mixer's forward under its edits; its result is what the host's function returns."""
    call = _through_point(call, forward)
    knockouts = [edit for edit in forward.conv_edits if isinstance(edit, Knockout)]
    taps = _removed(knockouts, forward, call.taps).to(call.inputs.device)
    return call.without([(None, taps)], Convolution.run) if taps.any() else call.run()


def carry(window: Tensor, weight: Tensor, edges: Tensor) -> Tensor:
    """What some taps carry, `[b d t]`.

    Args:
        window: inputs, `[b d (k-1)+t]`.
        weight: `[d k]`.
        edges: bool `[k b t]`: whether position t loses what it reads from j positions before it.
    """
    k, _, t = edges.shape
    carried = window.new_zeros(())
    for j in edges.flatten(1).any(1).nonzero()[:, 0].tolist():
        first = k - 1 - j
        read = window[..., first : first + t] * rearrange(weight[:, first], "d -> d 1")
        carried = carried + torch.where(rearrange(edges[j], "b t -> b 1 t"), read, 0)
    return carried.expand(*window.shape[:2], t)


def _through_point(call: Convolution, forward: Forward) -> Convolution:
    """The call with what the hook point lets pass, also in what the cache keeps of the inputs."""
    before, inputs = call.inputs[..., : -forward.length], call.inputs[..., -forward.length :]
    version = None if inputs.is_inference() else inputs._version
    shown = rearrange(inputs, "b d t -> b t d")
    passed = through_point(forward.points.hook_conv, shown)
    in_place = forward.points.hook_conv.has_hooks() if version is None else inputs._version != version
    changed = passed is not shown or in_place
    inputs = rearrange(passed, "b t d -> b d t")
    if changed and forward.cache is not None and call.cached is None:
        kept: Tensor = forward.cache.layers[forward.layer].conv_states[0]
        columns = min(kept.shape[-1], forward.length)
        kept[..., -columns:] = inputs[..., -columns:]
    return replace(call, inputs=torch.cat([before, inputs], dim=-1) if before.shape[-1] else inputs)


def _removed(knockouts: Iterable[Knockout], forward: Forward, taps: int) -> Tensor:
    """The taps that knockouts take from the positions of this call, `[k b t]`."""
    removed = torch.zeros(taps, forward.batch, forward.length, dtype=torch.bool)
    seen = forward.seen
    for knockout in knockouts:
        if knockout.is_open_ended or not forward.continues:
            for targets, sources in forward.prompt.edges_over(knockout, seen + forward.length):
                removed |= as_taps(targets[:, seen:], sources, seen, taps)
    return removed
