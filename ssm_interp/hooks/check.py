"""Prove, on a tiny input, that a hooked model is the model, and that its hooks do what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssm_interp.arguments import as_index
from ssm_interp.errors import HookError
from ssm_interp.hooks.attach import attach
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.seam.blocks import has_no_weights
from ssm_interp.hooks.seam.unknown import names_of
from ssm_interp.reprs import describe

LENGTH = 7
TOLERANCE = 1e-5
LEAK = 1e-4  # edges are taken out by differences, which leave rounding behind


@dataclass(frozen=True)
class Row:
    """One thing that was checked: the measured value, whether it is as it must be, and what it says."""

    name: str
    value: float
    passed: bool
    detail: str


@torch.no_grad()
def check(model: nn.Module, *, seed: int = 0) -> list[Row]:
    """Attach to a model, try it on a tiny random input, detach; the model is left as it was.

    Checked are: logits attached and idle (bit-identical), and with every hook point exposed, against the native ones;
    M x against the operator's y, and y with D-skip and gate against what the host goes on with (through the logits);
    that every hook point of every layer fires; that a knockout in all layers, in the SSM, in the convolution before it
    and in the attention, changes the target and nothing before it; that nothing else mixes tokens (with all edges of a
    token knocked out, the token does not matter to those after it); that detaching restores the logits.

    Args:
        model: as `attach` takes it, not attached.
        seed: of the random tokens.

    Raises:
        HookError: as `attach`; a model that gives nothing for token ids alone that could be compared.

    Example:
        >>> all(row.passed for row in check(model))
        True
    """
    if not isinstance(model, nn.Module):
        raise HookError(f"check takes a model, got {type(model).__name__}; si.load gives a model and a tokenizer")
    if as_index(seed) is None:
        raise HookError(f"seed must be a whole number, got {describe(seed)}")
    ids = _some_ids(model, seed)
    native = _logits(model, ids)
    with attach(model, allow_unknown=True) as ssm:
        rows = list(_attached(ssm, ids, native))
    rows.append(_exact("detached == native", _logits(model, ids), native))
    return rows


def _some_ids(model: Any, seed: int) -> Tensor:
    name = type(model).__name__
    if has_no_weights(model):
        raise HookError(f"{name} cannot be tried: its weights are on the device meta")
    try:
        vocabulary = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        raise HookError(f"{name} cannot be tried: it has no embedding of tokens; check the model around it") from None
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, LENGTH), generator=generator).to(next(model.parameters()).device)


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Logits, or without an output head the last hidden states, `[b t v]`; a decoder's, where there is an encoder."""
    given = {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        given = {"input_ids": torch.ones_like(ids), "decoder_input_ids": ids}
    output = model(**given)
    logits = getattr(output, "logits", None)
    logits = getattr(output, "last_hidden_state", None) if logits is None else logits
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise HookError(
            f"{type(model).__name__} cannot be tried: it gives no logits [b t v] and no hidden states, but {got}; "
            "check the causal language model that it is made of"
        )
    return logits


def _attached(ssm: Attachment, ids: Tensor, native: Tensor) -> Iterator[Row]:
    yield _exact("attached, idle == native", _logits(ssm.model, ids), native)
    if ssm.layers:
        yield from _hook_points(ssm, ids, native)
    for stream, layers in ssm.streams.items():
        if layers:
            yield from _knockout(ssm, ids, native, stream)
    yield _coverage(ssm, ids)


def _hook_points(ssm: Attachment, ids: Tensor, native: Tensor) -> Iterator[Row]:
    fired: set[tuple[int, str]] = set()
    handles = [
        point.register_forward_hook(lambda _module, _args, _out, key=(layer, point.name): fired.add(key))
        for layer, points in ssm.layers.items()
        for point in points.points()
    ]
    try:
        exposed = _logits(ssm.model, ids)
    finally:
        for handle in handles:
            handle.remove()
    yield _close("every hook point exposed == native", exposed, native)
    total = sum(len(list(points.points())) for points in ssm.layers.values())
    yield Row(
        "hook points that fired", float(len(fired)), len(fired) == total, f"of {total} in {len(ssm.layers)} SSM layers"
    )
    worst, where = 0.0, None
    for layer in ssm.layers:
        run = ssm.run(ids, read=["x", "attn", "y"], layers=layer)
        product = torch.einsum("bhts,bshp->bthp", run["attn", layer], run["x", layer].to(run["attn", layer].dtype))
        error = _relative(product, run["y", layer])
        worst, where = max((worst, where or layer), (error, layer))
    yield Row("M x == the operator's y", worst, worst <= TOLERANCE, f"worst relative error, in layer {where}")


def _knockout(ssm: Attachment, ids: Tensor, native: Tensor, stream: str) -> Iterator[Row]:
    with ssm.edit(Knockout(sources=[-3, -2], targets=-1, through=stream)):
        edited = _logits(ssm.model, ids)
    moved = _relative(edited[:, -1], native[:, -1])
    name = {"ssm": "SSM", "conv": "convolution", "attention": "attention"}[stream]
    yield Row(f"a knockout in the {name} changes its target", moved, moved > 0, "relative change of its logits")
    before = _relative(edited[:, :-1], native[:, :-1])
    yield Row("and nothing before it", before, before <= TOLERANCE, "relative change of the logits before")


def _coverage(ssm: Attachment, ids: Tensor) -> Row:
    streams = [stream for stream, layers in ssm.streams.items() if layers]
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % (ids.max() + 1)
    logits = []
    for tokens in (ids, other):
        with ssm.edit(Knockout(sources=0, targets=range(1, LENGTH), through=streams)):
            logits.append(_logits(ssm.model, tokens)[:, 1:])
    leaked = _relative(logits[1], logits[0])
    missing = f"not covered: {names_of(ssm.unknown)}" if ssm.unknown else f"at most {LEAK:g}"
    detail = f"relative change of the logits behind a token without edges, when it changes; {missing}"
    return Row("nothing else mixes tokens", leaked, leaked <= LEAK and not ssm.unknown, detail)


def _exact(name: str, actual: Tensor, expected: Tensor) -> Row:
    return Row(
        name, _relative(actual, expected), torch.equal(actual, expected), "relative error of the logits; must be 0"
    )


def _close(name: str, actual: Tensor, expected: Tensor) -> Row:
    error = _relative(actual, expected)
    return Row(name, error, error <= TOLERANCE, f"relative error of the logits; at most {TOLERANCE:g}")


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
