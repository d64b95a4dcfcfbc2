"""Files of facts: JSONL, CSV, Parquet, data sets, and the CounterFact layout wherever it is met."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from ssm_interp.prompts import Prompt, PromptError, counterfact, hub_row, load_prompts, original_idx
from ssm_interp.prompts import facts_file as reading

ROWS = [
    {"text": "The capital of France is", "subject": "France", "answer": "Paris", "relation": "capital", "id": "a"},
    {"text": "“Ça”, said\u2028Zoë,\nis", "subject": "Zoë", "answer": "French, maybe", "relation": "", "id": "b"},
]
PROMPTS = [Prompt(**row) for row in ROWS]
TRACED = [
    {
        "relation": "The mother tongue of {} is",
        "relation_prefix": "The mother tongue of",
        "relation_suffix": " is",
        "prompt": f"The mother tongue of {subject} is",
        "relation_id": "P103",
        "target_false_id": "Q1860",
        "target_true_id": "Q150",
        "target_true": " French",
        "target_false": " English",
        "subject": f" {subject}",
    }
    for subject in ("Danielle Darrieux", "Léon Blum")
]


def as_jsonl(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "facts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def as_csv(rows: list[dict[str, Any]], folder: Path, delimiter: str = ",") -> Path:
    path = folder / ("facts.tsv" if delimiter == "\t" else "facts.CSV")
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_tsv(rows: list[dict[str, Any]], folder: Path) -> Path:
    return as_csv(rows, folder, "\t")


def as_parquet(rows: list[dict[str, Any]], folder: Path) -> Path:
    pd.DataFrame(rows).to_parquet(folder / "facts.parquet")
    return folder / "facts.parquet"


def as_saved_dataset(rows: list[dict[str, Any]], folder: Path) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


WRITERS = [as_jsonl, as_csv, as_tsv, as_parquet, as_saved_dataset]
Writer = Callable[[list[dict[str, Any]], Path], Path]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_prompts(write: Writer, tmp_path: Path) -> None:
    assert load_prompts(write(ROWS, tmp_path)) == PROMPTS


@pytest.mark.parametrize("write", WRITERS)
def test_columns_are_mapped_and_others_ignored(write: Writer, tmp_path: Path) -> None:
    rows = [
        {"question": row["text"], "subject": row["subject"], "label": row["answer"], "n": i}
        for i, row in enumerate(ROWS)
    ]
    columns = {"text": "question", "answer": "label", "id": "n"}
    found = load_prompts(write(rows, tmp_path), columns=columns)
    assert [(p.text, p.subject, p.answer, p.relation, p.id) for p in found] == [
        (row["text"], row["subject"], row["answer"], "", str(i)) for i, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("write", WRITERS)
def test_the_counterfact_layout_is_recognised(write: Writer, tmp_path: Path) -> None:
    first, second = load_prompts(write(TRACED, tmp_path))
    assert first == Prompt(
        "The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "French", "The mother tongue of {} is", "0"
    )
    assert (second.subject, second.id) == ("Léon Blum", "1")
    numbered = [row | {"original_idx": 7 + i, "split": "x"} for i, row in enumerate(TRACED)]
    assert [prompt.id for prompt in load_prompts(write(numbered, tmp_path))] == ["7", "8"]


def test_original_idx_numbers_the_shuffled_rows() -> None:
    known = {53: 5564, 59: 9910, 74: 1892, 90: 10494, 93: 9634, 140: 4830, 148: 659, 13190: 7733, 16634: 21372}
    assert {index: hub_row(index) for index in known} == known
    assert all(original_idx(row) == index for index, row in known.items())
    assert sorted(map(hub_row, range(counterfact.ROWS))) == list(range(counterfact.ROWS))
    for wrong in (-1, counterfact.ROWS):
        with pytest.raises(PromptError, match=f"there is no original_idx {wrong} in NeelNanda/counterfact-tracing"):
            hub_row(wrong)
        with pytest.raises(PromptError, match=f"there is no row {wrong}"):
            original_idx(wrong)


def test_the_shuffle_is_that_of_datasets() -> None:
    shuffled = datasets.Dataset.from_dict({"row": range(counterfact.ROWS)}).shuffle(seed=counterfact.SHUFFLE_SEED)
    assert [shuffled[index]["row"] for index in (0, 53, 21_918)] == [hub_row(index) for index in (0, 53, 21_918)]


def test_the_whole_data_set_has_its_original_idx_as_ids(tmp_path: Path) -> None:
    rows = [TRACED[0] | {"relation_suffix": str(row)} for row in range(counterfact.ROWS)]
    prompts = load_prompts(as_parquet(rows, tmp_path))
    assert (prompts[7733].id, prompts[5564].id) == ("13190", "53")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("counterfact", ("NeelNanda/counterfact-tracing", "")),
        ("owner/facts", ("owner/facts", "")),
        ("owner/facts.v2:test", ("owner/facts.v2", "test")),
    ],
)
def test_names_of_data_sets(name: str, asked: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def read(place: str, split: str) -> list[Any]:
        seen.append((place, split))
        return [reading._Row("row 1", dict(TRACED[0]))]

    monkeypatch.setattr(reading, "_dataset_rows", read)
    assert load_prompts(name)[0].answer == "French"
    assert seen == [asked]


def test_splits_of_a_data_set(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([row]) for name, row in zip(("train", "test"), ROWS, strict=True)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    assert load_prompts(f"{tmp_path}:test") == PROMPTS[1:]
    with pytest.raises(PromptError, match=r"has several splits: name one of \['train', 'test'\], as in '.*:train'"):
        load_prompts(tmp_path)
    with pytest.raises(PromptError, match="has no split 'tset'"):
        load_prompts(f"{tmp_path}:tset")


def test_data_sets_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match="cannot load the data set"):
        load_prompts(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'ssm-interp\[datasets\]'"):
        load_prompts("owner/facts")


def test_rows_that_are_no_prompt_are_named_or_counted(tmp_path: Path) -> None:
    bad = {**ROWS[0], "subject": "Spain", "id": "c"}
    for write, place in ((as_csv, "facts.CSV, line 3"), (as_parquet, "facts.parquet, row 2"), (as_jsonl, "line 2")):
        path = write([ROWS[0], bad, ROWS[1]], tmp_path)
        with pytest.raises(PromptError, match=f"{place}: the subject 'Spain' occurs 0 times"):
            load_prompts(path)
        skipped: list[PromptError] = []
        assert load_prompts(path, on_bad=skipped.append) == PROMPTS
        assert len(skipped) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.csv", "text,subject\na b,b\n", r"f.csv, line 2: .* There is no answer; there are \['subject', 'text'\]"),
        ("f.csv", "text,subject,answer\na b,b\n", r"line 2: \['answer'\] must be text"),
        ("f.csv", "text,subject,answer\na b,b,c,d\n", "line 2: more cells than the 3 columns of the header"),
        ("f.csv", 'text,subject,answer\n"a b,b,c\n', "not CSV"),
        ("f.csv", "text,subject,answer,note\na b,b,c,d\n", r"unknown keys \['note'\]; .* say which to read"),
        ("f.csv", "text,subject,target\na b,b,c\n", "0.1 called the answer target: .* map it, answer=target"),
        ("f.csv", "", "f.csv' holds no prompt"),
        ("f.parquet", "text", "f.parquet' is not a Parquet file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=message):
        load_prompts(tmp_path / name)


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    path = as_parquet([ROWS[0], {**ROWS[1], "answer": None}], tmp_path)
    with pytest.raises(PromptError, match=r"row 2: \['answer'\] must be text"):
        load_prompts(path)
    path = as_jsonl([{**TRACED[0], "target_true": None}], tmp_path)
    with pytest.raises(PromptError, match=r"line 1: \['answer'\] must be text"):
        load_prompts(path)


def test_mappings_that_do_not_fit(tmp_path: Path) -> None:
    path = as_csv(ROWS, tmp_path)
    with pytest.raises(PromptError, match="a prompt has no field 'txt' .* did you mean 'text'?"):
        load_prompts(path, columns={"txt": "text"})
    with pytest.raises(PromptError, match="a prompt has no field 'target' .* did you mean 'answer'?"):
        load_prompts(path, columns={"target": "text"})
    with pytest.raises(PromptError, match="There is no 'question' for text; there are"):
        load_prompts(path, columns={"text": "question"})
    with pytest.raises(PromptError, match="There is no 'kind' for relation"):
        load_prompts(path, columns={"relation": "kind"})
    for missing in ("missing.csv", "data/missing.parquet", "no such", "/no/such"):
        with pytest.raises(PromptError, match=f"there is no prompt file '{missing}'"):
            load_prompts(missing)


def test_the_answer_of_files_of_0_1_is_mapped(tmp_path: Path) -> None:
    rows = [{"target" if name == "answer" else name: cell for name, cell in row.items()} for row in ROWS]
    assert load_prompts(as_csv(rows, tmp_path), columns={"answer": "target"}) == PROMPTS
