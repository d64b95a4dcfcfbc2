"""Positions are columns of `input_ids`; where virtual tokens stand in front of them, they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import relative_error
from test_softmax import transformer
from tiny_hosts import build, inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

import ssm_interp as si
from ssm_interp import attribution, circuits, features
from ssm_interp.hooks.rows.trial import obstacle

PUTS = "puts 4 virtual tokens in front of every prompt"
EDITS = [
    si.Knockout(sources=[2, 3], targets=-1),
    si.Knockout(sources=[2, 3]),
    si.Knockout(edges=[(5, 3)]),
    si.Knockout(sources=[2, 3], targets=-1, through="conv"),
    si.PatchState(position=3, state=0.0),
    si.SetDelta(value=0.1, positions=[2]),
    si.ScaleFeatures(factor=0.0, positions=[2]),
    si.EditAttention(edges=[(5, 3)], value=0.0),
]


class Soft(nn.Module):
    """Prompt tuning as somebody writes it who does not use PEFT."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.prompt = nn.Parameter(torch.randn(4, model.config.hidden_size))

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        embedded = self.model.get_input_embeddings()(input_ids)
        soft = self.prompt.expand(len(input_ids), -1, -1)
        return self.model(inputs_embeds=torch.cat([soft, embedded], 1), **options)


class Tuned(Soft):
    """As PEFT's models say what they are."""

    def __init__(self, model: PreTrainedModel, learned: bool = True) -> None:
        super().__init__(model)
        self._adapters_disabled = False
        self.active_peft_config = SimpleNamespace(
            is_prompt_learning=learned, num_virtual_tokens=4, peft_type="P_TUNING"
        )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.forward, self._adapters_disabled = self.model.forward, True
        try:
            yield
        finally:
            del self.forward
            self._adapters_disabled = False


def ids() -> Tensor:
    return inputs(2, 9)["input_ids"]


def refused(message: str) -> Any:
    return pytest.raises(
        si.InterventionError, match=f"names positions, but .*{message}.*not columns of input_ids; call"
    )


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.kind)
def test_positions_under_a_tuned_prompt_are_refused_whichever_is_attached(edit: si.Intervention) -> None:
    model = build("mamba2")
    tuned = Tuned(model)
    with si.attach(tuned) as ssm, refused(f"Tuned {PUTS}"), ssm.edit(edit):
        pass
    with si.attach(model) as ssm, ssm.edit(edit):
        with refused(f"Tuned {PUTS}"):
            tuned(ids())
        with refused("Soft makes 13 positions of 9 input_ids"):
            Soft(model)(input_ids=ids())
        model(ids())
    with si.attach(Soft(model)) as ssm, ssm.edit(edit), refused("Soft makes 13 positions of 9 input_ids"):
        ssm.model(ids())


def test_positions_in_attention_too() -> None:
    model = transformer("llama")
    knockout = si.Knockout(sources=[2, 3], targets=-1)
    with si.attach(model) as ssm, ssm.edit(knockout), refused(PUTS):
        Tuned(model)(ids())
    with si.attach(Soft(model)) as ssm, ssm.edit(knockout), refused("Soft makes 13 positions of 9"):
        ssm.model(ids())


@torch.no_grad()
def test_what_names_no_positions_goes_on() -> None:
    model = build("mamba2")
    tuned = Tuned(model)
    native = tuned(ids()).logits
    everywhere = si.ScaleFeatures(factor=0.0)
    with si.attach(tuned) as ssm:
        assert torch.equal(ssm.run(ids()).logits, native)
        with ssm.edit(everywhere):
            assert relative_error(tuned(ids()).logits, native) > 1e-3
        knockout = si.Knockout(sources=[2, 3], targets=-1)
        with tuned.disable_adapter(), ssm.edit(knockout):
            found = tuned(ids()).logits
        tuned.active_peft_config.is_prompt_learning = False  # LoRA, say
        tuned.prompt = nn.Parameter(tuned.prompt[:0])
        with ssm.edit(knockout):
            assert torch.equal(tuned(ids()).logits, found)
    with si.attach(model) as ssm, ssm.edit(knockout):
        embedded = model.get_input_embeddings()(ids())
        assert torch.equal(model(inputs_embeds=embedded).logits, found)  # columns of what is called with


def test_what_is_read_and_taken_apart_is_refused() -> None:
    tuned = Tuned(build("mamba2")).eval()
    with si.attach(tuned) as ssm:
        with pytest.raises(si.HookError, match=f"what is read has a column per position, but Tuned {PUTS}"):
            ssm.run(ids(), read="attn")
        for verb in (attribution.decompose, attribution.record_mixers):
            with pytest.raises(features.FeatureError, match=PUTS):
                verb(ssm, ids())
        roles = {"first": [0], "rest": list(range(1, 9))}
        metric = si.logit_difference(1, 2)
        with pytest.raises(features.FeatureError, match=PUTS):
            circuits.find_circuit(ssm, ids(), metric=metric, roles=roles, tolerance=0.1)
        assert "is no model of transformers" in str(obstacle(ssm))
    with si.attach(Soft(build("mamba2")).eval()) as ssm:
        with refused("Soft makes 13 positions of 9"):
            circuits.find_circuit(ssm, ids(), metric=metric, roles=roles, tolerance=0.1)
        for found in (lambda: attribution.edge_attribution(ssm, ids(), metric), lambda: features.spectrum(ssm, ids())):
            with pytest.raises(features.FeatureError, match="layer 0 read 13 positions of 9 input_ids"):
                found()
        for name in ("attn", "x", "state"):
            with pytest.raises(
                si.HookError, match=f"read 13 positions of 9 input_ids, so that {name} has other columns"
            ):
                ssm.run(ids(), read=name)
