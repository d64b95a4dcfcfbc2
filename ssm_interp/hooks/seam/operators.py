"""The operator signatures of the Mamba family, each put into the canonical layout and back.

Every mixer reaches its recurrence through one of four functions, whose signatures transformers shares with mamba_ssm:
a scan over positions and an update by one position, each in a Mamba-1 and a Mamba-2 layout. An adapter is made from the
arguments of one call; nothing else in the package knows these layouts.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ssm_interp.scan import Terms

Host = Callable[..., Any]

HEADS = {"x": 2, "dt": 2, "A": 0, "B": 2, "C": 2}  # operand -> the axis of its heads, or groups of them


@dataclass(frozen=True)
class Operands:
    """The tensors of one operator call, canonical in layout, in the host's own dtypes.

    x [b t h p], dt [b t h] (the effective step), A [h n] or [h 1], B and C [b t g n].
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def terms(self) -> Terms:
        """The same as Terms, in float32 at least."""
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        return Terms(*(tensor.to(dtype) for tensor in (self.x, self.dt, self.A, self.B, self.C)))


class Operator(ABC):
    """One call of a host's operator.

    Attributes:
        operands: what it was called with.
        z: the gate, [b t h p], if it reaches the operator.
        packed: whether several sequences are packed into a row, each with a recurrence of its own.
        updates: whether it is an update by one position, of a state that it changes in place.
        dt_limit: the range that the effective step is clamped to.
    """

    operands: Operands
    z: Tensor | None = None
    packed = False
    updates = False
    dt_limit: Sequence[float] = (0.0, float("inf"))

    def __init__(self, host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._host, self._args, self._kwargs = host, args, kwargs
        self.packed = any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens"))
        self._bind(*args, **kwargs)

    @property
    def is_reference(self) -> bool:
        """Whether the host runs its PyTorch implementation, not a fused kernel; unknown counts as a kernel."""
        return _is_reference(self._host)

    def native(self) -> Any:
        """The host's own call, as it was made."""
        return self._host(*self._args, **self._kwargs)

    @property
    def initial_state(self) -> Tensor | None:
        """The state it starts from, [b h p n], not yet changed by the call; None: zeros."""
        return None

    @abstractmethod
    def placeholder(self) -> Any:
        """What stands for the result of one of several calls until all of them were made: `Joined` fills it."""

    @abstractmethod
    def _bind(self, *args: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def run(self, operands: Operands) -> tuple[Tensor, Tensor | None]:
        """y = M x by the host's operator, without D-skip and gate; and the final state if the host asked for it."""

    @abstractmethod
    def finish(self, y: Tensor, state: Tensor | None, x: Tensor, z: Tensor | None) -> Any:
        """What the host expects back: y with D-skip and gate, in its layout, and the final state if it asked for it."""


@cache
def _is_reference(host: Host) -> bool:
    inner = inspect.getclosurevars(host).nonlocals if inspect.isfunction(host) else {}
    return "implementation" in inner and inner["implementation"] is inspect.unwrap(host)


class SelectiveScan(Operator):
    """`mamba_selective_scan`: x, dt, z [b h t]; A [h n]; B, C [b n t]; final state [b h n]."""

    def _bind(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **options: Any,
    ) -> None:
        self._D, self._wants_state, self._options = D, return_last_state, options
        step = dt if delta_bias is None else dt + rearrange(delta_bias.to(dt.dtype), "h -> h 1")
        step = F.softplus(step) if delta_softplus else step
        self.operands = Operands(
            x=rearrange(hidden_states, "b h t -> b t h 1"),
            dt=rearrange(step, "b h t -> b t h"),
            A=A,
            B=rearrange(B, "b n t -> b t 1 n"),
            C=rearrange(C, "b n t -> b t 1 n"),
        )
        self.z = None if z is None else rearrange(z, "b h t -> b t h 1")

    def placeholder(self) -> Any:
        x, n = self.operands.x, self.operands.A.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = _unset(rearrange(x, "b t h 1 -> b h t"), dtype)
        return (y, _unset(repeat(x[:, 0], "b h 1 -> b h n", n=n), dtype)) if self._wants_state else y

    def run(self, operands: Operands) -> tuple[Tensor, Tensor | None]:
        returned = self._host(
            rearrange(operands.x, "b t h 1 -> b h t"),
            rearrange(operands.dt, "b t h -> b h t"),
            operands.A,
            rearrange(operands.B, "b t 1 n -> b n t"),
            rearrange(operands.C, "b t 1 n -> b n t"),
            return_last_state=self._wants_state,
            **self._options,
        )
        y, state = returned if self._wants_state else (returned, None)
        return rearrange(y, "b h t -> b t h 1"), None if state is None else rearrange(state, "b h n -> b h 1 n")

    def finish(self, y: Tensor, state: Tensor | None, x: Tensor, z: Tensor | None) -> Any:
        output = rearrange(y, "b t h 1 -> b h t")
        if self._D is not None:
            output = output + rearrange(x, "b t h 1 -> b h t") * rearrange(self._D, "h -> h 1")
        if z is not None:
            output = output * F.silu(rearrange(z, "b t h 1 -> b h t"))
        if not self._wants_state:
            return output
        return output, None if state is None else rearrange(state, "b h 1 n -> b h n")


class SelectiveUpdate(Operator):
    """`mamba_selective_state_update`: state [b h n], changed in place; x, dt, z [b h]; A [h n]; B, C [b n]."""

    updates = True

    def _bind(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **options: Any,
    ) -> None:
        self._state, self._D, self._options = state, D, options
        step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        step = F.softplus(step) if dt_softplus else step
        self.operands = Operands(
            x=rearrange(hidden_states, "b h -> b 1 h 1"),
            dt=rearrange(step, "b h -> b 1 h"),
            A=A,
            B=rearrange(B, "b n -> b 1 1 n"),
            C=rearrange(C, "b n -> b 1 1 n"),
        )
        self.z = None if z is None else rearrange(z, "b h -> b 1 h 1")

    @property
    def initial_state(self) -> Tensor:
        return rearrange(self._state, "b h n -> b h 1 n").clone()

    def placeholder(self) -> Any:
        x = rearrange(self.operands.x, "b 1 h 1 -> b h")
        return _unset(x, x.dtype)

    def run(self, operands: Operands) -> tuple[Tensor, Tensor | None]:
        y = self._host(
            self._state,
            rearrange(operands.x, "b 1 h 1 -> b h"),
            rearrange(operands.dt, "b 1 h -> b h"),
            operands.A,
            rearrange(operands.B, "b 1 1 n -> b n"),
            rearrange(operands.C, "b 1 1 n -> b n"),
            **self._options,
        )
        return rearrange(y, "b h -> b 1 h 1"), rearrange(self._state, "b h n -> b h 1 n")

    def finish(self, y: Tensor, state: Tensor | None, x: Tensor, z: Tensor | None) -> Any:
        output = rearrange(y, "b 1 h 1 -> b h")
        if self._D is not None:
            output = output + rearrange(x, "b 1 h 1 -> b h") * self._D
        if z is not None:
            output = output * F.silu(rearrange(z, "b 1 h 1 -> b h"))
        _put(self._state, None if state is None else rearrange(state, "b h 1 n -> b h n"))
        return output.to(x.dtype)


class ChunkScan(Operator):
    """`mamba2_chunk_scan`: x [b t h p]; dt [b t h]; A [h]; B, C [b t g n]; states [b h p n]."""

    def _bind(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: Sequence[float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **options: Any,
    ) -> None:
        self._D, self._wants_state, self._initial_state = D, return_final_states, initial_states
        self._options = options | {"chunk_size": chunk_size}
        step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        step = F.softplus(step) if dt_softplus else step
        step = torch.clamp(step, min=dt_limit[0], max=dt_limit[1])
        self.dt_limit = dt_limit
        self.operands = Operands(x=hidden_states, dt=step, A=rearrange(A, "h -> h 1"), B=B, C=C)
        self.z = z

    @property
    def initial_state(self) -> Tensor | None:
        return self._initial_state

    def placeholder(self) -> Any:
        x, n = self.operands.x, self.operands.B.shape[3]
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = _unset(x, dtype)
        return (y, _unset(repeat(x[:, 0], "b h p -> b h p n", n=n), dtype)) if self._wants_state else y

    def run(self, operands: Operands) -> tuple[Tensor, Tensor | None]:
        returned = self._host(
            operands.x,
            operands.dt,
            rearrange(operands.A, "h 1 -> h"),
            operands.B,
            operands.C,
            initial_states=self._initial_state,
            return_final_states=self._wants_state,
            **self._options,
        )
        return returned if self._wants_state else (returned, None)

    def finish(self, y: Tensor, state: Tensor | None, x: Tensor, z: Tensor | None) -> Any:
        output = y
        if self._D is not None:
            output = output + (rearrange(self._D, "h -> h 1") if self._D.ndim == 1 else self._D) * x.to(y.dtype)
        if z is not None:
            output = output * F.silu(z)
        output = output.contiguous()  # hosts take a view of it
        return (output, state) if self._wants_state else output


class HeadUpdate(Operator):
    """`mamba2_selective_state_update`: state [b h p n], changed in place; x, dt, z [b h p]; A [h p n]; B, C [b g n]."""

    updates = True

    def _bind(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **options: Any,
    ) -> None:
        self._state, self._D, self._options, self._gate = state, D, options, z
        step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        step = F.softplus(step) if dt_softplus else step
        self._p, self._n = hidden_states.shape[-1], B.shape[-1]
        self.operands = Operands(
            x=rearrange(hidden_states, "b h p -> b 1 h p"),
            dt=rearrange(step[..., 0], "b h -> b 1 h"),
            A=A[:, 0, :1],
            B=rearrange(B, "b g n -> b 1 g n"),
            C=rearrange(C, "b g n -> b 1 g n"),
        )

    @property
    def initial_state(self) -> Tensor:
        return self._state.clone()

    def placeholder(self) -> Any:
        return _unset(self.operands.x[:, 0], self.operands.x.dtype)

    def run(self, operands: Operands) -> tuple[Tensor, Tensor | None]:
        y = self._host(
            self._state,
            rearrange(operands.x, "b 1 h p -> b h p"),
            repeat(operands.dt, "b 1 h -> b h p", p=self._p),
            repeat(operands.A, "h 1 -> h p n", p=self._p, n=self._n),
            rearrange(operands.B, "b 1 g n -> b g n"),
            rearrange(operands.C, "b 1 g n -> b g n"),
            **self._options,
        )
        return rearrange(y, "b h p -> b 1 h p"), self._state

    def finish(self, y: Tensor, state: Tensor | None, x: Tensor, z: Tensor | None) -> Any:  # noqa: ARG002
        output = y[:, 0]
        if self._D is not None:
            output = (output + x[:, 0] * self._D).to(output.dtype)
        if self._gate is not None:
            output = output * F.silu(self._gate)
        _put(self._state, state)
        return output.to(x.dtype)


class Joined(Operator):
    """The calls of one forward, each over some of the heads, as one over all (Zamba calls once per Mamba head)."""

    def __init__(self, calls: Sequence[Operator], given: Sequence[Any]) -> None:
        self._calls, self._given = calls, given  # given: what stood for the results of all calls but the last
        self._heads = [call.operands.x.shape[2] for call in calls]
        self._groups = [call.operands.B.shape[2] for call in calls]
        self.packed, self.updates = any(call.packed for call in calls), calls[0].updates
        parts = [call.operands for call in calls]
        self.operands = Operands(
            **{name: _cat([getattr(part, name) for part in parts], axis) for name, axis in HEADS.items()}
        )
        gates = [call.z for call in calls if call.z is not None]
        self.z = _cat(gates, 2) if gates else None

    @property
    def is_reference(self) -> bool:
        return self._calls[0].is_reference

    def native(self) -> Any:
        return self._give([call.native() for call in self._calls])

    @property
    def initial_state(self) -> Tensor | None:
        states = [state for call in self._calls if (state := call.initial_state) is not None]
        return torch.cat(states, 1) if states else None

    def _bind(self, *args: Any, **kwargs: Any) -> None: ...

    def placeholder(self) -> Any:
        return self._calls[-1].placeholder()

    def run(self, operands: Operands) -> tuple[Tensor, Tensor | None]:
        sizes = {name: self._groups if name in "BC" else self._heads for name in HEADS}
        split = {name: torch.split(getattr(operands, name), sizes[name], axis) for name, axis in HEADS.items()}
        parts = [Operands(**dict(zip(HEADS, part, strict=True))) for part in zip(*split.values(), strict=True)]
        results = [call.run(part) for call, part in zip(self._calls, parts, strict=True)]
        states = [state for _, state in results if state is not None]
        return _cat([y for y, _ in results], 2), torch.cat(states, 1) if states else None

    def finish(self, y: Tensor, state: Tensor | None, x: Tensor, z: Tensor | None) -> Any:
        ys, xs = torch.split(y, self._heads, 2), torch.split(x, self._heads, 2)
        zs = [None] * len(ys) if z is None else torch.split(z, self._heads, 2)
        states = [None] * len(ys) if state is None else torch.split(state, self._heads, 1)
        parts = zip(self._calls, ys, states, xs, zs, strict=True)
        return self._give([call.finish(y, state, x, z) for call, y, state, x, z in parts])

    def _give(self, results: Sequence[Any]) -> Any:
        for stood, result in zip(self._given, results, strict=False):
            for kept, value in zip(_tensors(stood), _tensors(result), strict=True):
                kept.copy_(value)
        return results[-1]


def _cat(parts: list[Tensor], axis: int) -> Tensor:
    """Heads put together, kept in memory as the host keeps them: position by position within a head."""
    if axis == 0:
        return torch.cat(parts)
    return torch.cat([part.transpose(1, axis) for part in parts], 1).transpose(1, axis)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _unset(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the same shape in which nobody could overlook that it was never filled."""
    return like.new_full(like.shape, float("nan"), dtype=dtype)


def _put(kept: Tensor, state: Tensor | None) -> None:
    """Copy an edited state to where the host keeps it (a no-op when the host has already changed it there)."""
    if state is not None and state.data_ptr() != kept.data_ptr():
        kept.copy_(state)


OPERATORS: dict[str, type[Operator]] = {
    "mamba_selective_scan": SelectiveScan,
    "mamba_selective_state_update": SelectiveUpdate,
    "mamba2_chunk_scan": ChunkScan,
    "mamba2_selective_state_update": HeadUpdate,
}
GATED_FAMILY = {"mamba_selective_scan", "mamba_selective_state_update"}
FUSED_SHORTCUTS = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
