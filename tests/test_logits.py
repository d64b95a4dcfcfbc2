"""Direct logit attribution: that it adds up, what the rest is, and what it finds in the embedded models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from drawn import png
from random_terms import as_users_run_it
from support import relative_error
from test_softmax import transformer
from tiny_hosts import NAMES, build, inputs, padded
from torch import Tensor, nn

import ssm_interp as si
from ssm_interp.attribution import logit_attribution
from ssm_interp.attribution.stream import _beside, _put, last_norm, written_share
from ssm_interp.errors import MetricError
from ssm_interp.features import FeatureError, feature_groups
from ssm_interp.hooks.seam.blocks import blocks_of
from ssm_interp.plots import attribution_figure

SHARES = {"granitemoehybrid": 0.8, "falcon_h1": 0.9}


def silence_all_but_mixers(ssm: si.Attachment) -> None:
    """Make attention, MLPs and experts give zeros, so that the embedding and the mixers are the whole stream."""
    for layer, block in enumerate(blocks_of(ssm.model) or ()):
        mixer = ssm.mixers.get(layer, nn.Module())
        for part in _beside(block, mixer):
            if "norm" not in type(part).__name__.lower():
                part.register_forward_hook(_put(torch.zeros_like))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["source", "input"])
def test_mixers_and_embedding_are_the_whole_logit_difference(name: str, by: Any) -> None:
    model = build(name, dtype=torch.float64)
    with si.attach(model, own_operator=True) as ssm:
        silence_all_but_mixers(ssm)
        seen: dict[str, Any] = {}
        (blocks_of(model) or [nn.Module()])[0].register_forward_pre_hook(
            lambda _m, args, kwargs: seen.update(embedded=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        norm = last_norm(ssm)
        norm.register_forward_hook(lambda _m, args, output: seen.update(entering=args[0], leaving=output))
        prompt = padded([9, 4])
        with torch.no_grad():
            logits = model(**prompt, use_cache=False).logits[:, -1]
        head = model.get_output_embeddings().weight
        behind_head = logits[0, 5] / (seen["leaving"][0, -1] @ head[5])  # multipliers of the logits
        direction = (seen["leaving"] / seen["entering"])[:, -1] * (head[[5, 7]] - head[9]) * behind_head
        embedding = (direction * seen["embedded"][:, -1]).sum(-1)
        found = logit_attribution(ssm, prompt, [5, 7], 9, by=by)
        assert relative_error(found.difference, logits[[0, 1], [5, 7]] - logits[:, 9]) == 0
        mixers = found.difference - found.rest
        assert relative_error(mixers, logits[[0, 1], [5, 7]] - logits[:, 9] - embedding) < 2e-6  # hosts' fp32 logits
        assert relative_error(found.rest, embedding) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_what_blocks_take_up_of_their_mixers(name: str) -> None:
    with si.attach(build(name, dtype=torch.float64)) as ssm:
        shares = written_share(ssm, torch.tensor([[3]]))
        assert shares == pytest.approx(dict.fromkeys(ssm.layers, SHARES.get(name, 1.0)))


@pytest.mark.parametrize("name", ["mamba", "granitemoehybrid", "zamba2"])
def test_the_frame_adds_up_to_the_difference(name: str) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        groups = feature_groups(ssm, ["top third", "bottom third"])
        for by in ("source", "input"):
            found = logit_attribution(ssm, padded([9, 4]), 5, 9, by=by, features=groups)  # type: ignore[arg-type]
            frame = found.frame
            assert list(frame) == ["row", "layer", "source", "part", "feature_group", "attribution"]
            sums = frame.groupby("row")["attribution"].sum()
            assert sums.tolist() == pytest.approx(found.difference.tolist(), rel=1e-12)
            assert frame[frame.part == "rest"]["layer"].isna().all() and len(frame[frame.part == "rest"]) == 2
            assert set(frame.feature_group.dropna()) == {"top third", "bottom third", "other"}


def test_groups_layers_and_position_are_parts_of_the_whole() -> None:
    with si.attach(build("bamba", dtype=torch.float64), own_operator=True) as ssm:
        whole = logit_attribution(ssm, inputs(), 5, 9, position=6)
        some = logit_attribution(ssm, inputs(), 5, 9, position=6, layers=[3, 0], features={"a": {0: [1, 2]}})
        assert whole.position == 6 and some.layers == (3, 0) and some.groups == ("a", "other")
        assert relative_error(some.parts["ssm"].sum(2), whole.parts["ssm"][:, [2, 0], 0]) < 1e-12
        assert not some.parts["ssm"][:, 0, 0].any() and some.parts["ssm"][:, 1, 0].any()
        left_out = whole.parts["ssm"][:, 1].sum((1, 2)) + whole.parts["skip"][:, 1].sum((1, 2))
        assert relative_error(some.rest - whole.rest, left_out) < 1e-9
        placed = some.by_position().sum((1, 2, 3)) + some.parts["out_bias"].sum((1, 2, 3))
        assert relative_error(placed + some.rest, some.difference) < 1e-12


def test_a_logit_alone_against_a_token_and_against_the_mean() -> None:
    with si.attach(build("mamba", dtype=torch.float64), own_operator=True) as ssm:
        prompt = inputs(batch=1)["input_ids"]
        alone = logit_attribution(ssm, prompt.expand(64, -1), range(64))
        pair = logit_attribution(ssm, prompt, torch.tensor([5]), (9,))
        mean = logit_attribution(ssm, prompt, 5, "mean")
        for name in ("ssm", "skip"):
            parts = alone.parts[name]
            assert relative_error(pair.parts[name][0], parts[5] - parts[9]) < 1e-5
            assert relative_error(mean.parts[name][0], parts[5] - parts.mean(0)) < 1e-5


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode(context: Any) -> None:
    model = build("mamba2")
    with si.attach(model) as ssm:
        expected = logit_attribution(ssm, inputs(), 5, 9)
        with context():
            before = torch.is_grad_enabled()
            found = logit_attribution(ssm, inputs(), 5, 9)
            assert torch.is_grad_enabled() == before
        assert torch.equal(found.rest, expected.rest) and not found.parts["ssm"].requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not last_norm(ssm)._forward_hooks and not ssm.mixers[0]._forward_hooks


def test_weights_that_are_offloaded() -> None:
    with si.attach(build("mamba2")) as ssm:
        expected = logit_attribution(ssm, inputs(), 5, 9, by="input")
    model = build("mamba2")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with si.attach(model) as ssm:
        found = logit_attribution(ssm, inputs(), 5, 9, by="input")
        assert torch.equal(found.parts["ssm"], expected.parts["ssm"]) and torch.equal(found.rest, expected.rest)


@pytest.mark.parametrize(("name", "most"), [("tiny-mamba1", 6), ("tiny-mamba2", 5)])
def test_the_subject_carries_the_answer(name: str, most: int) -> None:
    model, tokenizer = si.load(name)
    prompt = tokenizer("The name of the capital city of France is", return_tensors="pt")
    paris, london = (tokenizer(word)["input_ids"][0] for word in (" Paris", " London"))
    tokens = [tokenizer.decode(token) for token in prompt["input_ids"][0]]
    subject = [7, 8]
    assert [tokens[place] for place in subject] == [" Fran", "ce"]
    with si.attach(model) as ssm:
        found = logit_attribution(ssm, prompt, paris, london)
        carried = found.parts["ssm"][0, :, 0]  # l s
        assert carried[:, subject].sum() > 0.75 * carried.sum() > 0
        assert int(carried[:, subject].sum(1).argmax()) == most
        assert abs(float(found.rest)) < 0.02 * float(found.difference)
        png(attribution_figure(found.by_position()[0, :, 0], tokens, found.layers, subject=subject, title=name))


def test_bad_input_is_refused() -> None:
    prompt = inputs()
    with si.attach(build("mamba2")) as ssm, as_users_run_it():
        for arguments, message in [
            (([5, 6, 7],), "answer names 3 tokens, but there are 2 rows"),
            ((64,), "answer names the token 64, but the vocabulary has 64"),
            ((5, -1), "other must be a token id, or one for each row, got -1"),
            ((5, "median"), "other is a token id, .* got 'median'"),
            ((" Paris",), "answer must be a token id, .* got ' Paris'"),
            ((5.0,), "answer must be a token id, .* got 5.0"),
        ]:
            with pytest.raises((MetricError, FeatureError), match=message):
                logit_attribution(ssm, prompt, *arguments)
        with pytest.raises(FeatureError, match="position 8 is padding in row 1"):
            logit_attribution(ssm, padded([9, 4], side="right"), 5)
        with pytest.raises(FeatureError, match="no position 9"):
            logit_attribution(ssm, prompt, 5, position=9)
        with pytest.raises(FeatureError, match="by must be"):
            logit_attribution(ssm, prompt, 5, by="token")  # type: ignore[arg-type]
        with ssm.edit(si.Knockout(sources=0)), pytest.raises(FeatureError, match="an edit is at work"):
            logit_attribution(ssm, prompt, 5)
        assert not last_norm(ssm)._forward_hooks


def test_models_whose_end_cannot_be_frozen_are_refused() -> None:
    model: Any = build("mamba")
    with si.attach(model) as ssm:
        model.backbone.norm_f = nn.LayerNorm(32)
        with pytest.raises(FeatureError, match="LayerNorm, does more than scale"):
            logit_attribution(ssm, inputs(), 5)
        model.backbone.norm_f = nn.Identity()
        del model.backbone.norm_f
        with pytest.raises(FeatureError, match="has 0 norms beside its blocks"):
            logit_attribution(ssm, inputs(), 5)
    with si.attach(build("mamba").backbone) as ssm, pytest.raises(FeatureError, match="no output head"):
        logit_attribution(ssm, inputs(), 5)
    with si.attach(transformer("llama")) as ssm, pytest.raises(FeatureError, match="has no SSM layers"):
        logit_attribution(ssm, inputs(), 5)


def test_a_block_that_bends_its_mixers_output_is_refused() -> None:
    model: Any = build("mamba")
    with si.attach(model) as ssm:
        bent = torch.linspace(0, 1, 32)
        model.backbone.layers[2].register_forward_hook(lambda _m, _a, output: output * bent)
        with pytest.raises(FeatureError, match="block of layer 2 does more with its mixer's output"):
            logit_attribution(ssm, inputs(), 5)


def test_a_result_draws_a_row_of_its_batch() -> None:
    tokens = [[f"{row}.{column}" for column in range(9)] for row in range(2)]
    with si.attach(build("mamba2")) as ssm:
        groups = feature_groups(ssm, ["top third"])
        found = logit_attribution(ssm, inputs(), 5, 7, features=groups, tokens=tokens)
        with pytest.raises(FeatureError, match="2 rows of 9 positions"):
            logit_attribution(ssm, inputs(), 5, 7, tokens=["a"])
        numbered = logit_attribution(ssm, inputs(), 5, 7).plot()
    figure = found.plot(row=1, subject=[2])
    png(figure)
    axes = figure.axes[0]
    shown: Any = axes.get_images()[0].get_array()
    values = found.by_position()[1].sum(1)
    torch.testing.assert_close(torch.tensor(shown.tolist()), values.T.float())
    whole = f"logit difference {float(found.difference[1]):.3g}, of which {float(values.sum()):.3g} is shown"
    assert axes.get_title().replace("\n", " ") == f"Mamba2ForCausalLM {whole}"
    assert axes.get_yticklabels()[2].get_text() == "1.2"
    assert numbered.axes[0].get_yticklabels()[2].get_text() == "2"  # positions, where no tokens are known
    assert found.plot(title="mine").axes[0].get_title() == "mine"
    with pytest.raises(FeatureError, match="no row 2; the batch has rows 0 to 1"):
        found.plot(row=2)


def test_the_picture_shows_the_numbers_and_refuses_what_does_not_fit() -> None:
    values = torch.tensor([[0.5, -1.0, 0.0], [0.0, 2.0, 0.25]])
    figure = attribution_figure(values, ["The", " Nile", "$x"], [0, 4], subject=[1], title="t $x")
    png(figure)
    axes, bar = figure.axes
    image = axes.get_images()[0]
    shown: Any = image.get_array()
    assert torch.equal(torch.tensor(shown.tolist()), values.T) and image.get_clim() == (-2.0, 2.0)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["The", "·Nile", "$x"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "4"]
    assert bar.get_ylabel().replace("\n", " ").startswith("Written to the logit difference (logits)")
    assert axes.get_yticklabels()[1].get_weight() == "bold"
    assert attribution_figure(0 * values, ["a", "b", "c"], [0, 1]).axes[0].get_images()[0].get_clim() == (-1.0, 1.0)

    def draw(values: Tensor, tokens: int = 3, **options: Any) -> None:
        attribution_figure(values, ["x"] * tokens, [0, 4], **options)

    for values_, tokens, options, message in [
        (values, 2, {}, r"\[layer source\] = \[2, 2\] for 2 layers and 2 tokens, got \[2, 3\]"),
        (values * torch.inf, 3, {}, "not finite"),
        (values, 3, {"subject": [3]}, "subject has position 3, but there are 3 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(values_, tokens, **options)
