"""With TransformerLens: a bridge on an attached model runs, and our hook points answer as its own do."""

from __future__ import annotations

import pytest
import torch
from support import edited, logits, relative_error
from tiny_hosts import build, inputs

import ssm_interp as si

pytestmark = pytest.mark.hosts
pytest.importorskip("transformer_lens", reason="the extra `hosts` is not installed")


@pytest.mark.parametrize(("name", "architecture"), [("mamba", "MambaForCausalLM"), ("mamba2", "Mamba2ForCausalLM")])
def test_a_bridge_on_an_attached_model(name: str, architecture: str) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = build(name)
    ids = inputs(1, 8)["input_ids"]
    native = logits(model, {"input_ids": ids})
    ssm = si.attach(model)
    knocked = edited(ssm, {"input_ids": ids}, si.Knockout(edges=[(7, 3)], layers=1))
    bridge = build_bridge_from_module(model, architecture, hf_config=model.config)
    with torch.no_grad():
        assert torch.equal(bridge(ids), native)
        seen = []
        point = ssm.layers[1].hook_attn

        def zero(attn: torch.Tensor, hook: si.HookPoint) -> torch.Tensor:
            seen.append(hook.name)
            attn = attn.clone()
            attn[:, :, 7, 3] = 0
            return attn

        point.add_hook(zero)
        found = bridge(ids)
        point.remove_hooks()
        assert seen == ["attn"]
        assert relative_error(found, knocked) <= 1e-5
        with ssm.edit(si.Knockout(edges=[(7, 3)], layers=1)):
            assert torch.equal(bridge(ids), knocked)
        assert torch.equal(bridge(ids), native)


def test_hook_points_have_the_methods_of_theirs() -> None:
    import inspect

    from transformer_lens.hook_points import HookPoint

    for method in ("add_hook", "remove_hooks", "has_hooks"):
        theirs = inspect.signature(getattr(HookPoint, method)).parameters
        ours = inspect.signature(getattr(si.HookPoint, method)).parameters
        assert set(ours) <= set(theirs), method
        for name, parameter in ours.items():
            assert parameter.default == theirs[name].default, (method, name)


def test_importing_the_package_imports_no_host() -> None:
    import subprocess
    import sys

    code = (
        "import sys, ssm_interp; print([m for m in ('nnsight', 'transformer_lens', 'circuitsvis') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
