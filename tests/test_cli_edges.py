"""`ssm-interp edges`, run in this process."""

import json
from pathlib import Path

import pandas as pd
import pytest
from commands import refused, run

import ssm_interp as si
from ssm_interp.attribution import check_edges, edge_attribution
from ssm_interp.hooks import logit_difference
from ssm_interp.prompts import pad, tokenize

TEXT = "The name of the capital city of France is"


def test_edges_of_a_fact_beside_exact_knockouts(tmp_path: Path) -> None:
    result = run(
        "edges", "capital/France/0", "--model", "tiny-mamba1", "--check", 4, "--out", tmp_path / "new" / "e.svg"
    )
    assert result.exit_code == 0, result.output
    model, tokenizer = si.load("tiny-mamba1")
    (prompt,) = [prompt for prompt in si.load_prompts() if prompt.id == "capital/France/0"]
    row = tokenize(prompt, tokenizer)
    batch = pad([row])
    logits = model(**{"input_ids": batch.input_ids}).logits[0, -1]
    other = next(token for token in logits.topk(2).indices.tolist() if token != row.answer_id)
    with si.attach(model) as ssm:
        metric = logit_difference(row.answer_id, other)
        found = edge_attribution(ssm, batch, metric)
        checked = check_edges(ssm, batch, metric, found, top=4, random=4)
    table = pd.read_parquet(tmp_path / "new" / "e.parquet")
    assert len(table) == 10 * len(row) * (len(row) + 1) // 2
    assert table["exact"].notna().sum() == 8
    assert (table["attribution"] - found.frame["attribution"]).abs().max() <= 1e-5
    assert table["target_token"].tolist() == [row.tokens[target] for target in table["target"]]
    assert "<svg" in (tmp_path / "new" / "e.svg").read_text()
    strongest = checked.frame.iloc[0]
    assert f"{strongest['attribution']:+.4g}" in result.stdout
    assert f"{strongest['exact']:+.4g}" in result.stdout
    assert f"rank correlation with exact knockouts: {checked.correlation():.2f} over 8 edges" in result.stdout
    assert "4 top" in result.stdout
    assert "550 edges in 10 layers" in result.stdout


def test_edges_of_a_text_into_a_csv(tmp_path: Path) -> None:
    options = ["--model", "tiny-mamba1", "--steps", 2, "--top", 3, "--out", tmp_path / "e.csv"]
    result = run("edges", TEXT, "--answer", "Paris", "--other", "Rome", *options)
    assert result.exit_code == 0, result.output
    assert 'logit("·P" of "Paris") - logit("·R" of "Rome") = ' in result.stdout
    assert "without any of them" in result.stdout
    assert result.stdout.count(" ← ") == 4  # the header, and three edges
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    frame = pd.read_csv(tmp_path / "e.csv")
    assert len(frame) == 550
    assert "exact" not in frame
    (tmp_path / "facts").mkdir()
    facts = tmp_path / "facts" / "one.jsonl"
    facts.write_text(json.dumps({"text": TEXT, "subject": "France", "answer": "Paris"}))
    result = run("edges", "--facts", facts, "--metric", "log_probability", "--out", tmp_path / "p.html")
    assert result.exit_code == 0, result.output
    assert 'ln p("·P" of "Paris") = ' in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"e.csv", "e.png", "p.html", "p.parquet", "facts"}


def test_it_says_what_the_model_answers_instead(tmp_path: Path) -> None:
    asked = ("edges", TEXT, "--model", "tiny-mamba1", "--out", tmp_path / "e.png", "--answer")
    wrong, right = run(*asked, "London"), run(*asked, "Paris")
    asked_for = '"·L" of "London"'
    said = f"tiny-mamba1 answers ·P, not {asked_for}; what follows is about {asked_for} all the same"
    assert wrong.stdout.startswith(f"{said}\nlogit({asked_for}) - logit(·P) = ")
    assert wrong.stdout.endswith(f"\nwrote {tmp_path / 'e.png'} and {tmp_path / 'e.parquet'} (550 edges)\n")
    assert right.exit_code == 0
    assert right.stdout.startswith('logit("·P" of "Paris") - ')
    assert f"\noverwrote {tmp_path / 'e.png'} and {tmp_path / 'e.parquet'} (550 edges)" in right.stdout


def test_in_float64(tmp_path: Path) -> None:
    wide = run("edges", TEXT, "--answer", "Paris", "--dtype", "float64", "--out", tmp_path / "wide.png")
    assert wide.exit_code == 0, wide.output
    values = pd.read_parquet(tmp_path / "wide.parquet")["attribution"]
    assert (values != values.astype("float32")).any()


BAD = {
    "there is no device 'gpu'": [TEXT, "--answer", "Paris", "--device", "gpu"],
    "For a text of your own, give its answer too: --answer Paris": [TEXT],
    "the suffix is one of .png, .svg, .pdf, .html, .parquet, .csv": [TEXT, "--answer", "Paris", "--out", "edges.txt"],
    "is a folder; name a picture": [TEXT, "--answer", "Paris", "--out", "."],
    "--other: it is for --metric logit_difference; the log-probability has no wrong answer": [
        TEXT,
        "--answer",
        "Paris",
        "--other",
        "Rome",
        "--metric",
        "log_probability",
    ],
    "has no SSM layers": [TEXT, "--answer", "Paris", "--model", "tiny-llama"],
    "--check: it should be greater than or equal to 0": [TEXT, "--answer", "Paris", "--check", "-1"],
    "--answer: it should have at least 1 character": [TEXT, "--answer", ""],
    "--full-answer: its number is that of the answer's first token": [TEXT, "--answer", "Paris", "--full-answer"],
    "geo holds 2571 prompts, and one is asked; name it by its id": [],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message: str) -> None:
    refused(run("edges", *BAD[message]), message)


def test_another_answer_must_begin_otherwise(tmp_path: Path) -> None:
    asked = ("edges", "The capital of France is", "--answer", "Paris", "--out", tmp_path / "x.png", "--other")
    refused(run(*asked, "Prague"), "begins with the same token as the answer 'Paris'")
    refused(run("edges", "capital/France/0", "--answer", "Rome"), "is the id of a prompt, which has its own answer")
