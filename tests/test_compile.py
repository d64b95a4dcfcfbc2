"""Compiled models: idle they are compiled whole, as unattached; a hook or an edit that comes later is seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import cache_of, cached, edited, logits, relative_error
from tiny_hosts import build, inputs

import ssm_interp as si
from ssm_interp.hooks.rows.engine import run_each

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning"),  # of transformers' own functions
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
CASE = inputs() | {"use_cache": False}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1"])
def test_what_comes_after_the_first_compiled_call_is_seen(name: str) -> None:
    model = build(name)
    native = logits(model, CASE)
    with si.attach(model) as ssm, torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative_error(compiled(**CASE).logits, native) <= 1e-5
        compiled = torch.compile(model, backend="eager")
        assert relative_error(compiled(**CASE).logits, native) <= 1e-5
        layer = max(ssm.layers)
        handle = ssm.layers[layer].hook_x.register_forward_hook(lambda _module, _args, x: x * 0)
        known = logits(model, CASE)
        assert relative_error(compiled(**CASE).logits, known) <= 1e-5
        assert relative_error(known, native) > 1e-3
        handle.remove()
        assert relative_error(compiled(**CASE).logits, native) <= 1e-5
        knockout = si.Knockout(sources=[1, 2], targets=-1)
        known = edited(ssm, CASE, knockout)
        with ssm.edit(knockout):
            assert relative_error(compiled(**CASE).logits, known) <= 1e-5
        assert relative_error(known, native) > 1e-3
        assert relative_error(compiled(**CASE).logits, native) <= 1e-5
        assert not any(points.asked.now for points in ssm.layers.values())


def test_a_compiled_model_is_read_and_swept() -> None:
    model = build("mamba2")
    with si.attach(model) as ssm, torch.no_grad():
        known = ssm.run(CASE, read="attn")["attn", 2]
        variants = [si.Knockout(sources=1, targets=-1), si.Knockout(sources=2, targets=-1)]
        answers = [found.logits for found in run_each(ssm, CASE["input_ids"], variants)]
        model.compile(backend="eager")
        model(**CASE)
        assert torch.equal(ssm.run(CASE, read="attn")["attn", 2], known)
        again = [found.logits for found in run_each(ssm, CASE["input_ids"], variants)]
        assert all(relative_error(new, old) <= 1e-5 for new, old in zip(again, answers, strict=True))


def test_a_cache_counts_compiled_steps() -> None:
    """A step without the knockout under which the prompt was read is noticed, though it ran compiled."""
    model = build("mamba2")
    ids = inputs(1, 6)["input_ids"]
    with si.attach(model) as ssm, torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        knockout = si.Knockout(sources=[1])
        with ssm.edit(knockout):
            cache = cache_of(compiled(input_ids=ids[:, :4], use_cache=True))
        compiled(input_ids=ids[:, 4:5], **cached(model, cache))
        with pytest.raises(si.InterventionError, match="everything since"), ssm.edit(knockout):
            compiled(input_ids=ids[:, 5:], **cached(model, cache))


def test_an_attached_model_is_exported() -> None:
    model = build("mamba2")
    with si.attach(model), torch.no_grad():
        exported = torch.export.export(model, (CASE["input_ids"],), {"use_cache": False}).module()
        assert relative_error(exported(CASE["input_ids"], use_cache=False).logits, logits(model, CASE)) <= 1e-6
