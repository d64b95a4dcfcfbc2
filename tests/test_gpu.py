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
            si.Knockout(sources=ROLES[source], targets=ROLES[target], layers=window)
            for source in ("subject", "relation")
            for target in ("last", "subject")
            for window in windows(ssm)
        ]
        assert error(answers(ssm, ids, variants), forwards(ssm, ids, variants)) <= 1e-4


def test_softmax_knockouts_on_cuda() -> None:
    ids = inputs(2, LENGTH)["input_ids"].cuda()
    with si.attach(transformer("llama", "sdpa").cuda()) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=[5, 8], layers=window) for window in windows(ssm)]
        assert error(answers(ssm, ids, variants), forwards(ssm, ids, variants)) <= 1e-4
