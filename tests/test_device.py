"""On another device than the CPU: on the second device of these tests, and with `pytest -m gpu` on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from second_device import put, second_device
from support import edited, logits, relative_error
from test_rows import LENGTH, ROLES, answers, error, forwards, windows
from test_softmax import transformer
from tiny_hosts import inputs, padded
from transformers import PreTrainedModel

import ssm_interp as si
from ssm_interp.attribution import attention_views, check_edges, decompose, edge_attribution, logit_attribution
from ssm_interp.circuits import find_circuit
from ssm_interp.features import feature_groups, spectrum
from ssm_interp.flow import sweep
from ssm_interp.hooks import Attachment, logit_difference
from ssm_interp.hooks.seam.blocks import blocks_of

Place = Callable[[Any], Any]


@pytest.fixture(params=["second device", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Moves a model or a tensor to the device under test."""
    if request.param == "cuda":
        yield lambda thing: thing.cuda()
        return
    with second_device():
        yield put


def test_the_second_device_mixes_with_the_cpu_no_more_than_an_accelerator_does() -> None:
    with second_device():
        here, there = torch.ones(3), put(torch.arange(3))
        for mix in (lambda: here + there, lambda: torch.stack([here, there.float()]), lambda: here[there]):
            with pytest.raises(RuntimeError, match="two devices"):
                mix()
        with pytest.raises(TypeError, match="cpu"):
            there.numpy()
        assert there[torch.tensor([2])].tolist() == there[[2]].tolist() == [2]
        assert torch.equal((there * torch.tensor(2)).cpu(), torch.tensor([0, 2, 4]))
        assert torch.zeros(2, device=there.device).device == here.to(there.device).device == there.device


def interventions(ssm: Attachment) -> list[si.Intervention]:
    layer = max(ssm.layers)
    points = ssm.layers[layer]
    state = torch.ones(points.heads, points.head_dim, points.state_size)
    return [
        si.Knockout(sources=[6, 7], targets=-1, through=("ssm", "conv")),
        si.Knockout(edges=[(7, 6), (8, 8)], layers=layer),
        si.PatchState(position=6, state=state, layers=layer),
        si.SetDelta(value=0.1, positions=[6], layers=layer),
        si.ScaleFeatures(factor=0.5, features=[0], layers=layer),
        si.EditAttention(edges=[(8, 6)], value=0.5, layers=layer),
    ]


def test_every_edit_and_every_hook(host: PreTrainedModel, place: Place) -> None:
    case = padded([9, 4], side="left")
    with si.attach(host) as ssm:
        edits = interventions(ssm)
        known = [edited(ssm, case, edit) for edit in edits]
    host = place(host)
    case = {name: place(tensor) for name, tensor in case.items()}
    native = logits(host, case)
    with si.attach(host) as ssm:
        assert torch.equal(logits(host, case), native)
        with torch.no_grad(), ssm.expose("write", "state", "attn"):
            assert relative_error(host(**case).logits, native) <= 1e-5
        for edit, on_cpu in zip(edits, known, strict=True):
            assert relative_error(edited(ssm, case, edit).cpu(), on_cpu) <= 1e-3, edit
        with ssm.edit(edits[0]):
            host.generate(**case, max_new_tokens=2, do_sample=False)


def test_rows_of_one_step(host: PreTrainedModel, place: Place) -> None:
    ids = place(inputs(2, LENGTH)["input_ids"])
    with si.attach(place(host)) as ssm:
        variants = [
            si.Knockout(sources=ROLES[source], targets=ROLES[target], layers=window, through=through)
            for source, target in (("subject", "last"), ("relation", "subject"))
            for window in windows(ssm)[1:3]
            for through in ("ssm", ("ssm", "conv"))
        ]
        assert error(answers(ssm, ids, variants).cpu(), forwards(ssm, ids, variants).cpu()) <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_softmax_knockouts(kind: str, place: Place) -> None:
    ids = place(inputs(2, LENGTH)["input_ids"])
    with si.attach(place(transformer(kind, "sdpa"))) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=[5, 8], layers=window) for window in windows(ssm)]
        assert error(answers(ssm, ids, variants).cpu(), forwards(ssm, ids, variants).cpu()) <= 1e-4


def split(host: PreTrainedModel, place: Place) -> PreTrainedModel:
    """The second half of its blocks on the device under test, the rest on the CPU, as a `device_map` has it."""
    blocks = blocks_of(host)
    assert blocks is not None
    for block in list(blocks)[len(blocks) // 2 :]:
        device = next(place(block).parameters()).device
        add_hook_to_module(block, AlignDevicesHook(execution_device=device, io_same_device=True))
    return host


def test_a_model_split_over_two_devices(host: PreTrainedModel, place: Place) -> None:
    ids = inputs(2, LENGTH)["input_ids"]
    with si.attach(host) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=[5, -1], layers=window) for window in windows(ssm)[1:3]]
        known = answers(ssm, ids, variants)
    with si.attach(split(host, place)) as ssm:
        assert error(forwards(ssm, ids, variants).cpu(), known) <= 1e-4
        assert error(answers(ssm, ids, variants).cpu(), known) <= 1e-4


def features_of(ssm: Attachment, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Something of everything that the features floor computes, on the CPU."""
    layer, metric = max(ssm.layers), logit_difference(3, 4)
    groups = feature_groups(ssm, ["top half", "all but top half"])
    edges = edge_attribution(ssm, ids, metric, features=groups)
    found = {
        "decomposition": decompose(ssm, ids, features=groups)[layer].parts["ssm"],
        "by input": decompose(ssm, ids, by="input")[layer].parts["ssm"],
        "logits": logit_attribution(ssm, ids, 3, 4).by_position(),
        "unified": attention_views(ssm, ids, "unified", reduction="norm")[layer].values,
        "edges": edges.values,
        "mean distance": spectrum(ssm, ids)["mean distance"][layer],
    }
    exact = check_edges(ssm, ids, metric, edges, top=3, random=0).frame["exact"]
    found["exact"] = torch.tensor(exact.to_numpy()).abs().sort().values
    circuit = find_circuit(
        ssm, ids, roles={"early": range(4), "late": range(4, 9)}, layers=[layer], metric=metric, tolerance=0.0
    )
    found["circuit"] = torch.tensor([circuit.clean, circuit.empty])
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("host", ["mamba", "jamba", "mamba2", "nemotron_h"], indirect=True)
def test_features(host: PreTrainedModel, place: Place) -> None:
    ids = inputs(2, LENGTH)["input_ids"]
    with si.attach(host) as ssm:
        on_cpu = features_of(ssm, ids)
    with si.attach(place(host)) as ssm:
        found = features_of(ssm, place(ids))
    for name, known in on_cpu.items():
        assert error(found[name], known) <= 1e-3, name


def test_a_sweep(place: Place) -> None:
    model, tokenizer = si.load("tiny-mamba2")
    prompts = si.load_prompts()[:2]

    def table() -> pd.DataFrame:
        with si.attach(model) as ssm:
            return sweep(ssm, tokenizer, prompts, sources=["subject", 0], through=["ssm", "conv"], windows=10).frame

    known = table()
    place(model)
    pd.testing.assert_frame_equal(table(), known, rtol=1e-3, atol=1e-4)
