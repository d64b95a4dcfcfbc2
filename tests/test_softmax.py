"""Knockouts in softmax attention, against masks that are given to single layers by hand."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from support import cache_of, cached, checkpointing
from test_rows import LENGTH, ROLES, answers, error, forwards, windows
from tiny_hosts import build, inputs
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, PreTrainedModel

import ssm_interp as si
from ssm_interp.hooks.rows.engine import run_each
from ssm_interp.hooks.rows.trial import obstacle

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "jetmoe": {"num_key_value_heads": 4, "kv_channels": 8, "num_local_experts": 4},
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
        if name not in ("gpt2", "gemma2"):  # one path for all of them, but for a sliding window
            variants = variants[::7]
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
            if len(window) in (1, len(ssm.layers_with(through)))
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


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decode_and_generate_under_a_knockout_equal_full_forwards(name: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    for knockout in (si.Knockout(sources=[2, 3], layers=[1, 2]), si.Knockout(sources=[2], targets=[4, 6])):
        with si.attach(transformer(name)) as ssm, torch.no_grad(), ssm.edit(knockout):
            full = ssm.model(input_ids=ids, use_cache=False).logits
            output = ssm.model(input_ids=ids[:, :7], use_cache=True)
            found = [output.logits]
            for step in (7, 8):
                output = ssm.model(input_ids=ids[:, step : step + 1], **cached(ssm.model, cache_of(output)))
                found.append(output.logits)
            assert error(torch.cat(found, dim=1), full) < 1e-5
            ssm.model.generation_config.eos_token_id = None
            generated = ssm.model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
            for end in range(LENGTH, generated.shape[1]):
                best = ssm.model(input_ids=generated[:, :end], use_cache=False).logits[:, -1].argmax(-1)
                assert torch.equal(best, generated[:, end])


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_a_prompt_in_chunks_is_refused(name: str) -> None:
    ids = inputs(batch=1, length=LENGTH)["input_ids"]
    model = build(name) if name == "bamba" else transformer(name)
    given = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with si.attach(model) as ssm, ssm.edit(si.Knockout(sources=[2, 3], targets=-1, through="attention")):
        for _ in range(2):  # also after another prompt under the same edit
            model.generate(ids, **given)
            with pytest.raises(si.InterventionError, match="`generate` reads in 2 chunks, so that its end is not yet"):
                model.generate(ids, prefill_chunk_size=5, **given)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_target_that_is_left_with_nothing_reads_nothing(implementation: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(transformer("llama", implementation)) as ssm, torch.no_grad():
        seen: list[Tensor] = []
        handle = ssm.attention[1].o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        with ssm.edit(si.Knockout(sources=range(LENGTH), targets=[0, 5], layers=1)):
            ssm.model(input_ids=ids)
        handle.remove()
        assert (seen[0][:, [0, 5]] == 0).all()
        assert (seen[0][:, [1, 4, 6]] != 0).any(-1).all()


def test_single_edges_heads_and_both_streams_in_a_plain_forward() -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(transformer("gpt2")) as ssm, torch.no_grad():
        with ssm.edit(si.Knockout(edges=[(8, 2), (8, 3)])):
            by_edges = ssm.model(input_ids=ids).logits
        with ssm.edit(si.Knockout(sources=[2, 3], targets=8)):
            assert torch.equal(ssm.model(input_ids=ids).logits, by_edges)
        with ssm.edit(
            si.Knockout(sources=[[2], [3]], targets=8, features=[0, 1]),
            si.Knockout(sources=[[2], [3]], targets=8, features=[2, 3]),
        ):
            by_heads = ssm.model(input_ids=ids).logits
        with ssm.edit(si.Knockout(sources=[[2], [3]], targets=8)):
            assert torch.equal(ssm.model(input_ids=ids).logits, by_heads)
    with si.attach(build("falcon_h1")) as ssm, torch.no_grad():
        both = si.Knockout(sources=[2, 3], targets=8, through=["attention", "ssm"])
        with ssm.edit(both):
            found = ssm.model(input_ids=ids, use_cache=False).logits
        with ssm.edit(*(si.Knockout(sources=[2, 3], targets=8, through=stream) for stream in ("ssm", "attention"))):
            assert torch.equal(ssm.model(input_ids=ids, use_cache=False).logits, found)
        assert si.Intervention.from_dict(both.to_dict()) == both
        assert both.through == ("ssm", "attention")


def test_threads_have_their_own_knockouts() -> None:
    model = transformer("llama")
    ids = inputs(batch=1, length=LENGTH)["input_ids"]
    with si.attach(model) as ssm:
        knockouts = [(), si.Knockout(sources=2, targets=-1), si.Knockout(sources=3, targets=-1)]
        expected = forwards(ssm, ids, knockouts)
        wrong: list[int] = []

        def run(number: int) -> None:
            for _ in range(20):
                if not torch.equal(forwards(ssm, ids, [knockouts[number]])[0], expected[number]):
                    wrong.append(number)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert model.config._attn_implementation == "eager"


def test_copies_and_parts_of_a_model_under_a_knockout() -> None:
    ids = inputs(batch=1, length=LENGTH)["input_ids"]
    knockout, other = si.Knockout(sources=[1, 2], targets=-1), si.Knockout(sources=3, targets=-1)
    model = transformer("llama")
    with si.attach(model) as ssm, si.attach(model.model) as part, torch.no_grad():
        expected = forwards(ssm, ids, [(knockout,), (knockout, other)])
        with ssm.edit(knockout):
            twin = copy.deepcopy(model)
            with part.edit(other):
                assert torch.equal(model(input_ids=ids).logits[:, -1], expected[1])
            assert torch.equal(model(input_ids=ids).logits[:, -1], expected[0])
        assert model.config._attn_implementation == "eager"
    with si.attach(twin) as ssm:
        assert torch.equal(forwards(ssm, ids, [(knockout,)]), expected[:1])
    assert twin.config._attn_implementation == "eager"


def test_attention_that_knockouts_cannot_act_on_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with pytest.raises(
        si.UnsupportedModelError, match="BertForMaskedLM has no SSM layers.* no attention layers that are causal"
    ):
        si.attach(BertForMaskedLM(BertConfig(vocab_size=64, **sizes)))
    llama = transformer("llama")
    loose = nn.Module()
    loose.layers = llama.model.layers
    nowhere = pytest.raises(si.HookError, match="the attention in Module is part of no model of transformers")
    with si.attach(loose) as ssm, nowhere, ssm.edit(si.Knockout(sources=0)):
        pass
    checkpointing(llama.train())
    again = pytest.raises(si.HookError, match="LlamaForCausalLM uses gradient checkpointing, which would compute")
    with si.attach(llama) as ssm, again, ssm.edit(si.Knockout(sources=0)):
        pass


def test_blocks_that_take_no_rows_are_found_by_a_trial() -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    bigcode = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_bigcode", **sizes)).eval()
    with si.attach(bigcode) as ssm:
        assert "the blocks of GPTBigCodeForCausalLM take no rows of variants (RuntimeError: " in str(obstacle(ssm))
        with pytest.raises(si.HookError, match="take no rows of variants .*; use one forward per knockout inside"):
            run_each(ssm, ids, [()])
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model("roberta", vocab_size=64, is_decoder=True, **sizes)  # its positions count from 2
    with si.attach(AutoModelForCausalLM.from_config(config).eval()) as ssm:
        assert "rows of variants through RobertaForCausalLM are off by" in str(obstacle(ssm))


def test_bad_knockouts_in_attention() -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(transformer("gpt2")) as ssm, torch.no_grad():
        for knockout, message in [
            (si.Knockout(sources=0, targets=9), "Knockout.targets names position 9, but the prompt has 9 positions"),
            (si.Knockout(sources=0, features=[4]), "names 4, but in softmax attention a feature is a head, 0 to 3"),
            (
                si.Knockout(sources=0, features=[(0, 1)]),
                r"names \(0, 1\), but in softmax attention a feature is a head",
            ),
            (si.Knockout(sources=0, layers=[3]), r"no such layer \[3\]; this model has \[0, 1, 2\] \(attention\)"),
            (si.Knockout(sources=0, through="ssm"), "GPT2LMHeadModel has no ssm layers"),
            (si.PatchState(position=0, state=0.0), "GPT2LMHeadModel has no ssm layers"),
        ]:
            with pytest.raises(si.InterventionError, match=message), ssm.edit(knockout):
                ssm.model(input_ids=ids)
            if isinstance(knockout, si.Knockout):
                with pytest.raises(si.InterventionError, match=message):
                    list(run_each(ssm, ids, [knockout]))
        cache = cache_of(ssm.model(input_ids=ids, use_cache=True))
        with ssm.edit(si.Knockout(sources=0)), pytest.raises(si.InterventionError, match="this cache read without it"):
            ssm.model(input_ids=ids[:, :1], **cached(ssm.model, cache))
        with pytest.raises(si.HookError, match="run takes hook points|no SSM layer"):
            ssm.run(ids, read="attn", layers=[0])
        with ssm.edit(si.Knockout(sources=0)), pytest.raises(si.HookError, match="inside `with ssm.edit"):
            ssm.detach()
    with pytest.raises(si.InterventionError, match=r"through must name streams, out of .*'conv'.*; got 'mlp'"):
        si.Knockout(sources=0, through="mlp")
    sliding = transformer("gemma2")
    with si.attach(sliding) as ssm, torch.no_grad(), ssm.edit(si.Knockout(sources=0)):
        cache = cache_of(ssm.model(input_ids=ids, use_cache=True))
        with pytest.raises(si.HookError, match="after 9 positions this cache gives .* keys for 1 new ones"):
            ssm.model(input_ids=ids[:, :1], **cached(ssm.model, cache))


def test_an_implementation_without_masks_of_edges_is_refused() -> None:
    model = transformer("llama")
    with si.attach(model) as ssm:
        model.config._attn_implementation = "flex_attention"
        refused = pytest.raises(si.HookError, match=r"computed by 'flex_attention'.*set_attn_implementation\('sdpa'\)")
        with refused, ssm.edit(si.Knockout(sources=0)):
            pass
        model.config._attn_implementation = "eager"
        with ssm.edit(si.Knockout(sources=0)):
            assert model.config._attn_implementation != "eager"
        assert model.config._attn_implementation == "eager"
