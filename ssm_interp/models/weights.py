"""One number for all of a model's weights, by which two models are known to be the same."""

from __future__ import annotations

from hashlib import sha256

import torch
from accelerate.utils import align_module_device
from torch import nn


def weights_hash(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of a state dict, sorted by name; the same on every device.

    Cost: every weight once through the CPU, one at a time, also those that are offloaded.
    """
    hashed = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        module, _, own = name.rpartition(".")
        if not tensor.is_meta:
            hashed.update(_bytes(tensor))
            continue
        with align_module_device(model.get_submodule(module)):
            hashed.update(_bytes(getattr(model.get_submodule(module), own)))
    return hashed.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
