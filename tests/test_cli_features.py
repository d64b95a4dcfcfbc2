"""`ssm-interp features`, run in this process; the model is a small random one in a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import commands
import pandas as pd
import pytest
from tiny_flow import World, world

import ssm_interp as si
from ssm_interp.features import STATISTICS, spectrum
from ssm_interp.models import load
from ssm_interp.prompts import pad, save_prompts, tokenize


@pytest.fixture(scope="module")
def scene() -> World:
    return world("mamba2", count=5)


@pytest.fixture(scope="module")
def folder(scene: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model, its tokenizer and facts."""
    folder = tmp_path_factory.mktemp("models")
    scene.model.save_pretrained(folder / "tiny")
    scene.tokenizer.save_pretrained(folder / "tiny")
    save_prompts(scene.prompts, folder / "facts.jsonl")
    return folder


run = partial(commands.run, "features")


def test_it_writes_a_table_and_pictures_and_prints_quantiles(scene: World, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "features"
    done = run("--model", folder / "tiny", "--facts", folder / "facts.jsonl", "--batch-size", 2, "--out", out)
    assert done.exit_code == 0, done.output
    assert (out / "features.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "features.svg").read_text()
    frame = pd.read_parquet(out / "features.parquet")
    model, tokenizer = load(folder / "tiny")
    with si.attach(model) as ssm:
        batch = pad([tokenize(prompt, tokenizer) for prompt in scene.prompts])
        found = spectrum(ssm, batch, name=str(folder / "tiny"), batch_size=2)
    pd.testing.assert_frame_equal(frame, found.frame)
    assert f"({int(batch.attention_mask.sum())} tokens)" in done.stdout
    assert all(word in done.stdout for name in STATISTICS for word in name.split())
    median = found["half-life"][3].quantile(0.5, interpolation="nearest")
    assert f"{median:.3g}" in done.stdout
    assert f"({len(frame)} rows)" in done.stdout


def test_several_models_and_chosen_statistics(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "second").symlink_to(folder / "tiny", target_is_directory=True)
    names = [str(folder / "tiny"), str(tmp_path / "second")]
    models = [word for name in names for word in ("--model", name)]
    shared = ["--facts", folder / "facts.jsonl", "--limit", 2, "--out", tmp_path / "out"]
    done = run(*models, *shared, "--statistic", "mean dt", "--statistic", "decay norm")
    assert done.exit_code == 0, done.output
    frame = pd.read_parquet(tmp_path / "out" / "features.parquet")
    assert list(frame["model"].unique()) == names
    assert list(frame["statistic"].unique()) == ["decay norm", "mean dt"]
    assert done.stdout.count("median over the features") == 2


def test_the_embedded_mambas_by_default(tmp_path: Path) -> None:
    done = run("--limit", 3, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    frame = pd.read_parquet(tmp_path / "features.parquet")
    assert list(frame["model"].unique()) == ["tiny-mamba1", "tiny-mamba2"]
    assert set(frame["statistic"]) == set(STATISTICS)


def test_the_answers_need_not_be_known_to_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    good = '{"text": "ban dus", "subject": "dus", "answer": "Paris"}'
    (tmp_path / "facts.jsonl").write_text(f"{good}\n{good.replace('dus', 'kit', 1)}\n")
    shared = ["--model", folder / "tiny", "--facts", tmp_path / "facts.jsonl", "--out", tmp_path / "out"]
    done = run(*shared, "--skip-bad", "--statistic", "mean dt")
    assert done.exit_code == 0, done.output
    assert "(2 tokens)" in done.stdout
    assert f"\nwrote {tmp_path / 'out' / 'features.png'} (.svg) and " in done.stdout
    (line,) = done.stderr.splitlines()
    assert "rows left out: 1, no prompts; first: " in line
    again = run(*shared, "--skip-bad", "--statistic", "mean dt")
    assert f"\noverwrote {tmp_path / 'out' / 'features.png'} (.svg) and " in again.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--statistic", "halflife"], "--statistic: there is no statistic 'halflife': did you mean 'half-life'?"),
        (["--model", "tiny-llama"], "LlamaForCausalLM has no SSM layers"),
        (["--model", "tiny-mamba1", "--model", "tiny-mamba1"], "give each --model once, got tiny-mamba1, tiny-mamba1"),
        (["--model", "tiny-mamba3"], "there is no model 'tiny-mamba3'; did you mean the embedded"),
        (["--model", "tiny-mamba1", "--facts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "tiny-mamba1", "--device", "gpu"], "there is no device 'gpu'"),
        (["--limit", "-1"], "--limit: it should be greater than or equal to 0"),
        (["--out", __file__], "is not a folder"),
        (["--out", "x.pdf"], "it is a folder here, for a table and figures; name one without .pdf"),
    ],
)
def test_what_is_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands.refused(run(*words), message)
    assert not any(tmp_path.iterdir())
