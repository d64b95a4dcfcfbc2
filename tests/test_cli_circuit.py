"""`ssm-interp circuit`, run in this process."""

from pathlib import Path

import pandas as pd
import pytest
from commands import Done, refused, run

import ssm_interp as si
from ssm_interp.circuits import fact_roles, find_circuit
from ssm_interp.prompts import induction_prompts, induction_roles, pad, tokenize


def induction(*words: object) -> Done:
    return run("circuit", "--model", "tiny-induction-mamba1", *words)


def test_the_circuit_of_fresh_induction_prompts(tmp_path: Path) -> None:
    result = induction("--limit", 8, "--seed", 5, "--out", tmp_path / "new" / "c.svg")
    assert result.exit_code == 0, result.output
    model, tokenizer = si.load("tiny-induction-mamba1")
    batch = pad([tokenize(prompt, tokenizer) for prompt in induction_prompts(8, seed=5)])
    with si.attach(model, own_operator=True) as ssm:
        found = find_circuit(ssm, batch, roles=induction_roles(batch), tolerance=0.1, relative=True)
    assert result.stdout.startswith(f"{found}\n")
    assert "layer 1   query <- answer" in result.stdout
    files = f"{tmp_path / 'new' / 'c.svg'} and {tmp_path / 'new' / 'c.csv'}"
    assert result.stdout.endswith(f"\nwrote {files} (30 edge groups; {found.trials} trials)\n")
    assert "<svg" in (tmp_path / "new" / "c.svg").read_text()
    table = pd.read_csv(tmp_path / "new" / "c.csv")
    assert table["kept"].tolist() == found.frame["kept"].tolist()


def test_facts_with_the_roles_around_the_subject(tmp_path: Path) -> None:
    ids = ["capital/France/0", "capital/Japan/1", "currency/Japan/0"]
    chosen = [word for one in ids for word in ("--id", one)]
    result = run("circuit", "--model", "tiny-mamba2", *chosen, "--layer", 4, "--layer", 5, "--out", tmp_path / "c")
    assert result.exit_code == 0, result.output
    model, tokenizer = si.load("tiny-mamba2")
    rows = [tokenize(prompt, tokenizer) for prompt in si.load_prompts() if prompt.id in ids]
    rows = [row for row in rows if all(columns for (columns,) in fact_roles(pad([row])).values())]
    with si.attach(model, own_operator=True) as ssm:
        found = find_circuit(ssm, pad(rows), tolerance=0.1, relative=True, layers=[4, 5])
    assert str(found) in result.stdout
    assert "left out 1 of 3 prompts: in 1 no token is after, such as 'The name of the capital city of" in result.stdout


def test_a_text_that_lacks_a_role_has_one_less(tmp_path: Path) -> None:
    text = ["The capital of France is", "--answer", "Paris", "--subject", "France"]
    result = run("circuit", *text, "--layer", 4, "--out", tmp_path / "c.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("none of these prompts has a token that is after, so these are no roles here\n")
    table = pd.read_csv(tmp_path / "c.csv")
    assert set(table["source"]) | set(table["target"]) == {"context", "subject", "last"}


def test_every_option_reaches_the_search(tmp_path: Path) -> None:
    options = ["--metric", "probability", "--tolerance", 0.3, "--absolute", "--batch-size", 7, "--dtype", "float64"]
    options += ["--role", "context", "--role", "subject", "--role", "relation_minus_last", "--role", "last"]
    refused(induction("--limit", 4, *options), "'context' and 'relation_minus_last' overlap")
    options = options[:-8] + [word for place in range(9) for word in ("--role", place)]
    options += ["--features", "top half", "--features", "bottom half", "--through", "ssm", "--layer", 1]
    text = {"text": "a b c d e f g h b", "subject": "c", "answer": "c"}
    pd.DataFrame([text]).to_csv(tmp_path / "one.csv", index=False)
    words = ["--facts", tmp_path / "one.csv", *options, "--out", tmp_path / "c.parquet"]
    result = induction(*words)
    assert result.exit_code == 0, result.output
    assert "probability (mean over 1 prompt): " in result.stdout
    assert "tolerance 0.3\n" in result.stdout
    table = pd.read_parquet(tmp_path / "c.parquet")
    assert set(table["layer"]) == {1}
    assert set(table["feature_group"]) == {"top half", "bottom half"}
    assert set(table["source"]) == set("012345678")
    assert f"overwrote {tmp_path / 'c.png'} and {tmp_path / 'c.parquet'}" in induction(*words).stdout


BAD = {
    "there is no role 'subjekt': did you mean 'subject'": ["--role", "subjekt"],
    "none of these 3 prompts has a token of each role (first, 99): in 3 no token is 99, such as ": [
        "--role",
        "first",
        "--role",
        99,
    ],
    "--column and --skip-bad are for facts that are read": ["--column", "text=question"],
    "needs at least 1 prompt of at least 7 symbols, got count=0": ["--limit", 0],
    "no such layer": ["--layer", 7],
    '--metric: there is no "size": it is "log_probability", "probability", "logit_difference", ': ["--metric", "size"],
    "--tolerance: it should be greater than or equal to 0": ["--tolerance", -1],
    "--full-answer: its number is that of the answer's first token": ["--full-answer"],
    "--features: there is no feature group 'tpo third'": ["--features", "tpo third"],
    "there is no device 'gpu'": ["--device", "gpu"],
    "is a folder; name a picture, such as circuit.png": ["--out", "."],
    "the suffix is one of .png, .svg, .pdf, .html, .parquet, .csv": ["--out", "circuit.txt"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = [] if "--limit" in BAD[message] else ["--limit", 3]
    refused(induction(*few, *BAD[message]), message)
    assert not any(tmp_path.iterdir())
