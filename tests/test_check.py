"""`check` proves a sound attachment, and finds out an unsound one."""

from __future__ import annotations

import pytest
import torch
from support import logits
from test_softmax import transformer
from tiny_hosts import build, inputs
from transformers import PreTrainedModel

import ssm_interp as si
from ssm_interp.hooks import serve
from ssm_interp.hooks.check import check


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
