"""The commands `flow`, `heatmap`, `attention` and `check`; the model is a small random one in a folder."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import refused, run
from cyclopts import Parameter
from matplotlib.figure import Figure
from rich.console import Console
from tiny_flow import World, answer, world

import ssm_interp as si
from ssm_interp import plots
from ssm_interp.cli import check, flow, output
from ssm_interp.errors import FlowError
from ssm_interp.experiments import Study
from ssm_interp.flow import FlowResult, study_job
from ssm_interp.hooks.check import Row
from ssm_interp.jobs.store import Store
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


def test_flow_writes_pictures_every_number_and_what_was_dropped(
    scene: World, model: str, prompts: str, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "map"
    options = ["--window", 2, "--interval", "t", "--metric", "rank"]
    result = run("flow", "--model", model, "--prompts", prompts, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # quiet when it is no terminal
    assert "6 of 8 prompts answered correctly and kept; windows of 2 of 4 layers" in result.stdout
    assert (out / "flow.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "flow.svg").read_text()
    assert "Plotly.newPlot" in (out / "flow.html").read_text()
    found = FlowResult.load(out / "flow.parquet")
    assert len(found.frame) == 6 * 4 * 3
    assert found.runs[0].model == model
    assert set(found.frame["metric"]) == {"rank"}
    assert (found.frame["value_base"] == 0).all() and (found.frame["value"] >= 0).all()
    assert found.plot(statistic="metric").axes[0].get_title()
    drop = found.largest_drops(interval="t").iloc[0]
    (line,) = [line for line in result.stdout.splitlines() if "subject →" in line]
    assert f"{drop['mean']:+.1f}" in line
    assert f"{drop['window_start']} to {drop['window_start'] + 1}" in line
    assert f"{drop['low']:+.1f} to {drop['high']:+.1f}" in line
    dropped = pd.read_csv(out / "dropped.csv")
    assert dropped["prompt_id"].tolist() == [prompt.id for prompt in scene.wrong]
    said = [answer(scene.model, scene.tokenizer, prompt.text) for prompt in scene.wrong]
    assert dropped["answered"].tolist() == said
    assert dropped["answer"].tolist() == [prompt.answer for prompt in scene.wrong]
    assert f"2 otherwise, which are left out: wrong p0 ({said[0]} instead of {scene.wrong[0].answer})" in result.stdout


def test_a_source_without_any_drop_has_dashes(scene: World, capsys: pytest.CaptureFixture[str]) -> None:
    with si.attach(scene.model) as ssm:
        found = si.sweep(ssm, scene.tokenizer, scene.prompts, sources=["subject", "last"], windows=2)
    still = found.frame["source"] == "last"
    unchanged = {name: found.frame[name].mask(still, 0.0) for name in ("relative_change", "logprob_difference")}
    flow.print_flow(replace(found, frame=found.frame.assign(**unchanged)), "bootstrap", 0.9)
    printed = capsys.readouterr().out
    (subject,), (last,) = (
        [line for line in printed.splitlines() if f"{role} →" in line] for role in ("subject", "last")
    )
    assert last.count("\N{EN DASH}") == 4 and "\N{EN DASH}" not in subject
    assert "90 %" in printed and "95 %" not in printed


def test_what_is_answered_instead_of_a_full_answer(scene: World, model: str, tmp_path: Path) -> None:
    right = scene.prompts[0]
    second = answer(scene.model, scene.tokenizer, f"{right.text} {right.answer}")
    wrong = next(word for word in ("ban", "bas", "bat") if word != second)
    asked = si.Prompt(right.text, right.subject, f"{right.answer} {wrong}", id="half right")
    save_prompts([right, asked], tmp_path / "p.jsonl")
    words = ["--source", "subject", "--window", 4, "--full-answer", "--out", tmp_path]
    result = run("flow", "--model", model, "--prompts", tmp_path / "p.jsonl", *words)
    assert result.exit_code == 0, result.output
    assert pd.read_csv(tmp_path / "dropped.csv")["answered"].tolist() == [f"{right.answer}·{second}"]


def test_flow_takes_several_models_roles_and_a_seeded_draw(model: str, prompts: str, tmp_path: Path) -> None:
    (tmp_path / "second").symlink_to(model)
    shared = ["flow", "--model", model, tmp_path / "second", "--prompts", prompts, "--limit", 5, "--all-prompts"]
    options = ["--source", "context", "--source", "all", "--target", "last", "subject", "--align", "centre"]
    frames = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run(*shared, *options, "--window", 3, "--seed", seed, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        frames.append(pd.read_parquet(tmp_path / name / "flow.parquet"))
    assert frames[0].equals(frames[1])
    assert set(frames[0]["prompt_id"]) != set(frames[2]["prompt_id"])
    assert set(frames[0]["model"]) == {model, str(tmp_path / "second")}
    assert set(frames[0]["source"]) == {"context", "all"}
    assert set(frames[0]["target"]) == {"last", "subject"}
    assert sorted(set(frames[0]["layer"])) == [0, 1, 2, 3]
    assert frames[0]["prompt_id"].nunique() == 5  # those that are answered wrongly, too
    assert not (tmp_path / "a" / "dropped.csv").exists()
    assert "without" in result.stdout  # subjects that begin the prompt have no context


def flag(field: str) -> str:
    """How a field of a study is called on the command line."""
    named = [data.name for data in Study.model_fields[field].metadata if isinstance(data, Parameter) and data.name]
    return named[0][0] if named else f"--{field.replace('_', '-')}"


def words_of(study: Study) -> Iterator[str]:
    for name in Study.model_fields.keys() - {"groups", "held"}:  # of recipes alone
        value = getattr(study, name)
        if value is True:
            yield flag(name)
        elif name == "columns":
            yield from (flag(name), *(f"{field}={column}" for field, column in value.items()))
        else:
            yield from (flag(name), *map(str, value if isinstance(value, tuple) else [value]))


def test_flow_takes_every_option_of_a_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Study] = []

    def spy(study: Study, *positional: object, **options: object) -> FlowResult:
        given.append(study)
        raise FlowError("that is all")

    monkeypatch.setattr(flow, "run_study", spy)
    wanted = Study(
        model="a-model",
        revision="v1",
        dtype="float64",
        device="cpu",
        device_map="auto",
        facts="facts.csv",
        columns={"text": "question", "id": "n"},
        skip_bad=True,
        limit=5,
        seed=3,
        full_answer=True,
        all_prompts=True,
        ids=["p0", "p1"],
        sources=["subject", 0],
        targets=["subject", "last"],
        windows=[1, 3],
        align="centre",
        features=["all", "top third"],
        through=["ssm"],
        metric="accuracy",
        batch_size=3,
        shard_size=2,
        max_memory=2_000_000,
        workers=2,
        gpus_per_worker=0.5,
        address="auto",
    )
    kept = [name for name, field in Study.model_fields.items() if getattr(wanted, name) == field.default]
    assert kept == ["groups", "held"]
    refused(run("flow", *words_of(wanted), "--out", tmp_path), "that is all")
    assert given == [wanted]


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
        assert "20/40" in screen.getvalue()
        assert f"{unit}/s" in screen.getvalue()
    screen.truncate(0)
    with output.progress_bar(shown=False) as progress:
        progress.add_task("model", total=1)
    assert "model" not in screen.getvalue()


def test_attention_draws_what_the_hooks_read(
    model: str, prompts: str, scene: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    draw = plots.attention_figure

    def spy(shown: torch.Tensor, *args: object, **options: object) -> Figure:
        drawn.append(shown)
        return draw(shown, *args, **options)

    monkeypatch.setattr(plots, "attention_figure", spy)
    text, out = scene.prompts[0].text, tmp_path / "pictures" / "map.png"
    choices = (["--head", 3], ["--reduce", "mean"], ["--reduce", "mean_abs"], ["--reduce", "norm"], [])
    for asked, words in zip((text, text, text, text, "p0"), choices, strict=True):
        result = run("attention", asked, "--facts", prompts, "--model", model, "--layer", 1, *words, "--out", out)
        assert result.exit_code == 0, result.output
        assert "layer 1" in result.stdout
        assert out.read_bytes().startswith(b"\x89PNG")
    loaded, tokenizer = si.load(model)
    with si.attach(loaded) as ssm:
        attn = ssm.run(tokenizer(text, return_tensors="pt")["input_ids"], read=["attn"], layers=[1])["attn", 1][0]
    expected = [attn[3], attn.mean(0), attn.abs().mean(0), attn.square().sum(0).sqrt(), attn.mean(0)]
    for found, right in zip(drawn, expected, strict=True):
        torch.testing.assert_close(found, right)
    assert run("attention", text, "--model", model, "--out", out).stdout.startswith(f"overwrote {out}: layer 2 of ")
    assert run("attention", text, "--model", model, "--out", tmp_path / "x.html").exit_code == 0
    assert "Plotly.newPlot" in (tmp_path / "x.html").read_text()


def test_check_prints_a_table_and_fails_with_1(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("check", model)
    assert result.exit_code == 0, result.output
    assert "passed" in result.stdout
    assert "FAILED" not in result.stdout
    rows = [Row("good", 0.0, True, "fine"), Row("bad", 0.5, False, "must be 0")]
    monkeypatch.setattr(check, "check_model", lambda model: rows)
    result = run("check", model)
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "bad" in line]
    assert "FAILED" in line
    assert "0.5" in line


BAD_FLOW = {
    "there is no prompt file 'missing.jsonl'": ["--prompts", "missing.jsonl"],
    "--source: there is no role 'subjct': did you mean 'subject'?": ["--source", "last", "subjct"],
    "--target: there is no role 'lst': did you mean 'last'?": ["--target", "lst"],
    "a window of 5 layers does not fit: this model has 4 ": ["--window", 5],
    "--window: it should be greater than 0, got ": ["--window", 0],
    "--window: it should have at least 1 item": ["--window"],
    "--max-memory: could not interpret byte unit: XB": ["--max-memory", "4XB"],
    "--features: there is no feature group 'tpo third'": ["--features", "tpo third"],
    "has no attention layers": ["--through", "attention"],
    "there is no device 'cuda:99'": ["--device", "cuda:99"],
    "--column: text: give FIELD=COLUMN, such as text=question": ["--column", "text"],
    "--column: a prompt has no field 'txt' to read a column into: did you mean 'text'?": ["--column", "txt=a"],
    "--batch-size: it should be greater than 0": ["--batch-size", 0],
    "--limit: it should be a valid integer, got ": ["--limit", "x"],
    "--align: there is no \"center\": did you mean 'centre'? it is": ["--align", "center"],
    "--interval: there is no \"bootstap\": did you mean 'bootstrap'?": ["--interval", "bootstap"],
    "--statistic: it draws a metric, and none is named: give --metric too": ["--statistic", "metric"],
    "Unknown option: --windw. Did you mean --window?": ["--windw", 3],
    "there is nothing here that takes 'x'": ["--limit", 3, "x"],
    "it is a folder here, for figures, tables and what is stored; name one without .png": ["--out", "x.png"],
}


@pytest.mark.parametrize("message", BAD_FLOW)
def test_flow_refuses_bad_options(
    model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"--model": model, "--prompts": prompts}
    words = [word for name, value in options.items() if name not in BAD_FLOW[message] for word in (name, value)]
    refused(run("flow", *words, *BAD_FLOW[message]), message)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "ban kit", "subject": "kit", "answer": "Paris"}', "the tokenizer does not know it"),
        ('{"text": "ban dus", "subject": "dus", "answer": "lox"}', "these occur more than once: ban dus"),
    ],
)
def test_flow_refuses_bad_prompts(model: str, tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"text": "ban dus", "subject": "dus", "answer": "lox"})
    (tmp_path / "p.jsonl").write_text(f"{good}\n{line}\n")
    refused(run("flow", "--model", model, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path), message)


def test_models_that_cannot_be_asked_are_refused(model: str, prompts: str, scene: World, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    message = f"{str(missing)!r} is not a folder that holds a model"
    refused(run("check", missing), message)
    refused(run("flow", "--model", missing, "--out", tmp_path), message)
    for command in (["flow"], ["heatmap", "p0"], ["features"]):
        twice = ["--model", model, model, "--facts", prompts, "--out", tmp_path / ("x" if command[1:] else "y")]
        refused(run(*command, *twice), "give each --model once")
    save_prompts(scene.wrong, tmp_path / "p.jsonl")
    none = run("flow", "--model", model, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path)
    refused(none, "answers none of the 2 prompts correctly")


def test_outputs_that_cannot_be_written_are_refused_before_the_work(model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("flow", "--model", model, "--out", tmp_path / "file"), "file is not a folder")
    drawn = ["attention", "ban", "--model", model, "--out"]
    refused(run(*drawn, tmp_path / "file" / "deep" / "a.png"), "file is not a folder")
    refused(run(*drawn, tmp_path / "a.nonsense"), "a.nonsense: the suffix is one of .png, .svg, .pdf, .html")
    refused(run(*drawn, tmp_path), "is a folder; name a picture, such as ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ban dus", "--layer", 4], "there is no SSM layer 4; the SSM layers of this model are [0, 1, 2, 3]"),
        (["ban dus", "--head", 4], "no head 4; it has heads 0 to 3"),
        (["ban dus", "--head", 1, "--reduce", "mean"], "--head: give this or --reduce, not both"),
        (["ban dus", "--reduce", "max"], "--reduce: there is no \"max\": did you mean 'mean'? it is "),
        (["  "], "has no tokens: it is empty"),
        ([], "geo holds 2571 prompts, and one is asked; name it by its id, such as 'capital/Afghanistan/0', or give"),
        (["ban dus", "ban"], "there is no prompt 'ban dus' among these 2571"),
        (["capital/France/0", "capital/Japan/0"], "one prompt is asked here, and 2 are given"),
        (["ban dus", "--full-answer"], "--full-answer: its number is that of the answer's first token"),
    ],
)
def test_attention_refuses(model: str, tmp_path: Path, words: list[object], message: str) -> None:
    refused(run("attention", *words, "--model", model, "--out", tmp_path / "a.png"), message)


def test_heatmap_draws_a_panel_for_each_prompt(model: str, prompts: str, scene: World, tmp_path: Path) -> None:
    """By id, as a text with its answer, or as the facts have them."""
    own = scene.prompts[1]
    words = ["heatmap", "p0", own.text, "--answer", own.answer, "--subject", own.subject, "--model", model]
    picture = run(*words, "--facts", prompts, "--window", 2, "--out", tmp_path / "new" / "map")
    assert picture.exit_code == 0, picture.output
    asked = f"asked: {scene.prompts[0].answer}, {own.answer}"
    assert picture.stdout == f"wrote {tmp_path / 'new' / 'map.png'}: 2 heat maps, token -> last; {asked}\n"
    assert (tmp_path / "new" / "map.png").read_bytes().startswith(b"\x89PNG")
    drawn = ["heatmap", "--model", model, "--facts", prompts, "--limit", 1, "--seed", 2, "--colour-limit", 0.3]
    page = run(*drawn, "--out", tmp_path / "map.html")
    assert page.exit_code == 0, page.output
    assert "map.html: 1 heat map, token -> last" in page.stdout
    assert "Plotly.newPlot" in (tmp_path / "map.html").read_text()


BAD_HEATMAPS = {
    "there is no prompt 'p77' among these 8": ["p77"],
    "For a text of your own, give its answer too: --answer Paris": ["ban dus"],
    "p0 is the id of a prompt, which has its own answer and subject; leave --answer": ["p0", "--answer", "ban"],
    "there are 2 texts and 1 of --answer; give one for each text": ["ban dus", "dus ban", "--answer", "ban"],
    "--answer and --subject are of a text of your own, and there is none; give one": ["--answer", "ban"],
    "--reader: there is no role 'lst': did you mean 'last'?": ["p0", "--reader", "lst"],
    "a window of 9 layers does not fit: this model has 4 of them; give 1 to 4": ["p0", "--window", 9],
    "Mamba2ForCausalLM has no attention layers to knock out": ["p0", "--through", "attention"],
    "is a folder; name a picture, such as heatmap.png": ["p0", "--out", "."],
    "--colour-limit: it should be greater than 0": ["p0", "--colour-limit", -1],
}


@pytest.mark.parametrize("message", BAD_HEATMAPS)
def test_heatmap_refuses(model: str, prompts: str, message: str) -> None:
    first = BAD_HEATMAPS[message]
    refused(run("heatmap", *first, "--model", model, "--facts", prompts), message)


def test_a_model_is_loaded_where_and_as_is_said(
    model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, object]] = []

    def spy(name: str, **options: object) -> object:
        given.append(options)
        raise FlowError("that is all")

    monkeypatch.setattr(study_job, "load", spy)
    how = ["--revision", "v1", "--dtype", "float64", "--device", "cpu", "--device-map", "auto"]
    facts = ["--facts", prompts, "--model", model]
    for words in (
        ["check", model],
        ["attention", "ban dus", "--model", model],
        *([command, "p0", *facts] for command in ("heatmap", "edges", "circuit")),
        ["features", *facts],
    ):
        out = [] if words[0] == "check" else ["--out", tmp_path / ("f" if words[0] == "features" else "a.png")]
        refused(run(*words, *how, *out), "that is all")
        assert given.pop() == {
            "revision": "v1",
            "dtype": torch.float64,
            "device": torch.device("cpu"),
            "device_map": "auto",
        }
        refused(run(*words, "--device", "gpu", *out), "--device: there is no device 'gpu'")
