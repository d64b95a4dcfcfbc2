"""Attach hook points to the SSM mixers of a model that somebody else loaded."""

from __future__ import annotations

from collections import Counter
from typing import Any

import transformers
from torch import nn

from ssm_interp.errors import HookError, UnsupportedModelError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.newest import Newest, check_version
from ssm_interp.hooks.seam.blocks import attention_layers, repeated_blocks
from ssm_interp.hooks.seam.routing import HookedMixer, hook_mixer, operators_of
from ssm_interp.hooks.seam.unknown import names_of, unknown_mixers
from ssm_interp.reprs import describe
from ssm_interp.scan.terms import FLOATS


def attach(model: Any, *, own_operator: bool = False, allow_unknown: bool = False) -> Attachment:
    """Put hook points into every SSM mixer of a model.

    The model stays what it is: same parameters, same state_dict keys, and as long as nothing is edited and nothing
    exposed it calls its own operator and gives bit-identical logits. Hook points sit in a child module `ssm` of each
    mixer.

    Args:
        model: a transformers model (>= 5.15) of the families mamba, falcon_mamba, jamba, zamba, mamba2, bamba,
            falcon_h1, granitemoehybrid, nemotron_h, zamba2, or a module that contains such mixers; or a transformer
            (GPT-2, Llama, ...), in which a Knockout can act. Attention layers are left as they are: a Knockout goes
            through transformers' registry of attention functions while it is at work.
        own_operator: always run the library's recurrence in place of the host's operator. It keeps float64,
            differentiates fast on CPU, and goes on from a cache with several tokens.
        allow_unknown: attach though other mixers carry information between tokens too (gated delta rules, short
            convolutions, a class of your own, attention outside transformers' registry). They get no hook points, and
            a knockout acts on the covered layers alone, also one that names no layers; `Attachment.unknown` says what
            is left out.

    Raises:
        UnsupportedModelError: no SSM layers, or mixers whose operator is not known (too old a version, another class),
            in all layers, or in some without `allow_unknown`; a version of transformers that is older than 5.15, or
            newer than the newest known and not what it was (on a newer one a few forwards of seven tokens compare the
            hooked model with the native one; a warning says where they cannot be run).
        HookError: not a model; already attached; wrapped by nnsight (attach first, then wrap); a mixer's forward was
            replaced.

    Example:
        >>> with attach(model) as ssm:
        ...     attn = ssm.run(inputs, read=["attn"], layers=[3])["attn", 3]
    """
    if not isinstance(model, nn.Module):
        raise HookError(f"attach takes a model, got {type(model).__name__}; si.load gives a model and a tokenizer")
    for name, value in (("own_operator", own_operator), ("allow_unknown", allow_unknown)):
        if not isinstance(value, bool):
            raise HookError(f"{name} is True or False, got {describe(value)}")
    check_version()
    mixers = [module for module in model.modules() if isinstance(module, HookedMixer) or operators_of(type(module))]
    _check_model(model, mixers)
    if not allow_unknown:
        _check_covered(model)
    newest = Newest(model)
    for mixer in mixers:
        hook_mixer(mixer, own_operator)
    ssm = Attachment(model)
    try:
        newest.check(ssm)
    except BaseException:
        ssm.detach()
        raise
    return ssm


def attached(model: nn.Module) -> Attachment:
    """The attachment of a model that already has hook points: a deepcopy of an attached model, for example.

    Raises:
        HookError: the model has none.

    Example:
        >>> copy = copy.deepcopy(model)              # attached, and independent of the original
        >>> ssm_of_copy = attached(copy)
    """
    ssm = Attachment(model) if isinstance(model, nn.Module) else None
    if ssm is None or not ssm.layers:
        raise HookError(f"{type(model).__name__} has no hook points; call attach(model)")
    return ssm


def _check_model(model: nn.Module, mixers: list[nn.Module]) -> None:
    name = type(model).__name__
    if any(isinstance(mixer, HookedMixer) for mixer in mixers):
        raise HookError(f"{name} is already attached; detach first, or get its attachment with attached(model)")
    twice = [index for index, count in Counter(mixer.layer_idx for mixer in mixers).items() if count > 1]
    if twice:
        raise HookError(
            f"{name} has several SSM mixers of layer {twice[0]}, which edits could not tell apart; attach to each "
            "model alone, and give a copied layer a layer_idx of its own"
        )
    if twin := repeated_blocks(model):
        raise HookError(
            f"{name} uses one block as its layers {twin[0]} and {twin[1]}, which edits could not tell apart; give each "
            "layer a block of its own (copy.deepcopy, with its layer_idx)"
        )
    if not mixers and not attention_layers(model):
        if unknown := unknown_mixers(model):
            raise UnsupportedModelError(
                f"{name} has no SSM layers: its mixers, {names_of(unknown)}, call no operator that ssm_interp knows. "
                "Hooked are the Mamba classes of transformers >= 5.15, this is transformers "
                f"{transformers.__version__}, and attention that is causal and calls transformers' registry"
            )
        raise UnsupportedModelError(
            f"{name} has no SSM layers: none of its modules is a Mamba-1 or Mamba-2 mixer, and it has no attention "
            "layers that are causal and call transformers' registry of attention functions"
        )
    for mixer in mixers:
        where = f"{type(mixer).__name__} of layer {mixer.layer_idx}"
        if "__nnsight__" in mixer.__dict__:
            raise HookError(
                f"{where} is wrapped by nnsight, which would not see the hook points; attach first, then wrap"
            )
        if hasattr(mixer, "ssm"):
            raise HookError(f"{where} already has an attribute `ssm`, where the hook points would go")
        if mixer.A_log.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{where} is in {mixer.A_log.dtype}; supported are {', '.join(map(str, FLOATS))}"
            )
        inner = mixer.__dict__.get("_old_forward", mixer.forward)
        if getattr(inner, "__func__", None) is not type(mixer).forward:
            raise HookError(f"the forward of {where} was replaced on the instance; undo that before attaching")


def _check_covered(model: nn.Module) -> None:
    if unknown := unknown_mixers(model):
        outside = "attach to the part of interest, or " if any(isinstance(key, str) for key in unknown) else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} mixes tokens in places that ssm_interp cannot hook, {names_of(unknown)}, so that "
            f"a knockout in all layers would leave paths open; {outside}call attach(model, allow_unknown=True) to act "
            "on the other layers alone"
        )
