"""What an SSM layer hands to its recurrence, in one canonical layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from itertools import groupby
from typing import Any, TypeVar, cast

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from ssm_interp.errors import TermsError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RANKS = {"x": 4, "dt": 3, "A": 2, "B": 4, "C": 4}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Terms:
    """The operands of `state_t = exp(dt_t A) state_{t-1} + dt_t B_t x_t`, `y_t = C_t state_t`.

    Letters: b batch, t position, h head, p head_dim, g group, n state. Mamba-1 is the case h = d_inner, p = 1, g = 1,
    with A `[h, n]`; Mamba-2 has one decay per head, A `[h, 1]`. Of H heads in G groups, head h reads the B and C of
    group h // (H / G). `dt` is the effective step: bias, softplus and clamp are behind it. D-skip and gate lie outside.

    Attributes:
        x: values, `[b, t, h, p]`.
        dt: step sizes, `[b, t, h]`, >= 0 (not checked: that would wait for the device).
        A: continuous decay, `[h, n]` or `[h, 1]`, <= 0 (not checked either).
        B: what a position writes, `[b, t, g, n]`.
        C: what a position reads, `[b, t, g, n]`.

    Raises:
        TermsError: something that is not a tensor, shapes that do not fit together, an empty dimension, different
            dtypes or devices, a dtype that is not a float; the message names them.

    Source: Mamba (arXiv 2312.00752) eq. 2, with B discretised as dt B (Euler), as both reference implementations do.

    Example:
        >>> terms = Terms(x=torch.ones(1, 5, 2, 3), dt=torch.ones(1, 5, 2), A=-torch.ones(2, 1),
        ...               B=torch.ones(1, 5, 1, 4), C=torch.ones(1, 5, 1, 4))
        >>> terms.state_size, terms.scalar_decay
        (4, True)
    """

    x: Float[Tensor, "b t h p"]
    dt: Float[Tensor, "b t h"]
    A: Float[Tensor, "h #n"]  # noqa: UP037 - jaxtyping, no comment
    B: Float[Tensor, "b t g n"]
    C: Float[Tensor, "b t g n"]

    def __post_init__(self) -> None:
        tensors = {name: getattr(self, name) for name in RANKS}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TermsError(f"{name} must be a torch tensor, got {type(tensor).__name__}")
        self._check_shapes({name: list(tensor.shape) for name, tensor in tensors.items()})
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        if len(set(dtypes.values())) > 1 or self.x.dtype not in FLOATS:
            raise TermsError(f"all terms must share one of the dtypes {FLOATS}; got {dtypes}")
        devices = {name: str(tensor.device) for name, tensor in tensors.items()}
        if len(set(devices.values())) > 1:
            raise TermsError(f"all terms must be on one device; got {devices}; move them with .to(device)")

    def _check_shapes(self, shapes: dict[str, list[int]]) -> None:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        expected = "expected x [b t h p], dt [b t h], A [h n] or [h 1], B and C [b t g n] with h a multiple of g"
        for name, rank in RANKS.items():
            if len(shapes[name]) != rank:
                raise TermsError(f"{name} must have {rank} dimensions, got {shapes[name]}; {expected}")
        b, t, h, _ = shapes["x"]
        g, n = shapes["B"][2:]
        if any(0 in shape for shape in shapes.values()):
            raise TermsError(f"a recurrence needs at least one of everything, got an empty dimension in {given}")
        fits = (
            shapes["dt"] == [b, t, h]
            and shapes["A"] in ([h, n], [h, 1])
            and shapes["B"] == shapes["C"] == [b, t, g, n]
            and h % g == 0
        )
        if not fits:
            raise TermsError(f"these do not form one recurrence: {given}; {expected}")

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def length(self) -> int:
        return self.x.shape[1]

    @property
    def heads(self) -> int:
        return self.x.shape[2]

    @property
    def head_dim(self) -> int:
        return self.x.shape[3]

    @property
    def groups(self) -> int:
        return self.B.shape[2]

    @property
    def state_size(self) -> int:
        return self.B.shape[3]

    @property
    def scalar_decay(self) -> bool:
        """Whether a head has one decay for all its state dimensions (Mamba-2)."""
        return self.A.shape[1] == 1

    @property
    def log_decay(self) -> Float[Tensor, "b t h #n"]:
        """`dt_t A`, the logarithm of what one step keeps of the state; `[b, t, h, n]` or `[b, t, h, 1]`."""
        return self.dt[..., None] * self.A

    def to(self, dtype: torch.dtype) -> Terms:
        return Terms(*(tensor.to(dtype) for tensor in (self.x, self.dt, self.A, self.B, self.C)))

    def precise(self) -> Terms:
        """The same terms in fp32 at least: bf16 and fp16 are cast up, fp32 and float64 stay."""
        return self.to(torch.promote_types(self.x.dtype, torch.float32))

    def with_x(self, x: Float[Tensor, "b t h q"]) -> Terms:
        """The same operator, other values (their head_dim is free: the operator acts on each column alone)."""
        return replace(self, x=x)

    def at(self, positions: slice) -> Terms:
        """The terms of a contiguous run of positions."""
        return Terms(self.x[:, positions], self.dt[:, positions], self.A, self.B[:, positions], self.C[:, positions])

    def of_heads(self, heads: Iterable[int]) -> Iterator[tuple[list[int], Terms]]:
        """Some heads, ascending, those that share a group of B and C together: which these are, and their terms.

        Raises:
            TermsError: no heads, or one that does not exist.

        Example:
            >>> [(members, part.heads) for members, part in terms.of_heads([0, 2])]       # of 4 heads in 2 groups
            [([0], 1), ([2], 1)]
        """
        chosen = sorted(set(heads))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < self.heads:
            raise TermsError(f"heads must be some of 0 to {self.heads - 1}, got {chosen}")
        per_group = self.heads // self.groups
        for group, of_group in groupby(chosen, key=lambda head: head // per_group):
            members = list(of_group)
            B, C = self.B[:, :, [group]], self.C[:, :, [group]]
            yield members, Terms(self.x[:, :, members], self.dt[:, :, members], self.A[members], B, C)


def per_head(grouped: Float[Tensor, "b t g n"], heads: int) -> Float[Tensor, "b t h n"]:
    """B or C of each head: those of its group.

    Example:
        >>> per_head(torch.tensor([[[[1.0], [2.0]]]]), 4).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    return repeat(grouped, "b t g n -> b t (g j) n", j=heads // grouped.shape[2])


def in_full_precision(function: Function) -> Function:
    """Let a function of Terms compute in fp32 at least, also under autocast: it sees `terms.precise()`."""

    @wraps(function)
    def run(terms: Terms, *args: Any, **kwargs: Any) -> Any:
        device = terms.x.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return function(terms.precise(), *args, **kwargs)

    return cast(Function, run)
