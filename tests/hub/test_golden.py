"""The published numbers of Mamba Knockout, with the real weights and prompts.

pytest -m hub tests/hub                                  # downloads 130M and 355M models and the facts
SSM_INTERP_HUB=/data/hub pytest -m hub tests/hub         # or finds them in a folder: /data/hub/OWNER/NAME, and the
                                                         # facts as /data/hub/NeelNanda/counterfact-tracing
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ssm_interp as si
from ssm_interp.features import feature_groups
from ssm_interp.flow import FlowResult, sweep
from ssm_interp.prompts import Prompt, tokenize

GOLDEN = json.loads((Path(__file__).parent / "knockout.json").read_text(encoding="utf-8"))
MODELS = {
    "mamba1-130m": "state-spaces/mamba-130m-hf",
    "mamba2-130m": "AntonV/mamba2-130m-hf",
    "gpt2-355m": "openai-community/gpt2-medium",
}
FACTS = "NeelNanda/counterfact-tracing"

pytestmark = [pytest.mark.hub, pytest.mark.filterwarnings("ignore::ssm_interp.SsmInterpWarning")]


def place(name: str) -> str:
    """A hub id, or its folder under SSM_INTERP_HUB."""
    folder = os.environ.get("SSM_INTERP_HUB")
    return str(Path(folder, name)) if folder else name


@cache
def prompts() -> dict[str, Prompt]:
    """By original_idx."""
    facts = "counterfact" if "SSM_INTERP_HUB" not in os.environ else place(FACTS)
    return {prompt.id: prompt for prompt in si.load_prompts(facts, on_bad=lambda _: None)}


@cache
def swept(name: str) -> FlowResult:
    """Everything that the fixtures hold of a model."""
    rows = GOLDEN["mean_relative_change"][name]
    asked = [prompts()[str(number)] for number in GOLDEN["prompts"][name]]
    model, tokenizer = si.load(place(MODELS[name]))
    results = []
    with si.attach(model) as ssm:
        for target in dict.fromkeys(row["target"] for row in rows):
            wanted = [row for row in rows if row["target"] == target]
            result = sweep(
                ssm,
                tokenizer,
                asked,
                sources=list(dict.fromkeys(row["source"] for row in wanted)),
                targets=[target],
                features=feature_groups(ssm, list(dict.fromkeys(row["features"] for row in wanted))),
                windows=GOLDEN["window"],
                name=f"{name} {target}",
            )
            results.append(result)
    return FlowResult.join(results)


def windows_of(frame: pd.DataFrame, row: dict[str, Any]) -> pd.DataFrame:
    """The rows of one cut in the windows of the fixtures."""
    cut = (frame["target"] == row["target"]) & (frame["source"] == row["source"])
    return frame[cut & (frame["feature_group"] == row["features"]) & (frame["window_start"] < 10)]


@pytest.mark.parametrize("name", MODELS)
def test_clean_probabilities_and_ranks(name: str) -> None:
    model, tokenizer = si.load(place(MODELS[name]))
    for number, golden in GOLDEN["base"].items():
        row = tokenize(prompts()[number], tokenizer)
        with torch.no_grad():
            p = model(input_ids=torch.tensor([row.ids])).logits[0, -1].double().softmax(0)
        assert tokenizer.decode([row.answer_id]) == golden["token"]
        assert float(p[row.answer_id]) == pytest.approx(golden[name]["p"], rel=1e-4, abs=1e-6)
        assert int((p > p[row.answer_id]).sum()) + 1 == golden[name]["rank"]


@pytest.mark.parametrize("name", ["mamba1-130m", "mamba2-130m"])
def test_every_prompt_and_window_of_subject_to_last(name: str) -> None:
    found = windows_of(swept(name).frame, {"target": "last", "source": "subject", "features": "all"})
    table = found.pivot(index="prompt_id", columns="window_start", values="p")
    for number, golden in GOLDEN["last_from_subject"][name].items():
        np.testing.assert_allclose(table.loc[number], golden, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_mean_relative_changes(name: str) -> None:
    frame = swept(name).frame
    for row in GOLDEN["mean_relative_change"][name]:
        means = windows_of(frame, row).groupby("window_start")["relative_change"].mean()
        assert len(means) == 10
        np.testing.assert_allclose(means, row["change"], atol=0.051)  # they are given to one decimal
