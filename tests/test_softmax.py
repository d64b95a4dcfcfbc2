"""Knockouts in softmax attention, against masks that are given to single layers by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from test_rows import LENGTH, ROLES, answers, error, forwards, windows
from tiny_hosts import build, inputs
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import ssm_interp as si

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt_neox": {},
    "phi": {},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
}
HYBRIDS = ("jamba", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba", "zamba2")


def transformer(name: str, implementation: str = "eager") -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    if name not in ("gpt2", "gpt_neox", "phi"):
        sizes["num_key_value_heads"] = 2
    given = TRANSFORMERS[name] if name == "gpt2" else sizes | TRANSFORMERS[name]
    config = AutoConfig.for_model(name, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=1, **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        for weight in model.parameters():
            if weight.ndim >= 2:
                torch.nn.init.normal_(weight, std=2 / weight.shape[-1] ** 0.5)
    return model.eval()


@contextmanager
def masked(ssm: si.Attachment, layers: Sequence[int], edges: Tensor) -> Iterator[None]:
    """The slow way: attention modules of some layers get a causal mask without the edges, `[b t s]`."""
    causal = torch.ones(edges.shape[-2:]).tril().bool()
    allowed = (causal & ~edges)[:, None]
    least = torch.finfo(torch.float32).min

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": torch.where(allowed, 0.0, least)}

    with ExitStack() as stack:
        for layer in layers:
            handle = ssm.attention[layer].register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def edges_of(batch: int, target: str, source: str) -> Tensor:
    edges = torch.zeros(batch, LENGTH, LENGTH, dtype=torch.bool)
    edges[:, torch.tensor(ROLES[target])[:, None], torch.tensor(ROLES[source])] = True
    return edges


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name != "gemma2"])
def test_equal_to_a_mask_by_hand(name: str, implementation: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(transformer(name, implementation)) as ssm, torch.no_grad():
        clean = ssm.model(input_ids=ids).logits
        for target, source in (("last", "subject"), ("relation", "subject"), ("subject", "context"), ("last", "first")):
            for layers in ((1,), (0, 1, 2)):
                with ssm.edit(si.Knockout(sources=ROLES[source], targets=ROLES[target], layers=layers)):
                    found = ssm.model(input_ids=ids).logits
                with masked(ssm, layers, edges_of(2, target, source)):
                    expected = ssm.model(input_ids=ids).logits
                assert error(found, expected) < 1e-5
                assert error(found, clean) > 1e-3
                before = min(ROLES[target])
                assert error(found[:, :before], clean[:, :before]) < 1e-6 if before else True  # the causal mask is kept
        assert torch.equal(ssm.model(input_ids=ids).logits, clean)
        assert ssm.model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_rows_equal_full_forwards(name: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(transformer(name)) as ssm:
        variants = [()] + [
            si.Knockout(sources=source, targets=ROLES[target], layers=window, features=heads)
            for source in ROLES.values()
            for target in ("last", "subject", "relation")
            for window in windows(ssm)
            for heads in (None, [0, 3])
        ]
        expected = forwards(ssm, ids, variants)
        assert error(answers(ssm, ids, variants), expected) < 1e-5
        assert error(expected, expected[:1].expand_as(expected)) > 0.05


@pytest.mark.parametrize("through", ["attention", ("ssm", "attention")])
@pytest.mark.parametrize("name", HYBRIDS)
def test_streams_of_a_hybrid(name: str, through: Any) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(build(name)) as ssm:
        variants = [
            si.Knockout(sources=ROLES[source], targets=ROLES[target], layers=window, through=through)
            for source in ("subject", "relation")
            for target in ("last", "subject", "relation")
            for window in windows(ssm, through)
        ]
        expected = forwards(ssm, ids, variants)
        clean = forwards(ssm, ids, [()])
        assert error(answers(ssm, ids, variants), expected) < 1e-5
        assert error(expected, clean.expand_as(expected)) > 1e-3


@pytest.mark.parametrize("name", HYBRIDS)
def test_attention_of_a_hybrid_by_hand(name: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(build(name, attn_implementation="eager")) as ssm, torch.no_grad():
        clean = ssm.model(input_ids=ids, use_cache=False).logits
        layers = tuple(ssm.attention)
        with ssm.edit(si.Knockout(sources=[2, 3], targets=[5, 8], layers=layers, through="attention")):
            found = ssm.model(input_ids=ids, use_cache=False).logits
        edges = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
        edges[:, [[5], [8]], [2, 3]] = True
        with masked(ssm, layers, edges):
            expected = ssm.model(input_ids=ids, use_cache=False).logits
        assert error(found, expected) < 1e-5
        assert error(found, clean) > 1e-3
