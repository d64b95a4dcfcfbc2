"""Circuit search: trials are exact knockouts, searches end where they should, and known circuits are found."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from test_softmax import transformer
from tiny_hosts import CONFIGS, build, inputs, padded
from torch import Tensor

import ssm_interp as si
from ssm_interp.circuits import Circuit, fact_roles, find_circuit
from ssm_interp.circuits.trials import describe_edge, edge_of, layer_of
from ssm_interp.errors import FeatureError, SsmInterpError
from ssm_interp.hooks import Attachment
from ssm_interp.models import INDUCTION
from ssm_interp.prompts import Batch, induction_prompts, induction_roles, pad, tokenize

LENGTHS = [9, 6]
ROLES = {"early": range(2), "middle": range(2, 4), "late": range(4, 9)}  # of a prompt; the second one ends at 6


def columns(name: str, side: str) -> list[list[int]]:
    """Where a role stands in each padded row."""
    shift = [max(LENGTHS) - length if side == "left" else 0 for length in LENGTHS]
    return [[place + by for place in ROLES[name] if place < length] for length, by in zip(LENGTHS, shift, strict=True)]


def spread(logits: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 5]


def by_hand(ssm: Attachment, rows: dict[str, Tensor], removed: Collection[si.Knockout]) -> float:
    """The metric with edge groups removed: one prompt at a time, unpadded, with every edge named. Nothing but the norms
    of the hosts rounds to float32."""
    found = []
    for row, kept in zip(rows["input_ids"], rows["attention_mask"].bool(), strict=True):
        ids = row[kept]
        edges = [
            [(t, s) for t in ROLES[target] for s in ROLES[source] if len(ids) > t >= s]
            for target, source in map(edge_of, removed)
        ]
        edits = [
            si.Knockout(edges=named, layers=group.layers) for named, group in zip(edges, removed, strict=True) if named
        ]
        with torch.no_grad(), ssm.edit(*edits):
            found.append(spread(ssm.model(ids[None], use_cache=False).logits[:, -1]))
    return float(torch.cat(found).double().mean())


def searched(ssm: Attachment, side: str = "left", **options: Any) -> Circuit:
    rows = padded(LENGTHS, side=side)
    roles = {name: columns(name, side) for name in ROLES}
    layers = list(ssm.layers or ssm.attention)[:2]
    given: dict[str, Any] = {"roles": roles, "layers": layers, "metric": spread, "tolerance": 0.3, "relative": True}
    return find_circuit(ssm, rows, **given | options)


@pytest.mark.parametrize(
    ("name", "side"), [*((name, "left") for name in CONFIGS), ("mamba", "right"), ("bamba", "right")]
)
def test_trials_are_exact_knockouts_whatever_the_padding(name: str, side: str) -> None:
    rows = padded(LENGTHS, side=side)
    with si.attach(build(name).double(), own_operator=True) as ssm:
        circuit = searched(ssm, side)
        everything = (*circuit.groups, *circuit.removed)
        assert len(everything) == len(set(everything)) == 2 * 6
        for value, removed in [(circuit.clean, ()), (circuit.alone, circuit.removed), (circuit.empty, everything)]:
            assert value == pytest.approx(by_hand(ssm, rows, removed), rel=1e-6)
        for group, effect in list(circuit.effects.items())[:2]:
            value = by_hand(ssm, rows, (*circuit.removed, group))
            assert effect == pytest.approx(value - circuit.alone, rel=1e-4, abs=1e-6)


def test_a_transformer_has_circuits_too() -> None:
    with si.attach(transformer("gpt2").double()) as ssm:
        circuit = searched(ssm)
        assert circuit.alone == pytest.approx(by_hand(ssm, padded(LENGTHS, side="left"), circuit.removed), rel=1e-6)


def test_a_search_goes_as_its_log_says() -> None:
    with si.attach(build("mamba2").double(), own_operator=True) as ssm:
        circuit = searched(ssm, tolerance=0.2)
    log, gone = circuit.log, []
    assert circuit.tolerance == pytest.approx(0.2 * abs(circuit.clean - circuit.empty))
    assert 0 < len(circuit.groups) < 12
    for number, part in log.groupby("round"):
        assert len(part) == 12 - len(gone)
        left = part.sort_values("change", key=abs, kind="stable")
        here = list(left[left["removed"]].index)
        assert here == list(left.index[: len(here)])  # those that matter least
        gone += here
        last = number == log["round"].max()
        assert last == (part["change"].abs() > circuit.tolerance).all() == (not here)
    assert len(gone) == len(circuit.removed)
    assert abs(circuit.alone - circuit.clean) <= circuit.tolerance
    assert circuit.faithfulness == pytest.approx((circuit.alone - circuit.empty) / (circuit.clean - circuit.empty))


def test_neither_the_batch_size_nor_chance_matters() -> None:
    seen: list[tuple[int, int]] = []
    with si.attach(build("mamba").double(), own_operator=True) as ssm:
        one = searched(ssm, batch_size=1, layers=[1])
        other = searched(ssm, batch_size=1000, layers=[1], progress=lambda done, total: seen.append((done, total)))
    assert one.groups == other.groups and one.removed == other.removed
    assert one.alone == pytest.approx(other.alone, rel=1e-6)
    assert [done for done, _ in seen] == list(range(1, other.trials + 1)) and seen[-1] == (other.trials, other.trials)
    assert all(done <= total for done, total in seen)


def induction(name: str, count: int = 16) -> tuple[Attachment, Batch]:
    model, tokenizer = si.load(name)
    return si.attach(model, own_operator=True), pad([tokenize(p, tokenizer) for p in induction_prompts(count)])


@pytest.mark.parametrize("name", INDUCTION)
def test_the_circuit_of_induction_is_the_edge_from_the_answer_to_the_query(name: str) -> None:
    ssm, batch = induction(name)
    circuit = find_circuit(ssm, batch, roles=induction_roles(batch), tolerance=0.1, relative=True)
    assert {edge_of(group)[::-1] for group in circuit.groups} == {("answer", "query")}
    assert circuit.faithfulness == pytest.approx(1, abs=0.1)
    assert circuit.empty < -3 < -0.2 < circuit.clean


@pytest.mark.parametrize("name", INDUCTION)
def test_single_positions_as_roles(name: str) -> None:
    model, tokenizer = si.load(name)
    (prompt,) = induction_prompts(1, length=9, seed=3)
    row = tokenize(prompt, tokenizer)
    with si.attach(model, own_operator=True) as ssm:
        circuit = find_circuit(ssm, pad([row]), roles=range(9), tolerance=0.5, metric="probability")
        plain = find_circuit(
            ssm,
            torch.tensor([row.ids]),
            roles=range(9),
            tolerance=0.5,
            metric=lambda logits: logits.softmax(1)[:, row.answer_id],
        )
    (answer,) = row.roles["subject"]
    assert (str(answer), "8") in {edge_of(group)[::-1] for group in circuit.groups}
    assert plain.groups == circuit.groups


def test_groups_of_features() -> None:
    ssm, batch = induction("tiny-induction-mamba2", 8)
    halves = ["top half", "bottom half"]
    circuit = find_circuit(ssm, batch, roles=induction_roles(batch), tolerance=0.2, relative=True, features=halves)
    assert len(circuit.groups) + len(circuit.removed) == 2 * 15 * 2
    assert {group.features for group in circuit.groups} <= set(halves)
    some = {"first head": {0: [0]}, "rest": {0: [1, 2, 3]}}  # and no group in layer 1
    circuit = find_circuit(ssm, batch, roles=induction_roles(batch), tolerance=0.0, features=some)
    assert {layer_of(group) for group in (*circuit.groups, *circuit.removed)} == {0}
    with torch.no_grad(), ssm.edit(si.Knockout(layers=0)):
        logits = ssm.model(batch.input_ids, use_cache=False).logits[:, -1].double().log_softmax(1)
    assert circuit.empty == pytest.approx(float(logits.gather(1, batch.answer_ids[:, None]).mean()), rel=1e-4)


def test_edits_at_work_are_part_of_the_clean_run() -> None:
    ssm, batch = induction("tiny-induction-mamba1", 4)
    roles = induction_roles(batch)
    plain = find_circuit(ssm, batch, roles=roles, tolerance=0.1)
    with ssm.edit(si.Knockout(sources=roles["answer"], targets=-1)):
        edited = find_circuit(ssm, batch, roles=roles, tolerance=0.1)
    assert edited.clean < plain.clean - 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ssm_interp.prompts.SharedTokenWarning")
@pytest.mark.parametrize("name", ["tiny-mamba1", "tiny-mamba2"])
def test_the_circuit_of_facts_goes_from_the_subject_to_the_last_token(name: str) -> None:
    model, tokenizer = si.load(name)
    rows = [tokenize(prompt, tokenizer) for prompt in si.load_prompts()[::300]]
    batch = pad([row for row in rows if all(found[0] for found in fact_roles(pad([row])).values())])
    assert len(batch.prompts) > 4
    with si.attach(model, own_operator=True) as ssm:
        circuit = find_circuit(ssm, batch, tolerance=0.1, relative=True)
    assert ("subject", "last") in {edge_of(group)[::-1] for group in circuit.groups}
    assert len(circuit.groups) < 20
    assert len(circuit.groups) + len(circuit.removed) == 100


def test_what_a_circuit_says_and_shows() -> None:
    ssm, batch = induction("tiny-induction-mamba2", 8)
    circuit = find_circuit(ssm, batch, roles=induction_roles(batch), tolerance=0.1, relative=True)
    lines = str(circuit).splitlines()
    assert lines[0] == f"circuit: 1 of 30 edge groups, faithfulness {circuit.faithfulness:.3f}"
    assert lines[1].startswith("log_probability (mean over 8 prompts): clean -")
    assert lines[3].split()[:5] == ["layer", "0", "query", "<-", "answer"]
    assert describe_edge(circuit.groups[0]) == "query <- answer"
    frame = circuit.frame
    assert len(frame) == 30
    assert frame["kept"].sum() == 1
    assert frame["effect"].notna().sum() == 1
    figure = circuit.plot()
    (axes,) = figure.axes
    assert figure.get_suptitle() == f"tiny-induction-mamba2, 8 prompts\n{lines[0].removeprefix('circuit: ')}"
    assert "change of ln p of the answer (nats)" in axes.get_xlabel()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["before", "trigger", "answer", "between", "query"]


def test_edges_that_do_nothing_leave_nothing() -> None:
    ssm, batch = induction("tiny-induction-mamba2", 2)
    constant = find_circuit(ssm, batch, roles=induction_roles(batch), tolerance=0, metric=lambda x: x[:, 0] * 0)
    assert constant.groups == ()
    assert constant.faithfulness != constant.faithfulness
    assert len(str(constant).splitlines()) == 2
    with pytest.raises(FeatureError, match="leaves the metric at 0, so a tolerance relative to that means nothing"):
        find_circuit(
            ssm, batch, roles=induction_roles(batch), tolerance=0.1, relative=True, metric=lambda x: x[:, 0] * 0
        )


def test_roles_of_facts_share_out_every_position() -> None:
    _, tokenizer = si.load("tiny-mamba1")
    batch = pad([tokenize(prompt, tokenizer) for prompt in si.load_prompts()[::500]])
    roles = fact_roles(batch)
    assert list(roles) == ["context", "subject", "after", "last"]
    for row, mask in enumerate(batch.attention_mask):
        assert sorted(c for found in roles.values() for c in found[row]) == mask.nonzero()[:, 0].tolist()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tolerance": -0.1}, "tolerance must be a finite number, at least 0, got -0.1"),
    ({"tolerance": float("nan")}, "tolerance must be a finite number, at least 0, got nan"),
    ({"metric": "accurracy"}, "no metric 'accurracy': did you mean 'accuracy'"),
    ({"metric": "accuracy"}, "needs the prompts' answers, which a Batch of prompts has"),
    ({"metric": lambda logits: logits}, r"returned \[2, 64\], but must return a tensor with one number for each"),
    ({"metric": lambda logits: 1.0}, r"returned 1.0 of type float, but must return"),
    ({"metric": lambda logits: logits[:, 0] / 0}, "the metric is -?inf for row 0, not a finite number"),
    ({"layers": []}, r"at least one layer; Mamba2ForCausalLM has \[0, 1, 2, 3\]"),
    ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
    ({"roles": {}}, "roles must be names of roles, or role -> positions"),
    ({"roles": ["subject"]}, "without a Batch of prompts nobody knows which positions are 'subject'"),
    ({"roles": {"a": [0, 1], "b": range(1, 6)}}, "'a' and 'b' overlap: both have position 1 of row 0"),
    ({"roles": {"a": [0, 1], "b": range(2, 5)}}, "no role has position 5 of row 0; the roles of a circuit"),
    ({"roles": {"a": range(6), "b": []}}, "the role 'b' has no position in row 0; .* leave these 2 prompts out"),
    ({"features": {}}, "features has no group for any of the layers"),
    ({"features": {"none": {0: []}}}, "the feature group 'none' must name heads or .* in layer 0"),
    ({"features": {"one": {0: [0, 1]}, "two": {0: [1, 2]}}}, "'one' and 'two' overlap: both have head 1 of layer 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"roles": {"a": range(6)}, "tolerance": 1, "metric": spread}
    with si.attach(build("mamba2")) as ssm, pytest.raises(SsmInterpError, match=message):
        find_circuit(ssm, inputs(2, 6)["input_ids"], **given | options)


def test_bad_models_prompts_and_inputs() -> None:
    ids, given = inputs(2, 6)["input_ids"], {"roles": {"a": range(6)}, "tolerance": 1, "metric": spread}
    with si.attach(transformer("gpt2")) as ssm:
        with pytest.raises(si.InterventionError, match="ssm"):
            find_circuit(ssm, ids, **given, through="ssm")
        with pytest.raises(FeatureError, match="no SSM layers"):
            find_circuit(ssm, ids, **given, features=["top third"])
    with si.attach(build("mamba").train()) as ssm, pytest.raises(FeatureError, match="is in training mode"):
        find_circuit(ssm, ids, **given)
    ssm, batch = induction("tiny-induction-mamba1", 2)
    with pytest.raises(FeatureError, match=r"input_ids is empty, \[0, 6\]"):
        find_circuit(ssm, ids[:0], **given)
    with pytest.raises(FeatureError, match=r"attention_mask must be a tensor \[b t\].* \(\[2, 6\]\), got \[2, 5\]"):
        find_circuit(ssm, {"input_ids": ids % 27, "attention_mask": ids[:, 1:]}, **given)
    with pytest.raises(FeatureError, match="'context' and 'relation_minus_last' overlap: .* of row 0, '"):
        find_circuit(ssm, batch, roles=["context", "subject", "relation_minus_last", "last"], tolerance=1)
    with pytest.raises(si.InterventionError, match="no such layer"):
        find_circuit(ssm, batch, roles=induction_roles(batch), tolerance=1, layers=[7])
    with pytest.raises(si.PromptError, match="no role 'subjekt': did you mean 'subject'"):
        find_circuit(ssm, batch, roles=["subjekt"], tolerance=1)
