"""With nnsight: a model attached before wrapping gives its hook points in a trace."""

from __future__ import annotations

import pytest
import torch
from support import edited, logits, relative_error
from tiny_hosts import build, inputs

import ssm_interp as si

pytestmark = pytest.mark.hosts
nnsight = pytest.importorskip("nnsight", reason="the extra `hosts` is not installed")


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_reading_replacing_and_differentiating_in_a_trace(name: str) -> None:
    model = build(name)
    ids = inputs(1, 8)["input_ids"]
    native = logits(model, {"input_ids": ids})
    ssm = si.attach(model)
    with torch.no_grad():
        known = ssm.run(ids, read=["attn", "x"], layers=1)
    knocked = edited(ssm, {"input_ids": ids}, si.Knockout(edges=[(7, 3)], layers=1))
    ssm.expose("attn", layers=[1])
    wrapped = nnsight.NNsight(model)
    with torch.no_grad(), wrapped.trace(ids):
        x = wrapped.backbone.layers[1].mixer.ssm.hook_x.output.save()
        attn = wrapped.backbone.layers[1].mixer.ssm.hook_attn.output.save()
        found = wrapped.output.logits.save()
    assert torch.equal(attn, known["attn", 1])
    assert torch.equal(x, known["x", 1])
    assert torch.equal(found, native)
    with torch.no_grad(), wrapped.trace(ids):
        wrapped.backbone.layers[1].mixer.ssm.hook_attn.output[:, :, 7, 3] = 0
        in_place = wrapped.output.logits.save()
    with torch.no_grad(), wrapped.trace(ids):
        point = wrapped.backbone.layers[1].mixer.ssm.hook_attn
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[7, 3] = True
        point.output = torch.where(mask, 0.0, point.output)
        replaced = wrapped.output.logits.save()
    for edit in (in_place, replaced):
        assert relative_error(edit, knocked) <= 1e-5
        assert relative_error(edit, native) > 1e-4
    with wrapped.trace(ids):
        attn = wrapped.backbone.layers[1].mixer.ssm.hook_attn.output
        loss = wrapped.output.logits[:, -1].logsumexp(-1).sum()
        with loss.backward():
            gradient = attn.grad.save()
    run = ssm.run(ids, read="attn", layers=1)
    expected = torch.autograd.grad(run.logits[:, -1].logsumexp(-1).sum(), run["attn", 1])[0]
    assert relative_error(gradient, expected) <= 1e-5
    assert gradient.abs().max() > 0


def test_edits_of_ours_hold_in_a_trace() -> None:
    model = build("mamba2")
    ids = inputs(1, 8)["input_ids"]
    ssm = si.attach(model)
    knockout = si.Knockout(sources=[2, 3], targets=-1)
    knocked = edited(ssm, {"input_ids": ids}, knockout)
    wrapped = nnsight.NNsight(model)
    with torch.no_grad(), ssm.edit(knockout), wrapped.trace(ids):
        found = wrapped.output.logits.save()
    assert torch.equal(found, knocked)


def test_attaching_after_wrapping_is_refused() -> None:
    model = build("mamba")
    nnsight.NNsight(model)
    with pytest.raises(si.HookError, match="wrapped by nnsight.*attach first, then wrap"):
        si.attach(model)
