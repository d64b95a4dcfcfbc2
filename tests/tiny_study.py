"""A small study in a folder of its own, and ways to run it in other processes that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tiny_flow import world

from ssm_interp.flow import FlowResult, Study, run_study, study_folder
from ssm_interp.flow.study_store import digest
from ssm_interp.prompts import save_prompts

FORK = multiprocessing.get_context("fork")  # starts without importing everything anew


@dataclass(frozen=True)
class Scene:
    """`options` of a study of 10 prompts in 5 shards, two prompts answered wrongly, and its uninterrupted `result`."""

    options: dict[str, Any]
    folder: Path
    result: FlowResult

    def study(self, **changed: Any) -> Study:
        return Study(**self.options | changed)


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
    content: dict[str, Any] = json.loads((study_folder(folder, study.model) / "manifest.json").read_text())
    return content


def rewrite(study: Study, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as the program could have written it."""
    path = study_folder(folder, study.model) / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps({"sha256": digest(content), **content}))


def shards(study: Study, folder: Path) -> list[Path]:
    return sorted((study_folder(folder, study.model) / "shards").glob("*"))


def started(work: Callable[..., object], *arguments: object, rank: int = 0, ranks: int = 1, port: int = 0) -> Any:
    """A process at work, on its own or as one of several ranks."""

    def run() -> None:
        if ranks > 1:
            here = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in (here | {"MASTER_PORT": port}).items()}
        work(*arguments)

    process = FORK.Process(target=run)
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
