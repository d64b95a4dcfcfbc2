"""What else in a model mixes tokens: mixers that are neither hooked nor attention that a knockout can act in."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ssm_interp.hooks.seam.blocks import (
    asks_registry,
    attention_layers,
    blocks_of,
    is_causal,
    is_replaced,
    other_inputs,
)
from ssm_interp.hooks.seam.routing import HookedMixer, host_forward, operators_of

Unknown = dict[int | str, tuple[nn.Module, ...]]

SEQUENTIAL = (nn.RNNBase, nn.MultiheadAttention)
CACHE = re.compile(r"cache|past|^inference_params$|^states?$")  # parameters that hold what came before
MIXING = re.compile(r"attention|conv|recurrent|mamba|ssm|delta|hybrid|linear")  # layer types of a config
LIBRARIES = ("torch.", "transformers.", "peft.", "accelerate.", "bitsandbytes.", "torchao.", "nnsight.")
OVER_POSITIONS = {"cumsum", "cumprod", "logcumsumexp", "associative_scan", "roll", "conv1d"}
OVER_POSITIONS |= {"scaled_dot_product_attention"}
LOOP = ({"range"}, {"stack", "cat", "append"})  # what a loop over positions that keeps its results calls


def unknown_mixers(model: nn.Module) -> Unknown:
    """Every module that carries information between tokens and is not covered, by layer.

    The key of one outside the decoder blocks that were recognised is its name. Found are: parameters of a recurrence
    (`A_log`), what takes a cache, convolutions and torch's own recurrent and attention modules inside decoder blocks,
    causal attention of other blocks, attention that does not ask transformers' registry, a class of unknown origin in
    the place of a mixer or with a loop over positions, and layers that the config says mix tokens. Left alone are
    encoders, cross-attention, what else asks the registry without being causal, and towers that read no token ids.
    """
    return _Search(model).unknown()


def names_of(unknown: Unknown) -> str:
    """Layers and classes for a message: `layers 0, 1 (pkg.Mixer)`."""
    layers: dict[str, list[str]] = {}
    for key, modules in unknown.items():
        for module in modules:
            layers.setdefault(f"{type(module).__module__}.{type(module).__qualname__}", []).append(str(key))
    return "; ".join(f"{_listed(list(dict.fromkeys(keys)))} ({name})" for name, keys in layers.items())


def _listed(keys: list[str]) -> str:
    word, most = ("layer", 12) if keys[0].isdecimal() else ("module", 4)
    return f"{word}{'s' if len(keys) > 1 else ''} {', '.join(keys[:most])}{' and more' if len(keys) > most else ''}"


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = list(blocks_of(model) or ())
        self.layers = {id(part): layer for layer, block in enumerate(self.blocks) for part in block.modules()}
        attention = attention_layers(model).values()
        mixers = [part for part in model.modules() if isinstance(part, HookedMixer) or operators_of(type(part))]
        self.covered = {id(module) for module in (*mixers, *attention)}
        self.settled = {id(part) for mixer in mixers for part in mixer.modules()} | self.covered | other_inputs(model)
        self.inside_attention = {id(part) for module in attention for part in module.modules()}
        self.listed = {id(part) for module in model.modules() if isinstance(module, nn.ModuleList) for part in module}

    def unknown(self) -> Unknown:
        unknown: Unknown = {}
        inside: set[int] = set()
        for name, module in self._candidates():
            if id(module) not in inside:
                inside.update(id(part) for part in module.modules())
                key = self._key(name, module)
                unknown[key] = (*unknown.get(key, ()), module)
        unknown |= {layer: (module,) for layer, module in self._in_place_of_mixers() if layer not in unknown}
        return dict(sorted(unknown.items(), key=lambda item: item[0] if isinstance(item[0], int) else len(self.blocks)))

    def _candidates(self) -> Iterator[tuple[str, nn.Module]]:
        """Outer modules come before those inside them."""
        for name, module in self.model.named_modules():
            if id(module) in self.settled:
                continue
            in_block = id(module) in self.layers
            holds = any(id(part) in self.covered for part in module.modules())
            recurs = "A_log" in module._parameters or (in_block and _goes_over_positions(module, holds))
            attends = id(module) not in self.inside_attention and self._attends(module, in_block, holds)
            if recurs or attends:
                yield name, module

    def _attends(self, module: nn.Module, in_block: bool, holds: bool) -> bool:
        """Whether a module is uncovered attention, or takes a cache as a mixer does."""
        if asks_registry(module):
            return in_block if is_replaced(module) else is_causal(module) and hasattr(module, "layer_idx")
        placed = id(module) not in self.listed and (in_block or hasattr(module, "layer_idx"))
        if not placed or holds or "cross" in type(module).__name__.lower():
            return False
        takes_cache = any(CACHE.search(name) for name in _parameters(module))
        return takes_cache and not any(map(asks_registry, module.modules()))

    def _in_place_of_mixers(self) -> Iterator[tuple[int, nn.Module]]:
        """Blocks without anything covered, where the config says that they mix tokens, or where a class of unknown
        origin stands in the place in which other blocks have their mixer."""
        names = [[name for name, part in block.named_modules() if id(part) in self.covered] for block in self.blocks]
        paths = sorted({name for group in names for name in group})
        kinds = _layer_types(self.model, len(self.blocks))
        for layer, block in enumerate(self.blocks):
            if names[layer]:
                continue
            parts = dict(block.named_modules())
            instead = [parts[name] for name in paths if name in parts] or [block]
            foreign = [module for module in instead if _is_foreign(module)]
            if foreign or MIXING.search(kinds.get(layer, "")):
                yield layer, (foreign or instead)[0]

    def _key(self, name: str, module: nn.Module) -> int | str:
        if self.blocks:
            return self.layers.get(id(module), name)
        index = getattr(module, "layer_idx", None)
        return index if isinstance(index, int) else name


def _goes_over_positions(module: nn.Module, holds: bool) -> bool:
    """Whether a module of a decoder block calls one of torch that mixes positions, or (an unknown one) loops over them.

    Args:
        holds: whether something that is covered is part of it, so that its own code is that of a block.
    """
    wide = any(isinstance(part, nn.Conv1d) and part.kernel_size[0] > 1 for part in module.children())
    if wide or any(isinstance(part, SEQUENTIAL) for part in (module, *module.children())):
        return True
    return not holds and _is_foreign(module) and _scans(type(module))


def _is_foreign(module: nn.Module) -> bool:
    return not f"{type(module).__module__}.".startswith(LIBRARIES)


def _scans(kind: type[nn.Module]) -> bool:
    """Whether the code of a class, and the functions of its module that it calls, looks like going over positions."""
    own = [value for base in kind.__mro__ if base.__module__ == kind.__module__ for value in vars(base).values()]
    methods = [function for function in own if inspect.isfunction(function)]
    called = [method.__globals__.get(name) for method in methods for name in method.__code__.co_names]
    helpers = [helper for helper in called if inspect.isfunction(helper) and helper.__module__ == kind.__module__]
    groups = [set(function.__code__.co_names) for function in (*methods, *helpers)]
    return any(names & OVER_POSITIONS or all(names & part for part in LOOP) for names in groups)


def _parameters(module: nn.Module) -> Mapping[str, Any]:
    try:
        return inspect.signature(host_forward(type(module))).parameters
    except (TypeError, ValueError):  # a forward that is not written in Python
        return {}


def _layer_types(model: nn.Module, layers: int) -> dict[int, str]:
    """What the config that has as many layers says each of them is."""
    for module in model.modules():
        kinds = getattr(getattr(module, "config", None), "layer_types", None)
        if isinstance(kinds, list | tuple) and len(kinds) == layers:
            return {layer: str(kind) for layer, kind in enumerate(kinds)}
    return {}
