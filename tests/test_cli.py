"""The command line, run in this process; the model is a small random one in a folder."""

import io
import json
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tiny_flow import World, world
from typer.testing import CliRunner, Result

import ssm_interp as si
from ssm_interp import cli, plots
from ssm_interp.cli import flow, look, output
from ssm_interp.flow import FlowResult, Study, run_study, study_job
from ssm_interp.hooks.check import Row
from ssm_interp.jobs import Store
from ssm_interp.models import EMBEDDED
from ssm_interp.prompts import save_prompts


@pytest.fixture(scope="module")
def scene() -> World:
    return world("mamba2", count=6)


@pytest.fixture(scope="module")
def model(scene: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    scene.model.save_pretrained(folder)
    scene.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(scene: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    save_prompts(scene.prompts + scene.wrong, path)
    return str(path)


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_flow_writes_a_picture_and_every_number(model: str, prompts: str, tmp_path: Path) -> None:
    result = run("flow", "--model", model, "--prompts", prompts, "--window", 2, "--out", tmp_path / "new" / "map")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # quiet when it is no terminal
    assert "6 of 8 prompts answered correctly and kept; windows of 2 of 4 layers" in result.stdout
    assert (tmp_path / "new" / "map" / "flow.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "new" / "map" / "flow.svg").read_text()
    assert "Plotly.newPlot" in (tmp_path / "new" / "map" / "flow.html").read_text()
    found = FlowResult.load(tmp_path / "new" / "map" / "flow.parquet")
    assert len(found.frame) == 6 * 4 * 3
    assert found.runs[0].model == model
    drop = found.largest_drops().iloc[0]
    (line,) = [line for line in result.stdout.splitlines() if "subject →" in line]
    assert f"{drop['mean']:+.1f}" in line
    assert f"{drop['window_start']} to {drop['window_start'] + 1}" in line
    assert f"{drop['low']:+.1f} to {drop['high']:+.1f}" in line
    for row in found.largest_drops().to_dict("records"):  # where no window has a drop, none is named
        (line,) = [line for line in result.stdout.splitlines() if f"{row['source']} →" in line]
        assert (line.count("\N{EN DASH}") == 4) == (round(row["mean"], 1) >= 0)


def test_flow_takes_several_models_roles_and_a_seeded_draw(
    model: str, prompts: str, scene: World, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    scene.model.save_pretrained(second)
    scene.tokenizer.save_pretrained(second)
    shared = ["flow", "--model", model, "--model", second, "--prompts", prompts, "--limit", 5]
    options = ["--source", "context", "--source", "all", "--target", "last", "--target", "subject"]
    options += ["--align", "centre", "--window", "3"]
    frames = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run(*shared, *options, "--seed", seed, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        frames.append(pd.read_parquet(tmp_path / name / "flow.parquet"))
    assert frames[0].equals(frames[1])
    assert set(frames[0]["prompt_id"]) != set(frames[2]["prompt_id"])
    assert set(frames[0]["model"]) == {model, str(second)}
    assert set(frames[0]["source"]) == {"context", "all"}
    assert set(frames[0]["target"]) == {"last", "subject"}
    assert sorted(set(frames[0]["layer"])) == [0, 1, 2, 3]
    assert "of 5 prompts answered" in result.stdout
    assert "without" in result.stdout  # subjects that begin the prompt have no context


def test_flow_asks_the_embedded_models_by_default(tmp_path: Path) -> None:
    result = run("flow", "--limit", 12, "--source", "subject", "--window", 5, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert set(pd.read_parquet(tmp_path / "flow.parquet")["model"]) == set(EMBEDDED)


def test_flow_takes_every_option_of_a_study(
    model: str, scene: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Study] = []

    def spy(study: Study, *positional: object, **options: object) -> FlowResult:
        given.append(study)
        here = study.model_copy(update={"workers": None, "gpus_per_worker": 0.0, "address": None})
        return run_study(here, *positional, **options)

    monkeypatch.setattr(flow, "run_study", spy)
    rows = [{"question": p.text, "subject": p.subject, "target": p.target, "n": p.id} for p in scene.prompts]
    pd.DataFrame(rows).to_csv(tmp_path / "facts.csv", index=False)
    wanted = Study(
        model=model,
        revision="v1",
        dtype="float64",
        device="cpu",
        device_map="auto",
        facts=str(tmp_path / "facts.csv"),
        columns={"text": "question", "id": "n"},
        skip_bad=True,
        limit=5,
        seed=3,
        full_answer=True,
        ids=[f"p{number}" for number in range(6)],
        sources=["subject", 0],
        targets=["last"],
        windows=[1, 3],
        align="centre",
        features=["all", "top third"],
        through=["ssm"],
        batch_size=3,
        shard_size=2,
        max_memory=2_000_000,
        workers=2,
        gpus_per_worker=0.5,
        address="auto",
    )
    kept = [name for name, field in Study.model_fields.items() if getattr(wanted, name) == field.default]
    assert kept == ["answered_only", "targets", "groups", "held"]  # for recipes, but for the targets
    words = ["--column", "text=question", "--column", "id=n", "--skip-bad", "--full-answer", "--max-memory", "2MB"]
    singular = {"sources": "source", "targets": "target", "windows": "window", "ids": "id"}
    switches = {"columns", "skip_bad", "full_answer", "max_memory"}
    for name, value in wanted.model_dump(exclude=switches | {*kept} - {"targets"}).items():
        for one in value if isinstance(value, tuple) else [value]:
            words += [f"--{singular.get(name, name).replace('_', '-')}", str(one)]
    result = run("flow", *words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert given == [wanted]
    found = FlowResult.load(tmp_path / "out" / "flow.parquet")
    assert (found.runs[0].asked, found.runs[0].windows) == (5, (1, 3))
    assert set(found.frame["source"]) == {"subject", "0"}
    for label in ("subject → last, all", "subject → last, top third", "0 → last, all", "0 → last, top third"):
        assert label in result.stdout


def test_flow_goes_on_where_it_was_and_refuses_other_options(
    model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["flow", "--model", model, "--prompts", prompts, "--shard-size", 3, "--out", tmp_path]

    with monkeypatch.context() as patch:
        writes, write = [], Store.write

        def stops(self: Store, *arguments: object) -> None:
            write(self, *arguments)
            writes.append(arguments)
            if len(writes) == 2:
                raise KeyboardInterrupt

        patch.setattr(Store, "write", stops)
        result = run(*words)
    assert result.exit_code == 130
    line = result.stderr.strip()
    assert line.startswith("interrupted. Nothing that was stored is lost: 2 of 3 shards are in ")
    assert line.endswith("the same command continues from there")
    assert run(*words).exit_code == 0
    assert len(FlowResult.load(tmp_path / "flow.parquet").frame) == 6 * 4 * 3
    refused(run(*words, "--window", 1), "windows (stored: null, given: [1])")


def test_progress_has_a_rate_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(output, "Console", lambda **options: Console(file=screen, force_terminal=True, width=120))
    for unit in ("prompts", "trials"):
        with output.progress_bar(shown=True, unit=unit) as progress:
            task = progress.add_task("model", total=None)
            for done in (0, 10, 20):
                progress.update(task, completed=done, total=40)
                time.sleep(0.01)
        assert "20/40" in screen.getvalue()
        assert f"{unit}/s" in screen.getvalue()
    screen.truncate(0)
    with output.progress_bar(shown=False) as progress:
        progress.add_task("model", total=1)
    assert "model" not in screen.getvalue()


def test_attention_draws_what_the_hooks_read(
    model: str, scene: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    draw = plots.attention_figure

    def spy(shown: torch.Tensor, *args: object, **options: object) -> Figure:
        drawn.append(shown)
        return draw(shown, *args, **options)

    monkeypatch.setattr(plots, "attention_figure", spy)
    text = scene.prompts[0].text
    for words in (["--head", 3], ["--reduce", "mean"], ["--reduce", "mean_abs"], ["--reduce", "norm"], []):
        out = tmp_path / "pictures" / "map.png"
        result = run("attention", text, "--model", model, "--layer", 1, *words, "--out", out)
        assert result.exit_code == 0, result.output
        assert "layer 1" in result.stdout
        assert out.read_bytes().startswith(b"\x89PNG")
    loaded, tokenizer = si.load(model)
    with si.attach(loaded) as ssm:
        attn = ssm.run(tokenizer(text, return_tensors="pt")["input_ids"], read=["attn"], layers=[1])["attn", 1][0]
    expected = [attn[3], attn.mean(0), attn.abs().mean(0), attn.square().sum(0).sqrt(), attn.mean(0)]
    for found, right in zip(drawn, expected, strict=True):
        torch.testing.assert_close(found, right)


def test_attention_takes_the_middle_layer_by_default(model: str, tmp_path: Path) -> None:
    result = run("attention", "ban dus", "--model", model, "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "layer 2" in result.stdout


def test_check_prints_a_table_and_fails_with_1(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("check", model)
    assert result.exit_code == 0, result.output
    assert "passed" in result.stdout
    assert "FAILED" not in result.stdout
    rows = [Row("good", 0.0, True, "fine"), Row("bad", 0.5, False, "must be 0")]
    monkeypatch.setattr(look, "check_model", lambda model: rows)
    result = run("check", model)
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "bad" in line]
    assert "FAILED" in line
    assert "0.5" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "missing.jsonl"], "there is no prompt file 'missing.jsonl'"),
        (["--facts", "missing.csv"], "there is no prompt file 'missing.csv'"),
        (["--source", "subjct"], "sources.0: there is no role 'subjct': did you mean 'subject'?"),
        (["--target", "lst"], "did you mean 'last'?"),
        (["--window", 5], "a window of 5 layers does not fit: this model has 4 "),
        (["--window", 0], "windows.0: input should be greater than 0, got 0"),
        (["--max-memory", "4XB"], "max_memory: could not interpret byte unit: XB"),
        (["--features", "tpo third"], "there is no feature group 'tpo third'"),
        (["--through", "attention"], "has no attention layers"),
        (["--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--column", "text"], "--column text: give FIELD=COLUMN, such as text=question"),
        (["--column", "txt=a"], "did you mean 'text'?"),
        (["--batch-size", 0], "Invalid value for '--batch-size'"),
        (["--limit", -1], "Invalid value for '--limit'"),
        (["--align", "right"], "'right' is not one of 'left', 'centre'"),
        (["--colour", "red"], "No such option: --colour"),
    ],
)
def test_flow_refuses_bad_options(model: str, prompts: str, tmp_path: Path, options: list[str], message: str) -> None:
    out = tmp_path / "new"
    refused(run("flow", "--model", model, "--prompts", prompts, "--out", out, *options), message)
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "ban dus", "subject": "kit", "target": "lox"}', "line 2: the subject 'kit' occurs 0 times"),
        ('{"text": "dus dus", "subject": "dus", "target": "lox"}', "line 2: the subject 'dus' occurs 2 times"),
        ('{"text": "", "subject": "dus", "target": "lox"}', "line 2: the prompt '' has an empty text"),
        ('{"text": "ban kit", "subject": "kit", "target": "Paris"}', "the tokenizer does not know it"),
        ('{"text": "ban dus", "subject": "dus", "target": "lox"}', "these occur more than once: ban dus"),
    ],
)
def test_flow_refuses_bad_prompts(model: str, tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"text": "ban dus", "subject": "dus", "target": "lox"})
    (tmp_path / "p.jsonl").write_text(f"{good}\n{line}\n")
    refused(run("flow", "--model", model, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path), message)


def test_flow_refuses_prompts_the_model_cannot_answer(model: str, scene: World, tmp_path: Path) -> None:
    save_prompts(scene.wrong, tmp_path / "p.jsonl")
    message = "answers none of the 2 prompts correctly"
    refused(run("flow", "--model", model, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path), message)


def test_models_that_cannot_be_loaded_are_refused(model: str, prompts: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    message = f"{str(missing)!r} is not a folder that holds a model"
    refused(run("check", missing), message)
    refused(run("flow", "--model", missing, "--out", tmp_path), message)
    refused(run("attention", "x", "--model", missing), message)
    twice = run("flow", "--model", model, "--model", model, "--prompts", prompts, "--out", tmp_path)
    refused(twice, "each --model once")


def test_outputs_that_cannot_be_written_are_refused_before_the_work(model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("flow", "--model", model, "--out", tmp_path / "file"), "file is not a folder")
    attention = ["attention", "ban", "--model", model, "--out"]
    refused(run(*attention, tmp_path / "file" / "a.png"), "file is not a folder")
    refused(run(*attention, tmp_path / "file" / "deep" / "a.png"), "file is not a folder")
    refused(run(*attention, tmp_path / "a.nonsense"), "Format 'nonsense' is not supported")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", 4], "no SSM layer 4; the SSM layers of this model are [0, 1, 2, 3]"),
        (["--head", 4], "there is no head 4: this layer has 4, numbered 0 to 3"),
        (["--head", -1], "there is no head -1"),
        (["--head", 1, "--reduce", "mean"], "give --head or --reduce, not both"),
        (["--reduce", "max"], "'max' is not one of 'mean', 'mean_abs', 'norm'"),
    ],
)
def test_attention_refuses_bad_options(model: str, tmp_path: Path, options: list[str], message: str) -> None:
    refused(run("attention", "ban dus", "--model", model, "--out", tmp_path / "a.png", *options), message)


def test_attention_refuses_an_empty_text(model: str) -> None:
    refused(run("attention", "  ", "--model", model), "has no tokens: it is empty")


def test_heatmap_draws_a_panel_for_each_prompt_and_model(
    model: str, prompts: str, scene: World, tmp_path: Path
) -> None:
    ids = [prompt.id for prompt in (scene.prompts[0], scene.wrong[0])]
    words = ["heatmap", *ids, "--model", model, "--facts", prompts, "--window", 2]
    picture = run(*words, "--out", tmp_path / "new" / "map")
    assert picture.exit_code == 0, picture.output
    asked = f"asked: {scene.prompts[0].target}, {scene.wrong[0].target}"
    assert picture.stdout == f"wrote {tmp_path / 'new' / 'map.png'}: 2 heat maps, token -> last; {asked}\n"
    assert (tmp_path / "new" / "map.png").read_bytes().startswith(b"\x89PNG")
    page = run(*words, "--out", tmp_path / "map.html", "--limit", 0.3)
    assert page.exit_code == 0, page.output
    assert "Plotly.newPlot" in (tmp_path / "map.html").read_text()


def test_a_look_at_a_model_takes_its_type_and_its_device(
    model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, object]] = []

    def spy(name: str, **options: object) -> object:
        given.append(options)
        return si.load(name, **options)

    monkeypatch.setattr(study_job, "load", spy)
    how = ["--revision", "v1", "--dtype", "float64", "--device", "cpu", "--device-map", "auto"]
    for words in (["check", model], ["attention", "ban dus", "--model", model], ["heatmap", "p0", "--facts", prompts]):
        out = [] if words[0] == "check" else ["--out", tmp_path / "a.png"]
        result = run(*words, *(["--model", model] if words[0] == "heatmap" else []), *how, *out)
        assert result.exit_code == 0, result.output
        expected = {"revision": "v1", "dtype": torch.float64, "device": torch.device("cpu"), "device_map": "auto"}
        assert given.pop() == expected
    assert result.stdout.startswith(f"overwrote {tmp_path / 'a.png'}: ")  # where the attention was
    for words in (["check", model], ["attention", "ban", "--model", model], ["heatmap", "p0", "--facts", prompts]):
        refused(run(*words, "--device", "gpu"), "there is no device 'gpu'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["p77"], "there is no prompt 'p77' among these 8"),
        (["p0", "--target", "lst"], "there is no role 'lst': did you mean 'last'?"),
        (["p0", "--window", 9], "a window of 9 layers does not fit: this model has 4 of them; give 1 to 4"),
        (["p0", "--through", "attention"], "Mamba2ForCausalLM has no attention layers to knock out"),
        (["p0", "--out", "."], "is a folder; name a picture, such as heatmap.png"),
        (["p0", "--limit", -1], "the limit of the colours must be positive"),
    ],
)
def test_heatmap_refuses(model: str, prompts: str, words: list[object], message: str) -> None:
    refused(run("heatmap", *words[:1], "--model", model, "--facts", prompts, *words[1:]), message)
