"""A version of transformers that is too new to be known is tried on the model at attach."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from support import logits
from test_softmax import transformer
from tiny_hosts import build, inputs
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import ssm_interp as si
from ssm_interp.hooks import newest
from ssm_interp.hooks.rows import site as rowsite
from ssm_interp.hooks.seam.cache import CACHES


@pytest.fixture
def too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs here is newer than all that is known."""
    monkeypatch.setattr(newest, "KNOWN", ("5.1", "5.2"))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    found = newest._answers
    monkeypatch.setattr(newest, "_answers", lambda model: (calls.append(1), found(model))[1])
    return calls


def refused(model: nn.Module, message: str) -> None:
    """At attach, and the model is as it was."""
    training, classes = [part.training for part in model.modules()], [type(part) for part in model.modules()]
    hooks = [len(part._forward_hooks) for part in model.modules()]
    with pytest.raises(si.UnsupportedModelError, match=rf"is newer than 5\.2, .*fails the check.*{message}"):
        si.attach(model)
    assert [type(part) for part in model.modules()] == classes
    assert [part.training for part in model.modules()] == training
    assert [len(part._forward_hooks) for part in model.modules()] == hooks


def without_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes a cache, and does not use it."""

    @wraps(forward)
    def forgetful(self: Any, *args: Any, **options: Any) -> Any:
        return forward(self, *args, **{name: value for name, value in options.items() if name not in CACHES})

    return forgetful


@pytest.mark.usefixtures("too_new")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_passes_and_stays_what_it_was(
    host: PreTrainedModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, calls = host.to(dtype), counted(monkeypatch)
    native = logits(host, inputs())
    host.backbone.layers[0].train() if hasattr(host, "backbone") else host.train()
    training = [part.training for part in host.modules()]
    with si.attach(host) as ssm:
        assert len(calls) >= 4
        assert [
            part.training for part in host.modules() if not isinstance(part, si.HookPoint | si.HookPoints)
        ] == training
        assert not any(point.requested for points in ssm.layers.values() for point in points.points())
        assert torch.equal(logits(host.eval(), inputs()), native)
    assert not any(part._forward_hooks for part in host.modules())


@pytest.mark.usefixtures("too_new")
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_transformers_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    si.attach(transformer(name))
    assert len(calls) >= 2


@pytest.mark.usefixtures("too_new")
@pytest.mark.parametrize("clamp", [{}, {"time_step_limit": (0.5, 0.8)}])
def test_a_model_as_it_is_initialised_passes(clamp: dict[str, Any]) -> None:
    config = build("mamba2", **clamp).config
    si.attach(AutoModelForCausalLM.from_config(config)).detach()
    si.attach(AutoModelForCausalLM.from_config(config).backbone).detach()  # compared by hidden states


def test_known_versions_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    si.attach(build("mamba"))
    assert not calls


def test_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest, "KNOWN", ("6.0", "6.1"))
    with pytest.raises(si.UnsupportedModelError, match=r"transformers >= 6\.0, this is transformers 5\."):
        si.attach(build("mamba"))


@pytest.mark.usefixtures("too_new")
def test_an_operator_that_means_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mamba2_chunk_scan", "mamba2_selective_state_update"):
        right = getattr(modeling_mamba2, name)

        def scaled(*args: Any, right: Any = right, **options: Any) -> Any:
            found = right(*args, **options)
            return (1.5 * found[0], found[1]) if isinstance(found, tuple) else 1.5 * found

        monkeypatch.setattr(modeling_mamba2, name, scaled)
    refused(build("mamba2"), "hooked, with every hook point read, its logits of a prompt are off by")
    refused(build("mamba2", training=True), "are off by")


@pytest.mark.usefixtures("too_new")
@pytest.mark.parametrize("kind", ["Mamba2ForCausalLM", "Mamba2Model", "Mamba2Block"])
def test_a_cache_that_is_passed_and_not_used_is_found_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = getattr(modeling_mamba2, kind)
    monkeypatch.setattr(changed, "forward", without_cache(changed.forward))
    refused(build("mamba2"), "a step on a cache gives other logits than the same tokens at once")


def scan_that_needs_a_skip(right: Callable[..., Any]) -> Callable[..., Any]:
    def scan(*args: Any, **options: Any) -> Any:
        if options.get("D") is None:
            raise TypeError("a scan without D")
        return right(*args, **options)

    return scan


def attention_that_forgets_its_mask(right: Callable[..., Any]) -> Callable[..., Any]:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        causal = torch.full((query.shape[2], key.shape[2]), -1e9).triu(key.shape[2] - query.shape[2] + 1)
        return right(module, query, key, value, causal[None, None], **options)

    return attend


@pytest.mark.usefixtures("too_new")
@pytest.mark.parametrize(
    "name, module, function, sabotage, message",
    [
        (
            "mamba",
            modeling_mamba,
            "mamba_selective_scan",
            scan_that_needs_a_skip,
            "hooked, it raises TypeError: a scan",
        ),
        (
            "mamba2",
            rowsite,
            "read_initial",
            lambda right: lambda terms, state: 1.05 * right(terms, state),
            "rows of variants through Mamba2ForCausalLM are off by",
        ),
        (
            "llama",
            modeling_llama,
            "eager_attention_forward",
            attention_that_forgets_its_mask,
            r"a knockout in layer 0 \(attention\) of all that the last token reads changes nothing there",
        ),
    ],
)
def test_a_host_that_changed_is_found_out(
    name: str, module: Any, function: str, sabotage: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer(name) if name == "llama" else build(name)
    monkeypatch.setattr(module, function, sabotage(getattr(module, function)))
    refused(model, message)


@pytest.mark.usefixtures("too_new")
def test_what_cannot_be_tried_is_said() -> None:
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(build("mamba").config)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 4}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=64, encoder_attention_heads=4, **sizes))
    for model, reason in [
        (outline, "its weights are on the device meta"),
        (bart, "it is an encoder-decoder"),
        (build("mamba").backbone.layers, "ModuleList has no embedding of tokens"),
    ]:
        with pytest.warns(UserWarning, match=f"is newer than 5.2, .* could not be tried: {reason}"):
            si.attach(model)
