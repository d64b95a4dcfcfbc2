"""What one thread does to a model stays out of the forwards of the others, and they out of it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import edited, logits, relative_error
from tiny_hosts import build, inputs
from torch import Tensor, nn

import ssm_interp as si
from ssm_interp.attribution import attention_views, decompose, edge_attribution, logit_attribution
from ssm_interp.circuits import find_circuit
from ssm_interp.features import spectrum
from ssm_interp.hooks import logit_difference
from ssm_interp.hooks.rows.trial import obstacle
from ssm_interp.hooks.seam.blocks import running_block

Given = dict[str, Any]

CALLS: dict[str, Callable[[si.Attachment, Given], Tensor]] = {
    "run": lambda ssm, given: ssm.run(given, read=["attn", "x"], layers=2)["attn", 2],
    "edges": lambda ssm, given: edge_attribution(ssm, given, logit_difference(3, 5)).values,
    "spectrum": lambda ssm, given: torch.stack(list(spectrum(ssm, given)["mean dt"].values())),
    "decompose": lambda ssm, given: decompose(ssm, given, layers=1)[1].parts["ssm"],
    "views": lambda ssm, given: attention_views(ssm, given, "unified", layers=1)[1].values,
    "logits": lambda ssm, given: logit_attribution(ssm, given, 3, 5).parts["ssm"],
    "circuit": lambda ssm, given: torch.tensor(
        find_circuit(
            ssm, given, roles={"a": range(4), "b": range(4, 7)}, tolerance=0.1, metric=lambda row: row[:, 3], layers=1
        ).log["metric"]
    ),
}


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def beside(work: Callable[[], object], *others: Callable[[], bool]) -> None:
    """Do some work while each of the others runs in a thread of its own, and give True all the time."""
    done, right = threading.Event(), {other: [True] for other in others}

    def repeat(other: Callable[[], bool]) -> None:
        while not done.is_set() and all(right[other]):
            try:
                right[other].append(other())
            except Exception:
                right[other].append(False)
                raise

    threads = [threading.Thread(target=repeat, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert all(len(found) > 1 and all(found) for found in right.values())


@pytest.mark.parametrize("name", CALLS)
def test_threads_do_not_see_each_other(name: str, switching: None) -> None:
    call, mine, theirs = CALLS[name], inputs(2, 7), inputs(2, 7, seed=4)
    with si.attach(build("mamba2")) as ssm:
        alone, other, plain = call(ssm, mine), call(ssm, theirs), logits(ssm.model, theirs)

        def work() -> None:
            for _ in range(8):
                assert torch.equal(call(ssm, mine), alone)

        beside(
            work,
            lambda: torch.equal(logits(ssm.model, theirs), plain),
            lambda: torch.equal(call(ssm, theirs), other),
        )
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in ssm.model.modules())


def test_reading_exposes_nothing_to_others() -> None:
    with si.attach(build("mamba2")) as ssm:
        point = ssm.layers[1].hook_attn
        seen: list[Any] = []

        def look(_module: Any, _args: Any, _output: Any) -> None:
            other = threading.Thread(target=lambda: seen.append((point.requested, obstacle(ssm))))
            seen.append(point.requested)
            other.start()
            other.join()

        edge = ssm.layers[0].hook_x.register_forward_hook(look)
        ssm.run(inputs(), read=["attn"])
        edge.remove()
    assert seen == [True, (False, "hook_x of layer 0 is hooked or exposed")]


def test_the_running_block_is_that_of_its_own_thread() -> None:
    """Zamba's shared attention does not know its layer: a knockout there asks which block runs."""
    model = build("zamba")
    with si.attach(model) as ssm:
        knockout = si.Knockout(sources=1, targets=-1, through="attention", layers=max(ssm.attention))
        known, native = edited(ssm, inputs(), knockout), logits(model, inputs())
        assert not torch.equal(known, native)
        before, begin, found = threading.Barrier(2), threading.Barrier(2), {}

        def work(name: str, wait: bool) -> None:
            if wait:
                before.wait()
                begin.wait()
            found[name] = (logits(model, inputs()), running_block())

        older = threading.Thread(target=work, args=("older", True))
        older.start()
        before.wait()
        with ssm.edit(knockout):
            younger = threading.Thread(target=work, args=("younger", False))
            younger.start()
            younger.join()
            begin.wait()
            older.join()
        assert torch.equal(found["younger"][0], known)
        assert torch.equal(found["older"][0], native)
        assert found["older"][1] is not None
        assert running_block() is None


def test_edits_reach_the_threads_that_are_started_under_them() -> None:
    """By the pattern of a streamer; a pool's workers run their tasks under what they were started under."""
    for name, through in (("mamba2", "ssm"), ("bamba", "attention")):
        model = build(name)
        with si.attach(model) as ssm:
            knockout = si.Knockout(sources=[0, 1], targets=-1, through=through)
            known, native = edited(ssm, inputs(), knockout), logits(model, inputs())
            found: list[Tensor] = []

            def work(model: nn.Module = model, found: list[Tensor] = found) -> None:
                found.append(logits(model, inputs()))

            idle = threading.Thread(target=work)
            with ssm.edit(knockout):
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                with ThreadPoolExecutor(1) as pool:
                    found.append(pool.submit(logits, model, inputs()).result())
            idle.start()
            idle.join()
        assert threading.Thread.start.__module__ == "threading"
        assert [torch.equal(one, known) for one in found] == [True, True, False]
        assert torch.equal(found[2], native)
        assert not torch.equal(known, native)


def test_edits_reach_copies_made_under_them() -> None:
    model = build("mamba2")
    with si.attach(model) as ssm:
        before = copy.deepcopy(model)
        knockouts = [si.Knockout(sources=[0, 1], targets=-1, through=stream) for stream in ("ssm", "conv")]
        known, native = edited(ssm, inputs(), *knockouts), logits(model, inputs())
        with ssm.edit(*knockouts):
            after = copy.deepcopy(model)
            assert torch.equal(logits(after, inputs()), known)
            assert torch.equal(logits(before, inputs()), native)
            replica = model.backbone.layers[0].mixer._replicate_for_data_parallel()
            assert replica.ssm.key is model.backbone.layers[0].mixer.ssm.key  # so that a DataParallel replica has them
        assert torch.equal(logits(after, inputs()), native)
        assert torch.equal(edited(si.attached(after), inputs(), *knockouts), known)


def test_a_copy_whose_attention_no_edit_reaches_is_refused() -> None:
    for name in ("bamba", "zamba2"):
        model = build(name)
        with si.attach(model) as ssm:
            knockout = si.Knockout(sources=[0, 1], targets=-1, through="attention")
            with ssm.edit(knockout):
                twin = copy.deepcopy(model)
                with pytest.raises(si.HookError, match="a copy of a model.*copy first"):
                    logits(twin, inputs())
            assert torch.equal(logits(twin, inputs()), logits(model, inputs()))


def test_what_the_host_replaces_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the modeling module that is replaced after the first attach: idle, and with hooks at work."""
    module = sys.modules["transformers.models.mamba2.modeling_mamba2"]
    si.attach(build("mamba2")).detach()
    model = build("mamba2")
    native = module.mamba2_chunk_scan

    def halved(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any, **kwargs: Any) -> Any:
        return native(x, dt, A, 0.5 * B, *args, **kwargs)

    before = logits(model, inputs())
    monkeypatch.setattr(module, "mamba2_chunk_scan", halved)
    after = logits(model, inputs())
    assert not torch.equal(before, after)
    with si.attach(model) as ssm:
        assert torch.equal(logits(model, inputs()), after)
        run = ssm.run(inputs(), read="y")
        assert relative_error(run.logits, after) <= 1e-5
        monkeypatch.undo()
        assert torch.equal(logits(model, inputs()), before)
        assert relative_error(ssm.run(inputs(), read="y").logits, before) <= 1e-5
