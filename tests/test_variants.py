"""Answers under variants, through the one door: by rows and by forwards, against one hooked forward each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import png
from random_terms import as_users_run_it
from tiny_flow import World, world
from tiny_hosts import build, inputs
from torch import Tensor

import ssm_interp as si
from ssm_interp.errors import SsmInterpError
from ssm_interp.hooks import answers
from ssm_interp.prompts import Batch, pad, tokenize

METRICS = ("log_probability", "probability", "logit_difference", "rank", "accuracy", "kl")


@pytest.fixture(scope="module")
def scene() -> World:
    return world("mamba2", count=5)


@pytest.fixture(scope="module")
def batch(scene: World) -> Batch:
    return pad([tokenize(prompt, scene.tokenizer) for prompt in scene.prompts])


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def by_hand(ssm: si.Attachment, batch: Batch, variant: Any) -> dict[str, Tensor]:
    """Every metric from the logits of one hooked forward."""
    several = (variant,) if isinstance(variant, si.Intervention) else variant
    with torch.no_grad():
        clean = ssm.model(**batch).logits[:, -1].double()
        with ssm.edit(*several, batch=batch):
            logits = ssm.model(**batch).logits[:, -1].double()
    rows, ids = torch.arange(len(logits)), batch.answer_ids
    others = clean.scatter(1, ids[:, None], -torch.inf).argmax(1)
    p, q = clean.softmax(-1), logits.softmax(-1)
    return {
        "log_probability": q[rows, ids].log(),
        "probability": q[rows, ids],
        "logit_difference": logits[rows, ids] - logits[rows, others],
        "rank": (logits > logits[rows, ids][:, None]).sum(1).double(),
        "accuracy": (logits.argmax(1) == ids).double(),
        "kl": (p * (p / q).log()).sum(1),
        "entropy": entropy(logits),
    }


def variants_of(ssm: si.Attachment) -> list[Any]:
    layers = list(ssm.layers)
    return [
        (),
        si.Knockout(sources="subject", targets="last", layers=layers[:2]),
        si.Knockout(sources="last", targets="last"),
        (si.Knockout(sources="first", targets="last", layers=layers[0]), si.Knockout(sources="all", layers=layers[1])),
        si.Knockout(sources="subject", targets="last", features=[0, 2], layers=layers[1]),
    ]


def others_of(ssm: si.Attachment) -> list[Any]:
    """Variants that take full forwards."""
    layers = list(ssm.layers)
    return [
        (si.Knockout(sources="subject", targets="last"), si.Knockout(sources="first", targets="last")),
        si.Knockout(edges=[(-1, -2), (-1, -4), (-2, -3)], layers=layers[:2]),
        si.PatchState(position="subject_last", state=0.0, layers=layers[0]),
        (si.SetDelta(value=0.0, positions="subject"), si.Knockout(sources="last", targets="last")),
    ]


@pytest.mark.parametrize("by", ["rows", "forwards"])
def test_every_metric_of_every_variant_is_that_of_a_hooked_forward(scene: World, batch: Batch, by: Any) -> None:
    assert not batch.attention_mask.all()  # prompts of several lengths
    with si.attach(scene.model) as ssm:
        variants = variants_of(ssm)
        found = answers(ssm, batch, variants, [*METRICS, entropy], by=by, batch_size=7)
        assert found.metrics == (*METRICS, "entropy")
        assert repr(found).endswith(": [7, 5, 5]; rows of one step)") == (by == "rows")
        for number, variant in enumerate(variants):
            expected = by_hand(ssm, batch, variant)
            for name, values in zip(found.metrics, found.values[:, number], strict=True):
                torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5, msg=f"{name}, {variant}")
        frame = found.frame
        assert list(frame.columns) == ["variant", "intervention", "row", *METRICS, "entropy"]
        rank = frame[(frame["variant"] == 2) & (frame["row"] == 3)]["rank"].item()
        assert rank == float(found.values[METRICS.index("rank"), 2, 3])
        spread = found.values[0].amax(0) - found.values[0].amin(0)
        assert spread.min() > 0.05  # there is something to get wrong


def test_what_rows_cannot_do_takes_full_forwards_and_says_so(scene: World, batch: Batch) -> None:
    with si.attach(scene.model) as ssm:
        variants = [*variants_of(ssm), *others_of(ssm)]
        found = answers(ssm, batch, variants, ["log_probability", "kl"])
        assert found.how == (
            "rows of one step; 4 of 9 variants by full forwards: several knockouts in one module; "
            "a Knockout of single edges; PatchState is no Knockout; SetDelta is no Knockout"
        )
        for number, variant in enumerate(variants):
            expected = by_hand(ssm, batch, variant)
            torch.testing.assert_close(found.values[0, number], expected["log_probability"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.values[1, number], expected["kl"], rtol=1e-4, atol=1e-5)
        with pytest.raises(si.HookError, match=r"several knockouts in one module \(variant 5\)"):
            answers(ssm, batch, variants, by="rows")
        ssm.layers[0].hook_y.add_hook(lambda y, hook: y * 1)
        assert answers(ssm, batch, [()]).how == "full forwards: hook_y of layer 0 is hooked or exposed"
        ssm.reset_hooks()


@pytest.mark.parametrize("name", ["jamba", "falcon_h1", "zamba2"])
def test_sets_of_knockouts_share_a_forward_in_hybrids(name: str) -> None:
    ids = inputs(2, 7)["input_ids"]
    with si.attach(build(name)) as ssm:
        streams = [("ssm",), ("ssm", "conv"), ("attention",), ("ssm", "attention")]
        variants = [
            (
                si.Knockout(sources=[[1, 2], [3]], targets=-1, through=through),
                si.Knockout(sources=0, targets=[4, 5], through=through, layers=ssm.layers_with(through)[0]),
            )
            for through in streams
        ]
        found = answers(ssm, ids, [(), *variants], lambda logits: logits[:, 3], by="forwards")
        for number, variant in enumerate(variants, start=1):
            with torch.no_grad(), ssm.edit(*variant):
                expected = ssm.model(input_ids=ids).logits[:, -1, 3].double()
            torch.testing.assert_close(found.values[number], expected, rtol=1e-4, atol=1e-5)
        assert (found.values[1:] - found.values[0]).abs().amin() > 1e-4


def test_metrics_of_all_positions(scene: World, batch: Batch) -> None:
    def mean_entropy(logits: Tensor) -> Tensor:
        return entropy(logits).mean(1)

    with si.attach(scene.model) as ssm:
        knockout = si.Knockout(sources="first", targets="subject")
        found = answers(ssm, batch, [(), knockout], mean_entropy, positions="all")
        assert found.how == "full forwards: the metric takes all positions"
        with torch.no_grad(), ssm.edit(knockout, batch=batch):
            expected = mean_entropy(ssm.model(**batch).logits.double())
        torch.testing.assert_close(found.values[1], expected, rtol=1e-4, atol=1e-5)
        assert (found.values[1] - found.values[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda ssm, batch: answers(ssm, batch, []),
            r"got \[\]; \(\), no intervention, is the clean run",
        ),
        (lambda ssm, batch: answers(ssm, batch, si.Knockout()), "answers takes a sequence of variants"),
        (lambda ssm, batch: answers(ssm, batch, [3]), "edit takes interventions"),
        (
            lambda ssm, batch: answers(ssm, batch, [()], "logprob"),
            "'logprob': did you mean 'log_probability'",
        ),
        (lambda ssm, batch: answers(ssm, batch.input_ids, [()]), "'log_probability' needs the prompts' answers"),
        (lambda ssm, batch: answers(ssm, batch, [()], []), "answers needs at least one metric"),
        (lambda ssm, batch: answers(ssm, batch, [()], None), "the metric must be a name .* or a function .* got None"),
        (lambda ssm, batch: answers(ssm, batch, [()], positions="first"), "positions must be 'last' or 'all'"),
        (lambda ssm, batch: answers(ssm, batch, [()], progress=3), "progress must be a function of a count, got 3"),
        (lambda ssm, batch: answers(ssm, {**batch, "labels": batch.input_ids}, [()], "kl"), "the inputs hold labels"),
        (lambda ssm, batch: answers(ssm, batch, [()], by="magic"), "by must be 'auto', 'rows' or 'forwards'"),
        (lambda ssm, batch: answers(ssm, batch, [()], batch_size=0), "batch_size must be a whole number, at least 1"),
        (
            lambda ssm, batch: answers(ssm, batch.input_ids, [si.Knockout(sources="subject")], entropy),
            "names the role 'subject'.*; give the batch, pad",
        ),
        (
            lambda ssm, batch: answers(ssm, batch, [si.Knockout(sources="subject", features="top third")]),
            "Knockout.features names the feature group 'top third'",
        ),
        (lambda ssm, batch: answers(ssm, batch, [si.Knockout(sources="subjct")]), "subjct.*did you mean 'subject'"),
        (
            lambda ssm, batch: answers(ssm, batch, [si.Knockout(sources="last", targets="first")]),
            "none of the edges of Knockout.* exists in a prompt",
        ),
        (
            lambda ssm, batch: answers(ssm, batch, [()], lambda x: x),
            r"0 \(the clean run\): the metric returned",
        ),
        (lambda ssm, batch: answers(ssm, batch, [()], lambda x: x[:, 0] / 0), "is (nan|-?inf) for row 0, not a finite"),
        (lambda ssm, batch: answers(ssm.model, batch, [()]), "the model must be attached"),
        (
            lambda ssm, batch: answers(ssm, batch, [()], ["kl"], full_answer=True),
            "of full answers there are the metrics log_probability, probability, accuracy; 'kl' is about one token",
        ),
        (lambda ssm, batch: answers(ssm, batch.input_ids, [()], full_answer=True), "full answers are those of a Batch"),
    ],
)
def test_what_cannot_be_answered_says_why(scene: World, batch: Batch, ask: Any, message: str) -> None:
    with as_users_run_it(), si.attach(scene.model) as ssm, pytest.raises(SsmInterpError, match=message):
        ask(ssm, batch)


def test_roles_in_an_edit_need_a_batch(scene: World, batch: Batch) -> None:
    knockout = si.Knockout(sources=["subject", 0], targets="last")
    assert knockout.roles == ("subject", "last")
    subject, last = batch.positions("subject"), batch.positions("last")
    resolved = knockout.resolve(batch)
    assert resolved.targets == tuple(map(tuple, last))
    assert resolved.sources == tuple((0, *row) for row in subject)
    assert si.Intervention.from_dict(knockout.to_dict()) == knockout
    with si.attach(scene.model) as ssm:
        with (
            pytest.raises(si.InterventionError, match=r"names the role 'subject'.*ssm.edit\(..., batch=batch\)"),
            ssm.edit(knockout),
        ):
            pass
        for given in (batch.input_ids, batch.prompts[0], {"a": 1}, list(batch.prompts)):
            with (
                as_users_run_it(),
                pytest.raises(si.InterventionError, match="roles are resolved by a batch of prompts, as pad"),
                ssm.edit(knockout, batch=given),
            ):
                pass
        with (
            pytest.raises(si.InterventionError, match="feature group 'top third'"),
            ssm.edit(si.Knockout(sources=0, features="top third")),
        ):
            pass


def test_answers_are_drawn_and_stored(scene: World, batch: Batch, tmp_path: Path) -> None:
    with si.attach(scene.model) as ssm:
        found = answers(ssm, batch, variants_of(ssm), ["probability", entropy])
    found.save(tmp_path / "answers.parquet")
    again = si.Answers.load(tmp_path / "answers.parquet")
    assert torch.equal(again.values, found.values)
    assert (again.metrics, again.how, again.variants) == (found.metrics, found.how, found.variants)
    assert again.variants[0] == "the clean run"
    figure = found.plot()
    assert [axes.get_xlabel() for axes in figure.axes] == ["probability", "entropy"]
    means = figure.axes[0].lines[1].get_xdata()
    assert list(means) == pytest.approx(found.values[0].mean(1).tolist())
    assert png(figure) == png(found.plot())


def test_positions_under_full_answers_are_those_of_the_prompts() -> None:
    """Also where answers of different lengths stand behind them, in rows of different lengths."""
    scene = world("mamba2", count=3)
    texts = [f"{scene.prompts[0].answer} {scene.prompts[1].answer}", scene.prompts[1].answer]
    prompts = [replace(prompt, answer=text) for prompt, text in zip(scene.prompts, texts, strict=False)]
    batch = pad([tokenize(prompt, scene.tokenizer) for prompt in prompts])
    assert [len(row.answer_ids) for row in batch.prompts] == [2, 1]
    by_role = si.Knockout(sources="subject", targets="last")
    step, everywhere = si.SetDelta(value=0.0, positions="last"), si.SetDelta(value=0.0, positions=-1)
    variants = [by_role, by_role.resolve(batch), si.Knockout(sources="subject", targets=-1), step, everywhere]
    with si.attach(scene.model) as ssm:
        found = answers(ssm, batch, [(), *variants], full_answer=True).values
        for row, prompt in enumerate(batch.prompts):
            whole = prompt.continued()
            last = len(prompt) - 1
            hand = [si.Knockout(sources=list(prompt.positions("subject")), targets=last)] * 3
            hand += [si.SetDelta(value=0.0, positions=last)] * 2
            for number, edit in enumerate(hand, start=1):
                with torch.no_grad(), ssm.edit(edit):
                    logits = ssm.model(input_ids=torch.tensor([whole.ids])).logits[0].double().log_softmax(-1)
                expected = sum(float(logits[last + at, token]) for at, token in enumerate(prompt.answer_ids))
                assert float(found[number, row]) == pytest.approx(expected, rel=1e-4)
        assert (found[1:] - found[0]).abs().amin() > 1e-3
        with pytest.raises(si.InterventionError, match="names single edges, which full answers do not take"):
            answers(ssm, batch, [si.Knockout(edges=[(-1, -2)])], full_answer=True)
        with ssm.edit(everywhere), pytest.raises(si.HookError, match="an edit is at work that names positions"):
            answers(ssm, batch, [()], full_answer=True)


def test_metrics_have_names_of_their_own(scene: World, batch: Batch) -> None:
    with si.attach(scene.model) as ssm:
        found = answers(ssm, batch, [()], [lambda x: x[:, 0], entropy, lambda x: x[:, 1], "rank"])
    assert found.metrics == ("metric", "entropy", "metric 2", "rank")
    assert found.frame["metric"].tolist() == found.values[0, 0].tolist() != found.frame["metric 2"].tolist()
