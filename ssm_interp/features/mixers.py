"""What one forward of a mixer was made of: enough to write its output as a sum, whatever the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor

from ssm_interp.features.groups import FeatureError
from ssm_interp.hooks import Attachment, InterventionError, Run
from ssm_interp.hooks.interventions import as_indices
from ssm_interp.hooks.site import active_edits
from ssm_interp.scan import Terms
from ssm_interp.scan.unified import Convolution

READ = ("conv", "x", "dt", "B", "C", "y")
CACHES = ("cache_params", "past_key_values")


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
        inputs: ids `[b t]` or the mapping of a tokenizer.
        layers: of which SSM layers, one or a sequence; None: all.

    Returns:
        Layer -> its record.

    Raises:
        FeatureError: a model without SSM layers; an unknown layer; an edit at work in this thread; a filled cache
            among the inputs; an output projection whose weights are not a plain matrix (quantised).

    Cost: one forward without gradients, and per layer about ten tensors of the size of x.

    Example:
        >>> record = record_mixers(ssm, inputs)[3]                                         # doctest: +SKIP
        >>> record.gate * (record.y + record.skip * record.terms.x)      # is record.inner   # doctest: +SKIP
    """
    return run_recorded(ssm, inputs, layers)[1]


@torch.no_grad()
def run_recorded(ssm: Attachment, inputs: Any, layers: Any = None) -> tuple[Run, dict[int, MixerRecord]]:
    """As `record_mixers`, and the run itself."""
    chosen = chosen_layers(ssm, layers)
    if any(active_edits(place) for place in ssm.places()):
        raise FeatureError(
            "an edit is at work, under which a mixer's output is not M x and what follows it; leave the "
            "`with ssm.edit(...)` block first"
        )
    if isinstance(inputs, Mapping) and inputs.get("logits_to_keep") is not None:
        raise FeatureError(
            "the inputs hold logits_to_keep, without which positions are those of the text; leave it out"
        )
    if isinstance(inputs, Mapping) and any(inputs.get(name) is not None for name in CACHES):
        raise FeatureError(
            "the inputs hold a filled cache, whose tokens are not among the sources; give the whole text"
        )
    projections: dict[int, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for layer in chosen:
            module: Any = ssm.mixers[layer]

            def keep(_module: Any, args: Any, output: Tensor, layer: int = layer) -> None:
                projections[layer] = args[0], output

            stack.callback(module.out_proj.register_forward_hook(keep).remove)
        run = ssm.run(inputs, read=READ, layers=chosen, use_cache=False)
    return run, {layer: _record(ssm, run, layer, *projections[layer]) for layer in chosen}


@contextmanager
def precisely(device: torch.device) -> Iterator[None]:
    """Without gradients, and without autocast, which would take the sums of a record's tensors in half precision."""
    known = torch.amp.is_autocast_available(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if known else nullcontext():
        yield


def chosen_layers(ssm: Attachment, layers: Any) -> list[int]:
    """Layers that exist, in the order given; None: all SSM layers.

    Raises:
        FeatureError: a model without SSM layers; no layer, or one that is none of them.
    """
    known = sorted(ssm.layers)
    if not known:
        raise FeatureError(f"{type(ssm.model).__name__} has no SSM layers (or was detached): there is nothing to read")
    try:
        wanted = as_indices(layers, "layers")
    except InterventionError as error:
        raise FeatureError(f"{error}; the SSM layers of this model are {known}") from None
    if wanted is None:
        return known
    if not wanted:
        raise FeatureError(f"layers names no layer; leave it out for all SSM layers, {known}")
    if missing := [layer for layer in wanted if layer not in known]:
        raise FeatureError(f"there is no SSM layer {missing[0]!r}; the SSM layers of this model are {known}")
    return list(dict.fromkeys(wanted))


def columns(targets: Any, length: int, inputs: Any) -> list[int]:
    """Target positions as columns of the input ids, counted from 0.

    Raises:
        FeatureError: none; something else than integers; a position outside the prompt, or in a row's padding.
    """
    try:
        wanted = [index(targets)] if not isinstance(targets, Sequence | range) else [index(t) for t in targets]
    except TypeError:
        raise FeatureError(f"targets are positions, an integer or a sequence of them, got {targets!r}") from None
    if not wanted:
        raise FeatureError("there are no targets; name at least one position, such as -1")
    if outside := [target for target in wanted if not -length <= target < length]:
        raise FeatureError(
            f"there is no position {outside[0]}: the prompt has {length} positions, 0 to {length - 1} (or -{length} "
            "to -1)"
        )
    found = [target % length for target in wanted]
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None:
        return found
    for target in found:
        if len(rows := (mask[:, target] == 0).nonzero()[:, 0].tolist()):
            raise FeatureError(
                f"position {target} is padding in row {rows[0]}; targets are columns of input_ids, the same in each "
                "row, so pad on the left to have the last tokens of all rows in one column"
            )
    return found


def _record(ssm: Attachment, run: Run, layer: int, inner: Tensor, output: Tensor) -> MixerRecord:
    module: Any = ssm.mixers[layer]
    x, dt, B, C, y = (run[name, layer] for name in ("x", "dt", "B", "C", "y"))
    dtype = torch.promote_types(x.dtype, torch.float32)
    h, p = ssm.layers[layer].heads, ssm.layers[layer].head_dim

    def kept(tensor: Tensor, *shape: int) -> Tensor:
        return tensor.detach().to(x.device, dtype).reshape(*shape)

    with ExitStack() as stack:
        for part in (module, module.out_proj, module.conv1d):
            stack.enter_context(align_module_device(part))  # an offloaded layer has its weights elsewhere
        A = kept(-torch.exp(module.A_log.float()), h, -1)  # as every host computes it
        skip = kept(module.D, h, 1)
        projection = module.out_proj
        if not projection.weight.dtype.is_floating_point or projection.weight.shape != (output.shape[-1], h * p):
            raise FeatureError(
                f"layer {layer}: the output projection ({type(projection).__name__}) keeps its weight as "
                f"{projection.weight.dtype} {list(projection.weight.shape)}; a plain matrix [{output.shape[-1]}, "
                f"{h * p}] is needed. Load the model without quantisation"
            )
        weight = kept(projection.weight, -1, h, p)
        bias = weight.new_zeros(len(weight)) if projection.bias is None else kept(projection.bias, -1)
        taps = kept(module.conv1d.weight[: h * p].flip(-1), h, p, -1)
        offset = weight.new_zeros(h, p) if module.conv1d.bias is None else kept(module.conv1d.bias[: h * p], h, p)
    terms = Terms(*(tensor.detach().to(dtype) for tensor in (x, dt, A, B, C)))
    return MixerRecord(
        layer=layer,
        terms=terms,
        y=kept(y, *x.shape),
        inputs=kept(run["conv", layer][..., : h * p], *x.shape),
        convolution=Convolution(taps, offset),
        skip=skip,
        inner=kept(inner, *x.shape),
        weight=weight,
        bias=bias,
        output=kept(output, *output.shape),
        activation=str(module.activation),
    )
