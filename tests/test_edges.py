"""Every edge's worth in one backward pass, beside explicit masks on the matrix and exact knockouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_terms import as_users_run_it
from support import edited, relative_error
from tiny_hosts import NAMES, build, inputs, padded
from torch import Tensor

import ssm_interp as si
from ssm_interp.attribution import EdgeAttribution, check_edges, edge_attribution
from ssm_interp.errors import MetricError, SsmInterpError
from ssm_interp.features import FeatureError, feature_groups
from ssm_interp.hooks import HookedWarning, log_probability, logit_difference
from ssm_interp.prompts import pad, tokenize

LENGTH = 7
ATTENDING = ("bamba", "falcon_h1", "nemotron_h")  # in fp32 whatever the dtype: rotary positions, and experts' routers
METRIC = logit_difference(answer=[3, 8], other=5)


def double(name: str) -> si.Attachment:
    return si.attach(build(name, dtype=torch.float64), own_operator=True)


def masked_gradient(
    ssm: si.Attachment, given: dict[str, Tensor], chosen: dict[int, Tensor] | None = None, metric: Any = None
) -> Tensor:
    """Minus the gradient at a mask that multiplies the materialised matrix of some heads, `[b layer t s]`."""
    b, t = given["input_ids"].shape
    masks, handles = {}, []
    for layer, points in ssm.layers.items():
        masks[layer] = torch.ones(b, t, t, dtype=torch.float64, requires_grad=True)
        done = [0]

        def edit(_module: Any, _args: Any, attn: Tensor, layer: int = layer, done: list[int] = done) -> Tensor:
            here = slice(done[0], done[0] + attn.shape[1])  # Zamba calls its operator once for each Mamba head
            done[0] += attn.shape[1]
            mask = masks[layer][:, None]
            return attn * (mask if chosen is None else torch.where(chosen[layer][here, None, None], mask, 1.0))

        handles.append(points.hook_attn.register_forward_hook(edit))
    logits = ssm.model(**given, use_cache=False).logits
    value = METRIC(logits[:, -1]) if metric is None else metric(logits)
    gradients = torch.autograd.grad(value.sum(), list(masks.values()))
    for handle in handles:
        handle.remove()
    return -torch.stack(gradients, dim=1).tril()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_gradient_at_a_mask_on_the_matrix(name: str) -> None:
    ssm = double(name)
    given = inputs(2, LENGTH)
    found = edge_attribution(ssm, given, METRIC)
    assert found.values.shape == (2, len(ssm.layers), LENGTH, LENGTH)
    assert found.layers == tuple(sorted(ssm.layers))
    assert relative_error(found.values, masked_gradient(ssm, given)) <= 1e-9
    expected = METRIC(ssm.model(**given).logits[:, -1])
    assert relative_error(found.metric, expected) <= 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_in_fp32_with_the_hosts_weights(name: str) -> None:
    given = inputs(2, LENGTH)
    expected = edge_attribution(double(name), given, METRIC).values
    found = edge_attribution(si.attach(build(name)), given, METRIC).values
    assert found.dtype == torch.float32
    assert relative_error(found.double(), expected) <= 1e-3


def test_a_metric_of_all_positions() -> None:
    ssm, given = double("mamba2"), inputs(2, LENGTH)
    every = lambda logits: logits[:, 1:, 4].tanh().sum(1)  # noqa: E731
    found = edge_attribution(ssm, given, every, positions="all")
    assert relative_error(found.values, masked_gradient(ssm, given, metric=every)) <= 1e-9
    single = edge_attribution(
        ssm, {"input_ids": given["input_ids"][:1]}, lambda logits: logits[0, -1, 4], positions="all"
    )
    assert single.metric.shape == (1,)


@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2", "bamba"])
def test_groups_are_shares_of_the_whole(name: str) -> None:
    ssm, given = double(name), inputs(2, LENGTH)
    groups = feature_groups(ssm, ["top third", "all but top third", "all"])
    found = edge_attribution(ssm, given, METRIC, features=groups)
    assert found.groups == ("top third", "all but top third", "all")
    assert found.values.shape == (2, len(ssm.layers), 3, LENGTH, LENGTH)
    top, others, everything = found.values.unbind(2)
    whole = edge_attribution(ssm, given, METRIC).values
    assert relative_error(top + others, whole) <= 1e-12
    assert relative_error(everything, whole) <= 1e-12
    chosen = {layer: torch.zeros(points.heads, dtype=torch.bool) for layer, points in ssm.layers.items()}
    for layer, heads in (groups["top third"] or {}).items():
        chosen[layer][list(heads)] = True
    assert relative_error(top, masked_gradient(ssm, given, chosen)) <= 1e-9


@pytest.mark.parametrize("name", ["falcon_mamba", "zamba2"])
def test_pairs_add_up_to_their_heads(name: str) -> None:
    ssm, given = double(name), inputs(1, LENGTH)
    layer = min(ssm.layers)
    half = ssm.layers[layer].state_size // 2
    pairs = [[(1, n) for n in part] for part in (range(half), range(half, 2 * half))]
    groups = {"first": {layer: pairs[0]}, "second": {layer: pairs[1]}, "head": {layer: [1]}}
    metric = logit_difference(3, 5)
    found = edge_attribution(ssm, given, metric, features=groups).values[:, :, :]
    first, second, head = found.unbind(2)
    assert relative_error(first + second, head) <= 1e-12
    assert not found[:, 1:].any()  # of layers that no group names
    small = check_edges(ssm, given, metric, edge_attribution(ssm, given, metric, features=groups), top=4, random=0)
    assert set(small.frame["feature_group"]) <= {"first", "second", "head"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_and_has_no_edges(name: str, side: Any) -> None:
    ssm = double(name)
    batch = padded([LENGTH, 4], side=side)
    found = edge_attribution(ssm, batch, METRIC)
    for row, target in enumerate((3, 8)):
        columns = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row, columns][None]}
        expected = edge_attribution(ssm, alone, logit_difference(target, 5)).values[0]
        here = found.values[row]
        tight = 1e-5 if name in ATTENDING else 1e-9
        assert relative_error(here[:, columns][:, :, columns], expected) <= tight
        assert not here[:, ~columns].any()
        assert not here[:, :, ~columns].any()
    assert len(found.frame) == len(ssm.layers) * (LENGTH * (LENGTH + 1) // 2 + 10)


def test_integrated_gradients_add_up() -> None:
    ssm, given = double("mamba2"), inputs(2, LENGTH)
    gaps = []
    for steps in (2, 8, 32):
        found = edge_attribution(ssm, given, METRIC, steps=steps)
        assert found.without is not None
        gaps.append(float((found.gap.abs() / (found.without - found.metric).abs()).max()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] <= 1e-5
    gone = edited(ssm, given, si.Knockout())
    assert relative_error(found.without, METRIC(gone[:, -1])) <= 1e-9
    clean = edge_attribution(ssm, given, METRIC)
    assert relative_error(found.metric, clean.metric) <= 1e-12
    assert clean.without is None


def test_layers_are_those_asked_for() -> None:
    ssm, given = double("mamba"), inputs(2, LENGTH)
    whole = edge_attribution(ssm, given, METRIC)
    found = edge_attribution(ssm, given, METRIC, layers=[3, 1])
    assert found.layers == (1, 3)
    assert relative_error(found.values, whole.values[:, [1, 3]]) <= 1e-12
    assert edge_attribution(ssm, given["input_ids"], METRIC, layers=2).layers == (2,)


@pytest.mark.filterwarnings("ignore::ssm_interp.hooks.HookedWarning")
@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_edits_and_hooks_stay_at_work(name: str) -> None:
    ssm, given = double(name), inputs(2, LENGTH)
    layer = min(ssm.layers)
    ssm.layers[layer].hook_x.add_hook(lambda x, hook: x * 1.5)
    ssm.layers[layer].hook_y.add_hook(lambda y, hook: y.mul_(0.5))
    removed = si.Knockout(sources=[0, 2], targets=[-1, 4], layers=layer)
    leak = si.Knockout(sources=5, targets=-1, layers=3, through=("ssm", "conv"))
    only = si.Knockout(sources=2, targets=3, layers=3, through="conv")  # leaves the edges of the SSM
    with ssm.edit(removed, leak, only, si.SetDelta(value=0.3, positions=1), si.Knockout(edges=[(3, 1)])):
        found = edge_attribution(ssm, given, METRIC).values
        expected = masked_gradient(ssm, given)
    gone = torch.zeros(len(ssm.layers), LENGTH, LENGTH, dtype=torch.bool)
    gone[:, 3, 1] = True
    gone[-1, -1, 5] = True
    gone[0, [[-1], [4]], [0, 2]] = True
    assert not found[:, gone].any()
    assert relative_error(found, torch.where(gone, 0, expected)) <= 1e-9
    assert relative_error(edge_attribution(ssm, given, METRIC).values, found) > 1e-3


@pytest.mark.parametrize("wanted", [True, False])
def test_the_model_is_left_as_it_was(wanted: bool) -> None:
    ssm, given = si.attach(build("mamba").requires_grad_(wanted)), inputs(2, LENGTH)
    expected = edge_attribution(double("mamba"), given, METRIC).values
    found = edge_attribution(ssm, given, METRIC, steps=1)
    with pytest.raises(FeatureError):
        edge_attribution(ssm, given, lambda logits: logits.detach()[:, 0])
    assert relative_error(found.values.double(), expected) <= 1e-3
    assert not found.values.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad == wanted for parameter in ssm.model.parameters())
    assert not any(point.has_hooks() for points in ssm.layers.values() for point in points.points())
    assert not any(points.own_operator for points in ssm.layers.values())


def exact(ssm: si.Attachment, given: dict[str, Tensor], edge: dict[str, Any], features: Any = None) -> float:
    rows = range(len(given["input_ids"]))
    at = {key: [[edge[key[:-1]]] if row == edge["row"] else [] for row in rows] for key in ("sources", "targets")}
    knockout = si.Knockout(**at, layers=edge["layer"], features=features)
    last = given["attention_mask"].shape[1] - 1 - given["attention_mask"].flip(1).argmax(1)
    before, after = (METRIC(edited(ssm, given, *edits)[rows, last]) for edits in ((), (knockout,)))
    return float((after - before)[edge["row"]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["jamba", "mamba2"])
def test_checked_edges_are_knocked_out_one_at_a_time(name: str, side: Any) -> None:
    ssm, batch = double(name), padded([LENGTH, 4], side=side)
    groups = feature_groups(ssm, ["top half"])
    found = edge_attribution(ssm, batch, METRIC, features=groups)
    checked = check_edges(ssm, batch, METRIC, found, top=4, random=3, seed=1)
    assert list(checked.frame["chosen"]) == ["top"] * 4 + ["random"] * 3
    assert list(checked.frame["attribution"][:4]) == list(found.top(4)["attribution"])
    for edge in checked.frame.to_dict("records"):
        assert edge["exact"] == pytest.approx(exact(ssm, batch, edge, groups["top half"][edge["layer"]]), abs=1e-6)
    last = [-1, -1 if side == "left" else 3]
    whole = lambda logits: METRIC(logits[[0, 1], last])  # noqa: E731
    every = check_edges(ssm, batch, whole, found, positions="all", top=2, random=1)
    for edge in every.frame.to_dict("records"):
        assert edge["exact"] == pytest.approx(exact(ssm, batch, edge, groups["top half"][edge["layer"]]), abs=1e-6)
    assert check_edges(ssm, batch, METRIC, found, top=10**6).frame["chosen"].eq("top").all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-mamba1", "tiny-mamba2"])
def test_single_edges_of_the_embedded_models_rank_as_they_should(name: str) -> None:
    model, tokenizer = si.load(name)
    row = tokenize(si.load_prompts()[2000], tokenizer)
    batch = pad([row])
    other = int(model(input_ids=batch.input_ids).logits[0, -1].topk(2).indices[1])
    metric = logit_difference(row.answer_id, other)
    with si.attach(model) as ssm:
        found = edge_attribution(ssm, batch, metric)
        checked = check_edges(ssm, batch, metric, found, top=10**6)
    assert len(checked.frame) == len(found.frame) == 10 * len(row) * (len(row) + 1) // 2
    assert checked.correlation() >= 0.9
    assert checked.correlation("top") == checked.correlation()
    assert checked.correlation("random") != checked.correlation("random")  # NaN: there are none


def test_tables_and_pictures() -> None:
    ssm, batch = double("mamba2"), padded([LENGTH, 4])
    tokens = [[f"{row}.{column}" for column in range(LENGTH)] for row in range(2)]
    found = edge_attribution(ssm, batch, METRIC, features={"a": {0: [0, 1]}, "b": None}, tokens=tokens)
    frame = found.frame
    columns = ["row", "layer", "feature_group", "target", "source", "attribution", "target_token", "source_token"]
    assert list(frame.columns) == columns
    edge = frame.iloc[1234 % len(frame)]
    place = edge["row"], found.layers.index(edge["layer"]), found.groups.index(edge["feature_group"])
    assert edge["attribution"] == float(found.values[(*place, edge["target"], edge["source"])])
    assert edge["source_token"] == f"{edge['row']}.{edge['source']}"
    top = found.top(5)["attribution"].abs()
    assert top.is_monotonic_decreasing
    assert top[0] == float(found.values.abs().max())
    left, right, *_ = found.plot(row=1, group="b").axes
    assert left.get_title() == "Edges into “1.6”, position 3"
    figure = left.figure.figure
    assert figure.get_suptitle() == f"{ssm.name}: metric = {float(found.metric[1]):.3g}, features: b"
    assert found.plot(group="b", title="mine").get_suptitle() == "mine"
    integrated = edge_attribution(ssm, batch, METRIC, steps=2).plot()
    assert integrated.axes[-1].get_ylabel().startswith("Share of the change of the metric")
    assert [text.get_text() for text in right.get_xticklabels()] == ["1.3", "1.4", "1.5", "1.6"]
    for options, message in (({}, "name one of the feature groups"), ({"row": 2, "group": "b"}, "there is no row 2")):
        with pytest.raises(FeatureError, match=message):
            found.plot(**options)
    with pytest.raises(FeatureError, match=r"there are \[7, 3\] tokens, but 2 rows of 7 positions"):
        edge_attribution(ssm, batch, METRIC, tokens=[tokens[0], tokens[1][:3]])
    with pytest.raises(FeatureError, match="feature groups may overlap"):
        edge_attribution(ssm, batch, METRIC, features={"b": None}, steps=2).gap  # noqa: B018
    with pytest.raises(FeatureError, match="no integral"):
        found.gap  # noqa: B018
    assert repr(found) == "EdgeAttribution([2, 4, 2, 7, 7], layers [0, 1, 2, 3], groups ['a', 'b'], steps 1)"


BAD_METRICS = {
    "returned 1.5 of type float, but must return a tensor with one number": lambda logits: 1.5,
    r"returned \[\], but must return .* each of the 2 rows": lambda logits: logits[:, 0].sum(),
    r"returned \[2, 64\]": lambda logits: logits,
    "is nan for row 1": lambda logits: logits[:, 0] * torch.tensor([1.0, torch.nan]),
    "does not depend on the logits": lambda logits: logits[:, 0].detach(),
    "returned torch.int64": lambda logits: logits.argmax(-1),
    r"given the logits \[b v\] = \[2, 64\]": lambda logits: logits.sum(),
    "positions='all'": lambda logits: logits[:, -1, 3],
    "answer names 3 tokens, but there are 2 rows": log_probability([1, 2, 3]),
    "other names the token 64, but the vocabulary has 64": logit_difference(1, 64),
}


@pytest.mark.parametrize("message", BAD_METRICS)
def test_metrics_that_are_none(message: str) -> None:
    ssm = si.attach(build("mamba2"))
    with as_users_run_it(), pytest.raises(SsmInterpError, match=message):
        edge_attribution(ssm, inputs(2, 4), BAD_METRICS[message])


def test_metrics_of_tokens() -> None:
    logits = torch.randn(2, 9)
    assert torch.allclose(log_probability([4, 1])(logits), logits.log_softmax(1)[[0, 1], [4, 1]])
    assert torch.equal(logit_difference(4, [0, 2])(logits), logits[[0, 1], [4, 4]] - logits[[0, 1], [0, 2]])
    for bad in (1.5, "Paris", [], -1, None):
        with pytest.raises(MetricError, match="answer must be a token id, or one for each row"):
            log_probability(bad)
    with pytest.raises(MetricError, match=r"last token, \[b v\], got \[1, 2, 9\]"):
        log_probability(1)(logits[None])


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "steps must be a whole number, at least 1, got 0": {"steps": 0},
    "layers names no layer": {"layers": []},
    "there is no SSM layer 9": {"layers": [0, 9]},
    "positions must be one of": {"positions": "first"},
    "features must be name -> layer -> features": {"features": {}},
    "names layer 7": {"features": {"a": {7: [0]}}},
    "must name heads or .* pairs, at least one, in layer 0": {"features": {"a": {0: []}}},
    "layer 0 has no feature 99": {"features": {"a": {0: [99]}}},
    r"'a' names none of the layers \[1\]": {"features": {"a": {0: [1]}}, "layers": 1},
    r"the metric must be a name .* or a function of logits.*got 3": {"metric": 3},
    "inputs must be ids": {"inputs": "The capital of"},
    r"input_ids must be integers \[b t\], got torch.int64 \[4\]": {"inputs": torch.ones(4, dtype=torch.long)},
    "inputs hold past_key_values": {"inputs": inputs(2, 4) | {"past_key_values": object()}},
    "attention_mask must be .* with a token in every row; row 1": {
        "inputs": inputs(2, 4) | {"attention_mask": torch.tensor([[1] * 4, [0] * 4])}
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_input_is_named(message: str) -> None:
    ssm = si.attach(build("mamba2"))
    options = {"inputs": inputs(2, 4), "metric": METRIC} | BAD_OPTIONS[message]
    with as_users_run_it(), pytest.raises(SsmInterpError, match=message):
        edge_attribution(ssm, options.pop("inputs"), options.pop("metric"), **options)


def test_without_gradients_it_says_so() -> None:
    model = build("mamba")
    ssm, given = si.attach(model), inputs(2, 4)
    with torch.no_grad(), pytest.raises(FeatureError, match="torch.no_grad is on; call it outside"):
        edge_attribution(ssm, given, METRIC)
    with torch.inference_mode(), pytest.raises(FeatureError, match="torch.inference_mode is on"):
        edge_attribution(ssm, given, METRIC)
    model.train()
    with pytest.raises(FeatureError, match=r"training mode.*model.eval\(\)"):
        edge_attribution(ssm, given, METRIC)
    with torch.inference_mode():
        frozen = build("mamba")
    with pytest.raises(FeatureError, match="made under torch.inference_mode"):
        edge_attribution(si.attach(frozen), given, METRIC)
    llama, _ = si.load("tiny-llama")
    with pytest.raises(FeatureError, match="has no SSM layers"):
        edge_attribution(si.attach(llama), given, METRIC)


UNFIT = (
    si.ScaleFeatures(factor=0.5),
    si.PatchState(position=1, state=0.0),
    si.EditAttention(edges=[(2, 1)], value=0.0),
    si.Knockout(sources=0, targets=-1, features=[0]),
)


@pytest.mark.parametrize("edit", UNFIT, ids=lambda edit: edit.kind)
def test_edits_under_which_edges_have_no_single_worth(edit: si.Intervention) -> None:
    ssm, given = double("mamba2"), inputs(2, 4)
    here = type(edit).from_dict(edit.to_dict() | {"layers": [1]})
    with ssm.edit(here):
        with pytest.raises(FeatureError, match=f"{edit.kind}.* at work at layer 1"):
            edge_attribution(ssm, given, METRIC)
        found = edge_attribution(ssm, given, METRIC, layers=[2, 3]).values
        assert relative_error(found, masked_gradient(ssm, given)[:, 2:]) <= 1e-9


def test_hooks_under_which_edges_have_no_single_worth() -> None:
    ssm, given = double("mamba2"), inputs(2, 4)
    with ssm.layers[1].hook_attn.register_forward_hook(lambda module, args, attn: attn.tril(-1)):
        with pytest.raises(FeatureError, match="hook_attn of layer 1 is hooked"):
            edge_attribution(ssm, given, METRIC)
        with pytest.warns(HookedWarning, match="hook_attn of layer 1"):
            assert isinstance(edge_attribution(ssm, given, METRIC, layers=[0, 2]), EdgeAttribution)


def test_a_check_of_other_inputs_is_refused() -> None:
    ssm = si.attach(build("mamba2"))
    found = edge_attribution(ssm, inputs(2, 5), METRIC)
    with pytest.raises(FeatureError, match=r"the attribution is of inputs \[2, 5\] with 10 tokens, .*\[2, 4\]"):
        check_edges(ssm, inputs(2, 4), METRIC, found)
    with pytest.raises(FeatureError, match="top must be a whole number, at least 0, got -1"):
        check_edges(ssm, inputs(2, 5), METRIC, found, top=-1)
    with pytest.raises(FeatureError, match="'top', 'random' or None"):
        check_edges(ssm, inputs(2, 5), METRIC, found, top=3, random=0).correlation("best")


def test_a_check_of_something_else_is_refused() -> None:
    with si.attach(build("mamba2")) as ssm:
        found = edge_attribution(ssm, inputs(2, 7), logit_difference(3, 5))
        for other, metric in ((inputs(2, 7, seed=4), logit_difference(3, 5)), (inputs(2, 7), logit_difference(8, 9))):
            with pytest.raises(FeatureError, match="give the same model, inputs and metric to both"):
                check_edges(ssm, other, metric, found)
        for count in (-1, True):
            with pytest.raises(FeatureError, match="at least 0"):
                found.top(count)
