"""An attached model that is copied or stored is attached again: the same logits, hooks and edits; and it detaches."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import edited, logits, relative_error
from tiny_hosts import build, inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

import ssm_interp as si

CUT = si.Knockout(sources=[0, 1], targets=-1)


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


AGAIN: dict[str, Callable[[nn.Module], Any]] = {
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": _saved,
    "copied": copy.deepcopy,
}


def halve(tensor: Tensor, _point: object) -> Tensor:
    return tensor * 0.5


def halve_output(_module: object, _args: object, output: Tensor) -> Tensor:
    return output * 0.5


@pytest.mark.parametrize(("how", "own"), [("pickled", True), ("saved", False), ("copied", False)])
def test_stored_and_loaded(host: PreTrainedModel, how: str, own: bool) -> None:
    native, kinds = logits(host, inputs()), [type(module) for module in host.modules()]
    with si.attach(host, own_operator=own) as ssm:
        idle, cut = logits(host, inputs()), edited(ssm, inputs(), CUT)
        last = ssm.layers[max(ssm.layers)]
        last.hook_y.add_hook(halve)
        last.hook_x.register_forward_hook(halve_output)
        hooked = logits(host, inputs())
        assert relative_error(hooked, idle) > 1e-6
        with ssm.expose("state"):
            again = AGAIN[how](host)
        loaded = si.attached(again)
        assert not any(points.hook_state.exposed for points in loaded.layers.values())
        assert (list(loaded.layers), loaded.hooks) == (list(ssm.layers), ssm.hooks)
        assert torch.equal(logits(again, inputs()), hooked)
        loaded.reset_hooks()
        assert len(ssm.hooks) == 2
        assert torch.equal(logits(again, inputs()), idle)
        assert torch.equal(edited(loaded, inputs(), CUT), cut)
        loaded.detach()
        assert torch.equal(logits(again, inputs()), native)
        assert [type(module) for module in again.modules()] == kinds
    assert torch.equal(logits(host, inputs()), native)


def test_a_hook_that_cannot_be_pickled_says_so() -> None:
    with si.attach(build("mamba2")) as ssm:
        ssm.layers[0].hook_y.add_hook(lambda y, hook: y)
        with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't pickle .*lambda"):
            pickle.dumps(ssm.model)
        ssm.reset_hooks()
        assert si.attached(pickle.loads(pickle.dumps(ssm.model))).layers.keys() == ssm.layers.keys()


READ = """
import pickle, sys, torch
model = pickle.load(open(sys.argv[1], "rb"))
import ssm_interp as si
print(type(si.attached(model)).__name__, list(si.attached(model).layers))
torch.save(model(torch.tensor([[3, 4, 5]])).logits, sys.argv[1] + ".logits")
"""


def test_another_process_takes_an_attached_model(tmp_path: Path) -> None:
    model = build("jamba")
    with si.attach(model):
        (tmp_path / "model").write_bytes(pickle.dumps(model))
        run = subprocess.run(
            [sys.executable, "-c", READ, str(tmp_path / "model")], capture_output=True, text=True, check=False
        )
        assert run.stdout == "Attachment [0, 2, 3]\n", run.stderr
        found = torch.load(tmp_path / "model.logits")
        assert torch.allclose(found, logits(model, {"input_ids": torch.tensor([[3, 4, 5]])}), atol=1e-6)


def test_interventions_and_attachments_are_pickled_too() -> None:
    patch = si.PatchState(position=[1, 2], state=torch.randn(8, 8, 8), layers=1)
    with si.attach(build("mamba2")) as ssm:
        again, same = pickle.loads(pickle.dumps((ssm, patch)))
        assert torch.equal(edited(again, inputs(), same), edited(ssm, inputs(), patch))
        assert again.layers[1] is again.mixers[1].ssm
        again.detach()
        assert ssm.is_attached
