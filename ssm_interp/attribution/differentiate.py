"""A number made of a model's logits, and its gradient at what each SSM operator gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from accelerate.utils import align_module_device
from jaxtyping import Bool, Float
from torch import Tensor

from ssm_interp.errors import FeatureError, MetricError
from ssm_interp.features.arguments import same_columns, whole_texts
from ssm_interp.hooks import Attachment, HookPoint, Intervention, Knockout, SetDelta
from ssm_interp.hooks.active import active_edits
from ssm_interp.hooks.edits.masks import Columns, as_matrix
from ssm_interp.hooks.own import Watch, own_operators, watching
from ssm_interp.hooks.points import ON_REQUEST
from ssm_interp.hooks.rows.forwards import logits_of_text
from ssm_interp.hooks.rows.metrics import Metric, Positions, as_measured, measure, precise
from ssm_interp.reprs import short_repr
from ssm_interp.scan import Terms

FLAT = ("rank", "accuracy", "kl")
"""Metrics that say nothing to first order: steps, or at their minimum."""

Call = tuple[slice, Terms, Tensor]
"""One operator call of a mixer: which of its heads, the operands, and the gradient at y."""


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of a model, and through which layers it is differentiated.

    Attributes:
        ssm: the attached model.
        inputs: what the model is called with.
        mask: False at padding, `[b t]`.
        metric: from logits to a number per row.
        positions: "last" or "all", the logits that the metric gets.
        layers: SSM layers, ascending.
        edges: layer -> the edges that there are, `[b t s]`: between tokens, and not knocked out by an edit at work.
    """

    ssm: Attachment
    inputs: Mapping[str, Any]
    mask: Bool[Tensor, "b t"]
    metric: Metric
    positions: Positions
    layers: tuple[int, ...]
    edges: Mapping[int, Bool[Tensor, "b t s"]]

    __repr__ = short_repr

    @staticmethod
    def of(
        ssm: Attachment, inputs: Any, metric: str | Metric, positions: Positions, layers: tuple[int, ...]
    ) -> Question:
        """The question, checked.

        Raises:
            FeatureError, MetricError: whatever `edge_attribution` names.
        """
        _check_model(ssm, layers)
        if positions not in get_args(Positions):
            raise FeatureError(f"positions must be one of {list(get_args(Positions))}, got {positions!r}")
        if isinstance(metric, str) and metric in FLAT:
            raise MetricError(
                f"edges have no first-order effect on {metric!r} at the clean run, where its gradient is zero; name "
                "log_probability, probability or logit_difference, or knock edges out: answers(ssm, batch, variants, "
                f"{metric!r})"
            )
        given, mask = whole_texts(ssm, inputs)

        def clean() -> Tensor:
            with torch.no_grad():
                return precise(logits_of_text(ssm, given, mask))

        answer_ids = getattr(inputs, "answer_ids", None)
        measured = as_measured(metric, answer_ids=answer_ids, clean=clean, positions=positions)
        edges = {layer: _edges_of(ssm, layer, mask) for layer in layers}
        return Question(ssm, given, mask, measured.metric, measured.positions, layers, edges)

    @torch.no_grad()
    def value(self, scale: float = 1.0) -> Float[Tensor, " b"]:
        """The metric, with all edges of the layers scaled."""
        with self._captured(scale):
            return measure(self.metric, self.logits())

    def gradients(self, scale: float = 1.0) -> tuple[Float[Tensor, " b"], dict[int, list[Call]]]:
        """The metric with all edges of the layers scaled, and layer -> its operator calls.

        Raises:
            FeatureError: the metric does not depend on the logits, or these not on the layers.
        """
        with self._captured(scale) as captured:
            logits = self.logits()
            value = measure(self.metric, logits)
        ys = [call["y"] for calls in captured.values() for call in calls]
        gradients = torch.autograd.grad(value.sum(), ys, allow_unused=True) if value.requires_grad else [None]
        if all(gradient is None for gradient in gradients):
            raise FeatureError(
                "the model's logits have no gradient with respect to its SSM layers: quantised layers give none; load "
                "the model without quantisation"
                if self._metric_has_gradient(logits)
                else "the metric does not depend on the logits through anything that can be differentiated: compute it "
                "from the tensor that it is given, without .item(), .detach(), argmax or numpy"
            )
        at_y = iter(gradients)
        by_layer = {layer: self._calls(layer, calls, [next(at_y) for _ in calls]) for layer, calls in captured.items()}
        return value.detach(), by_layer

    def _metric_has_gradient(self, logits: Float[Tensor, "b *t v"]) -> bool:
        """Whether the metric depends on such logits by itself."""
        given = logits.detach().requires_grad_()
        value = self.metric(given)
        return value.requires_grad and torch.autograd.grad(value.sum(), given, allow_unused=True)[0] is not None

    def logits(self) -> Float[Tensor, "b *t v"]:
        """The logits that the metric gets, of one forward."""
        return logits_of_text(self.ssm, self.inputs, self.mask, self.positions)

    def _calls(self, layer: int, calls: list[dict[str, Tensor]], gradients: list[Tensor | None]) -> list[Call]:
        decay, operator_calls, first = _decay(self.ssm, layer), [], 0
        for call, gradient in zip(calls, gradients, strict=True):
            x, y = call["x"], call["y"].detach()
            heads = slice(first, first := first + x.shape[2])
            dtype = torch.promote_types(x.dtype, torch.float32)
            operands = (x, call["dt"], decay[heads].to(x.device), call["B"], call["C"])
            terms = Terms(*(tensor.to(dtype) for tensor in operands))
            operator_calls.append((heads, terms, torch.zeros_like(y) if gradient is None else gradient))
        return operator_calls

    @contextmanager
    def _captured(self, scale: float) -> Iterator[dict[int, list[dict[str, Tensor]]]]:
        """Keep the operands and y of every operator call inside the `with`, y scaled and ready for a gradient."""
        captured: dict[int, list[dict[str, Tensor]]] = {layer: [] for layer in self.layers}
        points = {layer: self.ssm.layers[layer] for layer in self.layers}
        watches = [
            Watch(points[layer].point(name), _read(name, calls))
            for layer, calls in captured.items()
            for name in ("x", "dt", "B", "C")
        ]
        watches += [
            Watch(points[layer].hook_y, give=_give_y(calls, scale, cut=layer == self.layers[0]))
            for layer, calls in captured.items()
        ]
        on_cpu = [points[layer] for layer in self.layers if self._device(layer).type == "cpu"]
        with watching(watches), own_operators(on_cpu):
            yield captured
        for layer, calls in captured.items():
            for call in calls:
                same_columns(layer, call["x"].shape[1], self.mask.shape[1])

    def _device(self, layer: int) -> torch.device:
        return next(self.ssm.mixers[layer].parameters()).device


def _read(name: str, calls: list[dict[str, Tensor]]) -> Callable[[Tensor], None]:
    def keep(tensor: Tensor) -> None:
        if name == "x":  # the first to fire of each call
            calls.append({})
        calls[-1][name] = tensor.detach()

    return keep


def _give_y(calls: list[dict[str, Tensor]], scale: float, *, cut: bool) -> Callable[[Tensor], Tensor]:
    """What hook_y is given in y's place; `cut` leaves out what lies below it in the graph."""

    def give(y: Tensor) -> Tensor:
        y = y.detach() if cut else y
        y = y if scale == 1.0 else y * scale
        calls[-1]["y"] = y if y.requires_grad or not torch.is_grad_enabled() else y.requires_grad_()
        return calls[-1]["y"].clone()  # which somebody's hook may change in place

    return give


def _decay(ssm: Attachment, layer: int) -> Float[Tensor, "h #n"]:  # noqa: UP037 - jaxtyping, no comment
    mixer: Any = ssm.mixers[layer]
    with align_module_device(mixer):  # an offloaded layer has its weights elsewhere
        A: Tensor = -mixer.A_log.detach().float().exp()  # in fp32, as every host computes it
    return A.reshape(ssm.layers[layer].heads, -1)


def _check_model(ssm: Attachment, layers: tuple[int, ...]) -> None:
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise FeatureError(f"edge attribution needs gradients, but torch.{mode} is on; call it outside of that block")
    if any(parameter.is_inference() for parameter in ssm.model.parameters()):
        raise FeatureError("the model was made under torch.inference_mode, and cannot be differentiated; make it again")
    if ssm.model.training:
        raise FeatureError(f"{type(ssm.model).__name__} is in training mode, perhaps with dropout; call model.eval()")
    for layer in layers:
        for point in (ssm.layers[layer].point(name) for name in ON_REQUEST):
            if point.has_hooks():
                raise FeatureError(_hooked(layer, point))


def _hooked(layer: int, point: HookPoint) -> str:
    return (
        f"hook_{point.name} of layer {layer} is hooked: what it may add to y is no edge of M x, so edges have no "
        "single worth there; remove the hook, or leave the layer out of `layers`"
    )


def _edges_of(ssm: Attachment, layer: int, mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t s"]:
    """The edges of a layer: between tokens, and not removed by a knockout at work."""
    edges = (mask[:, :, None] & mask[:, None, :]).tril().cpu()
    for edit in (active.intervention for active in active_edits(ssm.layers[layer])):
        if edit.acts_at(layer) and not isinstance(edit, SetDelta):
            edges &= ~_knocked_out(edit, layer, mask.cpu())
    return edges


def _knocked_out(edit: Intervention, layer: int, mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t s"]:
    if not isinstance(edit, Knockout) or edit.features is not None:
        what = "a Knockout of some features" if isinstance(edit, Knockout) else f"a {edit.kind}"
        raise FeatureError(
            f"{what} is at work at layer {layer}: an edge is then worth different things to different features or "
            "states; leave the `with ssm.edit(...)` block, or leave the layer out of `layers`"
        )
    products = Columns(len(mask), mask.shape[1], mask).edges(edit)
    return torch.stack([as_matrix(targets, sources) for targets, sources in products]).any(0)
