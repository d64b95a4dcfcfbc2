"""A study as a job: its prompts in shards, each of which a worker with the model makes rows of the table from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssm_interp.errors import NothingAnswered, SsmInterpWarning, StudyError
from ssm_interp.experiments import Study
from ssm_interp.features import feature_groups
from ssm_interp.flow.result import FlowResult
from ssm_interp.flow.study_held import check_held, held_on, measured
from ssm_interp.flow.sweep import FeatureGroups, Progress, check_complete, sweep
from ssm_interp.flow.windows import windows
from ssm_interp.hooks import Attachment, Intervention, answers, attach
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.hooks.rows.steps import default_memory
from ssm_interp.jobs import Job, Prepared, Report, Shard, Worker
from ssm_interp.jobs.files import digest
from ssm_interp.models import load, weights_hash
from ssm_interp.prompts import Prompt, pad, tokenize

LESS_MEMORY = "with a smaller max_memory or batch_size, which change no result,"


@dataclass(frozen=True)
class StudyJob(Job):
    """A study of prompts.

    Attributes:
        study: its options.
        prompts: that it asks.
        model: what its model is loaded from: of a folder the whole path, since workers may start in another one.
        threads: of the CPU that each worker computes with: how many decides the last bit of a number.
    """

    study: Study
    prompts: tuple[Prompt, ...]
    model: str
    threads: int
    experiment = "flow"

    @property
    def options(self) -> dict[str, Any]:
        return self.study.options()

    @property
    def identity(self) -> dict[str, Any]:
        return {"prompts": digest([asdict(prompt) for prompt in self.prompts])}

    @cached_property
    def shards(self) -> list[Sequence[Prompt]]:
        """The prompts of each."""
        size = self.study.shard_size
        return [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]

    @property
    def sizes(self) -> Sequence[int]:
        return [len(prompts) for prompts in self.shards]

    @property
    def remedies(self) -> dict[type[BaseException], str]:
        return dict.fromkeys((MemoryError, torch.OutOfMemoryError), LESS_MEMORY)

    def open(self) -> Worker:
        torch.set_num_threads(self.threads)
        return StudyWorker(self)


class _Shared(NamedTuple):
    """What the statistics of all prompts decide, and so every worker is told."""

    features: FeatureGroups
    held: list[Intervention]


class StudyWorker(Worker):
    """The model of a study, attached."""

    def __init__(self, job: StudyJob) -> None:
        self.job, self.study = job, job.study
        self.model, self.tokenizer = load_for(self.study.model_copy(update={"model": job.model}))
        commit = getattr(self.model.config, "_commit_hash", None)
        self.weights = {"model": self.study.model, "commit": commit, "weights": weights_hash(self.model)}
        self.ssm = attach(self.model)

    def prepare(self) -> Prepared:
        """The features in the groups, as measured on all prompts, and the memory that rows may take.

        How rows are batched decides the last bit of a number, so the memory is kept for the whole study.
        """
        study, rows = self.study, [tokenize(prompt, self.tokenizer) for prompt in self.job.prompts]
        check_fits(study, self.ssm)
        names = {*study.features, *(edit.features for edit in study.held)}
        statistics = measured(self.ssm, rows, names)
        groups = feature_groups(self.ssm, study.features, statistics=statistics, sets=study.groups)
        held = held_on(study.held, self.ssm, statistics)
        if held:
            self._rehearse(held)
        settings = {"max_memory": default_memory(device_of(self.model))}
        return Prepared({"measured features": digest(groups)}, settings, _Shared(groups, held))

    def shard(self, number: int, prepared: Prepared, report: Report) -> Shard:
        """A sweep over its prompts; no rows where none of them is answered."""
        prompts, shared = self.job.shards[number], prepared.shared
        memory = self.study.max_memory or prepared.settings["max_memory"]
        with self.ssm.edit(*shared.held):
            result = self._sweep(prompts, shared.features, memory, _in_prompts(report, len(prompts)))
        frame = result.frame if result else pd.DataFrame()
        run = result.runs[0] if result else None
        record = {"asked": len(prompts), "kept": run.kept if run else 0, "run": asdict(run) if run else None}
        return Shard(pa.Table.from_pandas(frame, preserve_index=False), record)

    def close(self) -> None:
        self.ssm.detach()

    def _rehearse(self, held: Sequence[Intervention]) -> None:
        """Raise, before anything is written, what the edits that are held on would in a forward pass."""
        batch = pad([tokenize(self.job.prompts[0], self.tokenizer)]).to(device_of(self.model))
        with self.ssm.edit(*held):
            answers(self.ssm, batch, [()], by="forwards")

    def _sweep(
        self, prompts: Sequence[Prompt], features: FeatureGroups, max_memory: int, progress: Progress
    ) -> FlowResult | None:
        study = self.study
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SsmInterpWarning)  # was said of all shards together
                return sweep(
                    self.ssm,
                    self.tokenizer,
                    prompts,
                    sources=study.sources,
                    targets=study.targets,
                    windows=study.windows,
                    align=study.align,
                    features=features,
                    through=study.through,
                    answered_only=not study.all_prompts,
                    full_answer=study.full_answer,
                    metric=study.metric,
                    allow_no_edges=True,
                    batch_size=study.batch_size,
                    max_memory=max_memory,
                    progress=progress,
                    name=study.label,
                )
        except NothingAnswered:
            return None


def check_fits(study: Study, ssm: Attachment) -> None:
    """Raise what a sweep over this model would, as far as that takes no weights to know."""
    layers = ssm.layers_with(study.through)
    for size in study.windows or ():
        windows(layers, size, study.align)
    known = [name for name in study.features if name in study.groups or not ssm.layers]  # ranks take weights
    check_complete(feature_groups(ssm, known, sets=study.groups), layers)
    check_held(study.held, ssm)


def load_for(study: Study) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a study, where it says, and its tokenizer.

    Raises:
        StudyError: there is no such device.
        LoadError: as `load`.
    """
    return load(
        study.model,
        dtype=getattr(torch, study.dtype),
        device=_device(study),
        device_map=study.device_map,
        revision=study.revision,
    )


def _device(study: Study) -> torch.device:
    cuda = torch.cuda.is_available()
    device = torch.device(study.device if study.device != "auto" else "cuda" if cuda else "cpu")
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise StudyError(
            f"there is no device {study.device!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _in_prompts(report: Report, prompts: int) -> Callable[[int, int], None]:
    """A sweep's progress, counted in answers, as that of a study. The answers that decide which prompts are kept come
    first and count as nothing: how many there will be is not known before."""

    def tell(done: int, answers: int) -> None:
        knockouts = answers - prompts
        report(prompts * max(0, done - prompts) // knockouts if knockouts else 0)

    return tell
