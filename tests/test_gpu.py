"""On an accelerator: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from support import edited, logits, relative_error
from test_rows import LENGTH, ROLES, answers, error, forwards, windows
from test_softmax import transformer
from tiny_hosts import inputs
from transformers import PreTrainedModel

import ssm_interp as si
from ssm_interp.features import (
    attention_views,
    check_edges,
    decompose,
    edge_attribution,
    feature_groups,
    find_circuit,
    logit_attribution,
    logit_difference,
    spectrum,
)
from ssm_interp.hooks import Attachment

pytestmark = pytest.mark.gpu


def test_attached_on_cuda(host: PreTrainedModel) -> None:
    ids = inputs(2, 9)["input_ids"]
    with si.attach(host) as ssm:
        on_cpu = edited(ssm, {"input_ids": ids}, si.Knockout(sources=[1, 2], targets=-1))
    host.cuda()
    case = {"input_ids": ids.cuda()}
    native = logits(host, case)
    with si.attach(host) as ssm:
        assert torch.equal(logits(host, case), native)
        with torch.no_grad(), ssm.expose("write", "state", "attn"):
            assert relative_error(host(**case).logits, native) <= 1e-5
        on_gpu = edited(ssm, case, si.Knockout(sources=[1, 2], targets=-1))
        assert relative_error(on_gpu.cpu(), on_cpu) <= 1e-3
        host.generate(**case, max_new_tokens=3, do_sample=False)


def test_rows_of_one_step_on_cuda(host: PreTrainedModel) -> None:
    ids = inputs(2, LENGTH)["input_ids"].cuda()
    with si.attach(host.cuda()) as ssm:
        variants = [
            si.Knockout(sources=ROLES[source], targets=ROLES[target], layers=window, through=through)
            for source in ("subject", "relation")
            for target in ("last", "subject")
            for window in windows(ssm)
            for through in ("ssm", ("ssm", "conv"))
        ]
        assert error(answers(ssm, ids, variants), forwards(ssm, ids, variants)) <= 1e-4


def test_softmax_knockouts_on_cuda() -> None:
    ids = inputs(2, LENGTH)["input_ids"].cuda()
    with si.attach(transformer("llama", "sdpa").cuda()) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=[5, 8], layers=window) for window in windows(ssm)]
        assert error(answers(ssm, ids, variants), forwards(ssm, ids, variants)) <= 1e-4


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


def test_features_on_cuda_are_those_on_the_cpu(host: PreTrainedModel) -> None:
    ids = inputs(2, LENGTH)["input_ids"]
    with si.attach(host) as ssm:
        on_cpu = features_of(ssm, ids)
    with si.attach(host.cuda()) as ssm:
        on_gpu = features_of(ssm, ids.cuda())
    for name, known in on_cpu.items():
        assert error(on_gpu[name], known) <= 1e-3, name
