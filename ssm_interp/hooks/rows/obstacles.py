"""What the rows of one step cannot be exact with, as far as it can be seen without trying."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from ssm_interp.errors import HookError
from ssm_interp.hooks.active import active_edits
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.own import OWN
from ssm_interp.hooks.seam.blocks import blocks_of, has_no_weights

CAPTURE = "transformers.utils.output_capturing"


def obstacles(ssm: Attachment) -> Iterator[str]:
    """Each reason why rows of variants cannot stand in for full forwards.

    Raises:
        HookError: no attachment.
    """
    if not isinstance(ssm, Attachment):
        raise HookError(f"the model must be attached, ssm = attach(model); got {type(ssm).__name__}")
    model: Any = ssm.model
    name = type(model).__name__
    if not ssm.is_attached:
        yield "this attachment was detached"
    elif not isinstance(model, PreTrainedModel):
        yield f"{name} is no model of transformers"
    else:
        if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            yield f"{name} has no language-model head, and gives no logits"
        if model.config.return_dict is False:
            yield "the model's config has return_dict=False, and its logits no name"
        if has_no_weights(model):
            yield "the model has no weights: they are on the device meta"
        if model.training:
            yield f"{name} is in training mode"
        if blocks_of(model) is None:
            yield "the model keeps its decoder blocks in no list"
        yield from _others(ssm)


def _others(ssm: Attachment) -> Iterator[str]:
    """What somebody else is doing with the model."""
    if any(active_edits(module) for module in ssm.modules_of()):
        yield "other edits are at work"
    for layer, points in ssm.layers.items():
        for point in points.points():
            if point.requested:
                yield f"hook_{point.name} of layer {layer} is hooked or exposed"
    for name, module in ssm.model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not all(map(_is_harmless, hooks)):
            yield f"{name or 'the model'} has forward hooks, which would see rows of variants"


def _is_harmless(hook: Any) -> bool:
    """Whether a forward hook is ours, or one of those that transformers leaves behind after `output_hidden_states`:
    they give what they see to the forward that asked for it, in its own thread, and else do nothing."""
    return bool(getattr(hook, OWN, False)) or getattr(hook, "__module__", "") == CAPTURE
