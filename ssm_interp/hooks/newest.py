"""Versions of transformers: which are known, and how a newer one is tried on the model itself before it is trusted.

What is tried is what a release can break without a word: logits of a prompt and of a step on its cache, hooked in every
way against native, and rows of variants against full forwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssm_interp.errors import HookError, UnsupportedModelError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.own import Watch, in_this_thread, own_operators, watching
from ssm_interp.hooks.rows.obstacles import obstacles
from ssm_interp.hooks.rows.trial import depends_on_batch, obstacle, precision
from ssm_interp.hooks.seam.blocks import has_no_weights
from ssm_interp.hooks.seam.cache import cache_in, cache_parameter

KNOWN = ("5.15", "5.24")  # the oldest and the newest version of transformers that the tests run on

LENGTH = 7
TOLERANCE = 2e-4  # of the largest logit, in fp32 on a CPU; kernels of other devices may multiply in less
ELSEWHERE = 2e-3
NO_LIMIT = 1e-2  # a step, far below those of trained models
ON_CACHE = 2e-2  # hosts clamp a step differently in a prompt and on a cache, and round differently


@dataclass(frozen=True)
class Answers:
    """What a model gives for some tokens: all at once, all but the last, and the last on the cache of those."""

    whole: Tensor
    prompt: Tensor
    step: Tensor


def check_version() -> None:
    """Refuse a version of transformers that is older than the oldest known.

    Raises:
        UnsupportedModelError: it is.
    """
    if _release(transformers.__version__) < _release(KNOWN[0]):
        raise UnsupportedModelError(
            f"ssm_interp works with the models of transformers >= {KNOWN[0]}, this is transformers "
            f"{transformers.__version__}; pip install 'transformers>={KNOWN[0]}'"
        )


class Newest:
    """The check of a model under a version of transformers that is newer than the newest known; it is made before the
    hooks are in.

    Where the model cannot be run as it is, a warning says so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._native: Answers | None = None
        self._reason: str | None = None
        if _release(transformers.__version__) > _release(KNOWN[1]):
            self._reason = _unfit(model)
            if self._reason is None:
                self._run_native()
            if self._reason is not None:
                warnings.warn(
                    f"transformers {transformers.__version__} is newer than {KNOWN[1]}, the newest that ssm_interp "
                    f"knows, and whether its hooks are right here could not be tried: {self._reason}",
                    stacklevel=4,
                )

    def _run_native(self) -> None:
        try:
            with _in_eval(self.model):
                self._native = _answers(self.model)
        except Exception as error:  # whatever a model raises that needs more than token ids
            self._reason = (
                f"{type(self.model).__name__} does not run on token ids alone ({type(error).__name__}: {error})"
            )

    def check(self, ssm: Attachment) -> None:
        """Compare an attached model with what it was.

        Raises:
            UnsupportedModelError: they differ.
        """
        if self._native is None:
            return
        try:
            with _in_eval(self.model), closing(_failures(ssm, self._native)) as failures:
                failure = next(failures, None)
        except Exception as error:  # whatever a changed host makes of our hooks
            failure = f"hooked, it raises {type(error).__name__}: {error}"
        if failure is not None:
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} is newer than {KNOWN[1]}, the newest that ssm_interp knows, "
                f"and {type(self.model).__name__} fails the check that this asks for: {failure}. Use transformers "
                f"{KNOWN[0]} to {KNOWN[1]}, or a newer ssm_interp"
            )


def _release(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


def _unfit(model: nn.Module) -> str | None:
    """Why a model cannot be run, as far as it can be seen."""
    if has_no_weights(model):
        return "its weights are on the device meta"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose step on a cache takes more than token ids"
    if _vocabulary(model) is None:
        return f"{type(model).__name__} has no embedding of tokens"
    return None


def _vocabulary(model: Any) -> int | None:
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _answers(model: Any) -> Answers:
    """What a model gives for seven tokens.

    Raises:
        TypeError: it gives no logits and no hidden states, or no cache.
    """
    ids = _tokens(model)
    whole, _ = _call(model, ids, 0)
    prompt, cache = _call(model, ids[:, :-1], 0)
    step, _ = _call(model, ids[:, -1:], LENGTH - 1, cache)
    return Answers(whole, prompt, step)


def _tokens(model: nn.Module) -> Tensor:
    device = next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
    return torch.arange(1, LENGTH + 1, device=device)[None].remainder(_vocabulary(model) or 1)


def _call(model: Any, ids: Tensor, start: int, cache: Any = None) -> tuple[Tensor, Any]:
    takes = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model).forward
    name = cache_parameter(takes)
    if name is None:
        raise TypeError("its forward takes no cache")
    options: dict[str, Any] = {"use_cache": True} | ({} if cache is None else {name: cache})
    if "position_ids" in signature(takes).parameters:
        options["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    output = model(input_ids=ids, **options)
    values = getattr(output, "logits", None)
    values = getattr(output, "last_hidden_state", None) if values is None else values
    if not isinstance(values, Tensor):
        raise TypeError(f"it gives a {type(output).__name__} without logits or hidden states")
    if (given := cache_in(output)) is None:
        raise TypeError("it gives no cache back, though called with use_cache=True")
    return values, given


def _failures(ssm: Attachment, native: Answers) -> Generator[str]:
    """What is not as it must be."""
    clamped = any(_has_limits(mixer) for mixer in ssm.mixers.values())
    if not clamped and not (off := _off(native.step, native.whole[:, -1:])) <= max(ON_CACHE, _tolerance(ssm, native)):
        yield f"a step on a cache gives other logits than the same tokens at once ({off:.0e} of the largest)"
    fired: set[tuple[int, str]] = set()
    points = [(layer, point) for layer, hook_points in ssm.layers.items() for point in hook_points.points()]
    watches = [Watch(point, lambda _, key=(layer, point.name): fired.add(key)) for layer, point in points]  # type: ignore[misc]
    ways: dict[str, AbstractContextManager[Any]] = {"idle": nullcontext()}
    if ssm.layers:
        ways["with every hook point read"] = watching(watches)
        ways["with the library's own recurrence"] = own_operators(ssm.layers.values())
    for way, context in ways.items():
        with context:
            yield from _differences(ssm, native, f"hooked, {way}")
    if silent := [key for layer, point in points if (key := (layer, point.name)) not in fired]:
        yield f"hook_{silent[0][1]} of layer {silent[0][0]} never fired"
    if ssm.layers:
        yield from _knocked_out(ssm, native, ("ssm", "conv"))
    if ssm.attention:
        with suppress(HookError):  # a knockout there is refused aloud: an implementation that takes no mask, say
            yield from _knocked_out(ssm, native, ("attention",))
    seen = any(obstacles(ssm))  # without an output head, say, there are no rows that could be wrong
    if ssm.layers and not seen and (reason := obstacle(ssm)) and not depends_on_batch(ssm):
        yield reason


def _differences(ssm: Attachment, native: Answers, way: str) -> Iterator[str]:
    answers = _answers(ssm.model)
    for part, where in (("whole", "a prompt"), ("prompt", "a prompt"), ("step", "a step on its cache")):
        off = _off(getattr(answers, part), getattr(native, part))
        if not off <= _tolerance(ssm, native):
            yield f"{way}, its logits of {where} are off by {off:.0e} of the largest"


def _knocked_out(ssm: Attachment, native: Answers, streams: tuple[str, ...]) -> Iterator[str]:
    """With nothing knocked out all is as it was; with all that the last token reads, that changes, and none before."""
    with ssm.edit(Knockout(sources=[[]], through=streams)):
        yield from _differences(ssm, native, f"under a knockout of nothing in its {streams[0]} layers")
    layers = ssm.layers_with(streams[0])
    outputs: list[Tensor] = []
    module = ssm.mixers[layers[0]] if streams[0] == "ssm" else ssm.attention[layers[0]]
    handle = module.register_forward_hook(
        in_this_thread(lambda _module, _args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    )
    try:
        prompt = _tokens(ssm.model)[:, :-1]
        _call(ssm.model, prompt, 0)
        with ssm.edit(Knockout(sources=range(LENGTH - 2), targets=LENGTH - 2, through=streams)):
            logits, _ = _call(ssm.model, prompt, 0)
    finally:
        handle.remove()
    if torch.equal(outputs[0][:, -1], outputs[1][:, -1]):
        yield f"a knockout in layer {layers[0]} ({streams[0]}) of all that the last token reads changes nothing there"
    if not (off := _off(logits[:, :-1], native.prompt[:, :-1])) <= _tolerance(ssm, native):
        yield f"a knockout in its {streams[0]} layers changes logits before its target, by {off:.0e} of the largest"


def _has_limits(mixer: Any) -> bool:
    """Whether a host clamps its steps by so much that it shows (in a prompt, but some hosts not on a cache)."""
    low, high = getattr(mixer, "time_step_limit", None) or (0.0, float("inf"))
    return bool(max(low, getattr(mixer, "time_step_min", None) or 0.0) > NO_LIMIT or high < float("inf"))


def _tolerance(ssm: Attachment, native: Answers) -> float:
    exact = TOLERANCE if native.whole.device.type == "cpu" else ELSEWHERE
    return max(exact, 8 * precision(ssm, native.whole))


def _off(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max().float() / expected.abs().max().float())
