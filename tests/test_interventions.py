"""Interventions are data: frozen, comparable, serialisable, and checked when they are made."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import ssm_interp as si

EXAMPLES = [
    si.Knockout(sources=[2, 3], targets=-1, layers=range(3, 12)),
    si.Knockout(sources=[[2, 3], [4], []], features=[0, 5]),
    si.Knockout(edges=[(7, 3), (9, 4)], features=[(0, 1)], layers=2),
    si.Knockout(),
    si.PatchState(position=-1, state=torch.randn(2, 3, 4), layers=[3]),
    si.PatchState(position=[1, 2], state=0.0),
    si.PatchState(position=[[1], [2]], state=0.0),
    si.SetDelta(value=0.0, positions=[2]),
    si.ScaleFeatures(factor=0.5, features=3),
    si.EditAttention(edges=[(7, 3)], value=1.5, mode="add"),
]


@pytest.mark.parametrize("intervention", EXAMPLES, ids=lambda intervention: intervention.kind)
def test_to_json_and_back(intervention: si.Intervention) -> None:
    data = json.loads(json.dumps(intervention.to_dict()))
    again = si.Intervention.from_dict(data)
    assert again == intervention
    assert hash(again) == hash(intervention)
    assert type(again) is type(intervention)


def test_all_examples_differ() -> None:
    assert len(set(EXAMPLES)) == len(EXAMPLES)


def test_what_may_be_given() -> None:
    known = si.Knockout(sources=(2, 3), targets=(5,), layers=(0, 1))
    assert si.Knockout(sources=torch.tensor([2, 3]), targets=np.int64(5), layers=range(2)) == known
    assert si.Knockout(sources=np.array([2, 3]), targets=[5], layers={0: "a", 1: "b"}) == known
    pair = si.Knockout(edges=[(np.int64(3), torch.tensor(1))], features=[(np.int64(1), 2)])
    assert json.loads(json.dumps(pair.to_dict())) == {"kind": "Knockout", "edges": [[3, 1]], "features": [[1, 2]]}
    assert hash(si.SetDelta(value=0)) == hash(si.SetDelta(value=0.0))
    assert si.Knockout(sources=torch.tensor([[2], [3]])).sources == ((2,), (3,))
    assert known.to_dict() == {"kind": "Knockout", "sources": [2, 3], "targets": [5], "layers": [0, 1]}


def test_they_are_frozen() -> None:
    with pytest.raises(si.InterventionError, match=r"a Knockout is frozen; intervention.replace\(layers=...\)"):
        EXAMPLES[0].layers = (1,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: si.Knockout(sources=[1.5]), "Knockout.sources must be an integer"),
        (lambda: si.Knockout(sources=True), "Knockout.sources must be an integer"),
        (lambda: si.Knockout(sources=[[1], 2]), "Knockout.sources must be an integer or a role, a sequence of them"),
        (lambda: si.Knockout(sources=[]), "Knockout.sources is empty, so that nothing would happen"),
        (lambda: si.Knockout(edges=[]), "Knockout.edges is empty"),
        (lambda: si.Knockout(sources=0, layers=[]), "Knockout.layers is empty"),
        (
            lambda: si.Knockout(sources=0, source=1),
            r"Knockout has no field \['source'\]; it has \['edges', ",
        ),
        (lambda: si.Knockout(sources=0, layers="all"), "Knockout.layers must be an integer or a sequence"),
        (lambda: si.Knockout(sources=0, edges=[(1, 0)]), "either `edges`, or `sources` and `targets`, not both"),
        (lambda: si.Knockout(edges=[(1, 0, 2)]), r"Knockout.edges must be pairs \(target, source\)"),
        (lambda: si.Knockout(edges=5), r"Knockout.edges must be pairs"),
        (lambda: si.Knockout(sources=0, features=[]), "features is empty; None means all features"),
        (lambda: si.Knockout(sources=0, features=[(0, 1), (1,)]), r"must be pairs \(head, state dimension\)"),
        (lambda: si.PatchState(position=None, state=0.0), "must name a position: .* or one such sequence per row"),
        (lambda: si.PatchState(position=[], state=0.0), "position must name a position"),
        (lambda: si.PatchState(position=[[], []], state=0.0), "position must name a position"),
        (
            lambda: si.PatchState(position=[[1], 2], state=0.0),
            "PatchState.position must be an integer or a role, a sequence of",
        ),
        (lambda: si.PatchState(position=0, state=[1.0, 2.0]), r"must be a number, \[h p n\] or \[b h p n\], got \[2\]"),
        (lambda: si.PatchState(position=0, state="zero"), "PatchState.state must be a number"),
        (lambda: si.SetDelta(value=-0.1), "step >= 0, got -0.1"),
        (lambda: si.SetDelta(value=float("nan")), "SetDelta.value must be a finite number, got nan"),
        (lambda: si.SetDelta(value=0.0, features=[(0, 1)]), "SetDelta acts on heads"),
        (lambda: si.ScaleFeatures(factor=float("inf")), "ScaleFeatures.factor must be a finite number, got inf"),
        (lambda: si.EditAttention(edges=[(1, 0)], value=0.0, mode="put"), "must be 'set', 'add' or 'scale', got 'put'"),
        (lambda: si.EditAttention(edges=[(1, 0)], value=0.0, features=[(0, 1)]), "EditAttention acts on heads"),
        (lambda: si.EditAttention(edges=[(1, 0)], value="q"), "EditAttention.value must be a finite number, got 'q'"),
        (lambda: si.PatchState(position=0, state=float("nan")), "entries that are not finite"),
        (lambda: si.PatchState(position=0, state=True), "state must be real numbers"),
        (lambda: si.PatchState(position=0, state=torch.zeros(2, 2, 2).cfloat()), "real numbers, got torch.complex64"),
        (lambda: si.PatchState(position=0, state=torch.zeros(2, 2, 2, device="meta")), "got torch.float32 on meta"),
        (lambda: si.Intervention.from_dict({"kind": "Knockout", 3: 1, "a": 2}), r"no field \['3', 'a'\]"),
        (lambda: si.Intervention.from_dict(None), "an intervention is a dict with a `kind`"),
        (lambda: si.Intervention.from_dict({"kind": "Knockuot"}), "unknown kind of intervention 'Knockuot'"),
        (lambda: si.Intervention.from_dict({"kind": "Knockout", "source": 1}), r"Knockout has no field \['source'\]"),
        (lambda: si.Intervention.from_dict({"kind": "SetDelta"}), "SetDelta: .*missing.*'value'"),
    ],
)
def test_bad_ones(make, message: str) -> None:  # noqa: ANN001
    with pytest.raises(si.InterventionError, match=message):
        make()
