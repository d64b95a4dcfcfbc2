"""Half precision: an edit that changes nothing changes nothing, one that leaves nothing leaves zero."""

from __future__ import annotations

import pytest
import torch
from support import edited, logits, relative_error
from tiny_hosts import inputs

import ssm_interp as si

CASE = inputs(2, 9) | {"use_cache": False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edits_that_change_nothing_and_edits_that_leave_nothing(host, dtype: torch.dtype) -> None:  # noqa: ANN001
    model = host.to(dtype)
    native = logits(model, CASE)
    with si.attach(model) as ssm, torch.no_grad():
        states = ssm.run(CASE, read="state")["state"]
        itself = [
            si.PatchState(position=position, state=states[layer][:, position], layers=layer)
            for layer in ssm.layers
            for position in (0, 4, 8)
        ]
        assert torch.equal(edited(ssm, CASE, *itself), native)
        for name in ("hook_write", "hook_state", "hook_attn"):
            for points in ssm.layers.values():
                getattr(points, name).add_hook(lambda tensor, hook: tensor.clone())
            assert torch.equal(logits(model, CASE), native)
            ssm.reset_hooks()
        largest = max(float(y.abs().max()) for y in ssm.run(CASE, read="y")["y"].values())
        for nothing_left in (
            [si.Knockout(through="ssm")],
            [si.Knockout(sources=None, targets=list(range(9)), through="ssm")],
            [si.PatchState(position=list(range(9)), state=0.0)],
        ):
            with ssm.edit(*nothing_left):
                run = ssm.run(CASE, read="y")
            assert max(float(y.abs().max()) for y in run["y"].values()) <= 1e-6 * largest
    assert edited(si.attach(model), CASE, si.ScaleFeatures(factor=1.0)).equal(native)


@pytest.mark.parametrize("name", ["tiny-mamba1", "tiny-mamba2"])
def test_effects_are_those_of_the_model_in_full_precision(name: str) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, tokenizer = si.load(name)
        given = tokenizer("The name of the capital city of France is", return_tensors="pt")
        paris, london = (tokenizer(word)["input_ids"][0] for word in (" Paris", " London"))
        with si.attach(model.to(dtype)) as ssm:
            knockout = si.Knockout(sources=[7, 8], targets=-1, layers=range(3, 8))
            change = edited(ssm, given, knockout)[0, -1].float() - logits(model, given)[0, -1].float()
        found.append(change[paris] - change[london])
    assert abs(found[0]) > 3
    for effect in found[1:]:
        assert relative_error(effect[None], found[0][None]) <= 0.05
