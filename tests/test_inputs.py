"""What a model is called with, and integers, in every form in which they come."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from random_terms import as_users_run_it
from support import CACHES, cache_of, relative_error
from tiny_flow import world
from tiny_hosts import build, inputs
from torch import nn
from transformers import PreTrainedModel

import ssm_interp as si
from ssm_interp.attribution import (
    attention_views,
    check_edges,
    decompose,
    edge_attribution,
    logit_attribution,
    record_mixers,
    rollout,
)
from ssm_interp.circuits import fact_roles, find_circuit
from ssm_interp.features import FeatureError, FeatureGroup, check_groups, decay_norms, feature_groups, spectrum
from ssm_interp.hooks import log_probability, logit_difference
from ssm_interp.hooks.check import check
from ssm_interp.hooks.rows.engine import run_each
from ssm_interp.prompts import pad, tokenize

METRIC = logit_difference(3, 5)
ROLES: dict[str, Any] = {"roles": {"a": range(6)}, "tolerance": 1, "metric": lambda logits: logits[:, 3]}
TAKING = {
    "run": lambda ssm, given: ssm.run(given).logits,
    "edges": lambda ssm, given: edge_attribution(ssm, given, METRIC).values,
    "decompose": lambda ssm, given: decompose(ssm, given)[0].whole,
    "record": lambda ssm, given: record_mixers(ssm, given)[0].y,
    "views": lambda ssm, given: attention_views(ssm, given)[0].values,
    "logits": lambda ssm, given: logit_attribution(ssm, given, 3, 5).difference,
    "spectrum": lambda ssm, given: spectrum(ssm, given)["mean dt"][0],
    "circuit": lambda ssm, given: torch.tensor(find_circuit(ssm, given, **ROLES | {"roles": {"a": REAL}}).clean),
}
REAL: list[list[int]] = []


@pytest.mark.parametrize("name", TAKING)
def test_a_batch_of_prompts_is_taken_like_the_mapping_of_a_tokenizer(name: str) -> None:
    tiny = world("mamba2", count=3)
    batch = pad([tokenize(prompt, tiny.tokenizer) for prompt in tiny.prompts])
    assert not batch.attention_mask.all()
    REAL[:] = [row.nonzero()[:, 0].tolist() for row in batch.attention_mask]
    mapping = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "token_type_ids": None}
    with si.attach(tiny.model) as ssm:
        assert torch.equal(TAKING[name](ssm, batch), TAKING[name](ssm, mapping))


def test_a_model_is_called_with_a_batch_of_prompts_as_with_a_mapping() -> None:
    tiny = world("mamba2", count=3)
    batch = pad([tokenize(prompt, tiny.tokenizer) for prompt in tiny.prompts])
    known = tiny.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(tiny.model(**batch).logits, known)
    assert torch.equal(tiny.model(**batch.to("cpu"), use_cache=False).logits, known)
    assert list(batch) == ["input_ids", "attention_mask"]
    with pytest.raises(KeyError, match="holds input_ids and attention_mask for a model, not 'answer_ids'"):
        batch["answer_ids"]


IDS = inputs(2, 6)["input_ids"]
BAD_INPUTS: list[tuple[Any, str]] = [
    ("a text", r"inputs must be ids \[b t\], the mapping .*, or a batch of prompts, got str"),
    (IDS.numpy(), "inputs must be ids .* got ndarray"),
    ({0: IDS}, r"inputs must be ids .* got dict with the keys \[0\]"),
    (IDS.float(), r"input_ids must be integers \[b t\], got torch.float32 \[2, 6\]"),
    (IDS.bool(), r"input_ids must be integers \[b t\], got torch.bool \[2, 6\]"),
    (IDS[0], r"input_ids must be integers \[b t\], got torch.int64 \[6\]"),
    (IDS[:, :0], r"input_ids is empty, \[2, 0\]: a model reads at least one token"),
    ({"input_ids": IDS.tolist()}, "input_ids must be integers .* got list; with a tokenizer give return_tensors='pt'"),
    (torch.where(IDS[1, 2] == IDS, 64, IDS), "have the token 64 in row .*, but the vocabulary of .* has 0 to 63"),
    (IDS - 64, "have the token -.* in row 0, position 0, but the vocabulary"),
    ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, r"attention_mask must be .* \(\[2, 6\]\), got \[2, 5\]"),
    ({"input_ids": IDS, "attention_mask": [[1] * 6] * 2}, r"attention_mask must be .* got list"),
    ({"input_ids": IDS, "attention_mask": IDS}, "must be 1 at tokens and 0 at padding; this one holds something else"),
    ({"input_ids": IDS, "attention_mask": IDS.new_tensor([[1], [0]]).expand(2, 6)}, "in every row; row 1 is"),
    (IDS.to(torch.uint8), r"must be torch.int64 or torch.int32, got torch.uint8; give ids.long\(\)"),
    ({}, r"inputs must have input_ids \[b t\] \(or else inputs_embeds\); these have \[\]"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 32)}, "(must have input_ids|hold inputs_embeds)"),
    ({"input_ids": IDS, "past_key_values": ((IDS, IDS),)}, "(must be a cache, which a .* got .*Tensor|hold past_key)"),
]


@pytest.mark.parametrize(("given", "message"), BAD_INPUTS, ids=[message[-40:] for _, message in BAD_INPUTS])
def test_inputs_that_are_none(given: Any, message: str) -> None:
    REAL[:] = [list(range(6))] * 2
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        for name, call in TAKING.items():
            kind = si.HookError if name == "run" else FeatureError
            with pytest.raises(kind, match=message):
                call(ssm, given)


def test_embeddings_have_a_mask_too() -> None:
    model = build("mamba2")
    embeds = model.get_input_embeddings()(IDS).detach()
    with si.attach(model) as ssm:
        assert torch.equal(ssm.run({"inputs_embeds": embeds}).logits, ssm.run(IDS).logits)
        with pytest.raises(si.HookError, match=r"as input_ids are \(\[2, 6\]\), got \[2, 5\]"):
            ssm.run({"inputs_embeds": embeds}, attention_mask=torch.ones_like(IDS)[:, 1:])


def test_what_a_tokenizer_says_of_a_text_is_left_out_where_nobody_takes_it() -> None:
    said: dict[str, Any] = {"token_type_ids": torch.zeros_like(IDS), "offset_mapping": [[(0, 1)] * 6] * 2}
    said["position_ids"] = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    with si.attach(build("mamba2")) as ssm:
        assert torch.equal(ssm.run({"input_ids": IDS} | said).logits, ssm.run(IDS).logits)
        for name, several in (("token_type_ids", [0, 0, 0, 1, 1, 1]), ("position_ids", [0, 1, 2, 0, 1, 2])):
            with pytest.raises(si.HookError, match=f"takes no {name}, which here tell several texts of a row apart"):
                ssm.run({"input_ids": IDS, name: torch.tensor([several] * 2)})


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"layer": [1]}, "Mamba2ForCausalLM takes no 'layer'; did you mean 'layers'"),
    ({"layer": None}, "takes no 'layer'"),
    ({"reads": "y"}, "takes no 'reads'; did you mean 'read'"),
    ({"attention_masks": torch.ones_like(IDS)}, "did you mean 'attention_mask'"),
    ({"fwd_hooks": []}, r"no 'fwd_hooks'. `run` takes inputs, read, layers; the model takes input_ids, .*labels"),
    ({"input_ids": IDS}, "input_ids is given twice"),
    ({"attention_mask": IDS}, "attention_mask must be 1 at tokens and 0 at padding"),
    ({"attention_mask": IDS[:, 1:]}, r"attention_mask must be a tensor \[b t\]"),
    ({"cache": object(), "past_key_values": object()}, "the cache is given twice"),
]


@pytest.mark.parametrize(("options", "message"), UNKNOWN, ids=[message[:40] for _, message in UNKNOWN])
def test_options_that_nobody_takes(options: dict[str, Any], message: str) -> None:
    with si.attach(build("mamba2")) as ssm, pytest.raises(si.HookError, match=message):
        ssm.run(IDS, read="y", **options)


@pytest.mark.parametrize("name", TAKING)
def test_keys_that_nobody_takes(name: str) -> None:
    with si.attach(build("mamba2")) as ssm, pytest.raises((si.HookError, FeatureError), match="takes no 'mask'"):
        TAKING[name](ssm, {"input_ids": IDS, "mask": torch.ones_like(IDS)})


def test_options_that_a_family_takes(host: PreTrainedModel) -> None:
    with si.attach(host) as ssm:
        assert len(ssm.run(IDS, output_hidden_states=True).output.hidden_states) > 3
        assert isinstance(ssm.run(IDS, return_dict=False, use_cache=False).output, tuple)
        with pytest.raises(si.HookError, match="did you mean 'output_hidden_states'"):
            ssm.run(IDS, output_hidden_state=True)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_cache_goes_by_any_of_its_names(host: PreTrainedModel, wrapped: bool) -> None:
    model = _Forwards(host) if wrapped else host
    place = {"position_ids": torch.tensor([[5]])} if "position_ids" in signature(host.forward).parameters else {}
    with si.attach(model) as ssm:
        whole = ssm.run(IDS).logits[:, -1:]
        for name in CACHES:
            cache = cache_of(ssm.run(IDS[:, :5], use_cache=True).output)
            assert relative_error(ssm.run(IDS[:, 5:], **{name: cache}, **place).logits, whole) < 1e-4


def test_a_model_without_a_cache_takes_none() -> None:
    with (
        si.attach(_Ids(build("mamba2"))) as ssm,
        pytest.raises(si.HookError, match="_Ids takes no 'cache_params'. .* the model takes input_ids$"),
    ):
        ssm.run(IDS, cache_params=object())


class _Forwards(nn.Module):
    """Hands everything on, as adapters and parallel wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList([inner])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0](*args, **kwargs)


class _Ids(_Forwards):
    def forward(self, input_ids: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids)


def test_ids_of_another_tokenizer_are_refused_by_rows_too() -> None:
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        for ids, message in ((IDS + 64, "but the vocabulary"), (IDS.float(), "must be integers")):
            with pytest.raises(si.HookError, match=message):
                run_each(ssm, ids, [si.Knockout(sources=0, targets=-1)])


@pytest.mark.parametrize("off", [True, False])
def test_logits_without_a_name(off: bool) -> None:
    with si.attach(build("mamba2")) as ssm:
        if off:
            ssm.model.config.return_dict = False
        given: dict[str, Any] = {"input_ids": IDS} | ({} if off else {"return_dict": False})
        assert repr(ssm.run(given)) == "Run(tuple; read nothing)"
        for call in (TAKING["run"], TAKING["edges"], TAKING["logits"]):
            with pytest.raises(si.HookError, match="returned a tuple without logits; .* without return_dict=False"):
                call(ssm, given)
        if off:
            with pytest.raises(si.HookError, match="config has return_dict=False, and its logits no name"):
                run_each(ssm, IDS, [()])


def test_a_model_without_a_head_gives_no_logits() -> None:
    with si.attach(build("mamba2").backbone) as ssm:
        run = ssm.run(IDS, read="x", layers=1)
        assert repr(run) == "Run(Mamba2Output; read x of layer 1: [2, 6, 8, 8])"
        with pytest.raises(
            si.HookError, match="returned a Mamba2Output without logits; they need a language-model head"
        ):
            run.logits  # noqa: B018


ONES = [
    1,
    np.int64(1),
    np.uint8(1),
    np.array(1),
    torch.tensor(1),
    [1],
    (np.int64(1),),
    np.array([1]),
    torch.tensor([1]),
]


@pytest.mark.parametrize("one", ONES, ids=repr)
def test_integers_in_every_form(one: Any) -> None:
    circuit: dict[str, Any] = ROLES | {"layers": one, "features": {"mine": {1: one}}}
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        assert edge_attribution(ssm, IDS, METRIC, layers=one).layers == (1,)
        assert ssm.run(IDS, read="x", layers=one)["x", np.int64(1)].shape == (2, 6, 8, 8)
        view = attention_views(ssm, IDS, layers=one, heads=one, targets=one, reduction=None)[1]
        assert view.targets == (1,) and view.values.shape == (2, 1, 1, 6)
        assert feature_groups(ssm, "mine", sets={"mine": {1: one}}) == {"mine": {1: (1,)}}
        assert {group.layers for group in find_circuit(ssm, IDS, **circuit).removed} == {(1,)}
        found = logit_attribution(ssm, IDS, one if np.ndim(one) == 0 else [1, 1], position=one, layers=one)
        assert found.position == 1 and found.layers == (1,)
        edges = edge_attribution(ssm, IDS, METRIC, features={"mine": {1: one}})
        assert edges.features == {"mine": {1: (1,)}}
        if np.ndim(one) == 0:
            assert edge_attribution(ssm, IDS, METRIC, steps=one).steps == 1
            assert len(edges.top(one)) == 1
            assert spectrum(ssm, IDS, batch_size=one).n_tokens == 12
            assert find_circuit(ssm, IDS, **ROLES, batch_size=one).trials
    assert si.Knockout(sources=one).sources == (1,)
    assert torch.equal(log_probability(one)(torch.eye(4)[:1]), log_probability(1)(torch.eye(4)[:1]))


@pytest.mark.parametrize(
    "pairs", [[(1, 2), (1, 3)], [[1, 2], [1, 3]], np.array([[1, 2], [1, 3]]), torch.tensor([[1, 2], [1, 3]])]
)
def test_pairs_in_every_form(pairs: Any) -> None:
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        assert check_groups(ssm, {"mine": {0: pairs}}) == {"mine": {0: ((1, 2), (1, 3))}}
        assert decompose(ssm, IDS, features={"mine": {0: pairs}})[0].groups == ("mine", "other")
    assert si.Knockout(sources=0, features=pairs).features == ((1, 2), (1, 3))


@pytest.mark.parametrize(
    "value", [torch.tensor(1.5), np.array(1.5), np.bool_(True), torch.tensor(True), torch.tensor([True]), b"1"]
)
def test_what_is_no_integer_is_not_rounded(value: Any) -> None:
    with as_users_run_it(), pytest.raises(si.InterventionError, match="must be an integer"):
        si.Knockout(sources=value)
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        for call in (
            lambda: edge_attribution(ssm, IDS, METRIC, steps=value),
            lambda: logit_attribution(ssm, IDS, value),
        ):
            with pytest.raises(si.SsmInterpError, match="steps must be a whole number|answer must be a token id"):
                call()


BAD_CALLS: list[tuple[Any, str]] = [
    (lambda ssm: decompose(ssm.model, IDS), r"must be attached, ssm = attach\(model\); got Mamba2ForCausalLM"),
    (lambda ssm: spectrum(None), "must be attached"),
    (lambda ssm: find_circuit(ssm.model, IDS, **ROLES), "must be attached"),
    (lambda ssm: decay_norms(ssm.model), "must be attached"),
    (lambda ssm: feature_groups(ssm.model, ["all"]), "must be attached"),
    (lambda ssm: run_each(ssm.model, IDS, [()]), "must be attached"),
    (
        lambda ssm: find_circuit(ssm, IDS, **ROLES | {"metric": None}),
        "the metric must be a name .* or a function of logits, .*, got None",
    ),
    (
        lambda ssm: find_circuit(ssm, IDS, **ROLES | {"tolerance": torch.tensor([True, False])}),
        "tolerance must be a finite",
    ),
    (lambda ssm: find_circuit(ssm, IDS, **ROLES, layers=1.5), "layers must be an integer .*, got 1.5"),
    (lambda ssm: find_circuit(ssm, IDS, **ROLES, progress=3), "progress must be a function .*, got 3"),
    (lambda ssm: rollout(list(attention_views(ssm, IDS).values())), r"matrix 0 must be .* got AttentionView"),
    (lambda ssm: rollout(attention_views(ssm, IDS)), r"\[view.values for view in views.values\(\)\]"),
    (lambda ssm: attention_views(ssm, IDS, heads={9: [0]}), r"heads names layers \[9\]"),
    (lambda ssm: attention_views(ssm, IDS, reduction=["mean"]), "reduction must be one of"),
    (lambda ssm: logit_attribution(ssm, IDS, 3, position=[0, 1]), r"one position, got \[0, 1\]"),
    (lambda ssm: spectrum(ssm, statistics=3), "asked for by name, decay norm, .* got 3"),
    (lambda ssm: spectrum(ssm)[["decay norm"]], "no statistic"),
    (lambda ssm: feature_groups(ssm, [3]), "asked for by name, such as 'all' or 'top third', got 3"),
    (lambda ssm: FeatureGroup("top", ["third"]), "no group 'top'"),  # type: ignore[arg-type]
    (lambda ssm: FeatureGroup("top").of({0: [1, 2]}), "layer -> a number per feature"),  # type: ignore[dict-item]
    (lambda ssm: fact_roles(IDS), "those of a Batch of prompts, got Tensor"),
    (lambda ssm: check_edges(ssm, IDS, METRIC, IDS), "what edge_attribution found, got Tensor"),
    (lambda ssm: check_edges(ssm, IDS, METRIC, edge_attribution(ssm, IDS, METRIC), seed="x"), "seed must be a whole"),
    (lambda ssm: edge_attribution(ssm, IDS, METRIC, tokens="tokens"), "tokens must be one text per position"),
    (lambda ssm: edge_attribution(ssm, IDS, METRIC, tokens=3), "tokens must be one text per position"),
    (lambda ssm: edge_attribution(ssm, IDS, METRIC).plot(row=1.5), "row must be a whole number"),
    (lambda ssm: edge_attribution(ssm, IDS, METRIC).plot(group="a"), "so there is no group 'a'"),
    (lambda ssm: edge_attribution(ssm, IDS, METRIC).plot(target="f"), "target is one position .* 'f'"),
    (lambda ssm: ssm.run(IDS, read=3), "hook points are named by text .*, got 3"),
    (lambda ssm: ssm.run(IDS, read=torch.tensor(1.5)), "hook points are named by text"),
    (lambda ssm: ssm.layers_with(torch.tensor(1.5)), "through must name streams"),
    (lambda ssm: ssm.layers[0].hook_x.add_hook(3), r"takes a function of \(tensor, hook point\), got 3"),
    (lambda ssm: ssm.layers[0].hook_x.add_hook(lambda module, args, x: x), "takes a function of .*, which .* is not"),
    (lambda ssm: ssm.layers[0].hook_x.add_hook(lambda x: x), "goes to register_forward_hook"),
    (lambda ssm: ssm.run(IDS, read="x", layers=[]), r"points \['x'\] of no layers: None means all, \[0, 1, 2, 3\]"),
    (lambda ssm: ssm.expose(), "expose takes the names of hook points"),
    (lambda ssm: ssm.expose("attn", layers=()), "of no layers"),
    (lambda ssm: ssm.modules_of(["x"]), "through must name streams"),
    (lambda ssm: ssm.check(si.Intervention(layers=0)), r"edit takes .*, got Intervention\(layers=\(0,\)\)"),
    (lambda ssm: ssm.layers[0].hook_x.remove_hooks("all"), "'fwd', 'bwd' or 'both', got 'all'"),
    (lambda ssm: si.attached(3), "int has no hook points"),
    (lambda ssm: check(3), "check takes a model, got int"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message[:40] for _, message in BAD_CALLS])
def test_calls_that_are_none(call: Any, message: str) -> None:
    with (
        si.attach(build("mamba2")) as ssm,
        as_users_run_it(),
        pytest.raises(si.SsmInterpError, match=message),
    ):
        call(ssm)


def test_a_run_says_what_was_not_read() -> None:
    with si.attach(build("mamba2")) as ssm:
        run = ssm.run(IDS, read=["x", "hook_x"], layers=0)
        assert run["x", 0].shape == run["hook_x", 0].shape == (2, 6, 8, 8)
        for key in (3, ("x",), ("x", 3), {"x": 0}, "y"):
            with pytest.raises(KeyError, match="was not read"):
                run[key]
