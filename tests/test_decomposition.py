"""The sums of a mixer's parts against the host's own output, and single parts against the host without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from random_terms import as_users_run_it
from support import cache_of, cached, relative_error
from test_softmax import transformer
from tiny_hosts import NAMES, build, inputs, padded
from torch import Tensor
from transformers import PreTrainedModel

import ssm_interp as si
from ssm_interp.attribution import Decomposition, decompose, edge_attribution, logit_attribution, record_mixers
from ssm_interp.features import FeatureError, feature_groups
from ssm_interp.hooks import HookedWarning, log_probability
from ssm_interp.scan import attention

GATED = ["mamba", "falcon_mamba", "jamba", "zamba"]  # the gate alone stands behind the operator
NORMED = ["mamba2", "bamba", "granitemoehybrid", "nemotron_h", "zamba2"]
PROMPTS: list[dict[str, Tensor]] = [inputs(), padded([9, 4])]


def total(found: Decomposition) -> Tensor:
    return sum(part.sum((2, 3)) for part in found.parts.values())  # type: ignore[return-value]


def mixer_outputs(ssm: si.Attachment, prompt: dict[str, Tensor]) -> dict[int, Tensor]:
    """What the host's mixers give back, `[b t m]`, by hooks of the test's own."""
    found: dict[int, Tensor] = {}
    handles = [
        mixer.register_forward_hook(lambda _m, _a, output, layer=layer: found.__setitem__(layer, output))
        for layer, mixer in ssm.mixers.items()
    ]
    with torch.no_grad():
        ssm.model(**prompt, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def pairs_and_heads(ssm: si.Attachment) -> dict[str, Any]:
    return {
        "heads": dict.fromkeys(ssm.layers, [0, 1, 5]),
        "pairs": {layer: [(2, 0), (3, 1), (3, 2)] for layer in ssm.layers},
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["source", "input"])
def test_sums_are_the_hosts_output_in_float64(name: str, by: Any) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        for prompt in PROMPTS:
            outputs = mixer_outputs(ssm, prompt)
            for features in (None, pairs_and_heads(ssm)):
                for layer, found in decompose(ssm, prompt, targets=[-1, 5], by=by, features=features).items():
                    assert relative_error(total(found), outputs[layer][:, [8, 5]]) < 1e-12
                    assert found.targets == (8, 5) and relative_error(found.rest + 1, torch.ones(())) < 1e-12


@pytest.mark.parametrize("by", ["source", "input"])
def test_sums_are_the_hosts_output_in_fp32(host: PreTrainedModel, by: Any) -> None:
    with si.attach(host) as ssm:
        for prompt, target in ((PROMPTS[1], 7), (padded([9, 4], side="right"), 3)):
            outputs = mixer_outputs(ssm, prompt)
            for layer, found in decompose(ssm, prompt, targets=target, by=by).items():
                assert relative_error(total(found), outputs[layer][:, [target]]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["source", "input"])
def test_sums_before_the_projection(name: str, by: Any) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        records = record_mixers(ssm, PROMPTS[1])
        for layer, found in decompose(ssm, PROMPTS[1], by=by, project=False).items():
            assert "out_bias" not in found.parts
            assert relative_error(total(found), records[layer].inner[:, [-1]]) < 1e-12


@pytest.mark.parametrize("name", [*GATED, "falcon_h1"])
def test_a_part_is_what_a_knockout_takes_away(name: str) -> None:
    """Where no norm stands behind the operator, edges that are cut change the output by exactly their part."""
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        prompt, layer = padded([9, 7]), min(ssm.layers)
        groups = {"some": {layer: [0, 4]}, "dims": {layer: [(1, 0), (1, 3)]}}
        found = decompose(ssm, prompt, layers=layer, features=groups)[layer]
        clean = mixer_outputs(ssm, prompt)[layer][:, -1]
        for place, features in enumerate([[0, 4], [(1, 0), (1, 3)]]):
            knockout = si.Knockout(sources=[3, 6], targets=-1, layers=layer, features=features)
            with ssm.edit(knockout):
                change = clean - mixer_outputs(ssm, prompt)[layer][:, -1]
            part = found.parts["ssm"][:, 0, place][:, [3, 6]].sum(1)
            assert relative_error(part, change) < 1e-9
            assert change.abs().max() > 1e-3


@pytest.mark.parametrize("name", NORMED)
def test_what_the_norm_is_given_is_m_x_and_the_skip(name: str) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        given: dict[int, Tensor] = {}
        for layer, mixer in ssm.mixers.items():
            mixer.norm.register_forward_hook(lambda _m, args, _o, layer=layer: given.__setitem__(layer, args[0]))
        for layer, record in record_mixers(ssm, PROMPTS[0]).items():
            carried = torch.einsum("bhts,bshp->bthp", attention(record.terms), record.terms.x)
            assert relative_error((carried + record.skip * record.terms.x).flatten(2), given[layer]) < 1e-12


@pytest.mark.parametrize("name", GATED)
def test_the_measured_gate_is_the_hosts(name: str) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        prompt = padded([9, 4])
        z = ssm.run(prompt, read="z")["z"]
        real = prompt["attention_mask"].bool()
        for layer, record in record_mixers(ssm, prompt).items():
            assert relative_error(record.gate[real], torch.nn.functional.silu(z[layer])[real]) < 1e-6  # D is in fp32
            assert not record.gate[~real].any()


def test_by_input_a_tap_is_what_the_mixer_loses_with_that_input() -> None:
    """A skip's tap against the difference of the convolution's output without that tap's input, times D, gate and Z."""
    with si.attach(build("mamba", dtype=torch.float64), own_operator=True) as ssm:
        record = record_mixers(ssm, PROMPTS[0])[0]
        found = decompose(ssm, PROMPTS[0], layers=0, by="input", project=False)[0]
        for lag in range(4):
            without = record.inputs.clone()
            without[:, 8 - lag] = 0
            lost = (record.convolution(record.inputs) - record.convolution(without))[:, 8]
            expected = lost * record.secant[:, 8] * record.skip * record.gate[:, 8]
            assert relative_error(found.parts["skip"][:, 0, 0, lag], expected) < 1e-10


def test_early_targets_have_no_taps_before_the_prompt() -> None:
    with si.attach(build("zamba2", dtype=torch.float64), own_operator=True) as ssm:
        outputs = mixer_outputs(ssm, PROMPTS[0])
        found = decompose(ssm, PROMPTS[0], targets=[0, 1], by="input")
        for layer, one in found.items():
            assert relative_error(total(one), outputs[layer][:, :2]) < 1e-12
            assert not one.parts["skip"][:, 0, :, 1:].any() and one.parts["skip"][:, 1, :, 1].any()


@pytest.mark.parametrize("by", ["source", "input"])
def test_by_position_puts_the_skip_where_it_reads(by: Any) -> None:
    with si.attach(build("mamba2", dtype=torch.float64), own_operator=True) as ssm:
        found = decompose(ssm, PROMPTS[0], targets=[1, -1], layers=0, by=by)[0]
        placed = found.by_position()
        biases = sum(found.parts[name].sum((2, 3)) for name in found.parts if name.endswith("bias"))
        assert relative_error(placed.sum((2, 3)) + biases, found.whole) < 1e-12
        assert not placed[:, 0, :, 2:].any()


def test_the_frame_has_a_row_per_part_and_readable_position() -> None:
    with si.attach(build("mamba2")) as ssm:
        prompt = inputs(batch=1, length=6)
        groups = feature_groups(ssm, ["top half"])
        frame = decompose(ssm, prompt, targets=[2], layers=0, by="input", features=groups)[0].frame
        assert list(frame) == ["row", "layer", "target", "part", "feature_group", "source", "norm"]
        counts = frame.groupby("part").size().to_dict()  # two groups; three positions; no tap before the prompt
        assert counts == {"ssm": 6, "skip": 6, "ssm_bias": 2, "skip_bias": 2, "out_bias": 1}
        assert set(frame.loc[frame.part == "ssm_bias", "source"].isna()) == {True}
        assert sorted(frame.loc[frame.part == "skip", "source"].unique()) == [0, 1, 2]
        assert frame.loc[frame.part == "out_bias", "feature_group"].isna().all()


def test_groups_have_their_share_and_other_has_the_rest() -> None:
    with si.attach(build("mamba2", dtype=torch.float64), own_operator=True) as ssm:
        whole = decompose(ssm, PROMPTS[0], layers=0)[0]
        groups = {"first": {0: [0, 1]}, "elsewhere": {1: [3]}, "everything": None}
        with pytest.raises(FeatureError, match="overlap"):
            decompose(ssm, PROMPTS[0], layers=0, features=groups)
        del groups["everything"]
        found = decompose(ssm, PROMPTS[0], layers=0, features=groups)[0]
        assert found.groups == ("first", "elsewhere", "other")
        assert not found.parts["ssm"][:, :, 1].any()
        for name in ("ssm", "skip"):
            assert relative_error(found.parts[name].sum(2), whole.parts[name].sum(2)) < 1e-12


@pytest.mark.parametrize("host_name", ["mamba", "nemotron_h"])
def test_bf16_is_decomposed_in_fp32_and_the_rest_is_rounding(host_name: str) -> None:
    with si.attach(build(host_name, dtype=torch.bfloat16)) as ssm:
        for found in decompose(ssm, PROMPTS[0]).values():
            assert found.whole.dtype == torch.float32
            assert found.rest.abs().max() < 0.05 * found.whole.abs().max()


@pytest.mark.parametrize("by", ["source", "input"])
def test_autocast_costs_the_host_digits_but_not_the_parts(by: Any) -> None:
    with si.attach(build("mamba2")) as ssm:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = decompose(ssm, PROMPTS[0], by=by, project=False)
            projected = decompose(ssm, PROMPTS[0], by=by)
        for layer, one in found.items():
            assert one.rest.abs().max() < 0.05 * one.whole.abs().max()
            assert relative_error(by_hand(ssm, layer, one.parts["ssm"]), projected[layer].parts["ssm"]) < 1e-5


def by_hand(ssm: si.Attachment, layer: int, part: Tensor) -> Tensor:
    """A part behind the output projection."""
    weight: Tensor = ssm.mixers[layer].out_proj.weight
    return part.flatten(-2) @ weight.T


def test_a_hook_on_y_shows_up_in_the_rest() -> None:
    with si.attach(build("mamba")) as ssm:
        ssm.layers[1].hook_y.add_hook(lambda y, hook: 2 * y)
        with pytest.warns(HookedWarning, match="under the hooks on hook_y of layer 1"):
            found = decompose(ssm, PROMPTS[0])
        assert relative_error(total(found[0]), found[0].whole) < 1e-5
        assert found[1].rest.abs().max() > 0.1 * found[1].whole.abs().max()


def test_bad_input_is_refused() -> None:
    prompt = padded([9, 4], side="right")
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        for options, message in [
            ({"targets": 9}, "there is no position 9: the prompt has 9 positions"),
            ({"targets": []}, "targets must be an integer or a sequence of at least one"),
            ({"targets": "last"}, "targets must be an integer"),
            ({"targets": -1}, "position 8 is padding in row 1; .* pad on the left"),
            ({"layers": [0, 7]}, r"no SSM layer 7; the SSM layers of this model are \[0, 1, 2, 3\]"),
            ({"by": "token"}, "by must be 'source' .* or 'input' .*, got 'token'"),
            ({"features": {"a": {0: [0]}, "b": {0: [(0, 1)]}}}, "'a' and 'b' overlap"),
            ({"features": {"a": {0: [99]}}}, "no feature 99"),
            ({"features": {"other": {0: [1]}}}, "cannot be named 'other'"),
        ]:
            with pytest.raises(FeatureError, match=message):
                decompose(ssm, prompt, **{"targets": 0, **options})  # type: ignore[arg-type]
        with ssm.edit(si.Knockout(sources=0, targets=2)), pytest.raises(FeatureError, match="an edit is at work"):
            decompose(ssm, prompt, targets=0)
        given = cached(ssm.model, cache_of(ssm.model(**inputs(), use_cache=True)))
        with pytest.raises(FeatureError, match="the inputs hold cache"):
            decompose(ssm, {**inputs(), **given})
        assert decompose(ssm, inputs())  # and nothing is left behind


def test_a_model_without_ssm_layers_is_refused() -> None:
    with si.attach(transformer("llama")) as ssm, pytest.raises(FeatureError, match="has no SSM layers"):
        decompose(ssm, inputs())


def test_a_projection_counts_for_what_it_does_not_for_how_it_keeps_its_weights() -> None:
    model = build("mamba")
    with si.attach(model) as ssm:
        packed = ssm.mixers[1].out_proj
        weight = packed.weight.detach()
        del packed.weight
        packed.weight = weight.to(torch.int8)
        packed.forward = lambda states: torch.nn.functional.linear(states, weight)
        found = decompose(ssm, inputs())[1]
        assert found.rest.abs().max() < 1e-5 * found.whole.abs().max()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:quantized..linear_dynamic_fp16. an autograd kernel was not registered")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
@pytest.mark.parametrize("name", ["bamba", "zamba2"])
def test_a_projection_that_quantises_its_inputs_is_refused_and_one_of_packed_weights_is_not(name: str) -> None:
    packed, quantised = (
        torch.ao.quantization.quantize_dynamic(build(name), {torch.nn.Linear}, dtype=dtype)
        for dtype in (torch.float16, torch.qint8)
    )
    with si.attach(packed) as ssm:  # their `weight` is a method
        expected = mixer_outputs(ssm, inputs())
        for layer, found in decompose(ssm, inputs()).items():
            assert relative_error(total(found), expected[layer][:, [-1]]) < 1e-5
            assert found.rest.abs().max() < 1e-5 * found.whole.abs().max()
        with pytest.raises(FeatureError, match="the output head gives no gradient"):
            logit_attribution(ssm, inputs(), 3)
        with pytest.raises(FeatureError, match="the model's logits have no gradient .* quantised layers give none"):
            edge_attribution(ssm, inputs(), log_probability(3))
    message = r"layer \d: the output projection \(\w+\) is no matrix product: it is"
    with si.attach(quantised) as ssm, pytest.raises(FeatureError, match=message):
        decompose(ssm, inputs())


class _Adapted(torch.nn.Module):
    """As adapters do it: the weight is that of the layer below, the output is not its product alone."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.low = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, states: Tensor) -> Tensor:
        return self.base(states) + self.low(states)


def test_an_adapter_beside_the_projection_is_a_part_of_it() -> None:
    with si.attach(build("mamba2")) as ssm:
        plain = decompose(ssm, inputs())[1]
        ssm.mixers[1].out_proj = _Adapted(ssm.mixers[1].out_proj)
        found = decompose(ssm, inputs())[1]
        assert found.rest.abs().max() < 1e-5 * found.whole.abs().max()
        assert relative_error(found.parts["ssm"], plain.parts["ssm"]) > 1e-2


def test_another_activation_has_no_view_by_inputs() -> None:
    with si.attach(build("mamba", hidden_act="gelu")) as ssm:
        assert relative_error(total(decompose(ssm, inputs())[0]), mixer_outputs(ssm, inputs())[0][:, [-1]]) < 1e-5
        with pytest.raises(FeatureError, match="activation is 'gelu'"):
            decompose(ssm, inputs(), by="input")


def test_layers_as_numpy_torch_and_python_have_them() -> None:
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        for layers in (1, np.int64(1), torch.tensor(1), [np.int64(1)], torch.tensor([1]), (1,), range(1, 2)):
            assert list(decompose(ssm, inputs(), layers=layers)) == [1]
        for layers, message in (
            ([], "names no layer"),
            (1.5, "integer"),
            ("1", "integer"),
            (range(0), "names no layer"),
        ):
            with pytest.raises(FeatureError, match=message):
                decompose(ssm, inputs(), layers=layers)
        for ids, message in ((torch.ones(2, 3), "float32"), (torch.ones(3).long(), r"\[b t\], got torch.int64 \[3\]")):
            with pytest.raises(FeatureError, match=message):
                decompose(ssm, ids)


@pytest.mark.parametrize("wrong", ["top third", [0, 1], {"a": [0, 1]}, {"a": {0: None}}, {"a": "top third"}])
def test_groups_of_another_form_are_refused(wrong: Any) -> None:
    with si.attach(build("mamba2")) as ssm, as_users_run_it(), pytest.raises(FeatureError, match="group"):
        decompose(ssm, inputs(), features=wrong)
