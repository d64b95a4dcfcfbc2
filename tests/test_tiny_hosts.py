"""The test models are worth testing on: their SSM path matters, and nothing in them is a default."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_hosts import FAMILY, NAMES, PAD, VOCABULARY, build, inputs, padded, tokens_of
from torch import Tensor
from transformers import PreTrainedModel

OPERATOR = {"mamba1": "mamba_selective_scan", "mamba2": "mamba2_chunk_scan"}


def operator_of(model: PreTrainedModel) -> tuple[Any, str]:
    """The module and the name under which the model's mixers call their operator."""
    return sys.modules[type(model).__module__], OPERATOR[FAMILY[model.config.model_type]]


def replace_operator(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, zeroed: Callable[[int], bool]
) -> list[dict[str, Any]]:
    """Let the model's i-th operator call run with B = 0 (so M = 0) where `zeroed(i)`; returns the calls it saw."""
    module, name = operator_of(model)
    native, calls = getattr(module, name), []

    def operator(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any, **options: Any) -> Any:
        calls.append({"x": x, "dt": dt, "A": A, "B": B, **options})
        return native(x, dt, A, B * (not zeroed(len(calls) - 1)), C, *args, **options)

    monkeypatch.setattr(module, name, operator)
    return calls


def moved(after: Tensor, before: Tensor) -> float:
    """The largest change of a logit, in parts of the logits' range."""
    return ((after - before).abs().max() / (before.max() - before.min())).item()


@torch.no_grad()
def test_zeroing_m_moves_the_logits(host, monkeypatch):
    before = host(**inputs()).logits
    calls = replace_operator(monkeypatch, host, zeroed=lambda _: True)
    assert moved(host(**inputs()).logits, before) > 0.1
    assert len(calls) >= 2


@torch.no_grad()
def test_zeroing_m_in_one_call_moves_the_logits(host, monkeypatch):
    with monkeypatch.context() as patched:
        calls = replace_operator(patched, host, zeroed=lambda _: False)
        before = host(**inputs()).logits
    for one in range(len(calls)):
        with monkeypatch.context() as patched:
            replace_operator(patched, host, zeroed=lambda call, one=one: call == one)
            assert moved(host(**inputs()).logits, before) > 0.1


@torch.no_grad()
def test_logits_are_finite_and_not_saturated(host):
    logits = host(**inputs(4, 63)).logits
    assert logits.isfinite().all()
    assert logits.softmax(-1).amax(-1).mean() < 0.5
    assert 0.5 < logits.std() < 5


@torch.no_grad()
def test_steps_and_decays_are_varied(host, monkeypatch):
    calls = replace_operator(monkeypatch, host, zeroed=lambda _: False)
    host(**inputs(4, 63))
    mamba1 = FAMILY[host.config.model_type] == "mamba1"
    for call in calls:
        bias = call["delta_bias"][:, None] if mamba1 else call["dt_bias"]
        dt = torch.nn.functional.softplus(call["dt"] + bias)
        assert 0.05 < dt.quantile(0.5) < 1.5
        assert dt.quantile(0.95) > 3 * dt.quantile(0.05)
        assert call["A"].flatten().unique().numel() == call["A"].numel()
        assert -2 <= call["A"].min() < call["A"].max() <= -0.1
        assert mamba1 or call["B"].shape[2] == 2


def test_no_parameter_keeps_its_default(host):
    fresh = build(host.config.model_type, seed=1).state_dict()
    for name, parameter in host.named_parameters():
        assert parameter.std() > 1e-3, name
        assert not torch.equal(parameter, fresh[name]), name


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(host, side):
    batch = padded([9, 1, 4], side=side)
    logits = host(**batch).logits
    for row in range(3):
        alone = tokens_of(batch, row)
        got = logits[row, batch["attention_mask"][row].bool()]
        assert moved(got, host(**alone).logits[0]) < 1e-5


@torch.no_grad()
def test_generate_goes_on_without_a_stop_token(host):
    ids = host.generate(**padded([7, 3]), max_new_tokens=4, do_sample=False)
    assert ids.shape == (2, 11)


@torch.no_grad()
def test_float64_is_the_same_model(host):
    exact = build(host.config.model_type, dtype=torch.float64)
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float64}
    assert moved(host(**inputs()).logits.double(), exact(**inputs()).logits) < 1e-4


def test_build_is_deterministic_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    first, again, other = build("jamba"), build("jamba"), build("jamba", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in first.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])
    assert not torch.equal(first.state_dict()["lm_head.weight"], other.state_dict()["lm_head.weight"])


def test_build_takes_overrides_and_training():
    model = build("mamba2", training=True, num_hidden_layers=2, n_groups=1)
    assert model.training
    assert (model.config.num_hidden_layers, model.config.n_groups) == (2, 1)
    assert not build("mamba2").training


def test_build_names_what_there_is():
    with pytest.raises(ValueError, match="no tiny host 'gpt2'; there are mamba, falcon_mamba"):
        build("gpt2")


def test_hybrids_have_ssm_and_attention_layers(host):
    assert sum(hasattr(module, "A_log") for module in host.modules()) >= 2
    hybrid = host.config.model_type not in ("mamba", "falcon_mamba", "mamba2")
    assert any("Attention" in type(module).__name__ for module in host.modules()) == hybrid


def test_there_are_ten_families_of_two_kinds():
    assert len(NAMES) == 10
    assert [name for name in NAMES if FAMILY[name] == "mamba1"] == ["mamba", "falcon_mamba", "jamba", "zamba"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_places_the_same_tokens(side):
    batch = padded([5, 2, 1], side=side)
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 1]
    column = -1 if side == "left" else 0
    assert batch["attention_mask"][:, column].tolist() == [1, 1, 1]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    tokens = torch.cat([tokens_of(batch, row)["input_ids"][0] for row in range(3)])
    assert torch.equal(tokens, inputs(1, 8)["input_ids"][0])
    assert tokens.min() > PAD
    assert tokens.max() < VOCABULARY
