"""The decoder blocks of a model: where its layers stand, which of them attend, and which one is running."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ssm_interp.hooks.own import in_this_thread, ours
from ssm_interp.hooks.seam.routing import HookedMixer, host_forward, operators_of

Enter = Callable[[int, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]

_running: ContextVar[tuple[object, int] | None] = ContextVar("ssm_interp_block", default=None)
_entered: list[object] = []  # the blocks of `entering` that are open


def blocks_of(model: nn.Module) -> nn.ModuleList | None:
    """The list of a model's decoder blocks, in which block i is layer i; None if there is no such list."""
    elsewhere = other_inputs(model)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and id(part) not in elsewhere]
    return next((blocks for blocks in lists if _are_blocks(blocks)), None)


def other_inputs(model: nn.Module) -> set[int]:
    """Ids of the modules that belong to a model inside this one that reads no token ids (a vision or audio tower)."""
    ids: set[int] = set()
    for part in model.modules():  # outer models come before those inside them
        if part is not model and isinstance(part, PreTrainedModel):
            inside = {id(module) for module in part.modules()}
            ids = ids - inside if part.main_input_name.endswith(("input_ids", "inputs_embeds")) else ids | inside
    return ids


def repeated_blocks(model: nn.Module) -> tuple[int, int] | None:
    """Two layers that are one and the same block, in a list of blocks that mix tokens; None: each is its own."""
    for blocks in (part for part in model.modules() if isinstance(part, nn.ModuleList)):
        first: dict[int, int] = {}
        for index, block in enumerate(blocks):
            earlier = first.setdefault(id(block), index)
            if earlier != index and any(operators_of(type(part)) or asks_registry(part) for part in block.modules()):
                return earlier, index
    return None


def has_no_weights(model: nn.Module) -> bool:
    """Whether weights are on the device meta, and accelerate does not bring them in for each forward."""
    bare = any(weight.is_meta for weight in model.parameters())
    return bare and not any(hasattr(module, "_hf_hook") for module in model.modules())


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> its softmax attention, for modules that call transformers' attention-function registry."""
    blocks = blocks_of(model) or ()
    by_block = {index: [part for part in block.modules() if is_attention(part)] for index, block in enumerate(blocks)}
    return {index: parts[0] for index, parts in by_block.items() if parts}


def is_attention(module: nn.Module) -> bool:
    """Whether a module is causal self-attention that asks the registry for its attention function."""
    return asks_registry(module) and is_causal(module) and hasattr(module, "layer_idx") and not is_replaced(module)


def asks_registry(module: nn.Module) -> bool:
    """Whether the class of a module asks transformers' registry for its attention function."""
    body = host_forward(type(module))
    return inspect.isfunction(body) and "ALL_ATTENTION_FUNCTIONS" in body.__code__.co_names


def is_causal(module: nn.Module) -> bool:
    """Whether attention is no cross-attention, and reads nothing that comes later, as far as it says."""
    return bool(getattr(module, "is_causal", True)) and not getattr(module, "is_cross_attention", False)


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody put another forward onto the instance (accelerate keeps the one that was there, nnsight calls
    it)."""
    own = module.__dict__
    inner = own.get("_old_forward", own.get("forward"))
    return (
        "__nnsight__" not in own and inner is not None and getattr(inner, "__func__", None) is not type(module).forward
    )


def running_block() -> int | None:
    """The block that is running in this thread, inside `entering`."""
    entered, index = _running.get() or (None, None)
    return index if any(entered is opened for opened in _entered) else None


@contextmanager
def entering(blocks: nn.ModuleList, enter: Enter | None = None) -> Iterator[None]:
    """Inside, `enter(index, args, kwargs)` sees every block before it runs, and may give it other arguments; in
    this thread. Without it, every thread knows its running block."""
    me = object()
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(_hook(me, index, enter), with_kwargs=True).remove)
        before = _running.set(None)
        _entered.append(me)
        try:
            yield
        finally:
            _entered.remove(me)
            _running.reset(before)


def _hook(entered: object, index: int, enter: Enter | None) -> Callable[..., Any]:
    def before_block(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _running.set((entered, index))
        return enter(index, args, kwargs) if enter else None

    return in_this_thread(before_block) if enter else ours(before_block)


def _are_blocks(blocks: nn.ModuleList) -> bool:
    """Whether the mixers in the blocks (or, where there are none, their attention) say that they are these layers."""
    if not len(blocks):
        return False
    parts = [(index, part) for index, block in enumerate(blocks) for part in block.modules()]
    mixers = [(index, part) for index, part in parts if isinstance(part, HookedMixer) or operators_of(type(part))]
    layers = mixers or [(index, part) for index, part in parts if is_attention(part)]
    return bool(layers) and all(part.layer_idx == index for index, part in layers)
