"""An edited state is the state: against a loop over positions in float64, and in the trained models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import decode, edited, logits, relative_error
from tiny_hosts import build, inputs
from torch import Tensor

import ssm_interp as si

LENGTH, PROMPT = 7, 5
SOME = [1, 2, 4]  # of which 1 and 2 follow each other


def zeroed(state: Tensor) -> Tensor:
    return torch.zeros_like(state)


def some_doubled(state: Tensor) -> Tensor:
    """Other elements at every position of SOME, so that the recurrence is cut element by element."""
    found = state.clone()
    for position in SOME:
        found[:, position, position % 2 :: 2] *= 2
    return found


def naive(terms: dict[str, Tensor], new: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """y, every state and the states that the hook was shown, one position after the other, one head after the other.

    The hook is shown the states of the unedited recurrence; where it gives another value than it saw, that value is
    the state from which the recurrence goes on.
    """
    x, dt, A, B, C = (terms[name].double() for name in ("x", "dt", "A", "B", "C"))
    b, t, h, p = x.shape
    n, each = B.shape[-1], h // B.shape[2]
    shown = torch.zeros(b, t, h, p, n, dtype=torch.float64)
    for position in range(t):
        for head in range(h):
            u = dt[:, position, head, None] * x[:, position, head]
            write = torch.einsum("bp,bn->bpn", u, B[:, position, head // each])
            before = shown[:, position - 1, head] if position else 0.0
            shown[:, position, head] = (dt[:, position, head, None] * A[head]).exp()[:, None] * before + write
    given = new(shown)
    states, y = torch.zeros_like(shown), torch.zeros_like(x)
    for position in range(t):
        for head in range(h):
            u = dt[:, position, head, None] * x[:, position, head]
            write = torch.einsum("bp,bn->bpn", u, B[:, position, head // each])
            before = states[:, position - 1, head] if position else 0.0
            follows = (dt[:, position, head, None] * A[head]).exp()[:, None] * before + write
            same = given[:, position, head] == shown[:, position, head]
            states[:, position, head] = torch.where(same, follows, given[:, position, head])
            y[:, position, head] = torch.einsum("bn,bpn->bp", C[:, position, head // each], states[:, position, head])
    return y, states, shown


def operands(ssm: si.Attachment, layer: int) -> dict[str, Tensor]:
    run = ssm.run(inputs(2, LENGTH), read=["x", "dt", "B", "C"], layers=layer, use_cache=False)
    A = -ssm.mixers[layer].A_log.detach().double().exp()
    A = A.flatten(0, -2) if A.ndim > 1 else A[:, None]
    return {name: run[name, layer].detach() for name in ("x", "dt", "B", "C")} | {"A": A}


@pytest.mark.parametrize("new", [zeroed, some_doubled])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2", "nemotron_h"])
def test_a_hook_on_several_states_against_a_loop(name: str, own: bool, new: Callable[[Tensor], Tensor]) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=own) as ssm:
        layer = max(ssm.layers)
        known, _, _ = naive(operands(ssm, layer), new)
        ssm.layers[layer].hook_state.add_hook(lambda state, hook: new(state))
        found = ssm.run(inputs(2, LENGTH), read="y", layers=layer, use_cache=False)["y", layer]
        assert (found - known).abs().max() <= 1e-6 * operands(ssm, layer)["x"].abs().max()  # a host may compute in fp32
        if new is zeroed:
            assert not known.any()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_patches_and_hooks_mean_the_same(name: str) -> None:
    """The same states given by a hook, by patches at those positions, and by both, one for each half of the heads."""
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        layer = 1
        _, _, shown = naive(operands(ssm, layer), zeroed)
        values = torch.randn(shown.shape[2:], dtype=torch.float64)
        half = list(range(shown.shape[2] // 2))

        def hook(state: Tensor, heads: slice) -> Tensor:
            state = state.clone()
            state[:, SOME, heads] = values[heads]
            return state

        patches = [si.PatchState(position=position, state=values, layers=layer) for position in SOME]
        known = edited(ssm, inputs(2, LENGTH), *patches)
        handle = ssm.layers[layer].hook_state.add_hook(lambda state, _: hook(state, slice(None)))
        assert relative_error(logits(ssm.model, inputs(2, LENGTH)), known) <= 1e-12
        handle.remove()
        ssm.layers[layer].hook_state.add_hook(lambda state, _: hook(state, slice(len(half), None)))
        patches = [si.PatchState(position=position, state=values, layers=layer, features=half) for position in SOME]
        assert relative_error(edited(ssm, inputs(2, LENGTH), *patches), known) <= 1e-12
        assert relative_error(logits(ssm.model, inputs(2, LENGTH)), known) > 1e-3


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_knockout_carries_only_what_an_edited_state_left(name: str) -> None:
    """After a hook has replaced the state, nothing of the sources before it is left to be knocked out."""
    with si.attach(build(name, dtype=torch.float64)) as ssm:
        layer, cut = 1, 3
        terms = operands(ssm, layer)

        def replaced(state: Tensor) -> Tensor:
            state = state.clone()
            state[:, cut, ::2] = 1.0
            return state

        ssm.layers[layer].hook_state.add_hook(lambda state, _: replaced(state))
        whole, _, _ = naive(terms, replaced)
        sources = [1, 4]
        kept = terms["x"].clone()
        kept[:, [s for s in range(LENGTH) if s not in sources]] = 0
        only, _, _ = naive(terms | {"x": kept}, lambda state: state)
        from_one, from_four = kept.clone(), kept.clone()
        from_one[:, 4], from_four[:, 1] = 0, 0
        by_one, _, _ = naive(terms | {"x": from_one}, lambda state: state)
        by_four, _, _ = naive(terms | {"x": from_four}, lambda state: state)
        by_one[:, cut:, ::2] = 0  # replaced there
        with ssm.edit(si.Knockout(sources=sources, targets=[5, 6], layers=layer)):
            found = ssm.run(inputs(2, LENGTH), read="y", layers=layer, use_cache=False)["y", layer]
        known = whole.clone()
        known[:, 5:] -= (by_one + by_four)[:, 5:]
        assert relative_error(found, known) <= 1e-6
        assert relative_error(whole - only, known) > 1e-3


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "zamba"])
def test_edited_states_reach_the_cache(name: str) -> None:
    def hook(state: Tensor, _: si.HookPoint) -> Tensor:
        return state if state.shape[1] == 1 else some_doubled(state) if state.shape[1] > max(SOME) else state

    with si.attach(build(name)) as ssm:
        for points in ssm.layers.values():
            points.hook_state.add_hook(hook)
        ids = inputs(2, LENGTH)["input_ids"]
        known = logits(ssm.model, {"input_ids": ids, "use_cache": False})
        assert relative_error(decode(ssm.model, ids, PROMPT), known) <= 1e-4
        ssm.layers[0].hook_state.remove_hooks()
        assert relative_error(logits(ssm.model, {"input_ids": ids, "use_cache": False}), known) > 1e-3


def test_a_state_edited_in_a_decode_step_is_the_state_from_there() -> None:
    for name in ("mamba", "mamba2"):
        with si.attach(build(name)) as ssm:
            ids = inputs(2, LENGTH)["input_ids"]
            wiped = [si.PatchState(position=position, state=0.0) for position in (5, 6)]
            known = edited(ssm, {"input_ids": ids, "use_cache": False}, *wiped)
            for points in ssm.layers.values():
                points.hook_state.add_hook(lambda state, _: None if state.shape[1] > 1 else torch.zeros_like(state))
            assert relative_error(decode(ssm.model, ids, PROMPT), known) <= 1e-4


def test_gradients_at_the_point_are_those_of_an_addition() -> None:
    """The gradient at the state of a position is that of adding to it there, whatever a hook gave back elsewhere."""
    for name in ("mamba", "mamba2"):
        with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
            points = ssm.layers[1]
            seen: list[Tensor] = []
            handle = points.hook_state.add_hook(lambda grad, _, seen=seen: seen.append(grad), dir="bwd")
            ssm.model(**inputs(1, LENGTH), use_cache=False).logits[:, -1, 3].sum().backward()
            handle.remove()
            step, at = 1e-2, (0, 2, 3, 0, 1)  # norms compute in fp32

            def moved(by: float, points: si.HookPoints = points, at: tuple[int, ...] = at) -> float:
                def add(state: Tensor, _: si.HookPoint) -> Tensor:
                    state = state.clone()
                    state[at] += by
                    return state

                handle = points.hook_state.add_hook(add)
                value = float(logits(ssm.model, inputs(1, LENGTH) | {"use_cache": False})[:, -1, 3].sum())
                handle.remove()
                return value

            finite = (moved(step) - moved(-step)) / (2 * step)
            assert abs(float(seen[0][at]) - finite) <= 5e-3 * abs(finite)


def test_zeroing_every_state_of_a_trained_model() -> None:
    """y is then zero; PatchState at every position says the same."""
    model, tokenizer = si.load("tiny-mamba2")
    given = tokenizer("The name of the capital city of France is", return_tensors="pt")
    paris = tokenizer(" Paris")["input_ids"][0]
    with si.attach(model) as ssm, torch.no_grad():
        length = given["input_ids"].shape[1]
        patches = [si.PatchState(position=position, state=0.0, layers=5) for position in range(length)]
        native = logits(model, given)[0, -1].softmax(-1)[paris]
        known = edited(ssm, given, *patches)[0, -1].softmax(-1)[paris]
        ssm.layers[5].hook_state.add_hook(lambda state, _: torch.zeros_like(state))
        run = ssm.run(given, read="y", layers=5)
        assert run["y", 5].abs().max() <= 1e-5
        found = run.logits[0, -1].softmax(-1)[paris]
    assert abs(float(found - known)) <= 1e-6
    expected = {0.996: 0.0107, 0.988: 0.0338}  # by the model's own p: 5.15 computes this Mamba-2 otherwise than 5.24
    assert abs(float(known) - expected[round(float(native), 3)]) <= 1e-4
