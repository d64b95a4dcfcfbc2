"""Whether rows of one step are exact for a model: what cannot be seen is tried, once."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ssm_interp.errors import HookError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.rows.obstacles import obstacles
from ssm_interp.hooks.rows.plan import resolve
from ssm_interp.hooks.rows.steps import each_length, out_of_memory

TRIAL_MEMORY = 2**30  # bytes, far more than a trial takes
TRIAL_ERROR = 1e-3  # of the largest logit: far above rounding, far below what blocks give that rows do not fit
BATCH_ERROR = 1e-5  # of the largest logit, beside rounding, that the other rows of a batch may make

_tried: WeakKeyDictionary[Attachment, tuple[int, str | None]] = WeakKeyDictionary()


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
        if out_of_memory(error):
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
    for row, logits in zip(ids, together, strict=True):
        alone = ssm.model(input_ids=row.expand_as(ids).contiguous(), use_cache=False).logits[0]
        off = max(off, float((logits - alone).float().abs().max()))
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
        for variants_here, rows, logits in each_length(
            ssm, ids, torch.ones_like(ids), plan, TRIAL_MEMORY, lambda: None
        ):
            for variant, of_variant in zip(variants_here, logits.float(), strict=True):
                off = max(off, float((of_variant - full[variant][rows]).abs().max()))
    except Exception as error:  # whatever its blocks raise when they get more rows than the model does
        if out_of_memory(error):
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
