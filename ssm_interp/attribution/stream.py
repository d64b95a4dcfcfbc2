"""The residual stream around the mixers: what of a mixer's output it takes up, and what its end says of the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from ssm_interp.errors import FeatureError
from ssm_interp.hooks import Attachment
from ssm_interp.hooks.own import in_this_thread
from ssm_interp.hooks.seam.blocks import blocks_of
from ssm_interp.reprs import short_repr


@dataclass
class StreamEnd:
    """The last norm in one forward.

    Attributes:
        entering: what it was given, `[b t m]`.
        leaving: what it gave: a leaf of the graph that leads to the logits, `[b t m]`.
    """

    entering: Tensor
    leaving: Tensor

    __repr__ = short_repr


def last_norm(ssm: Attachment) -> nn.Module:
    """The norm behind the last block, in front of the output head.

    Raises:
        FeatureError: a model without an output head or without such a norm; a norm that does not merely scale its
            input (a LayerNorm subtracts the mean, or adds a bias), so that it cannot be frozen.
    """
    model: Any = ssm.model
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise FeatureError("the model was made under torch.inference_mode, and cannot be differentiated; make it again")
    name, blocks = type(model).__name__, blocks_of(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or blocks is None:
        raise FeatureError(f"{name} has no output head that gives logits; load it as a causal language model")
    inside = next(part for part in model.modules() if any(child is blocks for child in part.children()))
    norms: list[nn.Module] = [
        child for key, child in inside.named_children() if "norm" in key.lower() and child is not blocks
    ]
    if len(norms) != 1:
        raise FeatureError(f"{name} has {len(norms)} norms beside its blocks; direct logit attribution needs the last")
    _check_scales(norms[0])
    return norms[0]


@contextmanager
def graph_from(norm: nn.Module) -> Iterator[list[StreamEnd]]:
    """Run a model inside: what follows the norm, and nothing before it, is tracked by autograd."""
    ends: list[StreamEnd] = []

    def leaf(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # until the block below, in which the model runs, gives it back
        ends.append(StreamEnd(args[0].detach(), output.detach().clone().requires_grad_()))
        return ends[-1].leaving

    with torch.inference_mode(False), torch.no_grad():
        handle = norm.register_forward_hook(in_this_thread(leaf))
        try:
            yield ends
        finally:
            handle.remove()


@torch.no_grad()
def written_share(ssm: Attachment, token: Tensor) -> dict[int, float]:
    """By what each mixer's output is multiplied on its way into the residual stream: 1, or a multiplier of the host.

    Measured: the model reads one token, and in a mixer's block the mixer gives ones, the stream and all else zeros.

    Args:
        ssm: an attached model.
        token: any token, `[1 1]`.

    Raises:
        FeatureError: a block that does more with its mixer's output than to multiply it.

    Cost: a forward over one token, which hooks of yours see too.

    Example:
        >>> written_share(ssm, torch.tensor([[5]]))      # GraniteMoeHybrid: its residual_multiplier  # doctest: +SKIP
    """
    blocks, shares = blocks_of(ssm.model), dict[int, float]()
    assert blocks is not None  # it has mixers
    with ExitStack() as stack:
        for layer, mixer in ssm.mixers.items():
            for silent in _beside(blocks[layer], mixer):
                stack.callback(silent.register_forward_hook(in_this_thread(_put(torch.zeros_like))).remove)
            stack.callback(mixer.register_forward_hook(in_this_thread(_put(torch.ones_like))).remove)
            stack.callback(blocks[layer].register_forward_pre_hook(in_this_thread(_empty), with_kwargs=True).remove)
            stack.callback(blocks[layer].register_forward_hook(in_this_thread(_measure(layer, shares))).remove)
        ssm.model(input_ids=token, use_cache=False)
    return shares


def _empty(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A block's arguments with an empty stream."""
    if args:
        return (torch.zeros_like(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": torch.zeros_like(kwargs["hidden_states"])}


def _measure(layer: int, shares: dict[int, float]) -> Callable[..., None]:
    def measure(_module: nn.Module, _args: Any, output: Any) -> None:
        written = output[0] if isinstance(output, tuple) else output
        if (written != written.flatten()[0]).any():
            raise FeatureError(
                f"the block of layer {layer} does more with its mixer's output than to multiply it, so what it writes "
                "into the residual stream is no fixed share"
            )
        shares[layer] = float(written.flatten()[0])

    return measure


def _beside(module: nn.Module, mixer: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block that stand beside the mixer, at any depth."""
    for child in module.children():
        if child is mixer:
            continue
        if any(part is mixer for part in child.modules()):
            yield from _beside(child, mixer)
        else:
            yield child


def _put(make: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def put(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(make(part) if isinstance(part, Tensor) else part for part in output)
        return make(output)

    return put


def frozen_scale(end: StreamEnd, column: int) -> Float[Tensor, "b m"]:
    """What the last norm multiplied the stream by at one position: `leaving / entering`; 0 where that is 0."""
    entering = end.entering[:, column].to(torch.promote_types(end.entering.dtype, torch.float32))
    leaving = end.leaving[:, column].detach().to(entering)
    return torch.where(entering == 0, 0, leaving / entering)


@torch.no_grad()
def _check_scales(norm: Any) -> None:
    with align_module_device(norm):  # an offloaded one has its weights elsewhere
        unit = torch.zeros(1, 1, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)
        unit[..., 0] = 1
        elsewhere = norm(unit)[..., 1:]
    if (elsewhere != 0).any():
        raise FeatureError(
            f"the last norm, {type(norm).__name__}, does more than scale: it subtracts a mean or adds a bias, so that "
            "freezing its scale does not make it linear. Models of the Mamba families end in an RMS norm"
        )
