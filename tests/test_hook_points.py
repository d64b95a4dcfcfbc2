"""Every hook point fires once, in order, and what a hook returns is what the model goes on with."""

from __future__ import annotations

import copy

import pytest
import torch
from support import logits, relative_error
from tiny_hosts import FAMILY, NAMES, build, inputs
from torch import Tensor
from transformers import PreTrainedModel

import ssm_interp as si

READS = ["x", "dt", "B", "C", "write", "state", "attn", "y"]
ORDER = ["x", "dt", "B", "C", "write", "state", "attn", "y", "z"]


def expected_points(name: str) -> list[str]:
    return ORDER if FAMILY[name] == "mamba1" else ORDER[:-1]


def test_every_point_fires_once_in_order(host: PreTrainedModel) -> None:
    name = host.config.model_type
    with si.attach(host) as ssm:
        fired: list[tuple[int, str]] = []
        for layer, points in ssm.layers.items():
            for point in points.points():
                point.add_hook(lambda _tensor, hook, layer=layer: fired.append((layer, hook.name)))
        logits(host, inputs())
    of_a_layer = ["conv", *expected_points(name)]
    assert fired == [(layer, point) for layer in _layers(host) for point in of_a_layer]


def _layers(host: PreTrainedModel) -> list[int]:
    with si.attach(host) as ssm:
        return list(ssm.layers)


def test_an_edit_at_every_point_changes_the_logits(host: PreTrainedModel) -> None:
    native = logits(host, inputs())
    span = native.max() - native.min()
    with si.attach(host) as ssm:
        points = ssm.layers[min(ssm.layers)]
        for point in points.points():
            point.add_hook(lambda tensor, hook: tensor * torch.rand(tensor.shape))  # a norm would undo one factor
            moved = (logits(host, inputs()) - native).abs().max() / span
            assert moved > 1e-3, point.name
            point.remove_hooks()
        assert torch.equal(logits(host, inputs()), native)


def test_equivalent_edits_agree(host: PreTrainedModel) -> None:
    """Halving the write, the state (by its own halved part), the matrix, C, or y halves M x."""
    with si.attach(host) as ssm:
        points = ssm.layers[min(ssm.layers)]
        found = []
        for name in ("write", "attn", "C", "B", "y"):
            handle = points.point(name).add_hook(lambda tensor, hook: tensor * 0.5)
            found.append(logits(host, inputs()))
            handle.remove()
        assert all(relative_error(other, found[0]) <= 1e-5 for other in found[1:])


def test_an_edit_in_place_is_an_edit(host: PreTrainedModel) -> None:
    with si.attach(host) as ssm:
        points = ssm.layers[min(ssm.layers)]
        for point in points.points():
            if point.name == "state":
                continue
            handle = point.add_hook(lambda tensor, hook: tensor * 0.5)
            known = logits(host, inputs())
            handle.remove()
            handle = point.add_hook(lambda tensor, hook: _halve(tensor))
            assert relative_error(logits(host, inputs()), known) <= 1e-5, point.name
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_at_the_convolutions_inputs(name: str) -> None:
    """It is that of what made them, through the channels of the projection that reach the convolution."""
    model = build(name, dtype=torch.float64)
    with si.attach(model, own_operator=True) as ssm:
        layer = min(ssm.layers)
        passed: list[Tensor] = []
        ssm.layers[layer].hook_conv.add_hook(lambda conv, _: passed.append(conv))
        metric = model(**inputs(2, 5), use_cache=False).logits[:, -1].logsumexp(-1).sum()
        gradient = torch.autograd.grad(metric, passed[0], retain_graph=True)[0]
        step = 1e-3 * gradient / gradient.norm()
        moved = []
        for sign in (1, -1):
            ssm.layers[layer].hook_conv.remove_hooks()
            ssm.layers[layer].hook_conv.add_hook(lambda conv, _, sign=sign: conv + sign * step)
            logits = model(**inputs(2, 5), use_cache=False).logits
            moved.append(logits[:, -1].logsumexp(-1).sum())
    assert relative_error((moved[0] - moved[1]) / 2, (gradient * step).sum()) <= 2e-3


def _halve(tensor: Tensor) -> None:
    tensor.mul_(0.5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_at_the_points_are_those_of_the_definition(name: str) -> None:
    model = build(name, dtype=torch.float64)
    with si.attach(model, own_operator=True) as ssm:
        layer = min(ssm.layers)
        passed: dict[str, list[Tensor]] = {
            point: [] for point in READS
        }  # in pieces: Zamba computes its heads in two calls
        for point in READS:
            ssm.layers[layer].point(point).register_forward_hook(lambda _m, _a, out, p=point: passed[p].append(out))
        metric = model(**inputs(2, 5), use_cache=False).logits[:, -1].logsumexp(-1).sum()
        pieces = torch.autograd.grad(metric, [piece for point in READS for piece in passed[point]])
        calls = len(passed["x"])
        axis = {"attn": 1}
        values = {point: torch.cat(found, axis.get(point, 2)).detach() for point, found in passed.items()}
        found = {p: torch.cat(pieces[i * calls : (i + 1) * calls], axis.get(p, 2)) for i, p in enumerate(READS)}
        leaves = {point: values[point].requires_grad_() for point in ("x", "dt", "B", "C")}
        A = -ssm.mixers[layer].A_log.detach().exp()
        y = _definition(A.reshape(found["x"].shape[2], -1), **leaves)
        assert relative_error(values["y"], y) <= 1e-6
        expected = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), found["y"]), strict=True))
        expected["x"] = expected["x"] + found["y"] * ssm.mixers[layer].D.detach().flatten()[:, None]
        expected["attn"] = torch.einsum("bthp,bshp->bhts", found["y"], leaves["x"])
        for point, gradient in expected.items():
            assert relative_error(found[point], gradient) <= 1e-5, point


def _definition(A: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y = M x with M written out, [b t s h n] in memory; differentiable."""
    B, C = (part.repeat_interleave(x.shape[2] // part.shape[2], dim=2) for part in (B, C))
    total = (dt[..., None] * A).cumsum(1)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)[None, :, :, None, None]
    decay = (total[:, :, None] - total[:, None]).masked_fill(later, -torch.inf).exp()
    M = torch.einsum("bthn,btshn,bshn->bhts", C, decay, dt[..., None] * B)
    return torch.einsum("bhts,bshp->bthp", M, x)


def test_reading_with_autograd_leaves_upstream_gradients_alone() -> None:
    for name in ("mamba", "mamba2"):
        model = build(name, dtype=torch.float64)
        weights = model.backbone.layers[0].mixer.in_proj.weight
        known = torch.autograd.grad(model(**inputs(), use_cache=False).logits[:, -1].sum(), weights)[0]
        with si.attach(model) as ssm:
            run = ssm.run(inputs(), read=["write", "state", "attn"], use_cache=False)
            found = torch.autograd.grad(run.logits[:, -1].sum(), weights)[0]
        assert relative_error(found, known) <= 1e-6  # the host rounds to float32 inside


def test_add_hook_levels_directions_and_permanence() -> None:
    model = build("mamba")
    with si.attach(model) as ssm:
        point = ssm.layers[0].hook_y
        seen: list[str] = []
        point.add_hook(lambda y, hook: seen.append("normal"))
        point.add_hook(lambda y, hook: seen.append("first"), prepend=True)
        point.add_hook(lambda y, hook: seen.append("permanent"), is_permanent=True)
        point.add_hook(lambda y, hook: seen.append("level"), level=2)
        logits(model, inputs())
        assert seen == ["first", "normal", "permanent", "level"]
        seen.clear()
        point.remove_hooks(level=2)
        logits(model, inputs())
        assert seen == ["first", "normal", "permanent"]
        seen.clear()
        point.remove_hooks()
        logits(model, inputs())
        assert seen == ["permanent"]
        point.remove_hooks(including_permanent=True)
        assert not point.has_hooks()
        point.add_hook(lambda gradient, hook: seen.append(hook.name), dir="bwd")
        model(**inputs()).logits.sum().backward()
        assert seen[-1] == "y"
        point.remove_hooks("bwd")
        assert not point.has_hooks()


def test_forgotten_hooks_are_seen_and_taken_off() -> None:
    model = build("mamba")
    native = logits(model, inputs())
    with si.attach(model) as ssm:
        assert repr(ssm) == "Attachment(MambaForCausalLM, SSM layers [0, 1, 2, 3])"
        assert ssm.hooks == {}
        ssm.layers[2].hook_x.add_hook(lambda x, hook: x * 2)
        ssm.layers[0].hook_x.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
        for points in ssm.layers.values():
            points.hook_y.register_forward_hook(lambda _m, _a, _k, y: y * 2, with_kwargs=True, always_call=True)
        ssm.layers[0].hook_x.add_hook(lambda gradient, hook: gradient, dir="bwd")
        assert ssm.hooks == {("x", 0): 2, ("x", 2): 1, ("y", 0): 1, ("y", 1): 1, ("y", 2): 1, ("y", 3): 1}
        assert "7 hooks on hook_x of layers [0, 2], hook_y of all layers" in repr(ssm)
        assert "layer 0, 64 heads, state size 4; x has 2 hooks; y has 1 hook" in repr(ssm.layers[0])
        assert "(hook_y): HookPoint(y, fires, has 1 hook)" in repr(ssm.layers[1])
        assert relative_error(logits(model, inputs()), native) > 1e-3
        ssm.reset_hooks()
        assert ssm.hooks == {}
        assert not any(points.asked.now for points in ssm.layers.values())
        assert torch.equal(logits(model, inputs()), native)
        assert repr(ssm.layers[0].hook_y) == "HookPoint(y, fires)"


def test_permanent_hooks_and_exposures_survive_a_reset() -> None:
    with si.attach(build("mamba2")) as ssm:
        seen: list[int] = []
        ssm.layers[1].hook_y.add_hook(lambda y, hook: seen.append(1), is_permanent=True)
        ssm.layers[1].hook_y.add_hook(lambda y, hook: seen.append(2))
        with ssm.expose("state", layers=0) as exposure:
            assert repr(ssm).endswith("2 hooks on hook_y of layer 1, exposed: hook_state of layer 0)")
            assert repr(exposure) == "Exposure(hook_state)"
            ssm.reset_hooks()
            assert ssm.layers[0].hook_state.exposed
        logits(ssm.model, inputs())
        assert seen == [1]
        assert ssm.layers[1].asked.now
        ssm.reset_hooks(including_permanent=True)
        assert ssm.hooks == {}
        assert not ssm.layers[1].asked.now
    with pytest.raises(si.HookError, match="was detached"):
        ssm.reset_hooks()


def test_a_copy_calls_its_hooks_with_its_own_points() -> None:
    model = build("mamba2")
    seen: list[object] = []
    with si.attach(model) as ssm:
        ssm.layers[0].hook_y.add_hook(lambda y, hook: seen.append(hook))
        copied = si.attached(copy.deepcopy(model))
        logits(copied.model, inputs())
        assert seen == [copied.layers[0].hook_y]
        copied.reset_hooks()
        assert ssm.hooks == {("y", 0): 1}
        logits(copied.model, inputs())
        assert len(seen) == 1


def test_a_hook_of_another_shape_is_refused() -> None:
    model = build("mamba2")
    with si.attach(model) as ssm:
        ssm.layers[0].hook_attn.register_forward_hook(lambda _m, _a, attn: attn[:, :1])
        with pytest.raises(
            si.HookError, match=r"hook_attn returned \[2, 1, 9, 9\]; it must return a tensor \[2, 8, 9, 9\]"
        ):
            logits(model, inputs())


def test_inference_mode() -> None:
    for name in ("mamba", "mamba2"):
        model = build(name)
        with torch.inference_mode():
            native = model(**inputs()).logits
            with si.attach(model) as ssm:
                assert torch.equal(ssm.run(inputs(), read=["attn", "state"]).logits, native)
                handle = ssm.layers[1].hook_attn.add_hook(lambda attn, hook: _halve(attn))
                in_place = model(**inputs()).logits
                handle.remove()
                ssm.layers[1].hook_attn.add_hook(lambda attn, hook: attn * 0.5)
                assert relative_error(in_place, model(**inputs()).logits) <= 1e-6
                assert not torch.equal(in_place, native)


def test_reads_have_canonical_shapes() -> None:
    for name, (d, h, p, g, n) in {
        "mamba": (64, 64, 1, 1, 4), "mamba2": (96, 8, 8, 2, 8), "zamba": (64, 64, 1, 2, 4)
    }.items():  # fmt: skip
        with si.attach(build(name)) as ssm:
            run = ssm.run(inputs(2, 5), read=["conv", *READS], layers=0)
            shapes = [tuple(run[point, 0].shape) for point in ["conv", *READS]]
            assert shapes == [
                (2, 5, d),
                (2, 5, h, p), (2, 5, h), (2, 5, g, n), (2, 5, g, n), (2, 5, h, p, n), (2, 5, h, p, n), (2, h, 5, 5),
                (2, 5, h, p),
            ]  # fmt: skip
            assert set(run["x"]) == {0}
