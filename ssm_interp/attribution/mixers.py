"""What one forward of a mixer was made of: enough to write its output as a sum, whatever the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import chosen_layers, whole_texts
from ssm_interp.hooks import Attachment, Run, warn_hooked
from ssm_interp.hooks.active import active_edits
from ssm_interp.hooks.own import in_this_thread
from ssm_interp.reprs import short_repr
from ssm_interp.scan import Terms
from ssm_interp.scan.unified import Convolution

OPERANDS = ("x", "dt", "B", "C")


@dataclass(frozen=True, eq=False)
class MixerRecord:
    """One mixer in one forward: `output = weight (gate (M x + D x)) + bias` with `x = Z (Conv inputs)`.

    All tensors are in fp32 at least and carry no gradient. In the Mamba-1 family a head is a channel, and p = 1.

    Attributes:
        layer: index of the layer in the model.
        terms: the operands of the operator; `terms.x` is x.
        y: what left the operator, M x.
        inputs: what the channels of x read of the input projection, before the convolution.
        convolution: its taps `[h p k]` and bias `[h p]`.
        skip: D, `[h 1]`.
        inner: what enters the output projection.
        weight: of the output projection.
        bias: of the output projection; zeros where it has none.
        output: what the mixer gives back, `[b t m]`.
        activation: of the convolution, as the host names it.
    """

    layer: int
    terms: Terms
    y: Float[Tensor, "b t h p"]
    inputs: Float[Tensor, "b t h p"]
    convolution: Convolution
    skip: Float[Tensor, "h 1"]
    inner: Float[Tensor, "b t h p"]
    weight: Float[Tensor, "m h p"]
    bias: Float[Tensor, " m"]
    output: Float[Tensor, "b t m"]
    activation: str

    __repr__ = short_repr

    @cached_property
    def gate(self) -> Float[Tensor, "b t h p"]:
        """What each feature is multiplied by behind the operator: the gate, and where there is one, the norm's scale.

        Measured, `inner / (y + D x)`, so that it is right whatever the host does there; 0 where y + D x is 0.
        """
        whole = self.y + self.skip * self.terms.x
        return torch.where(whole == 0, 0, self.inner / whole)

    @cached_property
    def secant(self) -> Float[Tensor, "b t h p"]:
        """Z of `x = Z c`: sigmoid(c), the slope of the secant of SiLU from 0 to c; 0 where the host blanks x (padding).

        Raises:
            FeatureError: the activation of the convolution is not SiLU.
        """
        if self.activation not in ("silu", "swish"):
            raise FeatureError(
                f"layer {self.layer}: the convolution's activation is {self.activation!r}, whose secant is not known; "
                "the view by input positions needs 'silu'. The view by sources needs none"
            )
        return torch.sigmoid(self.convolution(self.inputs)) * (self.terms.x != 0)


def record_mixers(ssm: Attachment, inputs: Any, *, layers: Any = None) -> dict[int, MixerRecord]:
    """Run the model once and keep what each mixer's output was made of.

    Args:
        ssm: an attached model.
        inputs: ids `[b t]`, the mapping of a tokenizer, or a batch of prompts.
        layers: of which SSM layers, one or a sequence; None: all.

    Returns:
        Layer -> its record.

    Raises:
        FeatureError: a model without SSM layers; an unknown layer; an edit at work in this thread; inputs that are not
            whole texts by ids of the model (a filled cache among them); an output projection that quantises its inputs,
            so that it is no matrix product.

    Warns:
        HookedWarning: hooks are on hook points, so that the record is of the model under them.

    Cost: one forward without gradients, and per layer about ten tensors of the size of x.

    Example:
        >>> record = record_mixers(ssm, inputs)[3]                                         # doctest: +SKIP
        >>> record.gate * (record.y + record.skip * record.terms.x)      # is record.inner   # doctest: +SKIP
    """
    chosen = chosen_layers(ssm, layers)
    given, _ = whole_texts(ssm, inputs)
    return run_recorded(ssm, given, chosen)[1]


@torch.no_grad()
def run_recorded(
    ssm: Attachment, given: Mapping[str, Any], chosen: Sequence[int]
) -> tuple[Run, dict[int, MixerRecord]]:
    """As `record_mixers`, of inputs and layers that are checked, and the run itself."""
    _check_unedited(ssm)
    projections: dict[int, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for layer in chosen:
            module: Any = ssm.mixers[layer]

            def keep(_module: Any, args: Any, output: Tensor, layer: int = layer) -> None:
                projections[layer] = args[0], output

            stack.callback(module.out_proj.register_forward_hook(in_this_thread(keep)).remove)
        run = ssm.run(given, read=("conv", *OPERANDS, "y"), layers=chosen, use_cache=False)
    return run, {layer: _record(ssm, run, layer, *projections[layer]) for layer in chosen}


@torch.no_grad()
def run_terms(ssm: Attachment, given: Mapping[str, Any], chosen: Sequence[int]) -> dict[int, Terms]:
    """Run the model once and keep the operands of some layers' operators, in fp32 at least and without a gradient.

    Raises:
        FeatureError: an edit at work in this thread.

    Warns:
        HookedWarning: hooks are on hook points.
    """
    _check_unedited(ssm)
    run = ssm.run(given, read=OPERANDS, layers=chosen, use_cache=False)
    return {layer: _terms(ssm, run, layer) for layer in chosen}


def _check_unedited(ssm: Attachment) -> None:
    if any(active_edits(module) for module in ssm.modules_of()):
        raise FeatureError(
            "an edit is at work, under which a mixer's output is not M x and what follows it; leave the "
            "`with ssm.edit(...)` block first"
        )
    warn_hooked(ssm, "the forward that is taken apart", stacklevel=4)


def _terms(ssm: Attachment, run: Run, layer: int) -> Terms:
    module: Any = ssm.mixers[layer]
    x, dt, B, C = (run[name, layer].detach() for name in OPERANDS)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with align_module_device(module):  # an offloaded layer has its weights elsewhere
        A = -torch.exp(module.A_log.detach().float())  # as every host computes it
    A = A.reshape(ssm.layers[layer].heads, -1).to(x.device)
    return Terms(*(tensor.to(dtype) for tensor in (x, dt, A, B, C)))


@contextmanager
def precisely(device: torch.device) -> Iterator[None]:
    """Without gradients, and without autocast, which would take the sums of a record's tensors in half precision."""
    known = torch.amp.is_autocast_available(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if known else nullcontext():
        yield


def _record(ssm: Attachment, run: Run, layer: int, inner: Tensor, output: Tensor) -> MixerRecord:
    module: Any = ssm.mixers[layer]
    terms = _terms(ssm, run, layer)
    x, h, p = terms.x, ssm.layers[layer].heads, ssm.layers[layer].head_dim

    def kept(tensor: Tensor, *shape: int) -> Tensor:
        return tensor.detach().to(x).reshape(*shape)

    with ExitStack() as stack:
        for part in (module, module.out_proj, module.conv1d):
            stack.enter_context(align_module_device(part))
        skip = kept(module.D, h, 1)
        matrix, offset = _projection(module.out_proj, layer, inner, output)
        weight, bias = kept(matrix, -1, h, p), kept(offset, -1)
        taps = kept(module.conv1d.weight[: h * p].flip(-1), h, p, -1)
        shift = weight.new_zeros(h, p) if module.conv1d.bias is None else kept(module.conv1d.bias[: h * p], h, p)
    return MixerRecord(
        layer=layer,
        terms=terms,
        y=kept(run["y", layer], *x.shape),
        inputs=kept(run["conv", layer][..., : h * p], *x.shape),
        convolution=Convolution(taps, shift),
        skip=skip,
        inner=kept(inner, *x.shape),
        weight=weight,
        bias=bias,
        output=kept(output, *output.shape),
        activation=str(module.activation),
    )


def _projection(module: nn.Module, layer: int, inner: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The weight `[m d]` and bias `[m]` of an output projection; of one that keeps them in another form (quantised, an
    adapter beside it), what it does to the identity and to nothing.

    Raises:
        FeatureError: what it does is no matrix product, as where it quantises its inputs.
    """
    held = getattr(module, "weight", None)
    if type(module) is nn.Linear and type(held) is nn.Parameter and held.is_floating_point():
        return held, held.new_zeros(len(held)) if module.bias is None else module.bias
    width = inner.shape[-1]
    rows = torch.cat([torch.eye(width, dtype=inner.dtype, device=inner.device), inner.new_zeros(1, width)])
    *columns, bias = module.forward(rows).detach().to(torch.promote_types(output.dtype, torch.float32))
    weight = (torch.stack(columns) - bias).T
    off = float((inner.to(weight) @ weight.T + bias - output).abs().max() / output.abs().max().clamp(min=1e-30))
    if off > max(1e-4, 8 * torch.finfo(output.dtype).eps):
        raise FeatureError(
            f"layer {layer}: the output projection ({type(module).__name__}) is no matrix product: it is {off:.1%} off "
            "the nearest one, as where inputs are quantised. Load the model without quantisation, or with that of the "
            "weights alone"
        )
    return weight, bias
