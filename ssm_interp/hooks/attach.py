"""Attach hook points to the SSM mixers of a model that somebody else loaded, and take them off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ssm_interp.hooks.blocks import attention_layers, blocks_of, entering
from ssm_interp.hooks.errors import HookError, InterventionError, UnsupportedModelError
from ssm_interp.hooks.interventions import STREAMS, Intervention, Knockout, as_indices, as_streams
from ssm_interp.hooks.operators import GATED_FAMILY
from ssm_interp.hooks.points import HEAD_AXIS, EditMemory, HookPoint, HookPoints
from ssm_interp.hooks.routing import HookedMixer, hooked_class, operators_of
from ssm_interp.hooks.site import ActiveEdit, active_edits, editing
from ssm_interp.hooks.softmax import knockable
from ssm_interp.scan.terms import FLOATS


@dataclass(frozen=True)
class Run:
    """What `Attachment.run` gives.

    Attributes:
        output: the model's own output.
        reads: the tensors that were read, by (name, layer).

    Example:
        >>> run["attn", 3]           # [b h t s]
        >>> run["attn"]              # {layer: tensor}
    """

    output: Any
    reads: dict[tuple[str, int], Tensor]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} of layer {layer}: {list(read.shape)}" for (name, layer), read in self.reads.items())
        return f"Run(logits {list(self.logits.shape)}; read {shapes or 'nothing'})"

    @property
    def logits(self) -> Tensor:
        """The model's logits, `[b t v]`."""
        logits: Tensor = self.output.logits
        return logits

    def __getitem__(self, key: str | tuple[str, int]) -> Any:
        if isinstance(key, str):
            key = key.removeprefix("hook_")
            found = {layer: tensor for (name, layer), tensor in self.reads.items() if name == key}
            if found:
                return found
        elif (short := (key[0].removeprefix("hook_"), key[1])) in self.reads:
            return self.reads[short]
        raise KeyError(f"{key!r} was not read; read were {sorted(self.reads)}. Name it in run(..., read=[...])")


class Attachment:
    """Hook points in every SSM mixer of a model; made by `attach`. As a context manager it detaches at the end.

    Attributes:
        model: the model.
        layers: model layer index -> the hook points of its SSM mixer.
        mixers: model layer index -> the mixer itself.
        attention: model layer index -> its softmax attention, in hybrids and ordinary transformers. Nothing is put into
            it; a Knockout `through` "attention" acts there.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mixers = {mixer.layer_idx: mixer for mixer in model.modules() if isinstance(mixer, HookedMixer)}
        self.layers = {index: mixer.ssm for index, mixer in self.mixers.items()}
        self.attention = attention_layers(model)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def __repr__(self) -> str:
        kinds: dict[str, Any] = {"SSM": self.layers, "attention": self.attention}
        state = ", ".join(f"{kind} layers {list(layers)}" for kind, layers in kinds.items() if layers)
        return f"Attachment({type(self.model).__name__}, {state or 'detached'})"

    @property
    def streams(self) -> dict[str, tuple[int, ...]]:
        """The layers that carry information between tokens through the SSM, through the convolution before it, and
        through softmax attention."""
        ssm = tuple(sorted(self.layers))
        return {"ssm": ssm, "conv": ssm, "attention": tuple(sorted(self.attention))}

    @property
    def default_stream(self) -> str:
        """What a knockout goes through that does not say: "ssm" in a model with SSM layers, else "attention"."""
        return "ssm" if self.layers else "attention"

    def layers_with(self, through: Any = None) -> tuple[int, ...]:
        """The layers that have one of these streams, ascending; None: the default stream.

        Raises:
            InterventionError: an unknown stream, or one that no layer of this model has.
        """
        self._check_attached()
        streams = as_streams(through) or (self.default_stream,)
        for stream in streams:
            if not self.streams[stream]:
                raise InterventionError(f"{type(self.model).__name__} has no {stream} layers to knock out")
        return tuple(sorted({layer for stream in streams for layer in self.streams[stream]}))

    def places(self, streams: Sequence[str] = STREAMS) -> list[nn.Module]:
        """The modules that interventions act on: the hook points and the convolution of every mixer, and the attention
        modules."""
        convolutions = {layer: mixer.conv1d for layer, mixer in self.mixers.items()}
        found: dict[str, Any] = {"ssm": self.layers, "conv": convolutions, "attention": self.attention}
        return [place for stream in streams for place in found[stream].values()]

    @contextmanager
    def edit(self, *interventions: Intervention) -> Iterator[None]:
        """Put interventions to work inside the `with` block, in this thread, beside those already at work.

        Their order does not matter; see `HookPoints` for what several edits at one layer mean.

        Raises:
            InterventionError: a layer, head or state dimension that the model does not have. Positions are checked in
                the forward, which knows the prompt.

        Example:
            >>> with ssm.edit(Knockout(sources=[2, 3], targets=-1, layers=range(3, 12))):
            ...     logits = model(**inputs).logits
        """
        self._check_attached()
        for intervention in interventions:
            self.check(intervention)
        through = [self._streams(intervention) for intervention in interventions]
        active = tuple(
            ActiveEdit(intervention, frozenset(id(place) for place in self.places(streams)))
            for intervention, streams in zip(interventions, through, strict=True)
        )
        attends = any("attention" in streams for streams in through)
        with self._attention_knockable() if attends else nullcontext(), editing(active):
            yield

    def run(
        self,
        inputs: Any,
        read: Any = (),
        layers: Any = None,
        **options: Any,
    ) -> Run:
        """Call the model once and keep what passes the named hook points.

        Args:
            inputs: `input_ids` `[b t]`, or the mapping (a dict) that a tokenizer returns.
            read: hook points, one or a sequence: conv, x, dt, B, C, write, state, attn, y, z.
            layers: of which layers; None: of all SSM layers.
            options: passed on to the model.

        Returns:
            The output and the tensors, with their gradient graph unless `torch.no_grad()` is on. Zamba's heads,
            computed in several operator calls, are put together.

        Raises:
            HookError: an unknown hook point or layer; inputs that are empty, or neither ids nor a mapping.

        Example:
            >>> ssm.run(inputs, read=["attn", "state"], layers=[3])["attn", 3].shape
        """
        self._check_attached()
        if not isinstance(inputs, Tensor | Mapping):
            raise HookError(f"run takes input_ids or the mapping that a tokenizer returns, got {type(inputs).__name__}")
        given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        for name, tensor in given.items():
            if isinstance(tensor, Tensor) and tensor.numel() == 0:
                raise HookError(f"{name} is empty, {list(tensor.shape)}: a run needs at least one token")
        _check_ids(given)
        caught: dict[tuple[str, int], list[Tensor]] = {}
        with ExitStack() as stack:
            for point, key in self._points([read] if isinstance(read, str) else list(read or ()), layers):
                caught[key] = []
                stack.callback(point.register_forward_hook(_catch(caught[key])).remove)
            output = self.model(**given | options)
        reads = {
            key: found[0] if len(found) == 1 else torch.cat(found, HEAD_AXIS[key[0]]) for key, found in caught.items()
        }
        return Run(output, reads)

    def expose(self, *names: str, layers: Any = None) -> Exposure:
        """Make hook points fire though nothing is hooked to them, for hosts that read modules without hooks (nnsight).

        It holds until `Exposure.close`, or to the end of a `with` block.

        Raises:
            HookError: an unknown hook point or layer.

        Example:
            >>> with ssm.expose("attn", layers=[3]), wrapped.trace(ids):
            ...     attn = wrapped.backbone.layers[3].mixer.ssm.hook_attn.output.save()
        """
        self._check_attached()
        return Exposure([point for point, _ in self._points(names, layers)])

    def detach(self) -> None:
        """Give every mixer back its class and forward, and drop the hook points with all hooks on them.

        Raises:
            HookError: an edit is at work in this thread; leave its `with` block first.
        """
        if any(active_edits(place) for place in self.places()):
            raise HookError("cannot detach inside `with ssm.edit(...)`: leave that block first")
        for mixer in self.mixers.values():
            if isinstance(mixer, HookedMixer):
                _restore(mixer)
        self.mixers, self.layers, self.attention = {}, {}, {}

    @contextmanager
    def _attention_knockable(self) -> Iterator[None]:
        blocks = blocks_of(self.model)
        assert blocks is not None  # it has attention layers
        elsewhere = any(module.layer_idx != layer for layer, module in self.attention.items())  # Zamba's shared blocks
        with knockable(self.model), entering(blocks) if elsewhere else nullcontext():
            yield

    def _points(self, names: Sequence[Any], layers: Any) -> list[tuple[HookPoint, tuple[str, int]]]:
        wanted = as_indices(layers, "layers")
        chosen = list(self.layers) if wanted is None else wanted
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise HookError(f"hook points are named by text (x, dt, ..., attn), got {wrong[0]!r}")
        if missing := [layer for layer in chosen if layer not in self.layers]:
            raise HookError(f"no SSM layer {missing[0]}; the SSM layers of this model are {list(self.layers)}")
        points = [(self.layers[layer].point(name), layer) for name in names for layer in chosen]
        return [(point, (point.name, layer)) for point, layer in points]

    def check(self, intervention: Intervention) -> None:
        """Whether this model has what an intervention names, apart from positions, which only a prompt has.

        Raises:
            InterventionError: something else than an intervention; a stream, layer, head or state dimension that the
                model does not have.
        """
        if not isinstance(intervention, Intervention):
            raise InterventionError(f"edit takes interventions (Knockout, PatchState, ...), got {intervention!r}")
        kind = intervention.kind
        streams = self._streams(intervention)
        known = self.layers_with(streams)
        layers = known if intervention.layers is None else intervention.layers
        if missing := [layer for layer in layers if layer not in known]:
            raise InterventionError(
                f"{kind}: no such layer {missing}; this model has {list(known)} ({', '.join(streams)})"
            )
        if "conv" in streams and intervention.features is not None:
            raise InterventionError(
                f"{kind}: the convolution feeds the dt, B and C of all features together, so a knockout through it "
                'takes no features; leave them out, or give through="ssm"'
            )
        if "ssm" not in streams:
            return  # how many heads attention has is known when it is called
        for points in (self.layers[layer] for layer in layers if layer in self.layers):
            for feature in intervention.features or ():
                head, dimension = feature if isinstance(feature, tuple) else (feature, 0)
                if not (0 <= head < points.heads and 0 <= dimension < points.state_size):
                    raise InterventionError(
                        f"{kind}: layer {points.layer} has no feature {feature}; it has heads 0 to {points.heads - 1} "
                        f"and state dimensions 0 to {points.state_size - 1}"
                    )

    def _streams(self, intervention: Intervention) -> tuple[str, ...]:
        """The streams that an intervention acts on: all but knockouts are about the SSM alone."""
        if not isinstance(intervention, Knockout):
            return ("ssm",)
        return intervention.through or (self.default_stream,)

    @property
    def is_attached(self) -> bool:
        """Whether it can be used: it was not detached."""
        gone = any(self.mixers[index]._modules.get("ssm") is not points for index, points in self.layers.items())
        return bool(self.layers or self.attention) and not gone

    def _check_attached(self) -> None:
        if not self.is_attached:
            raise HookError("this attachment was detached; call attach(model) again")


class Exposure:
    """Hook points that fire until `close`, or to the end of a `with` block."""

    def __init__(self, points: list[HookPoint]) -> None:
        self._points = points
        for point in self._points:
            point.exposures += 1

    def close(self) -> None:
        """Stop asking for these points; those that another exposure asks for go on firing."""
        for point in self._points:
            point.exposures -= 1
        self._points = []

    def __enter__(self) -> Exposure:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attach(model: Any, *, own_operator: bool = False) -> Attachment:
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

    Raises:
        UnsupportedModelError: no SSM layers, or mixers whose operator is not known (too old a version, another class).
        HookError: not a model; already attached; wrapped by nnsight (attach first, then wrap); a mixer's forward was
            replaced.

    Example:
        >>> with attach(model) as ssm:
        ...     attn = ssm.run(inputs, read=["attn"], layers=[3])["attn", 3]
    """
    if not isinstance(model, nn.Module):
        raise HookError(f"attach takes a model, got {type(model).__name__}; si.load gives a model and a tokenizer")
    found = [module for module in model.modules() if isinstance(module, HookedMixer) or operators_of(type(module))]
    _check_model(model, found)
    memory = EditMemory()
    for mixer in found:
        _hook(mixer, own_operator, memory)
    return Attachment(model)


def attached(model: nn.Module) -> Attachment:
    """The attachment of a model that already has hook points: a deepcopy of an attached model, for example.

    Raises:
        HookError: the model has none.

    Example:
        >>> copy = copy.deepcopy(model)              # attached, and independent of the original
        >>> ssm_of_copy = attached(copy)
    """
    found = Attachment(model)
    if not found.layers:
        raise HookError(f"{type(model).__name__} has no hook points; call attach(model)")
    return found


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
    if not mixers and not attention_layers(model):
        unknown = sorted({f"{type(m).__module__}.{type(m).__name__}" for m in model.modules() if hasattr(m, "A_log")})
        if unknown:
            raise UnsupportedModelError(
                f"the mixers of {name} ({', '.join(unknown)}) call no operator that ssm_interp knows; it works with "
                f"the Mamba classes of transformers >= 5.15, this is transformers {transformers.__version__}"
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


def _hook(mixer: Any, own_operator: bool, memory: EditMemory) -> None:
    gated = bool(GATED_FAMILY.intersection(operators_of(type(mixer))))
    A_log: Tensor = mixer.A_log
    heads = A_log.shape[:-1].numel() if gated else A_log.shape[0]
    head_dim = 1 if gated else mixer.head_dim
    state_size = A_log.shape[-1] if gated else mixer.ssm_state_size
    mixer.__class__ = hooked_class(type(mixer))  # type: ignore[arg-type]
    mixer.add_module(
        "ssm",
        HookPoints(mixer.layer_idx, heads, head_dim, state_size, gated, own_operator, memory).train(mixer.training),
    )
    _rebind_old_forward(mixer)


def _restore(mixer: nn.Module) -> None:
    del mixer._modules["ssm"]
    mixer.__class__ = mixer.host_class  # type: ignore[assignment]
    _rebind_old_forward(mixer)


def _rebind_old_forward(mixer: nn.Module) -> None:
    """accelerate's hooks keep the forward that was bound when they were added."""
    if "_old_forward" in mixer.__dict__:
        mixer._old_forward = MethodType(type(mixer).forward, mixer)  # type: ignore[assignment]


def _check_ids(given: Mapping[str, Any]) -> None:
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise HookError(f"input_ids must be integers [b t], got {got}; with a tokenizer give return_tensors='pt'")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim == 2 and mask.shape[0] != ids.shape[0]):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise HookError(f"attention_mask must be a tensor [b t], as input_ids are ({list(ids.shape)}), got {shape}")


def _catch(found: list[Tensor]) -> Callable[[Any, Any, Tensor], None]:
    return lambda _module, _args, tensor: found.append(tensor)
