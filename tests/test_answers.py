"""Answers of several tokens: what is asked is what is shown, and all of it can be asked."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from tiny_flow import WORDS, World, world

import ssm_interp as si
from ssm_interp.circuits import find_circuit
from ssm_interp.flow import (
    FlowResult,
    FlowRun,
    NothingAnswered,
    Study,
    run_study,
    sweep,
    token_map,
    windows,
)
from ssm_interp.prompts import (
    Prompt,
    PromptError,
    SharedTokenWarning,
    load_prompts,
    pad,
    save_prompts,
    shared_first_tokens,
    tokenize,
    with_ids,
)

FRANCE = "The name of the capital city of France is"


@pytest.fixture(scope="module")
def scene() -> World:
    """Answers of one to three words; the model says all of those of `prompts` by itself."""
    tiny = world("mamba2", count=5)

    @torch.no_grad()
    def said(text: str, count: int) -> str:
        ids = tiny.tokenizer(text, return_tensors="pt")["input_ids"]
        for _ in range(count):
            logits = tiny.model(ids).logits[:, -1:]
            ids = torch.cat([ids, logits[..., 1:].argmax(-1) + 1], dim=1)
        return tiny.tokenizer.decode(ids[0, -count:])

    lengths = [1, 2, 3, 1, 2]
    asked = [
        Prompt(p.text, p.subject, said(p.text, count), id=p.id) for p, count in zip(tiny.prompts, lengths, strict=True)
    ]
    first, *_ = asked[2].answer.split()
    wrong = Prompt(asked[2].text, asked[2].subject, f"{first} {next(w for w in WORDS if w not in asked[2].answer)}")
    return World(tiny.model, tiny.tokenizer, asked, [wrong])


def test_what_is_asked_of_an_answer_is_said() -> None:
    _, tokenizer = si.load("tiny-mamba2")
    prague, paris, france = (
        tokenize(Prompt(FRANCE, "France", word), tokenizer) for word in ("Prague", "Paris", "Europe")
    )
    assert prague.asked == '"·P" of "Prague"'
    assert prague.answer_ids[0] == prague.answer_id == paris.answer_id
    assert tokenizer.decode(prague.answer_ids) == " Prague"
    assert len(france.answer_ids) == 1 and france.asked == "Europe"
    assert shared_first_tokens([prague, france, paris, paris]) == {" P": ["Prague", "Paris"]}
    assert shared_first_tokens([paris, paris, france]) == {}
    whole = prague.continued()
    assert tokenizer.decode(whole.ids) == f"{FRANCE} Prag"
    assert whole.roles == prague.roles and whole.positions(len(prague)) == ()
    assert pad([whole, paris]).positions("last") == [[len(whole) - 3 - 1], [len(whole) - 1]]


def test_a_sweep_shows_the_token_it_asks_for_and_warns_where_it_is_another_answers(scene: World) -> None:
    both = [*scene.prompts, *scene.wrong]
    with si.attach(scene.model) as ssm:
        with pytest.warns(SharedTokenWarning, match="2 of 6 prompts .* from another answer: .* full_answer") as caught:
            found = sweep(ssm, scene.tokenizer, both, sources=["subject"], windows=2)
        assert len(caught) == 1
        assert found.runs[0].kept == 6  # "answered correctly", by their first tokens
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sweep(ssm, scene.tokenizer, scene.prompts, sources=["subject"], windows=2)
    rows = found.frame.drop_duplicates("prompt_id")
    assert rows["unasked"].tolist() == [0, 1, 2, 0, 1, 1]
    for prompt, answer in zip(both, rows["answer"], strict=True):
        first, *rest = prompt.answer.split()
        assert answer == (f'"·{first}" of "{prompt.answer}"' if rest else first)
    assert set(found.summary()["n_first"]) == {4}
    assert "6 prompts, 4 by first token" in found.plot().get_suptitle() + found.plot().axes[0].get_title()


@pytest.mark.parametrize("batch_size", [1, 32])
def test_full_answers_are_the_product_over_their_tokens(scene: World, batch_size: int) -> None:
    both = [*scene.prompts, *scene.wrong]
    with si.attach(scene.model) as ssm:
        found = sweep(
            ssm, scene.tokenizer, both, sources=["subject", 0], windows=2, full_answer=True, answered_only=False,
            batch_size=batch_size,
        )  # fmt: skip
        kept = sweep(ssm, scene.tokenizer, both, sources=["subject"], windows=2, full_answer=True)
        table = found.frame.set_index(["prompt_id", "source", "layer"])
        for prompt in both:
            row = tokenize(prompt, scene.tokenizer)
            ids, last = torch.tensor([[*row.ids, *row.answer_ids[:-1]]]), len(row.ids) - 1

            @torch.no_grad()
            def said(*knockouts: si.Knockout, row=row, ids=ids, last=last) -> tuple[float, bool]:
                with ssm.edit(*knockouts):
                    p = scene.model(ids).logits[0, last:].double().softmax(-1)
                hits = [int(p[place].argmax()) == token for place, token in enumerate(row.answer_ids)]
                return float(np.prod([float(p[place, token]) for place, token in enumerate(row.answer_ids)])), all(hits)

            base, right = said()
            assert right == (prompt in scene.prompts)
            for source, positions in (("subject", row.roles["subject"]), ("0", (0,))):
                for window in windows(range(4), 2):
                    p, hit = said(si.Knockout(sources=positions, targets=last, layers=window.layers))
                    cell = table.loc[(prompt.id or prompt.text, source, window.at)]
                    np.testing.assert_allclose([cell["p_base"], cell["p"]], [base, p], rtol=1e-6)
                    assert (cell["hit"], cell["answer"], cell["unasked"]) == (hit, prompt.answer, 0)
    assert kept.runs[0].kept == 5 and kept.runs[0].full_answer
    assert kept.runs[0].engine == "full forwards: every token of the answer is scored"
    assert set(found.summary()["n_first"]) == {0}


def test_an_answer_of_one_token_is_the_same_either_way(scene: World) -> None:
    single = [scene.prompts[0], scene.prompts[3]]
    with si.attach(scene.model) as ssm:
        first, full = (sweep(ssm, scene.tokenizer, single, windows=2, full_answer=full).frame for full in (False, True))
        np.testing.assert_allclose(first["p"], full["p"], rtol=1e-6)
        one = token_map(ssm, scene.tokenizer, scene.prompts[1], window=2)
        whole = token_map(ssm, scene.tokenizer, scene.prompts[1], window=2, full_answer=True)
    first_word = scene.prompts[1].answer.split()[0]
    assert one.caption.startswith(f'answer: "·{first_word}" of "{scene.prompts[1].answer}", p = ')
    assert whole.caption.startswith(f"answer: {scene.prompts[1].answer}, p = ")
    assert whole.p_base is not None and one.p_base is not None and whole.p_base < one.p_base


def test_what_full_answers_cannot_go_with_is_refused(scene: World) -> None:
    unknown = Prompt(scene.prompts[0].text, scene.prompts[0].subject, f"{scene.prompts[0].answer} Zz")
    with si.attach(scene.model) as ssm:
        with pytest.raises(si.HookError, match="cannot be exact: every token of the answer is scored"):
            sweep(ssm, scene.tokenizer, scene.prompts, full_answer=True, by="rows")
        with pytest.raises(PromptError, match="in full: the tokenizer does not know ' Zz'"):
            sweep(ssm, scene.tokenizer, [unknown], full_answer=True)
        with pytest.raises(NothingAnswered, match="tokens are never all of the answer's"):
            sweep(ssm, scene.tokenizer, scene.wrong, full_answer=True)


def test_a_study_keeps_the_option_and_warns_once_for_all_shards(scene: World, tmp_path: Path) -> None:
    scene.model.save_pretrained(tmp_path / "tiny")
    scene.tokenizer.save_pretrained(tmp_path / "tiny")
    save_prompts([*scene.prompts, *scene.wrong], tmp_path / "facts.jsonl")
    options = {
        "model": str(tmp_path / "tiny"), "facts": str(tmp_path / "facts.jsonl"), "device": "cpu", "shard_size": 2,
        "sources": ["subject"], "windows": [2],
    }  # fmt: skip
    with pytest.warns(SharedTokenWarning) as caught:
        run_study(Study(**options), tmp_path / "first")
    assert len(caught) == 1
    full = run_study(Study(**options, full_answer=True), tmp_path / "full")
    full.save(tmp_path / "full.parquet")
    runs = FlowResult.load(tmp_path / "full.parquet").runs
    assert runs == full.runs and runs[0].full_answer and runs[0].kept == 5
    asked = ["flow", "--model", options["model"], "--facts", options["facts"], "--window", 2]
    partly, whole = (run(*asked, "--out", tmp_path / f"x{len(more)}", *more) for more in ((), ("--full-answer",)))
    assert partly.exit_code == whole.exit_code == 0, partly.output + whole.output
    (line,) = partly.stderr.splitlines()
    assert line.startswith("warning: 2 of 6 prompts ask for a first token that does not tell their answer from another")
    example = tokenize(scene.prompts[1], scene.tokenizer).asked
    said = f"kept, 4 of them asked for the first token of their answer alone (such as {example}; --full-answer)"
    assert "6 of 6 prompts answered correctly and " + said in partly.stdout
    assert whole.stderr == ""
    assert "5 of 6 prompts answered correctly and kept, every token of the answer asked for" in whole.stdout


def test_pictures_and_commands_show_the_token_that_is_asked(tmp_path: Path) -> None:
    ids = ["capital/France/0", "capital/Czechia/0"]
    drawn = run("heatmap", *ids, "--model", "tiny-mamba2", "--out", tmp_path / "x.html")
    assert drawn.exit_code == 0, drawn.output
    assert 'asked: "·P" of "Paris", "·P" of "Prague"' in drawn.stdout
    assert "warning: 2 of 2 prompts" in drawn.stderr and '"·P" begins Paris, Prague' in drawn.stderr
    assert "&quot;\\u00b7P&quot; of &quot;Prague&quot;" in (tmp_path / "x.html").read_text()
    full = run("heatmap", ids[1], "--model", "tiny-mamba2", "--full-answer", "--out", tmp_path / "y.png")
    assert full.stdout.endswith("; asked: Prague\n") and full.stderr == ""
    edges = run("edges", FRANCE, "--answer", "Prague", "--other", "Rome", "--out", tmp_path / "e.png")
    assert 'logit("·P" of "Prague") - logit("·R" of "Rome") = ' in edges.stdout


def test_a_recipe_asks_for_full_answers_by_the_same_name(tmp_path: Path) -> None:
    recipe = tmp_path / "x.toml"
    text = Path("hooks/tiny-heatmaps.toml").read_text()
    start, end = text.index("names = ["), text.index("]", text.index("names = [")) + 1
    text = text[:start] + 'names = ["tiny-mamba2"]' + text[end:]
    start, end = text.index("prompts = ["), text.index("]", text.index("prompts = [")) + 1
    recipe.write_text(text[:start] + 'prompts = ["capital/Czechia/0"]' + text[end:])
    first = run("run", recipe, "--out", tmp_path / "first")
    full = run("run", recipe, "--full-answer", "--out", tmp_path / "full")
    assert first.exit_code == full.exit_code == 0, first.output + full.output
    assert '"·P" of "Prague"' in first.stdout
    assert "Prague" in full.stdout and "·P" not in full.stdout
    assert "# run with prompts.full_answer = true" in (tmp_path / "full" / "recipe.toml").read_text()


def test_a_circuit_says_of_how_many_answers_it_asked_the_first_token() -> None:
    model, tokenizer = si.load("tiny-mamba2")
    ids = ["capital/France/0", "capital/Czechia/0", "continent/France/0"]
    batch = pad([tokenize(prompt, tokenizer) for prompt in with_ids(load_prompts(), ids)])
    with si.attach(model, own_operator=True) as ssm, pytest.warns(SharedTokenWarning, match="2 of 3 prompts"):
        found = find_circuit(ssm, batch, roles=["subject", "relation_minus_last", "last"], tolerance=1e9, layers=[0])
    assert "3 prompts, 2 by first token" in str(found)


def test_runs_of_files_from_before_have_first_tokens() -> None:
    assert not FlowRun("m", (0,), (1,), "left", 1, 1, "rows of one step").full_answer
