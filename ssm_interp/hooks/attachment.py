"""The hook points of a model: read, edit and expose them, and take them off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ssm_interp.arguments import as_indices, as_list, as_streams
from ssm_interp.errors import HookError, InterventionError
from ssm_interp.hooks.active import ActiveEdit, active_edits, editing, key_of
from ssm_interp.hooks.bylayer import ByLayer
from ssm_interp.hooks.intervention import HasRoles, Intervention
from ssm_interp.hooks.interventions import KINDS, Knockout
from ssm_interp.hooks.own import Watch, asking, watching
from ssm_interp.hooks.points import HookPoint
from ssm_interp.hooks.run import Exposure, Run, layers_in_words
from ssm_interp.hooks.seam.blocks import attention_layers, blocks_of, entering, has_no_weights
from ssm_interp.hooks.seam.callers import keeping_mask
from ssm_interp.hooks.seam.inputs import as_inputs
from ssm_interp.hooks.seam.routing import HookedMixer, class_without_hooks, restore_mixer
from ssm_interp.hooks.seam.softmax import knockable
from ssm_interp.hooks.seam.unknown import Unknown, names_of, unknown_mixers
from ssm_interp.hooks.seam.virtual import refuse_virtual_tokens
from ssm_interp.reprs import describe
from ssm_interp.words import STREAMS


class Attachment:
    """Hook points in every SSM mixer of a model; made by `attach`. As a context manager it detaches at the end.

    Attributes:
        model: the model.
        layers: model layer index -> the hook points of its SSM mixer.
        mixers: model layer index -> the mixer itself.
        attention: model layer index -> its softmax attention, in hybrids and ordinary transformers. Nothing is put into
            it; a Knockout `through` "attention" acts there.
        unknown: model layer index (or a module's name, outside the decoder blocks) -> what else mixes tokens there,
            and is not covered: no intervention acts on it. Empty, unless attached with `allow_unknown`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        mixers = {mixer.layer_idx: mixer for mixer in model.modules() if isinstance(mixer, HookedMixer)}
        self._know(mixers, attention_layers(model), unknown_mixers(model))

    def _know(self, mixers: dict[int, HookedMixer], attention: dict[int, nn.Module], unknown: Unknown) -> None:
        self.mixers = ByLayer.of("SSM", mixers)
        self.layers = ByLayer.of("SSM", {index: mixer.ssm for index, mixer in mixers.items()})
        self.attention = ByLayer.of("attention", attention)
        self.unknown = unknown

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def __repr__(self) -> str:
        kinds: dict[str, Any] = {"SSM": self.layers, "attention": self.attention}
        state = [f"{kind} layers {list(layers)}" for kind, layers in kinds.items() if layers] or ["detached"]
        if self.unknown:
            state.append(f"not covered: {names_of(self.unknown)}")
        if number := sum(self.hooks.values()):
            state.append(f"{number} hook{'s' * (number > 1)} on {self._where(self.hooks)}")
        if exposed := [at for at, point in self._all_points() if point.exposed]:
            state.append(f"exposed: {self._where(exposed)}")
        return f"Attachment({type(self.model).__name__}, {', '.join(state)})"

    def _all_points(self) -> Iterator[tuple[tuple[str, int], HookPoint]]:
        for layer, points in self.layers.items():
            yield from (((point.name, layer), point) for point in points.points())

    def _where(self, points: Iterable[tuple[str, int]]) -> str:
        by_name: dict[str, list[int]] = {}
        for name, layer in points:
            by_name.setdefault(name, []).append(layer)
        every = {name: len(self.layers) > 1 and len(layers) == len(self.layers) for name, layers in by_name.items()}
        return ", ".join(
            f"hook_{name} of {'all layers' if every[name] else layers_in_words(layers)}"
            for name, layers in by_name.items()
        )

    @property
    def hooks(self) -> dict[tuple[str, int], int]:
        """How many hooks are on the points that have some, by (name, layer).

        Example:
            >>> ssm.layers[3].hook_dt.add_hook(lambda dt, hook: dt * 2)
            >>> ssm.hooks
            {('dt', 3): 1}
        """
        return {at: point.hooks for at, point in self._all_points() if point.hooks}

    def reset_hooks(self, including_permanent: bool = False) -> None:
        """Take every hook off every point: those of `add_hook` and PyTorch's own.

        What `expose` asked for goes on firing until its `close`; hooks on other modules of the model stay.

        Args:
            including_permanent: those of `add_hook(..., is_permanent=True)` too.

        Example:
            >>> ssm.reset_hooks()
            >>> ssm.hooks
            {}
        """
        self._check_attached()
        for points in self.layers.values():
            points.reset_hooks(including_permanent)

    @property
    def name(self) -> str:
        """What the model is called in tables and pictures: its config's `name_or_path`, or its class."""
        config = getattr(self.model, "config", None)
        return getattr(config, "name_or_path", "") or type(self.model).__name__

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

    def modules_of(self, streams: Sequence[str] = STREAMS) -> list[nn.Module]:
        """The modules that interventions act on: the hook points of every mixer, that of its convolution's inputs, and
        the attention modules."""
        convolutions = {layer: points.hook_conv for layer, points in self.layers.items()}
        of_stream: dict[str, Any] = {"ssm": self.layers, "conv": convolutions, "attention": self.attention}
        return [module for stream in as_streams(streams) or () for module in of_stream[stream].values()]

    @contextmanager
    def edit(self, *interventions: Intervention, batch: HasRoles | None = None) -> Iterator[None]:
        """Put interventions to work inside the `with` block, beside those already at work: in this thread, in those
        that it starts inside, and in copies of the model made inside.

        Their order does not matter; see `HookPoints` for what several edits at one layer mean.

        Args:
            interventions: what to change.
            batch: the prompts that the model is called with inside, where an intervention names roles.

        Raises:
            InterventionError: a layer, head or state dimension that the model does not have; the name of a feature
                group; a role, and no batch; positions in a model that puts virtual tokens in front of its prompts
                (PEFT's prompt tuning, p-tuning, prefix tuning). Other positions are checked in the forward, which knows
                the prompt.
            PromptError: a role that the batch does not know.

        Example:
            >>> with ssm.edit(Knockout(sources=[2, 3], targets=-1, layers=range(3, 12))):
            ...     logits = model(**inputs).logits
            >>> with ssm.edit(Knockout(sources="subject", targets="last"), batch=batch):          # doctest: +SKIP
            ...     logits = model(**batch).logits
        """
        self._check_attached()
        interventions = tuple(self.resolved(intervention, batch) for intervention in interventions)
        for intervention in interventions:
            if intervention.names_positions:
                refuse_virtual_tokens(self.model, f"{intervention.kind} names positions", InterventionError)
        through = [self._streams(intervention) for intervention in interventions]
        active = tuple(
            ActiveEdit(intervention, {key_of(module) for module in self.modules_of(streams)}, streams)
            for intervention, streams in zip(interventions, through, strict=True)
        )
        attends = any("attention" in streams for streams in through)
        asked = asking(points.asked for points in self.layers.values())
        with asked, self._attention_knockable() if attends else nullcontext(), editing(active):
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
            inputs: `input_ids` `[b t]`, the mapping (a dict) that a tokenizer returns, or a batch of prompts.
            read: hook points, one or a sequence: conv, x, dt, B, C, write, state, attn, y, z.
            layers: of which layers; None: of all SSM layers.
            options: passed on to the model, which must name them; a cache by any of the names that versions of
                transformers have for it.

        Returns:
            The output and the tensors, with their gradient graph unless `torch.no_grad()` is on. Where a mask says that
            rows are padded on the right, their states stay those of the last token over the padding. Other threads may
            use the model meanwhile.

        Raises:
            HookError: an unknown hook point or layer; an input or option that the model does not take; inputs that are
                empty, or neither ids nor a mapping; ids that are no integers `[b t]` of the vocabulary; a mask that is
                not theirs; what is read has other columns than the ids (a model that puts virtual tokens in front).

        Example:
            >>> ssm.run(inputs, read=["attn", "state"], layers=[3])["attn", 3].shape
        """
        self._check_attached()
        if has_no_weights(self.model):
            raise HookError(f"{type(self.model).__name__} cannot be run: its weights are on the device meta")
        given = as_inputs(inputs, self.model, options)
        points = {key: point for point, key in self._points(read, layers)}
        if points:
            refuse_virtual_tokens(self.model, "what is read has a column per position")
        caught: dict[tuple[str, int], list[Tensor]] = {key: [] for key in points}
        with watching(Watch(point, caught[key].append) for key, point in points.items()):
            output = self.model(**given)
        for (name, layer), tensors in caught.items():
            if len(tensors) != 1:
                raise HookError(f"hook_{name} of layer {layer} fired {len(tensors)} times in this call, not once")
        reads = {key: tensors[0] for key, tensors in caught.items()}
        _check_columns_of(reads, given.get("input_ids"))
        return Run(output, reads)

    def expose(self, *names: str, layers: Any = None) -> Exposure:
        """Make hook points fire though nothing is hooked to them, for hosts that read modules without hooks (nnsight).

        It holds until `Exposure.close`, or to the end of a `with` block.

        Raises:
            HookError: no hook point; an unknown one, or an unknown layer.

        Example:
            >>> with ssm.expose("attn", layers=[3]), wrapped.trace(ids):
            ...     attn = wrapped.backbone.layers[3].mixer.ssm.hook_attn.output.save()
        """
        self._check_attached()
        if not names:
            raise HookError('expose takes the names of hook points, as in ssm.expose("attn", "state", layers=[3])')
        return Exposure([point for point, _ in self._points(names, layers)])

    def detach(self) -> None:
        """Give every mixer back its class and forward, and drop the hook points with all hooks on them.

        What was done to a mixer meanwhile (a parametrisation, pruning, an adapter, another dtype or device) stays.

        Raises:
            HookError: an edit is at work in this thread; leave its `with` block first. Somebody made another class of a
                mixer's, which cannot do without the hooked one.
        """
        if any(active_edits(module) for module in self.modules_of()):
            raise HookError("cannot detach inside `with ssm.edit(...)`: leave that block first")
        hooked = [mixer for mixer in self.mixers.values() if isinstance(mixer, HookedMixer)]
        classes = [class_without_hooks(mixer) for mixer in hooked]
        for mixer, without_hooks in zip(hooked, classes, strict=True):
            restore_mixer(mixer, without_hooks)
        self._know({}, {}, {})

    @contextmanager
    def _attention_knockable(self) -> Iterator[None]:
        blocks = blocks_of(self.model)
        assert blocks is not None  # it has attention layers
        elsewhere = any(module.layer_idx != layer for layer, module in self.attention.items())  # Zamba's shared blocks
        with knockable(self.model), keeping_mask(self.model), entering(blocks) if elsewhere else nullcontext():
            yield

    def _points(self, read: Any, layers: Any) -> list[tuple[HookPoint, tuple[str, int]]]:
        wanted = as_indices(layers, "layers")
        chosen = list(self.layers) if wanted is None else wanted
        names = as_list(read)
        if missing := [layer for layer in chosen if layer not in self.layers]:
            raise HookError(f"no SSM layer {missing[0]}; the SSM layers of this model are {list(self.layers)}")
        if names and not chosen:
            there = f"None means all, {list(self.layers)}" if self.layers else "this model has no SSM layers"
            raise HookError(f"hook points {describe(names)} of no layers: {there}")
        points = [(self.layers[layer].point(name), layer) for name in names for layer in chosen]
        return [(point, (point.name, layer)) for point, layer in points]

    def resolved(self, intervention: Intervention, batch: HasRoles | None = None) -> Intervention:
        """An intervention that this model has what it names of, with positions in place of roles.

        Raises:
            InterventionError: as `edit`.
            PromptError: a role that the batch does not know.
        """
        self.check(intervention, whole=True)
        if not intervention.roles:
            return intervention
        if batch is None:
            raise InterventionError(
                f"{intervention!r} names the role {intervention.roles[0]!r}, and only a batch of prompts knows where "
                "that is: ssm.edit(..., batch=batch), where batch = pad([tokenize(prompt, tokenizer), ...])"
            )
        return intervention.resolve(batch)

    def check(self, intervention: Intervention, *, whole: bool = False) -> None:
        """Whether this model has what an intervention names, apart from positions, which only a prompt has.

        Args:
            whole: whether it must name its features itself, not a group of them.

        Raises:
            InterventionError: something else than an intervention; a stream, layer, head or state dimension that the
                model does not have; the name of a feature group, where that is not allowed.
        """
        if not isinstance(intervention, KINDS):
            got = describe(intervention)
            raise InterventionError(f"edit takes interventions (Knockout, PatchState, ...), got {got}")
        kind = intervention.kind
        if whole and isinstance(intervention.features, str):
            raise InterventionError(
                f"{kind}.features names the feature group {intervention.features!r}; give its features, one "
                f"intervention per layer: feature_groups(ssm, [{intervention.features!r}]) has them"
            )
        streams = self._streams(intervention)
        known = self.layers_with(streams)
        layers = known if intervention.layers is None else as_list(intervention.layers)
        if missing := [layer for layer in layers if layer not in known]:
            raise InterventionError(
                f"{kind}: no such layer {describe(missing)}; this model has {list(known)} ({', '.join(streams)})"
            )
        if "conv" in streams and intervention.features is not None:
            raise InterventionError(
                f"{kind}: the convolution feeds the dt, B and C of all features together, so a knockout through it "
                'takes no features; leave them out, or give through="ssm"'
            )
        if "ssm" not in streams:
            return  # how many heads attention has is known when it is called
        for points in (self.layers[layer] for layer in layers if layer in self.layers):
            for feature in intervention.features if isinstance(intervention.features, tuple) else ():
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
        return as_streams(intervention.through) or (self.default_stream,)

    @property
    def is_attached(self) -> bool:
        """Whether it can be used: it was not detached."""
        gone = any(self.mixers[index]._modules.get("ssm") is not points for index, points in self.layers.items())
        return bool(self.layers or self.attention) and not gone

    def _check_attached(self) -> None:
        if not self.is_attached:
            raise HookError("this attachment was detached; call attach(model) again")


def _check_columns_of(reads: dict[tuple[str, int], Tensor], ids: Any) -> None:
    """Whether what was read has a position per column of the ids."""
    if not isinstance(ids, Tensor):
        return
    for (name, layer), read in reads.items():
        if (length := read.shape[2 if name == "attn" else 1]) != ids.shape[1]:
            raise HookError(
                f"layer {layer} read {length} positions of {ids.shape[1]} input_ids, so that {name} has other columns: "
                "the model puts tokens of its own in between; run the part of it that is called with all of them"
            )
