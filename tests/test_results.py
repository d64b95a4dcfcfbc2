"""What verbs return: a table with the same columns everywhere, a picture, and a file from which it comes back whole."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from drawn import png
from matplotlib.figure import Figure
from random_terms import as_users_run_it
from tiny_flow import world
from torch import Tensor

import ssm_interp as si
from ssm_interp.attribution import (
    AttentionView,
    EdgeAttribution,
    LogitAttribution,
    attention_views,
    check_edges,
    decompose,
    edge_attribution,
    logit_attribution,
)
from ssm_interp.circuits import find_circuit
from ssm_interp.errors import FeatureError, MissingError, PlotError, ResultError
from ssm_interp.features import Spectrum, feature_groups, spectrum
from ssm_interp.flow import FlowResult, leak, sweep, token_map
from ssm_interp.hooks import log_probability
from ssm_interp.plots import TokenMap, agreement_figure, edges_page
from ssm_interp.prompts import Batch, pad, tokenize
from ssm_interp.results import KEY, TENSORS, ByLayer, Result

NAMES = {"prompt_id", "model", "layer", "feature_group", "row", "target", "source", "target_token", "source_token"}
"""What every table calls the same thing by the same name."""
OWN = {
    "Decomposition": {"part", "norm"},
    "Decompositions": {"part", "norm"},
    "AttentionView": {"attention"},
    "AttentionViews": {"attention"},
    "EdgeAttribution": {"attribution"},
    "EdgeCheck": {"attribution", "exact", "chosen"},
    "LogitAttribution": {"part", "attribution"},
    "Spectrum": {"feature", "statistic", "value"},
    "Circuit": {"kept", "effect"},
    "TokenMap": {"change"},
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    tiny = world("mamba2", count=2)
    return pad([tokenize(prompt, tiny.tokenizer) for prompt in tiny.prompts])


@pytest.fixture(scope="module")
def results(batch: Batch) -> dict[str, Result]:
    tiny = world("mamba2", count=2)
    with si.attach(tiny.model, own_operator=True) as ssm:
        groups = feature_groups(ssm, ["top half"])
        metric = log_probability(batch.answer_ids)
        edges = edge_attribution(ssm, batch, metric, features=groups)
        written = decompose(ssm, batch, layers=[0, 2], features=groups)
        views = attention_views(ssm, batch, "unified", layers=[1, 3])
        every = [
            written,
            written[2],
            views,
            views[3],
            edges,
            check_edges(ssm, batch, metric, edges, top=2, random=3),
            logit_attribution(ssm, batch, batch.answer_ids, features=groups),
            spectrum(ssm, batch),
            find_circuit(ssm, batch, roles={"all": batch.positions("all")}, tolerance=0.0),
            sweep(ssm, tiny.tokenizer, tiny.prompts, windows=2),
            leak(ssm, tiny.tokenizer, tiny.prompts, windows=4, sources=["subject"]),
            token_map(ssm, tiny.tokenizer, tiny.prompts[0], window=2),
            si.answers(ssm, batch, [(), si.Knockout(sources="subject")], ["probability", "rank"]),
        ]
    return {type(one).__name__: one for one in every}


def result_classes() -> Iterator[str]:
    """Names of all results of the package that are no base of others."""
    for module in pkgutil.walk_packages(si.__path__, "ssm_interp."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Result) and value not in (Result, ByLayer):
                yield value.__name__


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same in all that they hold; sequences may be lists here and tuples there."""
    if isinstance(one, Tensor | np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True) and one.dtype == other.dtype
    if isinstance(one, pd.DataFrame):
        return one.equals(other)
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list | range):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_every_result_is_tested_here(results: dict[str, Result]) -> None:
    assert set(result_classes()) == set(results)


def test_results_come_back_from_one_file_whose_table_anything_reads(results: dict[str, Result], tmp_path: Path) -> None:
    for name, result in results.items():
        path = tmp_path / f"{name}.parquet"
        result.save(path)
        assert same(result, type(result).load(path)), name
        pd.testing.assert_frame_equal(pd.read_parquet(path), result.frame, check_dtype=False)
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted(f"{name}.parquet" for name in results)


def test_tables_call_the_same_things_by_the_same_names(results: dict[str, Result]) -> None:
    for name, own in OWN.items():
        assert set(results[name].frame.columns) <= NAMES | own, name
        assert own <= set(results[name].frame.columns), name
    for name in ("FlowResult", "LeakReport"):
        assert {"prompt_id", "model", "source", "target", "feature_group", "layer"} <= set(results[name].frame.columns)
    for name in ("EdgeAttribution", "Decomposition", "LogitAttribution"):
        assert set(results[name].frame["feature_group"].dropna()) == {"top half", "other"} - (
            {"other"} if name == "EdgeAttribution" else set()
        )


def test_every_result_draws_itself_and_says_what_it_is(results: dict[str, Result]) -> None:
    for name, result in results.items():
        figure = result.plot(**{"group": "top half"} if name == "EdgeAttribution" else {})
        assert isinstance(figure, Figure)
        png(figure)
        text = repr(result)
        assert text.startswith(f"{name}(") and len(text) < 4000 and "\n" not in text, name
        assert "tensor(" not in text and "array(" not in text, name


PAGES: dict[str, tuple[dict[str, Any], str]] = {
    "FlowResult": ({"title": "my sweep"}, "my sweep"),
    "TokenMap": ({"title": "my map"}, "my map"),
    "EdgeAttribution": ({"group": "top half", "row": 1}, "features: top half"),
    "AttentionView": ({}, "attention of the whole mixer"),
    "Circuit": ({}, "edge groups, faithfulness"),
}


def test_a_check_of_edges_is_drawn_as_points(results: dict[str, Result]) -> None:
    frame = results["EdgeCheck"].frame
    axes = results["EdgeCheck"].plot().axes[0]
    drawn = np.concatenate([np.asarray(points.get_offsets()) for points in axes.collections])
    np.testing.assert_allclose(drawn, frame[["attribution", "exact"]].to_numpy(float))  # the top ones come first
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["both the same", "top", "random"]
    for rows, message in ((frame.drop(columns="exact"), r"missing: \['exact'\]"), (frame[:0], "at least one edge")):
        with pytest.raises(PlotError, match=message):
            agreement_figure(rows)


def test_pages_are_of_the_result(results: dict[str, Result]) -> None:
    for name, result in results.items():
        assert hasattr(result, "page") == (name in PAGES), name
        if name in PAGES:
            options, word = PAGES[name]
            page = result.page(**options)
            assert word in page and "<html" in page, name


def test_a_page_of_edges_leaves_padding_out(results: dict[str, Result], batch: Batch) -> None:
    edges: Any = results["EdgeAttribution"]
    row = min(range(2), key=lambda row: len(batch.prompts[row]))
    frame = edges.frame[(edges.frame["row"] == row) & (edges.frame["feature_group"] == "top half")]
    start = batch.input_ids.shape[1] - len(batch.prompts[row])
    shown = frame.assign(source=frame["source"] - start, target=frame["target"] - start)
    about = f"Mamba2ForCausalLM: metric = {float(edges.metric[row]):.3g}, features: top half"
    expected = edges_page(shown, batch.prompts[row].tokens, about, scale=float(edges.metric[row]))
    assert edges.page(row=row, group="top half") == expected


def test_the_tokens_of_a_batch_are_carried(results: dict[str, Result], batch: Batch) -> None:
    width = batch.input_ids.shape[1]
    short = min(range(2), key=lambda row: len(batch.prompts[row]))
    start = width - len(batch.prompts[short])
    assert start > 0  # there is padding
    frame = results["EdgeAttribution"].frame
    words = batch.prompts[short].tokens
    mine = frame[frame["row"] == short]
    assert mine["source_token"].tolist() == [words[source - start] for source in mine["source"]]
    assert mine["target_token"].tolist() == [words[target - start] for target in mine["target"]]
    for name in ("Decompositions", "LogitAttribution", "AttentionViews"):
        frame = results[name].frame
        mine = frame[(frame["row"] == short) & frame["source"].notna() & (frame["source"] >= start)]
        assert mine["source_token"].tolist() == [words[source - start] for source in mine["source"]], name
    written = results["LogitAttribution"].frame
    assert written["source_token"].isna().tolist() == written["source"].isna().tolist()


def test_tables_hold_the_numbers(results: dict[str, Result]) -> None:
    view = results["AttentionView"]
    assert isinstance(view, AttentionView) and view.bias is not None
    frame = view.frame
    length = view.values.shape[-1]
    inner, bias = frame[frame["source"].notna()], frame[frame["source"].isna()]
    assert len(inner) == 2 * length * (length + 1) // 2
    at = inner.iloc[17]
    assert at["attention"] == float(view.values[at["row"], at["target"], at["source"]])
    assert inner["attention"].sum() == pytest.approx(float(view.values.sum()))
    assert bias["attention"].tolist() == view.bias.flatten().tolist()
    both: Any = results["Decompositions"]
    pd.testing.assert_frame_equal(both.frame, pd.concat([both[0].frame, both[2].frame], ignore_index=True))
    with pytest.raises(MissingError, match=r"layer 1 was not asked for; there are layers \[0, 2\]"):
        both[1]


def test_what_is_written_is_drawn_as_its_length(results: dict[str, Result]) -> None:
    both: Any = results["Decompositions"]
    shown: Any = both.plot(row=1).axes[0].get_images()[0].get_array()
    for column, layer in enumerate((0, 2)):
        lengths = both[layer].by_position()[1, 0].sum(0).norm(dim=-1)
        torch.testing.assert_close(torch.tensor(shown[:, column].tolist()), lengths.float())
    for options, message in (
        ({"row": 2}, "no row 2; the batch has rows 0 to 1"),
        ({"target": 0}, r"target 0 was not asked for; there are \["),
        ({"group": "best"}, "no feature group 'best'; there are"),
    ):
        with pytest.raises(FeatureError, match=message):
            both.plot(**options)


def test_half_precision_numbers_of_numpy_and_what_is_not_a_number_come_back(
    results: dict[str, Result], tmp_path: Path
) -> None:
    values = torch.tensor([torch.nan, -torch.inf], dtype=torch.bfloat16)
    attribution: Any = results["LogitAttribution"]
    odd = dataclasses.replace(attribution, difference=values)
    odd.save(tmp_path / "logits")
    again = LogitAttribution.load(tmp_path / "logits")
    assert again.difference.dtype == torch.bfloat16
    assert torch.equal(again.difference.view(torch.int16), values.view(torch.int16))
    measured = Spectrum("m", 0, {"half-life": {4: torch.tensor([torch.inf]).double(), 7: torch.zeros(0).double()}}, {})
    measured.save(tmp_path / "spectrum.pq")
    assert same(Spectrum.load(tmp_path / "spectrum.pq"), measured)
    numbers = TokenMap(np.array([[np.nan, 0.1]]), ["a"], [3, 4], p_base=np.float64(0.1))
    numbers.save(tmp_path / "map")
    assert same(TokenMap.load(tmp_path / "map"), numbers)


def test_other_files_are_refused_by_name(results: dict[str, Result], tmp_path: Path) -> None:
    def refused(message: str, kind: type[Result] = FlowResult, name: str = "x.parquet") -> None:
        with as_users_run_it(), pytest.raises(ResultError, match=message):
            kind.load(tmp_path / name)

    refused("there is no file .*x.parquet")
    (tmp_path / "x.parquet").write_text("hello")
    refused("x.parquet' is not a Parquet file")
    plain = pd.DataFrame({"a": [1]})
    plain.to_parquet(tmp_path / "x.parquet")
    refused(r"not one that FlowResult\.save wrote; read its table with pandas.read_parquet")
    results["EdgeAttribution"].save(tmp_path / "x.parquet")
    refused(r"holds EdgeAttribution, not FlowResult; read it with EdgeAttribution\.load")
    table = pq.read_table(tmp_path / "x.parquet")
    old = table.replace_schema_metadata({**table.schema.metadata, b"ssm_interp.flow": b"[]"})
    pq.write_table(old, tmp_path / "x.parquet")
    refused(r"was written by ssm_interp 0\.1, whose files this version does not read; sweep again")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, "holds version 2 of EdgeAttribution, but this ssm_interp reads version 1"),
        ({"fields": {"layers": [0]}}, "is damaged: its EdgeAttribution cannot be read"),
        ({"fields": {"values": {"tensor": "99"}}}, "is damaged"),
        ({"fields": {"values": {"code": "0"}}}, "is damaged"),
        ({"fields": {"values": {"part": ["Path", {}]}}}, "is damaged"),
        ({"bytes": 1}, "is damaged"),
        (None, "is damaged: it does not say what it holds"),
        (b"", "is damaged"),
    ],
)
def test_damaged_files_are_refused(
    results: dict[str, Result], tmp_path: Path, changed: dict[str, Any] | bytes | None, message: str
) -> None:
    path = tmp_path / "edges.parquet"
    results["EdgeAttribution"].save(path)
    with pq.ParquetFile(path) as file:
        table, metadata = file.read(), dict(file.metadata.metadata)
    origin, tensors = json.loads(metadata[KEY]), metadata[TENSORS]
    if isinstance(changed, bytes):
        tensors = changed
    written = "{" if changed is None else json.dumps(origin | (changed if isinstance(changed, dict) else {}))
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: written, TENSORS: tensors})
    with as_users_run_it(), pytest.raises(ResultError, match=message):
        EdgeAttribution.load(path)


def test_what_cannot_be_saved_leaves_the_file_as_it_was(results: dict[str, Result], tmp_path: Path) -> None:
    path = tmp_path / "edges.parquet"
    results["EdgeAttribution"].save(path)
    before = path.read_bytes()
    edges: Any = results["EdgeAttribution"]
    with as_users_run_it(), pytest.raises(ResultError, match="cannot be saved with a PosixPath in it"):
        dataclasses.replace(edges, model=tmp_path).save(path)
    assert path.read_bytes() == before
    with pytest.raises(ResultError, match="save writes Parquet, which keeps all that EdgeAttribution holds; name"):
        edges.save(tmp_path / "edges.csv")
    assert [one.name for one in tmp_path.iterdir()] == ["edges.parquet"]
