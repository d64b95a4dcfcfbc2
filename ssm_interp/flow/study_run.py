"""Running a study: from where a killed run left it, here or on the workers of a cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from ssm_interp import jobs
from ssm_interp.errors import NothingAnswered
from ssm_interp.experiments import Study
from ssm_interp.flow.named_edges import check_edges_exist
from ssm_interp.flow.result import FlowResult, FlowRun
from ssm_interp.flow.study_facts import StudyFacts
from ssm_interp.flow.study_job import StudyJob, check_fits
from ssm_interp.flow.sweep import Progress
from ssm_interp.hooks import attach
from ssm_interp.jobs import Shard, Where, job_folder
from ssm_interp.models import SHIPPED, load_outline, load_tokenizer
from ssm_interp.prompts import tokenize, warn_shared

logger = logging.getLogger(__name__)


def run_study(study: Study, folder: str | Path, *, progress: Progress | None = None) -> FlowResult:
    """Run a study, or what is left of it, and keep every shard of its table as soon as it is there.

    Killed at any moment, it loses the shards in flight alone (one per worker), and called again it ends with the same
    table; with another number of `workers`, too.

    Args:
        study: its options. Only those in `WITHOUT_EFFECT` may differ from a stored one's.
        folder: for the studies of any number of models; this one's has the name of its model, see `jobs.job_folder`.
            Workers do not write it.
        progress: called with (done, total) prompts of those that are left to ask, over all workers.

    Returns:
        The whole table, in the order of a sweep over all prompts.

    Raises:
        JobError: the folder holds another study (what differs is named), one of version 0.1, a damaged or a foreign
            shard, or a process at work; of the workers: as `jobs.run`.
        StudyError: there is no such device.
        LoadError, PromptError, FlowError, FeatureError, InterventionError: as `load`, `load_prompts` and `sweep`;
            all that can be known before the first answer, before anything is written.
        NothingAnswered: the model answers none of the prompts.
        OSError: the folder cannot be written.
        Any error, or KeyboardInterrupt, in the course of the work has a note on what is stored and how to go on.

    Warns:
        SharedTokenWarning, NoEdgesWarning: as `sweep`, once for all prompts.
        JobWarning: as `jobs.run`.

    Cost: that of `sweep`; reading the weights once more for their sha256, about a second per GB and worker. Memory for
        a shard.

    Example:
        >>> study = Study(model="tiny-mamba2", sources=["subject"], windows=[3])          # doctest: +SKIP
        >>> run_study(study, "studies").plot().savefig("flow.png")                         # doctest: +SKIP
    """
    where = Where(study.workers, study.gpus_per_worker, study.address)
    job = _job(study, say=True)
    _tell_idle(job, os.cpu_count() or 1)
    return _as_one_sweep(jobs.run(job, job_folder(folder, study.model), where, progress=progress), study)


def check_study(study: Study) -> None:
    """Raise what `run_study` would, as far as the facts, the tokenizer and the model's config tell: no weights are
    loaded, and nothing is written.

    Raises:
        JobError: workers that cannot be as they are asked for.
        LoadError, PromptError, FlowError, FeatureError, InterventionError: as `run_study`.

    Example:
        >>> check_study(Study(model="tiny-mamba2", windows=[99]))
        Traceback (most recent call last):
        ssm_interp.errors.WindowError: a window of 99 layers does not fit: this model has 10 of them; give 1 to 10
    """
    Where(study.workers, study.gpus_per_worker, study.address)
    _job(study, say=False)


def _job(study: Study, *, say: bool) -> StudyJob:
    """The study and its prompts, once they are known to fit each other, the tokenizer and the model's config.

    Args:
        say: whether to warn, and tell of what is left out.
    """
    tokenizer = load_tokenizer(study.model, revision=study.revision)
    asked = StudyFacts(study).askable(tokenizer, say=say)
    rows = [tokenize(prompt, tokenizer) for prompt in asked]
    check_edges_exist(rows, study.sources, study.targets, warn=say)
    with attach(load_outline(study.model, revision=study.revision)) as ssm:
        check_fits(study, ssm)
    if say and not study.full_answer:
        warn_shared(rows)
    folder = study.model not in SHIPPED and Path(study.model).is_dir()
    model = str(Path(study.model).absolute()) if folder else study.model
    return StudyJob(study, tuple(asked), model, torch.get_num_threads())


def _tell_idle(job: StudyJob, cores: int) -> None:
    """Say so if there are more workers than shards, or than cores for their threads."""
    study, prompts, shards = job.study, len(job.prompts), len(job.sizes)
    workers = study.workers or 1
    if idle := max(0, workers - shards):
        logger.warning(
            "%d of %d workers have nothing to do: %d prompts make %d shard%s of %d; in another folder, a shard_size of "
            "%d gives each of them some",
            idle, workers, prompts, shards, "" if shards == 1 else "s", study.shard_size, max(1, prompts // workers),
        )  # fmt: skip
    share = max(1, cores // workers)
    if workers > 1 and study.address is None and not study.gpus_per_worker and job.threads > share:
        logger.warning(
            "%d workers compute with %d threads each on %d cores; OMP_NUM_THREADS=%d is faster, and may give other "
            "last digits", workers, job.threads, cores, share,
        )  # fmt: skip


def _as_one_sweep(shards: Sequence[Shard], study: Study) -> FlowResult:
    """The whole table, as one sweep over all prompts gives it."""
    asked, kept = (sum(shard.record[key] for shard in shards) for key in ("asked", "kept"))
    answered = [shard for shard in shards if shard.record["kept"]]
    if not answered:
        raise NothingAnswered(asked, full_answer=study.full_answer)
    runs = [_run(shard.record["run"]) for shard in answered]
    engine = "; ".join(dict.fromkeys(run.engine for run in runs))
    frame = _in_order([shard.table for shard in answered], [run.kept for run in runs])
    return FlowResult(frame, (replace(runs[0], asked=asked, kept=kept, engine=engine),))


def _run(fields: dict[str, Any]) -> FlowRun:
    return FlowRun(**fields | {name: tuple(value) for name, value in fields.items() if isinstance(value, list)})


def _in_order(tables: list[pa.Table], kept: list[int]) -> pd.DataFrame:
    """The rows of all shards as one sweep orders them: by knockout, then by prompt."""
    knockouts = [
        np.repeat(np.arange(len(table) // prompts), prompts) for table, prompts in zip(tables, kept, strict=True)
    ]
    order = np.argsort(np.concatenate(knockouts), kind="stable")
    frame: pd.DataFrame = pa.concat_tables(tables).take(order).to_pandas()
    return frame
