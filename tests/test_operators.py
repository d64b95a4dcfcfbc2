"""The adapters: the host's operator in the canonical layout, bit for bit, and against the definition."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import ssm_interp as si
from ssm_interp.hooks.edits.site import EditSite
from ssm_interp.hooks.seam.operators import ChunkScan, HeadUpdate, Operator, SelectiveScan, SelectiveUpdate
from ssm_interp.scan.naive import naive_scan

b, t, h, p, g, n = 2, 5, 6, 3, 2, 4


def selective_scan() -> tuple[dict[str, Any], Any]:
    tensors = {
        "hidden_states": torch.randn(b, h, t),
        "dt": torch.randn(b, h, t),
        "A": -torch.rand(h, n),
        "B": torch.randn(b, n, t),
        "C": torch.randn(b, n, t),
        "D": torch.randn(h),
        "z": torch.randn(b, h, t),
        "delta_bias": torch.randn(h),
        "delta_softplus": True,
        "return_last_state": True,
    }
    return tensors, modeling_mamba.mamba_selective_scan


def selective_update() -> tuple[dict[str, Any], Any]:
    tensors = {
        "state": torch.randn(b, h, n),
        "hidden_states": torch.randn(b, h),
        "dt": torch.randn(b, h),
        "A": -torch.rand(h, n),
        "B": torch.randn(b, n),
        "C": torch.randn(b, n),
        "D": torch.randn(h),
        "z": torch.randn(b, h),
        "dt_bias": torch.randn(h),
        "dt_softplus": True,
    }
    return tensors, modeling_mamba.mamba_selective_state_update


def chunk_scan() -> tuple[dict[str, Any], Any]:
    tensors = {
        "hidden_states": torch.randn(b, t, h, p),
        "dt": torch.randn(b, t, h),
        "A": -torch.rand(h),
        "B": torch.randn(b, t, g, n),
        "C": torch.randn(b, t, g, n),
        "chunk_size": 4,
        "D": torch.randn(h),
        "dt_bias": torch.randn(h),
        "initial_states": torch.randn(b, h, p, n),
        "dt_softplus": True,
        "dt_limit": (0.2, 1.5),
        "return_final_states": True,
    }
    return tensors, modeling_mamba2.mamba2_chunk_scan


def head_update() -> tuple[dict[str, Any], Any]:
    tensors = {
        "state": torch.randn(b, h, p, n),
        "hidden_states": torch.randn(b, h, p),
        "dt": torch.randn(b, h)[..., None].expand(-1, -1, p),
        "A": (-torch.rand(h))[:, None, None].expand(-1, p, n),
        "B": torch.randn(b, g, n),
        "C": torch.randn(b, g, n),
        "D": torch.randn(h)[:, None].expand(-1, p),
        "dt_bias": torch.randn(h)[:, None].expand(-1, p),
        "dt_softplus": True,
        "z": torch.randn(b, h, p),
    }
    return tensors, modeling_mamba2.mamba2_selective_state_update


CALLS = {
    SelectiveScan: selective_scan,
    SelectiveUpdate: selective_update,
    ChunkScan: chunk_scan,
    HeadUpdate: head_update,
}
adapters = pytest.mark.parametrize("adapter", list(CALLS))


def fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with a state of their own, since an update changes it in place."""
    return {name: value.clone() if name == "state" else value for name, value in arguments.items()}


@adapters
def test_what_an_adapter_composes_is_the_hosts_own_call(adapter: type[Operator]) -> None:
    arguments, host = CALLS[adapter]()
    native_arguments, composed_arguments = fresh(arguments), fresh(arguments)
    native = host(**native_arguments)
    operator = adapter(host, (), composed_arguments)
    assert operator.is_reference
    y, state = operator.run(operator.operands)
    composed = operator.finish(y, state, operator.operands.x, operator.z)
    for found, known in zip(_tuple(composed), _tuple(native), strict=True):
        assert torch.equal(found, known)
    if "state" in arguments:
        assert torch.equal(composed_arguments["state"], native_arguments["state"])


@adapters
def test_the_operands_mean_what_the_definition_says(adapter: type[Operator]) -> None:
    arguments, host = CALLS[adapter]()
    operator = adapter(host, (), fresh(arguments))
    terms = operator.operands.terms()
    initial = operator.initial_state
    y, _ = operator.run(operator.operands)
    known, _ = naive_scan(terms)
    if initial is not None:
        decay = (terms.dt[..., None] * terms.A).cumsum(1).exp()
        C = terms.C.repeat_interleave(terms.heads // terms.groups, dim=2)
        known = known + torch.einsum("bhpn,bthn->bthp", initial, decay * C)
    assert relative_error(y.double(), known.double()) <= 1e-5


@adapters
def test_a_kernel_is_called_as_the_host_called_it(adapter: type[Operator]) -> None:
    """An operator that is not known to be the reference gets its own arguments, unless something is touched."""
    arguments, host = CALLS[adapter]()
    seen: list[dict[str, Any]] = []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        seen.append(inspect.signature(host).bind(*args, **kwargs).arguments)
        return host(*args, **kwargs)

    native = host(**fresh(arguments))
    gated = adapter in (SelectiveScan, SelectiveUpdate)
    points = si.HookPoints(layer=0, heads=h, head_dim=1, state_size=n, gated=gated, own_operator=False)

    def site() -> EditSite:
        return EditSite(
            SimpleNamespace(ssm=points, conv1d=points, layer_idx=0, training=False), None, None, torch.empty(b, t, 1)
        )

    operator = adapter(kernel, (), fresh(arguments))
    assert not operator.is_reference
    assert all(torch.equal(a, k) for a, k in zip(_tuple(site().serve(operator)), _tuple(native), strict=True))
    assert seen[-1].get("D") is arguments["D"]
    points.hook_y.add_hook(lambda y, hook: y * 2)
    doubled = _tuple(site().serve(adapter(kernel, (), fresh(arguments))))[0]
    assert seen[-1].get("D") is None
    assert not torch.equal(doubled, _tuple(native)[0])
    points.hook_y.remove_hooks()
    points.hook_dt.add_hook(lambda dt, hook: dt.mul_(0.5) * 1)
    moved = _tuple(site().serve(adapter(kernel, (), fresh(arguments))))[0]
    assert not torch.equal(moved, _tuple(native)[0])


def test_packed_sequences_are_refused_where_positions_matter() -> None:
    arguments, host = selective_scan()
    operator = SelectiveScan(host, (), arguments | {"seq_idx": torch.zeros(b, t)})
    points = si.HookPoints(layer=4, heads=h, head_dim=1, state_size=n, gated=True, own_operator=False)
    points.hook_attn.exposures = 1
    site = EditSite(
        SimpleNamespace(ssm=points, conv1d=points, layer_idx=4, training=False), None, None, torch.empty(b, t, 1)
    )
    with pytest.raises(si.HookError, match="layer 4 got packed sequences.*one sequence per row"):
        site.serve(operator)


def test_the_step_is_behind_bias_softplus_and_clamp() -> None:
    arguments, host = chunk_scan()
    operands = ChunkScan(host, (), arguments).operands
    assert torch.equal(operands.dt, F.softplus(arguments["dt"] + arguments["dt_bias"]).clamp(0.2, 1.5))


def _tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@adapters
def test_two_calls_joined_fire_once_and_fill_what_stood_for_the_first(adapter: type[Operator]) -> None:
    """As Zamba calls: each for some of the heads. What the first call gave back is filled when the last is made."""
    (first, host), (second, _) = CALLS[adapter](), CALLS[adapter]()
    known = [_tuple(host(**fresh(arguments))) for arguments in (first, second)]
    gated = adapter in (SelectiveScan, SelectiveUpdate)
    points = si.HookPoints(
        layer=0, heads=2 * h, head_dim=1 if gated else p, state_size=n, gated=gated, own_operator=False
    )
    seen: list[Tensor] = []
    points.hook_x.add_hook(lambda x, hook: seen.append(x))
    site = EditSite(SimpleNamespace(ssm=points, layer_idx=0), None, None, torch.empty(b, t, 1))
    given = [fresh(first), fresh(second)]
    found = [_tuple(site.serve(adapter(host, (), arguments))) for arguments in given]
    site.close()
    assert [x.shape[2] for x in seen] == [2 * h]
    for mine, theirs in zip(found, known, strict=True):
        assert all(relative_error(one, other) <= 1e-5 for one, other in zip(mine, theirs, strict=True))
    assert all(relative_error(*pair) <= 1e-5 for pair in _states(given, [first, second], host))


def _states(given: list[dict[str, Any]], fresh_ones: list[dict[str, Any]], host: Any) -> list[tuple[Tensor, Tensor]]:
    """The states that updates changed in place, and those that the host's own updates leave."""
    found = []
    for mine, arguments in zip(given, fresh_ones, strict=True):
        if "state" in arguments:
            again = fresh(arguments)
            host(**again)
            found.append((mine["state"], again["state"]))
    return found
