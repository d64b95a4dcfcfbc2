"""Under PEFT: adapters go on working, virtual tokens are refused where positions matter."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from support import edited, logits
from test_softmax import transformer
from test_virtual import ids, refused
from tiny_hosts import build
from torch import nn

import ssm_interp as si

peft = pytest.importorskip("peft", reason="the extra `test` is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|past_key_values).* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]
KNOCKOUT = si.Knockout(sources=[2, 3], targets=-1)
LEARNED: dict[str, Any] = {
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
CASES = [(name, kind) for name in ("mamba2", "llama") for kind in LEARNED]


def model_of(name: str) -> Any:
    return transformer(name) if name in ("llama", "gpt2") else build(name)


@pytest.mark.parametrize("name, kind", CASES)
def test_virtual_tokens_are_refused_whichever_is_attached(name: str, kind: str) -> None:
    model = model_of(name)
    with si.attach(model) as ssm:
        tuned = peft.get_peft_model(model, LEARNED[kind]).eval()
        puts = rf"PeftModelForCausalLM puts 4 virtual tokens in front of every prompt \({kind}\)"
        with ssm.edit(KNOCKOUT):
            with refused(puts):
                tuned(input_ids=ids())
            with refused(puts), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's own: of position ids, and of arguments by their old names
                tuned.generate(input_ids=ids(), max_new_tokens=2, attention_mask=torch.ones_like(ids()))
            model(input_ids=ids())
    with si.attach(tuned) as ssm:
        with refused(puts), ssm.edit(KNOCKOUT):
            pass
        with tuned.disable_adapter():
            found = edited(ssm, {"input_ids": ids()}, KNOCKOUT)
        with refused(puts), ssm.edit(KNOCKOUT):
            pass
    with si.attach(model) as ssm:
        assert torch.equal(edited(ssm, {"input_ids": ids()}, KNOCKOUT), found)


@pytest.mark.parametrize("name", ["bamba", "jamba", "zamba2", "llama", "gpt2"])
def test_lora_goes_on_working(name: str) -> None:
    model = model_of(name)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    if name in ("bamba", "jamba", "zamba2"):
        config.exclude_modules = ["out_proj"]
    tuned = peft.get_peft_model(model, config).eval()
    given = {"input_ids": ids()}
    native = logits(tuned, given)
    with si.attach(tuned) as ssm:
        assert not ssm.unknown
        assert torch.equal(logits(tuned, given), native)
        found = edited(ssm, given, KNOCKOUT)
    assert torch.equal(found[:, :-1], native[:, :-1]) or name == "jamba"  # whose experts round by their batch
    assert not torch.equal(found[:, -1], native[:, -1])


def test_peft_is_not_imported_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it raises
    with si.attach(build("mamba2")) as ssm, ssm.edit(KNOCKOUT):
        ssm.model(input_ids=ids())
    assert isinstance(ssm.model, nn.Module)
