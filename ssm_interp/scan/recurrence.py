"""The recurrence: y, the final state, or every state, from any initial state. All in fp32 at least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ssm_interp.errors import TermsError
from ssm_interp.scan.chunks import scan_by_chunks
from ssm_interp.scan.terms import Terms, in_full_precision, per_head

FEW = 4  # positions up to which single steps are faster than matrix products


@in_full_precision
def scan(
    terms: Terms, initial_state: Float[Tensor, "b h p n"] | None = None
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Run the recurrence: `y = M x` (plus what the initial state gives) and the state after the last position.

    Args:
        terms: the operands.
        initial_state: state before the first position, `[b, h, p, n]`, in any dtype; zeros if None.

    Returns:
        y `[b, t, h, p]` and the final state `[b, h, p, n]`, in fp32 at least (bf16 and fp16 terms are cast up).

    Raises:
        TermsError: an initial state of another shape.

    Cost: O(L H P N) time, O(H P N) memory beside the result (with autograd O(L H P N)); with one decay per head in
        matrix products over chunks of positions.
    Source: Mamba (arXiv 2312.00752) eq. 2; B is discretised as dt B (Euler), as both reference implementations do.

    Example:
        >>> y, state = scan(terms)
        >>> y_more, _ = scan(next_terms, state)          # the recurrence goes on where it stopped
    """
    state = _initial(terms, initial_state)
    if terms.scalar_decay and terms.length > FEW:
        return scan_by_chunks(terms, state)
    by_group = (terms.batch, terms.groups, -1, terms.state_size)
    reads: list[Tensor] = []
    steps = _run(terms, _writes(terms), state)
    for state, C in zip(steps, terms.C.unbind(1), strict=True):  # plain shapes: a step takes microseconds
        reads.append(state.reshape(by_group) @ C[..., None])  # b g (h/g p) 1
    return torch.stack(reads, dim=1).reshape(terms.x.shape), state


@in_full_precision
def states(terms: Terms, initial_state: Float[Tensor, "b h p n"] | None = None) -> Float[Tensor, "b t h p n"]:
    """Every state of the recurrence: `[:, t]` is the state after position t.

    Arguments and errors as for `scan`. Cost: O(L H P N) time and memory.

    Example:
        >>> read(states(terms), terms.C)                 # is scan(terms)[0]
    """
    return torch.stack(list(_run(terms, _writes(terms), _initial(terms, initial_state))), dim=1)


def read(state: Float[Tensor, "b t h p n"], C: Float[Tensor, "b t g n"]) -> Float[Tensor, "b t h p"]:
    """`y_t = C_t state_t`: what each position reads out of a given state, in the dtype of the state.

    Raises:
        TermsError: a state and a C that do not belong together.

    Cost: O(L H P N) time, no memory beside the result.

    Example:
        >>> read(states(terms), terms.C)                 # is scan(terms)[0]
    """
    b, t, h, p, n = state.shape
    g = C.shape[2]
    if C.shape != (b, t, g, n) or h % g:
        raise TermsError(
            f"state [b t h p n] = {list(state.shape)} and C [b t g n] = {list(C.shape)} do not belong together: "
            "b, t and n must be equal and h a multiple of g"
        )
    return (state.reshape(b, t, g, -1, n) @ C[..., None].to(state)).reshape(b, t, h, p)  # plain: one step of many


@in_full_precision
def write(terms: Terms) -> Float[Tensor, "b t h p n"]:
    """`dt_t B_t x_t`: what each position adds to the state, in fp32 at least. Cost: O(L H P N) memory.

    Example:
        >>> list(accumulate(terms, write(terms)))[-1]    # is scan(terms)[1]
    """
    u = einsum(terms.dt, terms.x, "b t h, b t h p -> b t h p")
    return einsum(u, per_head(terms.B, terms.heads), "b t h p, b t h n -> b t h p n")


@in_full_precision
def accumulate(
    terms: Terms, writes: Float[Tensor, "b t h p n"], initial_state: Float[Tensor, "b h p n"] | None = None
) -> Iterator[Float[Tensor, "b h p n"]]:
    """Yield the state after each position when the positions write `writes` instead of `dt B x`.

    Raises:
        TermsError: writes or an initial state of another shape.

    Cost: O(L H P N) time, O(H P N) memory.

    Example:
        >>> torch.stack(list(accumulate(terms, write(terms))), dim=1)      # is states(terms)
    """
    shape = (terms.batch, terms.length, terms.heads, terms.head_dim, terms.state_size)
    if writes.shape != shape:
        raise TermsError(f"writes must be [b t h p n] = {list(shape)}, got {list(writes.shape)}")
    return _run(terms, writes.to(terms.x).unbind(1), _initial(terms, initial_state))


def decays(terms: Terms) -> Iterator[Float[Tensor, "b h 1 #n"]]:
    """`exp(dt_t A)`: what each position keeps of the state before it, one at a time.

    Example:
        >>> len(list(decays(terms))) == terms.length
        True
    """
    for dt in terms.dt.unbind(1):
        yield (dt[..., None] * terms.A).exp()[:, :, None, :]


def _run(
    terms: Terms, writes: Iterable[Float[Tensor, "b h p n"]], state: Float[Tensor, "b h p n"]
) -> Iterator[Float[Tensor, "b h p n"]]:
    """`state_t = exp(dt_t A) state_{t-1} + write_t`."""
    for decay, added in zip(decays(terms), writes, strict=True):
        state = torch.addcmul(added, decay, state)
        yield state


def _writes(terms: Terms) -> Iterator[Float[Tensor, "b h p n"]]:
    """The rows of `write(terms)`, one at a time, so that only one is held."""
    by_group = (terms.batch, terms.groups, -1, terms.head_dim)
    shape = (terms.batch, terms.heads, terms.head_dim, terms.state_size)
    for u, B in zip((terms.dt[..., None] * terms.x).unbind(1), terms.B.unbind(1), strict=True):
        yield (u.reshape(by_group)[..., None] * B[:, :, None, None, :]).reshape(shape)


def _initial(terms: Terms, state: Tensor | None) -> Float[Tensor, "b h p n"]:
    shape = (terms.batch, terms.heads, terms.head_dim, terms.state_size)
    if state is None:
        return terms.x.new_zeros(shape)
    if state.shape != shape:
        raise TermsError(f"the initial state must be [b h p n] = {list(shape)}, got {list(state.shape)}")
    return state.to(terms.x)
