"""One operator call of a hooked mixer: fire the hook points, apply the edits, give the host what it expects.

What several edits at one layer mean, whatever their order: edits of x, dt, B, C and write act on the recurrence; an
edited state is the state, from which later positions go on; an edge mask multiplies M; an edit of attn adds (M' - M) x;
features are scaled in what is then read; an edit of y comes last.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ssm_interp.errors import HookError
from ssm_interp.hooks.edits.forward import Forward
from ssm_interp.hooks.edits.layer import Injected, LayerEdits
from ssm_interp.hooks.edits.masks import right_padded
from ssm_interp.hooks.points import ON_REQUEST, HookPoints
from ssm_interp.hooks.seam.convolution import Convolution, convolve
from ssm_interp.hooks.seam.operators import Operands, Operator
from ssm_interp.hooks.seam.through import shift_at, through_point
from ssm_interp.scan import attention, read, scan, write
from ssm_interp.scan.terms import Terms

Result = tuple[Tensor, Tensor | None]  # y, and the final state if the host asked for it


class EditSite(Forward):
    """A forward under the edits at work, as its calls reach us."""

    def serve(self, call: Operator) -> Any:
        """Do one operator call; its result is what the host's operator returns."""
        operator = self.join(call)
        if operator is None:
            return self.given[-1]
        points = self.points
        given = operator.operands
        edits = LayerEdits(self, given)
        versions = _versions(given)
        operands = replace(given, dt=edits.set_delta(given.dt)) if edits else given
        operands = replace(
            operands,
            x=through_point(points.hook_x, operands.x),
            dt=through_point(points.hook_dt, operands.dt),
            B=through_point(points.hook_B, operands.B),
            C=through_point(points.hook_C, operands.C),
        )
        exposed = any(points.point(name).requested for name in ON_REQUEST)
        if edits or exposed or points.own_operator:
            y, state = _edited(operator, operands, self, edits)
        elif _keeps_to_itself(operator, points) and _untouched(operands, given) and _versions(given) == versions:
            return operator.native()
        else:
            y, state = operator.run(operands)
        y = through_point(points.hook_y, y)
        z = None if operator.z is None else through_point(points.hook_z, operator.z)
        return operator.finish(y, state, operands.x, z)

    def convolve(self, call: Convolution) -> Tensor:
        """Do one call of the causal convolution; its result is what the host's function returns."""
        return convolve(call, self)


def _edited(operator: Operator, operands: Operands, forward: Forward, edits: LayerEdits) -> Result:
    """y and the final state of a call with something to edit or to show."""
    if operator.packed:
        raise HookError(
            f"layer {forward.layer} got packed sequences (seq_idx or cu_seqlens), in which positions mean something "
            "else in each sequence; give one sequence per row, padded, with an attention_mask"
        )
    points = forward.points
    initial = _initial_state(operator, forward)
    clean = _kept_over_padding(operands.terms(), forward) if points.hook_state.requested else operands.terms()
    terms = edits.scale_reads(clean)
    initial = None if initial is None else initial.to(terms.x.dtype)
    exact = operands.x.dtype in (torch.float32, torch.float64)  # so that the host's y and ours may be added
    own = points.own_operator or (exact and (edits.needs_own_scan or points.hook_state.has_hooks()))
    y, state = edits.scan(terms, initial) if own else operator.run(operands)
    with torch.autocast(terms.x.device.type, enabled=False):
        if own or exact:
            y, state = _with_edits(points, terms, initial, edits, y, state)
        else:
            clean_run = scan(clean, initial)
            edited_run = edits.scan(terms, initial) if edits.needs_own_scan else clean_run
            edited = _with_edits(points, terms, initial, edits, *edited_run)
            y, state = _with_rounding(edited, clean_run, (y, state))
        return edits.scale_heads(y), state


def _kept_over_padding(terms: Terms, forward: Forward) -> Terms:
    """The terms without steps at the padding on the right, over which a state would decay: it stays that of the last
    token."""
    if forward.continues or not right_padded(forward.mask):
        return terms
    assert forward.mask is not None
    return replace(
        terms, dt=torch.where(rearrange(forward.mask.bool().to(terms.dt.device), "b t -> b t 1"), terms.dt, 0)
    )


def _with_rounding(edited: Result, own: Result, host: Result) -> Result:
    """Edited values in the host's half precision, with as much of the host's rounding error as is left of each value.

    Where an edit changes nothing this is the host's own value, and where it leaves nothing it is zero.
    """

    def rounded(new: Tensor | None, exact: Tensor | None, given: Tensor | None) -> Tensor | None:
        if new is None or exact is None or given is None:
            return None
        left = torch.where(exact == 0, 1.0, (new / exact).abs()).clamp(max=1.0)
        return (new + (given.to(exact) - exact) * left).to(given.dtype)

    y = rounded(edited[0], own[0], host[0])
    assert y is not None
    return y, rounded(edited[1], own[1], host[1])


def _with_edits(
    points: HookPoints, terms: Terms, initial: Tensor | None, edits: LayerEdits, y: Tensor, state: Tensor | None
) -> Result:
    """y and the final state with what hooks and interventions add to those of the recurrence."""
    injected = _injected(points, terms, initial, edits)
    if injected is not None:
        y = y + read(injected.states, terms.C).to(y.dtype)
        state = None if state is None else state + injected.states[:, -1].to(state.dtype)
    if points.hook_attn.requested:
        shift = shift_at(points.hook_attn, lambda: attention(terms))
        if shift is not None:
            y = y + torch.einsum("bhts,bshp->bthp", shift, terms.x).to(y.dtype)
    y = y + edits.edit_attention(terms).to(y.dtype)
    return y - edits.knocked_out(terms, injected).to(y.dtype), state


def _injected(points: HookPoints, terms: Terms, initial: Tensor | None, edits: LayerEdits) -> Injected | None:
    writes = shift_at(points.hook_write, lambda: write(terms)) if points.hook_write.requested else None
    written = None if writes is None else edits.accumulate(terms, writes)

    def all_states() -> Tensor:
        states = edits.states(terms, initial)
        return states if written is None else states + written

    shift = shift_at(points.hook_state, all_states) if points.hook_state.requested else None
    if shift is None:
        return None if written is None else Injected(writes, written, None)
    moved = edits.replace(terms, shift)
    replaced = shift != 0
    return Injected(writes, moved if written is None else written + moved, replaced if replaced.any() else None)


def _initial_state(operator: Operator, forward: Forward) -> Tensor | None:
    """The state before this call, [b h p n]."""
    state = operator.initial_state
    if state is not None or not forward.continues:
        return state
    if not forward.points.own_operator:
        raise HookError(
            f"layer {forward.layer}: several tokens at once on a filled cache, which the Mamba-1 operator of "
            "transformers starts from a zero state; feed one token at a time, or attach with own_operator=True, which "
            "goes on from the cached state"
        )
    cached: Tensor = forward.cache.layers[forward.layer].recurrent_states[0]
    return rearrange(cached.flatten(1, -2), "b h n -> b h 1 n")


def _keeps_to_itself(operator: Operator, points: HookPoints) -> bool:
    """Whether the operator is a fused kernel, D-skip and gate inside, and nobody asked to see what lies between."""
    wanted = points.hook_y.requested or ("hook_z" in points._modules and points.hook_z.requested)
    return not (operator.is_reference or wanted)


def _untouched(operands: Operands, given: Operands) -> bool:
    return all(new is old for new, old in zip(vars(operands).values(), vars(given).values(), strict=True))


def _versions(operands: Operands) -> list[int | None]:
    """How often each operand was changed in place; inference tensors do not count that."""
    return [None if tensor.is_inference() else tensor._version for tensor in vars(operands).values()]
