"""A model that mixes tokens in places without hook points is refused, or says what is not covered."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, run
from support import edited, logits
from test_softmax import transformer
from tiny_flow import word_tokenizer
from tiny_hosts import build, inputs
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartForConditionalGeneration,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import ssm_interp as si
from ssm_interp.hooks.check import check
from ssm_interp.hooks.seam.unknown import unknown_mixers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MIXED = ["linear_attention", "full_attention"] * 2
HOSTS: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "qwen3_next": (DELTA | EXPERTS | {"layer_types": MIXED}, [0, 2], "Qwen3NextGatedDeltaNet"),
    "olmo_hybrid": (DELTA | {"layer_types": MIXED, "linear_num_key_heads": 4}, [0, 2], "OlmoHybridGatedDeltaNet"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv", "full_attention"]}, [0, 2], "Lfm2ShortConv"),
    "minimax": ({"layer_types": MIXED}, [0, 2], "MiniMaxLightningAttention"),
    "recurrent_gemma": ({"lru_width": 32}, [0, 1, 3], "RecurrentGemmaRecurrentBlock"),
}


def hybrid(name: str) -> PreTrainedModel:
    """A tiny model some of whose layers mix tokens in a way that we do not know."""
    given = SIZES | HEADS | HOSTS[name][0]
    config = AutoConfig.for_model(name, num_hidden_layers=4, eos_token_id=None, **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


class Subclass(Mamba2Mixer):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        return super().forward(*args, **options) * 2


class Cumulative(nn.Module):
    """A scan of somebody's own: no A_log, no cache, no index."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.5))

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.mix(hidden_states)

    def mix(self, values: Tensor) -> Tensor:
        state, found = torch.zeros_like(values[:, 0]), []
        for position in range(values.shape[1]):
            state = self.decay * state + values[:, position]
            found.append(state)
        return torch.stack(found, 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(32, 32, batch_first=True)

    def forward(self, values: Tensor, **_: Any) -> Tensor:
        return self.rnn(values)[0]


class OwnAttention(LlamaAttention):
    """Attention that does not ask the registry."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        values = self.v_proj(hidden_states).repeat(1, 1, 2)
        return self.o_proj(values.cumsum(1)), None


class Beside(nn.Module):
    """Another mixer beside a known one."""

    def __init__(self, known: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.known, self.other = known, other

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return self.known(hidden_states, **options) + self.other(hidden_states)


def mamba2_with(change: Any) -> PreTrainedModel:
    model = build("mamba2")
    block = model.backbone.layers[1]
    block.mixer = change(block.mixer, model.config)
    return model.eval()


CHANGES = {
    "Subclass": lambda _mixer, config: Subclass(config, 1),
    "Cumulative": lambda _mixer, _config: Cumulative(),
    "GRU": lambda _mixer, _config: nn.GRU(32, 32, batch_first=True),
    "Beside": lambda mixer, _config: Beside(mixer, Cumulative()),
    "BesideRecurrent": lambda mixer, _config: Beside(mixer, Recurrent()),
}


@pytest.mark.parametrize("name", HOSTS)
def test_hybrids_with_other_mixers_are_refused_by_layer_and_class(name: str) -> None:
    model, (_, layers, kind) = hybrid(name), HOSTS[name]
    native = [type(module) for module in model.modules()]
    named = f"layers {', '.join(map(str, layers))} .*{kind}"
    with pytest.raises(si.UnsupportedModelError, match=rf"{named}\), .*call attach\(model, allow_unknown=True\)"):
        si.attach(model)
    assert [type(module) for module in model.modules()] == native
    with si.attach(model, allow_unknown=True) as ssm:
        assert {layer: type(found[0]).__name__ for layer, found in ssm.unknown.items()} == dict.fromkeys(layers, kind)
        assert list(ssm.attention) == [layer for layer in range(4) if layer not in layers]
        assert re.search(f"attention layers .*, not covered: {named}", repr(ssm))
        assert not torch.equal(edited(ssm, inputs(), si.Knockout(sources=1, targets=-1)), logits(model, inputs()))
    assert ssm.unknown == {}


@pytest.mark.parametrize("name", CHANGES)
def test_one_layer_with_a_mixer_of_somebodys_own(name: str) -> None:
    model = mamba2_with(CHANGES[name])
    with pytest.raises(si.UnsupportedModelError, match=r"layer 1 \(.*\), so that a knockout in all layers"):
        si.attach(model)
    ssm = si.attach(model, allow_unknown=True)
    assert list(ssm.layers) == [layer for layer in range(4) if layer != 1 or name.startswith("Beside")]
    assert list(ssm.unknown) == list(si.attached(copy.deepcopy(model)).unknown) == [1]
    assert "not covered: layer 1 (" in repr(ssm)


def test_attention_that_asks_no_registry() -> None:
    model = transformer("llama")
    model.model.layers[1].self_attn = OwnAttention(model.config, 1)
    with pytest.raises(si.UnsupportedModelError, match=r"layer 1 \(test_unknown.OwnAttention\)"):
        si.attach(model)
    model = transformer("llama")
    attention = model.model.layers[2].self_attn
    attention.forward = lambda *args, **options: type(attention).forward(attention, *args, **options)
    with pytest.raises(si.UnsupportedModelError, match=r"layer 2 \(transformers.*LlamaAttention\)"):
        si.attach(model)
    model = transformer("llama")
    model.model.layers[1].self_attn = nn.Identity()  # which mixes nothing
    assert list(si.attach(model).attention) == [0, 2]


def test_several_models_in_one() -> None:
    pair = nn.ModuleDict({"one": transformer("llama"), "other": transformer("qwen2")})
    with pytest.raises(
        si.UnsupportedModelError, match=r"modules other\.model\.layers\.0.*attach to the part of interest, or"
    ):
        si.attach(pair)
    assert list(si.attach(pair, allow_unknown=True).unknown) == [
        f"other.model.layers.{layer}.self_attn" for layer in range(3)
    ]


def test_nothing_is_found_where_all_is_covered(host: PreTrainedModel) -> None:
    assert unknown_mixers(host) == {}
    ssm = si.attach(host)
    assert ssm.unknown == {}
    assert "not covered" not in repr(ssm)


def test_encoders_and_cross_attention_are_left_alone() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    encoder = AutoConfig.for_model("bert", vocab_size=64, **sizes)
    decoder = AutoConfig.for_model("bert", vocab_size=64, is_decoder=True, add_cross_attention=True, **sizes)
    bert = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    assert list(si.attach(bert).attention) == [0, 1]
    bart = AutoConfig.for_model("bart", vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3)
    assert list(si.attach(BartForConditionalGeneration(bart)).attention) == [0, 1, 2]


@pytest.mark.parametrize("name", ["Subclass", "Cumulative"])
def test_check_says_what_is_not_covered_and_what_leaks(name: str) -> None:
    rows = {row.name: row for row in check(mamba2_with(CHANGES[name]))}
    row = rows["nothing else mixes tokens"]
    assert not row.passed
    assert row.value > 1e-3
    assert f"not covered: layer 1 (test_unknown.{name})" in row.detail


class Shifted(nn.Module):
    """Mixes tokens by a slice, which no look at the code tells."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + nn.functional.pad(hidden_states[:, :-1], (0, 0, 1, 0))


def test_check_finds_a_leak_that_no_rule_finds() -> None:
    model = build("mamba2")
    model.backbone.norm_f = nn.Sequential(model.backbone.norm_f, Shifted())
    assert unknown_mixers(model) == {}
    assert [row.name for row in check(model) if not row.passed] == ["nothing else mixes tokens"]


def test_the_command_line_says_so_in_one_line(tmp_path: Path) -> None:
    hybrid("lfm2").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    message = "layers 0, 2 (transformers.models.lfm2.modeling_lfm2.Lfm2ShortConv)"
    refused(run("attention", "a text", "--model", tmp_path), message)
    failed = run("check", tmp_path)
    assert failed.exit_code == 1
    assert "nothing else mixes tokens" in failed.stdout
