"""What others do to the mixers of an attached model stays, and does not keep its hook points from going."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import edited, logits, relative_error
from tiny_hosts import build, inputs
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import PreTrainedModel

import ssm_interp as si

CUT = si.Knockout(sources=[0, 1], targets=-1)


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value * 2


def mixers(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "conv1d")]


def double_skip(mixer: Any) -> None:
    parametrize.register_parametrization(mixer, "D", Doubled())


def _seeded(norm: Callable[..., Any], *args: Any) -> None:
    torch.manual_seed(0)
    norm(*args)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "parametrised": double_skip,
    "parametrised twice": lambda mixer: (double_skip(mixer), double_skip(mixer)),
    "weight norm": lambda mixer: weight_norm(mixer.in_proj),
    "spectral norm": lambda mixer: _seeded(spectral_norm, mixer.out_proj),
    "spectral norm of its own": lambda mixer: _seeded(spectral_norm, mixer, "A_log"),
    "pruned": lambda mixer: prune.l1_unstructured(mixer, "A_log", 0.3),
    "another dtype": lambda mixer: mixer.conv1d.double().float(),
}


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_mixer_changed_after_attach(name: str, change: str) -> None:
    changed, model = build(name), build(name)
    for mixer in (mixers(changed)[0], mixers(changed)[-1]):
        CHANGES[change](mixer)
    native, classes = logits(changed.eval(), inputs()), [type(mixer) for mixer in mixers(build(name))]
    ssm = si.attach(model)
    for mixer in (mixers(model)[0], mixers(model)[-1]):
        CHANGES[change](mixer)
    model.eval()
    assert torch.equal(logits(model, inputs()), native)
    with si.attach(changed) as known:
        expected = edited(known, inputs(), CUT)
    assert torch.equal(edited(ssm, inputs(), CUT), expected)
    copied = copy.deepcopy(model)
    ssm.detach()
    for each in (model, changed):
        assert torch.equal(logits(each, inputs()), native)
        assert all(isinstance(mixer, kind) for mixer, kind in zip(mixers(each), classes, strict=True))
        assert not any("Hooked" in base.__name__ for mixer in mixers(each) for base in type(mixer).__mro__)
    with si.attached(copied) as again:
        assert torch.equal(edited(again, inputs(), CUT), expected)
    assert torch.equal(logits(copied, inputs()), native)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_parametrisation_that_is_taken_off_again(before: bool, after: bool) -> None:
    model = build("mamba2")
    kind, native = type(mixers(model)[2]), logits(model, inputs())
    if before:
        double_skip(mixers(model)[2])
    ssm = si.attach(model)
    if not before:
        double_skip(mixers(model)[2])
    assert relative_error(logits(model, inputs()), native) > 1e-3
    if after:
        ssm.detach()
    parametrize.remove_parametrizations(mixers(model)[2], "D", leave_parametrized=False)
    if not after:
        assert ssm.run(inputs(), read="x")["x"].keys() == set(range(4))
        ssm.detach()
    assert type(mixers(model)[2]) is kind
    assert torch.equal(logits(model, inputs()), native)


def test_a_class_that_calls_super_is_refused_before_anything_changes() -> None:
    model = build("mamba2")
    ssm = si.attach(model)
    base: Any = type(mixers(model)[3])

    class Logged(base):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    mixers(model)[3].__class__ = Logged
    with pytest.raises(si.HookError, match="made Logged out of HookedMamba2Mixer, and its forward calls super"):
        ssm.detach()
    assert ssm.is_attached
    assert all(mixer.ssm is ssm.layers[layer] for layer, mixer in enumerate(mixers(model)))
    mixers(model)[3].__class__ = base
    ssm.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_dtype_after_attach(host: PreTrainedModel, dtype: torch.dtype) -> None:
    native = logits(copy.deepcopy(host).to(dtype), inputs())
    with si.attach(host) as ssm:
        host.to(dtype)
        assert torch.equal(logits(host, inputs()), native)
        assert ssm.run(inputs(), read="state").logits.isfinite().all()
        assert relative_error(edited(ssm, inputs(), CUT), native) > 1e-3
    assert torch.equal(logits(host, inputs()), native)
