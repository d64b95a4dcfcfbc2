"""The script that trained the induction models: its labels are right, and it writes what `load` reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import ssm_interp as si
from ssm_interp.models import INDUCTION

SCRIPT = Path(__file__).parents[1] / "examples" / "train_induction.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_induction", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_labels_are_what_followed_last_time(script: Any) -> None:
    ids, labels = script.batch(7)
    assert torch.equal(ids, script.batch(7)[0]) and not torch.equal(ids, script.batch(8)[0])
    for row, wanted in zip(ids.tolist()[:8], labels.tolist()[:8], strict=True):
        for place, symbol in enumerate(row):
            earlier = [at for at in range(place) if row[at] == symbol]
            assert wanted[place] == (row[earlier[-1] + 1] if earlier else script.UNLABELLED)


@pytest.mark.parametrize("name", INDUCTION)
def test_a_short_training_gives_a_model_of_the_shipped_shape(
    script: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(script, "ROWS", 4)
    with torch.random.fork_rng(devices=[]):
        script.train(name, tmp_path, steps=2, every=2, ship=False)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    found, tokenizer = si.load(tmp_path)
    shipped, own = si.load(name)
    shapes = {key: weight.shape for key, weight in found.state_dict().items()}
    assert shapes == {key: weight.shape for key, weight in shipped.state_dict().items()}
    assert tokenizer("a b z")["input_ids"] == own("a b z")["input_ids"] == [1, 2, 26]


def test_another_name_is_refused(script: Any) -> None:
    with pytest.raises(SystemExit, match="no recipe for 'tiny-mamba1'"):
        script.build_model("tiny-mamba1")
