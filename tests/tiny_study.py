"""A small study in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tiny_flow import world

from ssm_interp.flow import FlowResult, Study, run_study
from ssm_interp.jobs import job_folder
from ssm_interp.jobs.files import digest
from ssm_interp.prompts import Prompt, load_prompts, save_prompts


@dataclass(frozen=True)
class Scene:
    """`options` of a study of 10 prompts in 5 shards, two prompts answered wrongly, and its uninterrupted `result`."""

    options: dict[str, Any]
    folder: Path
    result: FlowResult

    def study(self, **changed: Any) -> Study:
        return Study(**self.options | changed)

    def prompts(self) -> list[Prompt]:
        return load_prompts(self.options["facts"])


def scene(folder: Path) -> Scene:
    tiny = world("mamba2", count=8)
    tiny.model.save_pretrained(folder / "tiny")
    tiny.tokenizer.save_pretrained(folder / "tiny")
    save_prompts([*tiny.prompts[:3], *tiny.wrong, *tiny.prompts[3:]], folder / "prompts.jsonl")
    options = {
        "model": str(folder / "tiny"),
        "dtype": "float64",
        "device": "cpu",
        "facts": str(folder / "prompts.jsonl"),
        "sources": ["subject", "last"],
        "windows": [1, 2],
        "features": ["all", "top half"],
        "shard_size": 2,
    }
    return Scene(options, folder / "whole", run_study(Study(**options), folder / "whole"))


def same(found: FlowResult, expected: FlowResult) -> None:
    """Equal to the last bit, and in the same order."""
    pd.testing.assert_frame_equal(found.frame, expected.frame, check_exact=True)
    assert found.runs == expected.runs


def manifest(study: Study, folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((job_folder(folder, study.model) / "manifest.json").read_text())
    return content


def rewrite(study: Study, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as the program could have written it."""
    path = job_folder(folder, study.model) / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps({"sha256": digest(content), **content}))


def shards(study: Study, folder: Path) -> list[Path]:
    return sorted((job_folder(folder, study.model) / "shards").glob("*"))
