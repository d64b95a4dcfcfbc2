"""A second device where there is none: it computes on the CPU, and mixes with it no more than an accelerator does.

    with second_device():
        model = put(model)
        model(input_ids=put(ids)).logits       # .device is lazy:0
        put(ids) + ids                          # RuntimeError: tensors on two devices

It shows where tensors are, and nothing else of an accelerator: no kernels of its own, no autocast, no streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")  # a kind of device that autograd takes and nothing implements
aten = torch.ops.aten
MIXING = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
Thing = TypeVar("Thing", Tensor, nn.Module)


class There(Tensor):
    """A tensor on the second device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operator, args, kwargs or {})

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(_without_lists(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_without_lists(key), value)

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_options: Any) -> Any:
        raise TypeError("a tensor of an accelerator is no numpy array; use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self, **_options: Any) -> str:
        return f"There({self.held!r})"


def _without_lists(key: Any) -> Any:
    """Lists as tensors: PyTorch would make those itself, past every mode."""
    if isinstance(key, tuple):
        return tuple(_without_lists(part) for part in key)
    return There(torch.tensor(key)) if isinstance(key, list | range) else key


def computed(operator: Any, args: Any, kwargs: Any) -> Any:
    """An operation on tensors of one device, wherever it is; RuntimeError for tensors on two."""
    _check_one_device(operator, args, kwargs)
    asked = kwargs.get("device")
    held, options = tree_map(lambda leaf: leaf.held if isinstance(leaf, There) else leaf, (args, kwargs))
    found = operator(*held, **(options if asked is None else options | {"device": "cpu"}))
    given = dict(zip(_names(operator), args, strict=False)) | kwargs
    if written := [given[name] for name in _written(operator) if name in given]:
        return written[0] if len(written) == 1 else tuple(written)
    there = _is_there(asked) if asked is not None else any(isinstance(leaf, There) for leaf in tree_leaves(given))
    return tree_map(lambda leaf: There(leaf) if there and isinstance(leaf, Tensor) else leaf, found)


def _check_one_device(operator: Any, args: Any, kwargs: Any) -> None:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if operator in INDEXING:  # positions may be on the CPU, whatever they index
        places = {id(index) for index in args[1] if not isinstance(index, There)}
        tensors = [tensor for tensor in tensors if id(tensor) not in places]
    devices = {tensor.device for tensor in tensors if tensor.ndim or isinstance(tensor, There)}
    if len(devices) > 1 and operator not in MIXING:
        shown = [f"{tensor.device.type} {list(tensor.shape)}" for tensor in tensors]
        raise RuntimeError(f"{operator} got tensors on two devices: {', '.join(shown)}")


def _is_there(device: Any) -> bool:
    return torch.device(device).type == DEVICE.type


@cache
def _names(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


@cache
def _written(operator: Any) -> list[str]:
    """The arguments that an operation in place changes and returns."""
    return [one.name for one in operator._schema.arguments if one.alias_info and one.alias_info.is_write]


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operator, args, kwargs or {})


class _Called(TorchFunctionMode):
    """`torch.tensor(..., device=...)`, which allocates past every dispatch mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if function is torch.tensor and asked is not None and _is_there(asked):
            return There(function(*args, **(kwargs | {"device": "cpu"})))
        return function(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[None]:
    """Lets tensors be made on the second device, and be moved to and from it."""
    autocast, dtype, enabled = torch.autocast, torch.get_autocast_dtype, torch.is_autocast_enabled

    def cast(kind: str, *args: Any, **options: Any) -> Any:
        return autocast("cpu" if kind == DEVICE.type else kind, *args, **options)

    here = {DEVICE.type: "cpu"}
    with (
        mock.patch.object(torch, "autocast", cast),
        mock.patch.object(torch, "get_autocast_dtype", lambda kind: dtype(here.get(kind, kind))),
        mock.patch.object(torch, "is_autocast_enabled", lambda kind="cpu": enabled(here.get(kind, kind))),
        _Called(),
        _Dispatched(),
    ):
        yield


def put(thing: Thing) -> Thing:
    """A tensor on the second device, or a module moved to it in place, its shared weights still shared."""
    if isinstance(thing, Tensor):
        return There(thing.detach().clone())
    moved: dict[int, Any] = {}
    for module in thing.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not isinstance(weight, There):
                made = nn.Parameter(put(weight), requires_grad=weight.requires_grad)
                module._parameters[name] = moved.setdefault(id(weight), made)
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, There):
                module._buffers[name] = put(buffer)
    return thing
