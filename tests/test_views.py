"""Attention in its forms: against the matrix, the host's own tensors, and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import png
from random_terms import as_users_run_it
from support import relative_error
from tiny_hosts import NAMES, build, inputs, padded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ssm_interp as si
from ssm_interp.attribution import attention_views, record_mixers, rollout
from ssm_interp.attribution import views as views_module
from ssm_interp.attribution.views import FORMS
from ssm_interp.features import FeatureError
from ssm_interp.scan import blocks, edges

MEASURES = {
    "mean": lambda values: values.mean(1),
    "mean_abs": lambda values: values.abs().mean(1),
    "norm": lambda values: values.square().sum(1).sqrt(),
}


def read_both_ends(ssm: si.Attachment, prompt: dict[str, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What enters the convolution and what enters the output projection, per layer, by hooks of the test's own."""
    seen: dict[int, Tensor] = {}
    handles = [
        mixer.out_proj.register_forward_pre_hook(lambda _m, args, layer=layer: seen.__setitem__(layer, args[0]))
        for layer, mixer in ssm.mixers.items()
    ]
    entering = ssm.run(prompt, read="conv")["conv"]
    for handle in handles:
        handle.remove()
    return entering, seen


@pytest.mark.parametrize("name", NAMES)
def test_the_unified_matrix_is_the_hosts_input_of_the_projection(name: str) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        for prompt in (inputs(), padded([9, 4]), padded([9, 4], side="right")):
            entering, seen = read_both_ends(ssm, prompt)
            for layer, view in attention_views(ssm, prompt, "unified", reduction=None).items():
                assert view.bias is not None
                read = entering[layer][..., : view.values.shape[1]]
                bias = ssm.mixers[layer].conv1d.bias[: view.values.shape[1]]
                without = torch.einsum("bcts,bsc->btc", view.values, read)
                assert relative_error(without + view.bias.mT * bias, seen[layer]) < 1e-9
                assert relative_error(without, seen[layer]) > 0.01  # as published code has it


@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2"])
def test_the_forms_from_the_matrix(name: str) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        run = ssm.run(inputs(), read=["attn", "x", "dt"])
        for layer in ssm.layers:
            attn, x, dt = (run[what, layer] for what in ("attn", "x", "dt"))
            expected = {
                "operator": attn,
                "no_dt": attn / dt.mT[:, :, None],
                "value": (attn[..., None] * x.transpose(1, 2)[:, :, None]).norm(dim=-1),
            }
            for form, matrix in expected.items():
                found = attention_views(ssm, inputs(), form, reduction=None, layers=layer)[layer]  # type: ignore[arg-type]
                assert relative_error(found.values, matrix) < 1e-10
                assert found.bias is None and found.targets == tuple(range(9))


@pytest.mark.parametrize("name", NAMES)
def test_reduced_views_are_the_reduced_matrix(name: str) -> None:
    with si.attach(build(name)) as ssm, torch.no_grad():
        attn = ssm.run(padded([9, 4]), read="attn")["attn"]
        for reduction, measure in MEASURES.items():
            for layer, view in attention_views(ssm, padded([9, 4]), reduction=reduction).items():  # type: ignore[arg-type]
                assert relative_error(view.values, measure(attn[layer])) < 1e-6


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(part.numel() for part in tree_leaves(made) if isinstance(part, Tensor))])
        return made


@pytest.mark.parametrize("form", ["operator", "no_dt", "value"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_reducing_never_holds_the_matrix_of_every_head(name: str, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, edges):
        monkeypatch.setattr(module, "SLAB_BYTES", 1)
    length = 65
    with si.attach(build(name)) as ssm, torch.no_grad():
        for reduction in (*MEASURES, None):
            with Largest() as largest:
                attention_views(ssm, torch.ones(1, length, dtype=torch.long), form, reduction=reduction, layers=0)
            whole = ssm.layers[0].heads * length**2
            assert largest.numbers >= whole if reduction is None else largest.numbers < whole / 2


@pytest.mark.parametrize("name", ["mamba", "zamba", "nemotron_h"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slab", [1, 2000])
def test_reductions_rows_and_heads_agree(name: str, form: Any, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_module, "SLAB_BYTES", slab)
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        prompt, heads = padded([9, 4]), [5, 0, 6]
        whole = attention_views(ssm, prompt, form, reduction=None, layers=0)[0]
        channels = whole.values.unflatten(1, (ssm.layers[0].heads, -1))[:, heads].flatten(1, 2)
        ordered = attention_views(ssm, prompt, form, reduction=None, layers=0, heads=heads)[0]
        assert relative_error(ordered.values, channels) < 1e-12
        for reduction, measure in MEASURES.items():
            options: dict[str, Any] = {"reduction": reduction, "layers": 0, "heads": {0: heads}}
            assert relative_error(attention_views(ssm, prompt, form, **options)[0].values, measure(channels)) < 1e-12
            some = attention_views(ssm, prompt, form, targets=[-1, 6], **options)[0]
            assert some.targets == (8, 6)
            assert relative_error(some.values, measure(channels)[:, [8, 6]]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_padding_neither_reads_nor_is_read(form: Any) -> None:
    for name in NAMES:
        with si.attach(build(name)) as ssm:
            prompt = padded([7, 4])
            blank = prompt["attention_mask"] == 0
            for view in attention_views(ssm, prompt, form).values():
                assert not view.values[blank].any()
                if form != "unified":  # there a tap may reach into the padding, where the input projection has a bias
                    assert not view.values.mT[blank].any()


def test_rows_of_few_targets_are_those_of_the_record() -> None:
    with si.attach(build("mamba2")) as ssm:
        record = record_mixers(ssm, inputs())[2]
        view = attention_views(ssm, inputs(), "unified", reduction=None, layers=2, targets=-1)[2]
        assert view.bias is not None
        read = torch.einsum("bcts,bsc->btc", view.values, record.inputs.flatten(2))
        found = read + view.bias.mT * record.convolution.bias.flatten()
        assert relative_error(found, record.inner[:, [-1]].flatten(2)) < 1e-5


def test_rollout_by_hand() -> None:
    first = torch.tensor([[[2.0, 0.0], [1.0, 3.0]]])
    second = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    mixed_first = torch.tensor([[1.0, 0.0], [0.125, 0.875]])
    mixed_second = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # a row of zeros stays with itself
    assert torch.equal(rollout([first, second])[0], mixed_second @ mixed_first)
    assert torch.equal(rollout([first], residual=1.0)[0], torch.eye(2))
    assert torch.equal(rollout([first], residual=0.0)[0], first[0] / first[0].sum(-1, keepdim=True))


def test_rollout_of_a_model_is_causal_and_sums_to_one() -> None:
    with si.attach(build("mamba")) as ssm:
        found = rollout([view.values for view in attention_views(ssm, padded([9, 4]), "unified").values()])
        assert relative_error(found.sum(-1), torch.ones(())) < 1e-5
        assert not found.triu(1).any() and (found >= 0).all()
        assert torch.equal(found[1, :5, :5], torch.eye(5))  # padding


@pytest.mark.parametrize(
    ("form", "reduction", "title", "label"),
    [
        ("operator", "mean", "attention M[t,s] of the SSM", "Mean over heads (blue: positive, red: negative)"),
        ("unified", "norm", "attention of the whole mixer (unified)", "Root of the sum of squares over channels"),
    ],
)
def test_a_view_draws_itself(form: Any, reduction: Any, title: str, label: str) -> None:
    tokens = [[f"{row}.{column}" for column in range(9)] for row in range(2)]
    with si.attach(build("mamba2")) as ssm:
        view = attention_views(ssm, inputs(), form, reduction=reduction, layers=2, tokens=tokens)[2]
        some = attention_views(ssm, inputs(), form, reduction=reduction, layers=2, targets=-1)[2]
        apart = attention_views(ssm, inputs(), form, reduction=None, layers=2)[2]
    figure = view.plot(row=1)
    png(figure)
    axes, bar = figure.axes
    shown: Any = axes.get_images()[0].get_array()
    torch.testing.assert_close(torch.tensor(shown.filled(0)).float(), view.values[1].float())
    assert axes.get_title().replace("\n", " ") == f"Mamba2ForCausalLM, layer 2 {title}"
    assert bar.get_ylabel().replace("\n", " ") == label
    assert axes.get_xticklabels()[0].get_text() == "1.0"
    for one in (some, apart):
        with pytest.raises(FeatureError, match=r"a heat map needs \[b t s\] with t = s, this view has \[2, "):
            one.plot()
    with pytest.raises(FeatureError, match="no row 2; the batch has rows 0 to 1"):
        view.plot(row=2)


def test_bad_input_is_refused() -> None:
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        for options, message in [
            ({"form": "softmax"}, "no form 'softmax' of attention; there are operator, no_dt, value, unified"),
            ({"reduction": "max"}, "reduction must be one of mean, mean_abs, norm, or None, got 'max'"),
            ({"heads": [8]}, "layer 0 has no head 8; it has heads 0 to 7"),
            ({"heads": []}, "layer 0: heads must be an integer or a sequence of at least one"),
            ({"heads": [1, 1]}, "once each"),
            ({"heads": {0: [1]}}, "layer 1: heads must be an integer or a sequence of at least one"),
            ({"targets": -10}, "no position -10"),
            ({"layers": 4}, "no SSM layer 4"),
        ]:
            with pytest.raises(FeatureError, match=message):
                attention_views(ssm, inputs(), **options)  # type: ignore[arg-type]
        ones = torch.ones(1, 3, 3)
        for matrices, message in [
            ([], "at least one layer"),
            ([ones, -ones], "matrix 1 has entries that are negative"),
            ([ones, torch.ones(1, 4, 4)], r"\[1, 3, 3\] and \[1, 4, 4\]"),
            ([torch.ones(1, 2, 3)], "t = s"),
            ([ones * torch.nan], "not finite"),
        ]:
            with pytest.raises(FeatureError, match=message):
                rollout(matrices)
        with pytest.raises(FeatureError, match="from 0 to 1, got 1.5"):
            rollout([ones], residual=1.5)


@pytest.mark.parametrize("form", ["operator", "no_dt", "value", "unified"])
def test_columns_of_padding_are_zero(form: str) -> None:
    rows = padded([7, 4], side="left")
    with si.attach(build("mamba2")) as ssm:
        for view in attention_views(ssm, rows, form, reduction="mean_abs").values():
            assert view.values[1, :, :3].abs().max() == 0
            assert view.values[1, 3:, 3:].abs().max() > 0
