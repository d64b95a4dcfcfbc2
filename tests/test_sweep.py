"""The sweep, against knockouts made by hand on single prompts without padding."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from random_terms import as_users_run_it
from test_softmax import transformer
from tiny_flow import LAYERS, World, tiny_model, word_tokenizer, world
from torch import Tensor

import ssm_interp as si
from ssm_interp.errors import SsmInterpError
from ssm_interp.features import FeatureError
from ssm_interp.flow import FlowError, FlowResult, FlowRun, default_size, sweep, windows
from ssm_interp.flow.result import COLUMNS
from ssm_interp.hooks import HookedWarning
from ssm_interp.prompts import Prompt, PromptError, pad, tokenize

FAMILIES = ("mamba1", "mamba2")
ROLES = {"sources": ("subject", "relation", "first", "last", "context"), "targets": ("last", "subject")}
FEW = {"sources": ("subject", "last"), "targets": ("last",)}
KEPT, WRONG = 5, 2


@pytest.fixture(scope="module", params=FAMILIES)
def scene(request: pytest.FixtureRequest) -> World:
    return world(request.param, count=KEPT)


def swept(scene: World, **options: object) -> FlowResult:
    with si.attach(scene.model) as ssm:
        return sweep(ssm, scene.tokenizer, scene.prompts + scene.wrong, **options)


@torch.no_grad()
def by_hand(scene: World, align: str, size: int, roles: dict[str, Sequence[str]]) -> Iterator[dict[str, object]]:
    """One prompt, one window at a time; probabilities by numpy."""
    with si.attach(scene.model) as ssm:
        for window in windows(range(LAYERS), size, align):
            for prompt in scene.prompts:
                words = tokenize(prompt, scene.tokenizer)
                ids = torch.tensor([words.ids])
                base = softmax(scene.model(ids).logits[0, -1])
                for target in roles["targets"]:
                    for source in roles["sources"]:
                        edges = [(t, s) for t in words.roles[target] for s in words.roles[source] if s <= t]
                        p = base
                        if edges:
                            with ssm.edit(si.Knockout(edges=edges, layers=window.layers)):
                                p = softmax(scene.model(ids).logits[0, -1])
                        before, after = base[words.answer_id], p[words.answer_id]
                        yield {
                            "prompt_id": prompt.id,
                            "source": source,
                            "target": target,
                            "layer": window.at,
                            "n_edges": len(edges),
                            "p_base": before,
                            "p": after,
                            "relative_change": 100 * (after - before) / before,
                            "logprob_difference": np.log(after) - np.log(before),
                            "hit": p.argmax() == words.answer_id,
                        }


def softmax(logits: torch.Tensor) -> np.ndarray:
    shifted = np.exp((logits - logits.max()).double().numpy())
    return shifted / shifted.sum()


@pytest.mark.parametrize(("align", "size", "roles"), [("left", 2, ROLES), ("centre", 3, FEW)])
def test_every_number_is_that_of_a_single_prompt_by_hand(
    scene: World, align: str, size: int, roles: dict[str, Sequence[str]]
) -> None:
    keys = ["prompt_id", "source", "target", "layer"]
    result = swept(scene, **roles, windows=size, align=align, batch_size=3)
    expected = pd.DataFrame(by_hand(scene, align, size, roles)).set_index(keys)
    found = result.frame.set_index(keys).loc[expected.index]
    assert len(result.frame) == len(expected)
    for column in ("p_base", "p"):
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-5)
    np.testing.assert_allclose(found["relative_change"], expected["relative_change"], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found["logprob_difference"], expected["logprob_difference"], rtol=1e-5, atol=1e-5)
    assert found["n_edges"].tolist() == expected["n_edges"].tolist()
    assert found["hit"].tolist() == expected["hit"].tolist()
    moved = expected.query("source == 'subject' and target == 'last'")["relative_change"]
    assert moved.abs().max() > 10  # the knockouts of this model do something


def test_batches_and_padding_change_nothing(scene: World) -> None:
    one, three, all_at_once = (swept(scene, **FEW, windows=2, batch_size=size).frame for size in (1, 3, 64))
    for frame in (three, all_at_once):
        numbers = ["p_base", "p", "relative_change", "logprob_difference"]
        pd.testing.assert_frame_equal(frame.drop(columns=numbers), one.drop(columns=numbers))
        np.testing.assert_allclose(frame[["p_base", "p"]], one[["p_base", "p"]], rtol=1e-5)


def test_only_prompts_answered_correctly_are_kept_and_counted(scene: World) -> None:
    result = swept(scene)
    assert result.runs == (
        FlowRun(
            model=type(scene.model).__name__,
            layers=tuple(range(LAYERS)),
            windows=(default_size(range(LAYERS)),),
            align="left",
            asked=KEPT + WRONG,
            kept=KEPT,
            engine="rows of one step",
        ),
    )
    assert result.frame["prompt_id"].unique().tolist() == [prompt.id for prompt in scene.prompts]
    assert list(result.frame.columns) == COLUMNS
    assert set(result.summary()["n"]) == {KEPT}


def test_an_empty_role_changes_nothing_and_is_counted(scene: World) -> None:
    result = swept(scene, sources=("context",), windows=1)
    at_start = [prompt.id for prompt in scene.prompts if prompt.subject_span[0] == 0]
    assert 0 < len(at_start) < len(scene.prompts)
    without = result.frame[result.frame["n_edges"] == 0]
    assert sorted(without["prompt_id"].unique()) == sorted(at_start)
    np.testing.assert_allclose(without["p"], without["p_base"], rtol=1e-6)
    assert set(result.summary()["n_empty"]) == {len(at_start)}


def test_the_default_window_and_roles_are_the_papers(scene: World) -> None:
    frame = swept(scene).frame
    assert set(frame["window_size"]) == {default_size(range(LAYERS))}
    assert frame["source"].unique().tolist() == ["subject", "relation", "first", "last"]
    assert frame["target"].unique().tolist() == ["last"]


@pytest.mark.parametrize("by", ["rows", "forwards"])
def test_a_metric_of_ones_own_is_measured_beside_the_probability(scene: World, by: str) -> None:
    def margin(logits: Tensor) -> Tensor:
        best = logits.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]

    result = swept(scene, sources=("subject", "last"), windows=4, metric=margin, by=by, batch_size=4)
    with si.attach(scene.model) as ssm:
        for row in result.frame.to_dict("records"):
            prompt = tokenize(next(one for one in scene.prompts if one.id == row["prompt_id"]), scene.tokenizer)
            batch = pad([prompt])
            with torch.no_grad(), ssm.edit(si.Knockout(sources=row["source"], targets="last"), batch=batch):
                expected = margin(ssm.model(**batch).logits[:, -1])
            assert row["metric"] == "margin"
            assert row["value"] == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    named = swept(scene, sources=("subject",), windows=4, metric="probability", by=by)
    np.testing.assert_allclose(named.frame["value"], named.frame["p"], rtol=1e-6)
    np.testing.assert_allclose(named.frame["value_base"], named.frame["p_base"], rtol=1e-6)
    assert set(named.frame["metric"]) == {"probability"}


def test_the_plain_engine_gives_the_same_table_and_says_why(scene: World) -> None:
    options = {"sources": ("subject", "relation"), "targets": ("last", "subject"), "windows": (1, 3)}
    fast = swept(scene, **options)
    with si.attach(scene.model) as ssm:
        ssm.layers[1].hook_y.add_hook(lambda y, hook: None)
        with pytest.warns(HookedWarning, match="the sweep runs under the hooks on hook_y of layer 1"):
            plain = sweep(ssm, scene.tokenizer, scene.prompts + scene.wrong, **options)
    assert plain.runs[0].engine == "full forwards: hook_y of layer 1 is hooked or exposed"
    numbers = ["p_base", "p", "relative_change", "logprob_difference"]
    pd.testing.assert_frame_equal(fast.frame.drop(columns=numbers), plain.frame.drop(columns=numbers))
    np.testing.assert_allclose(fast.frame["p"], plain.frame["p"], rtol=1e-5)
    assert set(fast.frame["window_size"]) == {1, 3}


def test_feature_groups_and_single_positions_are_rows_too(scene: World) -> None:
    with si.attach(scene.model) as ssm:
        heads = {layer: (0, 2) for layer in ssm.layers}
        result = sweep(
            ssm, scene.tokenizer, scene.prompts, sources=(0, 2, 8), windows=2, features={"all": None, "two": heads}
        )
        frame = result.frame.set_index(["prompt_id", "source", "feature_group", "window_start"])
        assert frame.index.is_unique
        for prompt in scene.prompts:
            words = tokenize(prompt, scene.tokenizer)
            for source in (0, 2, 8):
                row = frame.loc[(prompt.id, str(source), "two", 1)]
                assert row["n_edges"] == (source < len(words.ids))
                if row["n_edges"]:
                    knockout = si.Knockout(sources=source, targets=-1, layers=(1, 2), features=(0, 2))
                    with ssm.edit(knockout), torch.no_grad():
                        p = softmax(scene.model(torch.tensor([words.ids])).logits[0, -1])[words.answer_id]
                    assert row["p"] == pytest.approx(p, rel=1e-5)
        with pytest.raises(FeatureError, match="feature group 'two' names no features for layer 3"):
            sweep(ssm, scene.tokenizer, scene.prompts, features={"two": {0: (0,), 1: (0,), 2: (0,)}})


def test_progress_counts_every_answer(scene: World) -> None:
    seen: list[tuple[int, int]] = []
    swept(scene, sources=("subject", "last"), windows=2, batch_size=2, progress=lambda *counts: seen.append(counts))
    done = [now for now, _ in seen]
    assert done == sorted(done)
    answers = KEPT + WRONG + KEPT * (1 + 2 * 3)
    assert seen[-1] == (answers, answers)


def test_the_model_is_left_as_it_was(scene: World) -> None:
    ids = torch.tensor([tokenize(scene.prompts[0], scene.tokenizer).ids])
    before = scene.model(ids).logits
    swept(scene, windows=2)
    after = scene.model(ids).logits
    assert torch.equal(before, after)
    assert after.requires_grad
    assert torch.is_grad_enabled()


def test_results_are_saved_joined_and_loaded(scene: World, tmp_path: Path) -> None:
    one, two = swept(scene, name="one", windows=2), swept(scene, name="two", windows=3, align="centre")
    both = FlowResult.join([one, two])
    both.save(tmp_path / "flow.parquet")
    assert FlowResult.load(tmp_path / "flow.parquet").runs == (*one.runs, *two.runs)
    with pytest.raises(FlowError, match="same model name, 'one'"):
        FlowResult.join([one, one])
    with pytest.raises(FlowError, match="no results"):
        FlowResult.join([])
    with pytest.raises(FlowError, match=r"these are missing: \['p_base'\]"):
        FlowResult(one.frame.drop(columns="p_base"), one.runs)


def test_largest_drops_are_the_lowest_means(scene: World) -> None:
    result = swept(scene, windows=2)
    summary = result.summary()
    drops = result.largest_drops()
    assert drops["source"].tolist() == ["subject", "relation", "first", "last"]
    for _, row in drops.iterrows():
        assert row["mean"] == summary.loc[summary["source"] == row["source"], "mean"].min()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"windows": 5}, FlowError, "a window of 5 layers does not fit: this model has 4 of them; give 1 to 4"),
        ({"windows": 0}, FlowError, "give 1 to 4"),
        ({"align": "right"}, Exception, "align"),
        ({"sources": ("subjct",)}, PromptError, "did you mean 'subject'"),
        ({"targets": ("lst",)}, PromptError, "did you mean 'last'"),
        ({"sources": ()}, FlowError, "sources must be a sequence of at least one role"),
        ({"targets": "last"}, FlowError, r"targets must be a sequence of at least one role, such as \('last',\)"),
        ({"batch_size": 0}, FlowError, "batch size must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    model, tokenizer = tiny_model("mamba2"), word_tokenizer()
    with si.attach(model) as ssm, pytest.raises(error, match=message):
        sweep(ssm, tokenizer, [Prompt("ban dus", "dus", "kit")], **options)


def test_bad_prompts_and_models_are_refused(scene: World) -> None:
    with si.attach(scene.model) as ssm:
        with pytest.raises(FlowError, match="at least one prompt"):
            sweep(ssm, scene.tokenizer, [])
        with pytest.raises(PromptError, match="these occur more than once: p0"):
            sweep(ssm, scene.tokenizer, scene.prompts[:1] * 2)
        with pytest.raises(FlowError, match="none of the 2 prompts correctly"):
            sweep(ssm, scene.tokenizer, scene.wrong)
        scene.model.train()
        with pytest.raises(FlowError, match=r"is in training mode; call \.eval\(\)"):
            sweep(ssm, scene.tokenizer, scene.prompts)
        scene.model.eval()


def test_padding_does_not_move_learned_positions() -> None:
    prompts = [Prompt("ban dus", "dus", "kit"), Prompt("lot ban mex dus ral", "mex", "kit")]
    with si.attach(transformer("gpt2")) as ssm:
        found = [
            sweep(ssm, word_tokenizer(), prompts, windows=1, answered_only=False, by=by).frame
            for by in ("forwards", "rows")
        ]
    assert np.allclose(found[0]["p_base"], found[1]["p_base"], rtol=1e-4)
    assert np.allclose(found[0]["p"], found[1]["p"], rtol=1e-4)


def test_logits_that_are_not_numbers_are_refused() -> None:
    scene = world("mamba2", count=2)
    with torch.no_grad():
        scene.model.backbone.layers[1].mixer.out_proj.weight.fill_(torch.nan)
    with pytest.raises(SsmInterpError, match=r"variant 0 \(the clean run\): the metric is nan for row 0"):
        swept(scene)


def test_what_a_sweep_takes(scene: World) -> None:
    with si.attach(scene.model) as ssm:
        named = sweep(ssm, scene.tokenizer, scene.prompts, sources=["subject"], features=["all", "top half"])
        assert set(named.frame["feature_group"]) == {"all", "top half"}
        assert named.summary(interval="bootstrap")["low"].notna().all()
        assert named.plot(statistic="accuracy").axes
    with as_users_run_it():
        with pytest.raises(FlowError, match="takes an attachment, got Mamba.*ForCausalLM; write `with attach"):
            sweep(scene.model, scene.tokenizer, scene.prompts)
        with si.attach(scene.model) as ssm:
            for wrong in (scene.prompts[0], "text", ["text"]):
                with pytest.raises(FlowError, match="takes a sequence of prompts, as load_prompts gives"):
                    sweep(ssm, scene.tokenizer, wrong)
        with pytest.raises(si.HookError, match="this attachment was detached; call attach"):
            sweep(ssm, scene.tokenizer, scene.prompts)
