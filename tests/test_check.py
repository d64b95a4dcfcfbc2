"""`check` proves a sound attachment, and finds out an unsound one."""

from __future__ import annotations

import pytest
import torch
from random_terms import as_users_run_it
from support import logits
from test_softmax import transformer
from tiny_hosts import build, inputs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
)

import ssm_interp as si
from ssm_interp.hooks.check import check
from ssm_interp.hooks.edits import site as serve


def test_every_family_passes(host: PreTrainedModel) -> None:
    native = logits(host, inputs())
    rows = check(host)
    assert [row.name for row in rows if not row.passed] == []
    assert len(rows) == 10 + 2 * (host.config.model_type not in ("mamba", "falcon_mamba", "mamba2"))
    assert torch.equal(logits(host, inputs()), native)
    si.attach(host).detach()


def test_a_transformer_passes_what_it_has() -> None:
    rows = check(transformer("llama"))
    assert [row.name for row in rows] == [
        "attached, idle == native",
        "a knockout in the attention changes its target",
        "and nothing before it",
        "nothing else mixes tokens",
        "detached == native",
    ]
    assert all(row.passed for row in rows)


def test_a_wrong_matrix_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = serve.attention
    monkeypatch.setattr(serve, "attention", lambda terms: right(terms) * 1.001)
    failed = [row.name for row in check(build("mamba2")) if not row.passed]
    assert failed == ["M x == the operator's y"]


def test_a_knockout_without_effect_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.LayerEdits, "knocked_out", lambda _self, terms, _extra: terms.x.new_zeros(()))
    failed = [row.name for row in check(build("mamba")) if not row.passed]
    assert failed == ["a knockout in the SSM changes its target", "nothing else mixes tokens"]


def test_an_exception_leaves_the_model_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mamba")
    monkeypatch.setattr(serve, "attention", lambda terms: None)
    with pytest.raises(AttributeError):
        check(model)
    monkeypatch.undo()
    si.attach(model).detach()


def test_a_headless_model_and_a_decoder_with_an_encoder_pass() -> None:
    assert all(row.passed for row in check(build("jamba").model))
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "decoder_attention_heads": 4}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=64, encoder_attention_heads=4, **sizes)).eval()
    assert [row.name for row in check(bart) if not row.passed] == []


def test_what_cannot_be_tried_is_refused() -> None:
    model = build("mamba2")
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(model.config)
    classifier = AutoModelForSequenceClassification.from_config(transformer("llama").config)
    for other, message in [
        (outline, "Mamba2ForCausalLM cannot be tried: its weights are on the device meta"),
        (model.backbone.layers, "ModuleList cannot be tried: it has no embedding of tokens"),
        (classifier, r"gives no logits \[b t v\] and no hidden states, but \[1, 2\]; check the causal"),
    ]:
        with pytest.raises(si.HookError, match=message):
            check(other)
    with as_users_run_it(), pytest.raises(si.HookError, match="seed must be a whole number, got 'x'"):
        check(model, seed="x")
    si.attach(model).detach()
    with pytest.raises(si.HookError, match="cannot be run: its weights are on the device meta"):
        si.attach(outline).run(inputs(), read="x")
