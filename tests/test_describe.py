"""What errors and reprs show: never a tensor, never a model; and a layer or a reading that is not there by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from random_terms import as_users_run_it
from tiny_flow import world
from tiny_hosts import build, inputs
from transformers import BatchEncoding

import ssm_interp as si
from ssm_interp.hooks import MissingError
from ssm_interp.hooks.rows.engine import run_each
from ssm_interp.prompts import pad, tokenize
from ssm_interp.reprs import describe

BIG = torch.full((3, 700), 0.125)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (BIG, "Tensor [3, 700]"),
        (torch.tensor(1.5), "tensor(1.5000)"),
        (BIG.numpy(), "ndarray [3, 700]"),
        ({0: BIG, 1: [BIG, 2]}, "{0: Tensor [3, 700], 1: [Tensor [3, 700], 2]}"),
        ([BIG] * 100, "[" + "Tensor [3, 700], " * 8 + "...]"),
        (BatchEncoding({"input_ids": BIG}), "BatchEncoding of ['input_ids']"),
        (torch.nn.Linear(2, 2), "Linear"),
        (torch.nn.Linear, "Linear"),
        (describe, "describe"),
        ("x" * 1000, "'" + "x" * 37 + "..." + "x" * 38 + "'"),
        ([1, "a", None, True, 2.5], "[1, 'a', None, True, 2.5]"),
        (range(3), "range(0, 3)"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        ({at: None for at in range(9)}, "{" + ", ".join(f"{at}: None" for at in range(8)) + ", ... 9 in all}"),
        ((1,), "(1,)"),
        (pd.DataFrame({"a": [1, 2], "b": [3, 4]}), "DataFrame of 2 rows: a, b"),
    ],
)
def test_descriptions(value: Any, shown: str) -> None:
    assert describe(value) == shown


BAD: dict[str, Callable[[si.Attachment], Any]] = {
    "state of all layers": lambda ssm: si.PatchState(position=0, state={at: BIG for at in range(64)}),
    "state of a run": lambda ssm: si.PatchState(position=0, state=ssm.run(inputs(), read="state")["state"]),
    "sources": lambda ssm: si.Knockout(sources=BIG),
    "edges": lambda ssm: si.Knockout(edges=BIG),
    "features": lambda ssm: si.Knockout(features=BIG),
    "layers": lambda ssm: si.Knockout(layers={"a": BIG}),
    "many layers": lambda ssm: ssm.check(si.Knockout(layers=range(9999))),
    "through": lambda ssm: si.Knockout(through=BIG),
    "delta": lambda ssm: si.SetDelta(value=BIG),
    "factor": lambda ssm: si.ScaleFeatures(factor=BIG),
    "mode": lambda ssm: si.EditAttention(edges=[(1, 0)], value=0, mode=BIG),
    "edit": lambda ssm: ssm.check(BIG),  # type: ignore[arg-type]
    "edit by a model": lambda ssm: ssm.check(ssm.model),  # type: ignore[arg-type]
    "from_dict": lambda ssm: si.Intervention.from_dict(BIG),
    "kind": lambda ssm: si.Intervention.from_dict({"kind": "a" * 9999}),
    "inputs": lambda ssm: ssm.run(ssm.model),
    "keys": lambda ssm: ssm.run(dict.fromkeys(range(9999), BIG)),
    "read": lambda ssm: ssm.run(inputs(), read=[BIG]),
    "read layers": lambda ssm: ssm.run(inputs(), read="x", layers={"a": BIG}),
    "hook": lambda ssm: ssm.layers[0].hook_x.add_hook(BIG),  # type: ignore[arg-type]
    "direction": lambda ssm: ssm.layers[0].hook_x.add_hook(print, dir=BIG),  # type: ignore[arg-type]
    "variant": lambda ssm: next(run_each(ssm, inputs()["input_ids"], [BIG])),
    "layer": lambda ssm: ssm.layers[BIG],  # type: ignore[index]
    "reading": lambda ssm: ssm.run(inputs(), read="x")[BIG],
}


@pytest.mark.parametrize("name", BAD)
def test_errors_print_no_tensor_and_no_model(name: str) -> None:
    with si.attach(build("mamba2")) as ssm, as_users_run_it(), pytest.raises(si.HookError) as caught:
        BAD[name](ssm)
    assert len(str(caught.value)) < 500
    assert "0.1250" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reprs_print_no_tensor_and_no_model() -> None:
    tiny = world("mamba2", count=2)
    batch = pad([tokenize(prompt, tiny.tokenizer) for prompt in tiny.prompts])
    patch = si.PatchState(position=[3, 4], state=torch.randn(2, 3, 4), layers=3)
    assert repr(patch) == "PatchState(layers=(3,), position=(3, 4), state=Tensor [2, 3, 4])"
    knockout = si.Knockout(sources=[2, 3], targets=-1, layers=range(48))
    assert repr(knockout) == "Knockout(layers=(0, 1, 2, 3, 4, 5, 6, 7, ...), sources=(2, 3), targets=(-1,))"
    assert repr(batch) == f"Batch(2 prompts, input_ids {list(batch.input_ids.shape)})"
    with si.attach(tiny.model) as ssm:
        answers = next(run_each(ssm, inputs(2, 6)["input_ids"] % 37, [()]))
        assert repr(answers) == f"RowLogits(1 variants, 2 rows, logits {list(answers.logits.shape)})"
        run = ssm.run(inputs(2, 6)["input_ids"] % 37, read=["x", "attn"])
        every = list(ssm.layers)
        shape = list(run["x", 0].shape)
        assert f"read x of layers {every}: {shape}, attn of layers {every}: [2, " in repr(run)
        assert repr(ssm.layers) == f"SSM layers {every}: HookPoints"
        assert repr(ssm.mixers) == f"SSM layers {every}: Hooked{type(ssm.mixers[0]).__name__.removeprefix('Hooked')}"


def test_a_layer_that_there_is_not() -> None:
    ssm = si.attach(build("jamba"))
    for missing in (10, 1, -1, "a", None, True, [0, 2], slice(1, 2), torch.tensor([0, 2])):
        with pytest.raises(MissingError, match=r"no SSM layer .*; the SSM layers of this model are \[0, 2, 3\]"):
            ssm.layers[missing]  # type: ignore[index]
        with pytest.raises(KeyError):
            ssm.mixers[missing]  # type: ignore[index]
    with pytest.raises(KeyError, match=r"^there is no attention layer 0; the attention layers of .* are \[1\]$"):
        ssm.attention[0]
    assert ssm.layers[np.int64(2)] is ssm.layers[torch.tensor(2)] is ssm.mixers[2].ssm  # type: ignore[index]
    assert (1 in ssm.layers, 2 in ssm.layers, ssm.layers.get(1), list(ssm.layers)) == (False, True, None, [0, 2, 3])
    for again in (copy.deepcopy(ssm), pickle.loads(pickle.dumps(ssm))):
        with pytest.raises(si.HookError, match=r"the SSM layers of this model are \[0, 2, 3\]"):
            again.layers[1]
        assert again.layers[2] is not ssm.layers[2]
        assert again.mixers[2].ssm is again.layers[2]
        again.detach()
    ssm.detach()
    with pytest.raises(si.HookError, match="there is no SSM layer 0; the model has none, or was detached"):
        ssm.layers[0]
