"""Running a study: shard by shard, on as many ranks as there are, from where a killed run left it."""

from __future__ import annotations

import errno
import logging
import platform
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
import transformers
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ssm_interp
from ssm_interp.errors import NothingAnswered, PromptError, SsmInterpWarning, StudyError
from ssm_interp.experiments import Study
from ssm_interp.features import feature_groups
from ssm_interp.flow.engine import CLEAN, full_forwards
from ssm_interp.flow.named_edges import check_edges_exist
from ssm_interp.flow.result import FlowResult
from ssm_interp.flow.study_held import check_held, held_on, measured
from ssm_interp.flow.study_ranks import Ranks, ranks
from ssm_interp.flow.study_store import Store, digest
from ssm_interp.flow.sweep import FeatureGroups, Progress, check_complete, check_distinct, device_of, sweep
from ssm_interp.flow.windows import windows
from ssm_interp.hooks import Attachment, attach
from ssm_interp.hooks.rows import default_memory
from ssm_interp.models import load, load_outline, load_tokenizer
from ssm_interp.prompts import Prompt, load_prompts, pad, tokenize, warn_shared, with_ids

logger = logging.getLogger(__name__)


def run_study(study: Study, folder: str | Path, *, progress: Progress | None = None) -> FlowResult:
    """Run a study, or what is left of it, and keep every shard of its table as soon as it is there.

    Killed at any moment, it loses the shards in flight alone (one per rank), and called again it ends with the same
    table. The same call in every process that `torchrun` or `accelerate launch` starts shares the shards between them:
    shard i is rank i mod n's, and n may be another one each time.

    Args:
        study: its options. Only `device`, `device_map`, `batch_size` and `max_memory` may differ from a stored one's.
        folder: for the studies of any number of models; this one's has the name of its model, see `study_folder`. On
            several machines, on a disk that they share.
        progress: called with (done, total) prompts of those that this process has yet to ask.

    Returns:
        The whole table, on every rank, in the order of a sweep over all prompts.

    Raises:
        StudyError: the folder holds another study (what differs is named), a damaged or a foreign shard, or a process
            at work; there is no such device.
        LoadError, PromptError, FlowError, FeatureError, InterventionError: as `load`, `load_prompts` and `sweep`;
            all that can be known before the first answer, before anything is written.
        NothingAnswered: the model answers none of the prompts.
        OSError: the folder cannot be written.
        Any error, or KeyboardInterrupt, in the course of the work has a note on what is stored and how to go on.

    Warns:
        SharedTokenWarning, NoEdgesWarning: as `sweep`, once for all prompts, on rank 0.

    Cost: that of `sweep`; reading the weights once more for their sha256, about a second per GB. Memory for a shard.

    Example:
        >>> study = Study(model="tiny-mamba2", sources=["subject"], windows=[3])          # doctest: +SKIP
        >>> run_study(study, "studies").plot().savefig("flow.png")                         # doctest: +SKIP
    """
    facts = StudyFacts(study)
    with ranks() as peers:
        model, tokenizer = load_for(study, peers)
        with attach(model) as ssm:
            check_fits(study, ssm)
            asked = facts.askable(tokenizer, say=peers.index == 0)
            rows = [tokenize(prompt, tokenizer) for prompt in asked]
            check_edges_exist(rows, study.sources, study.targets, warn=peers.index == 0)
            if not study.full_answer and peers.index == 0:
                warn_shared(rows)
            names = {*study.features, *(edit.features for edit in study.held)}
            statistics = measured(ssm, rows, names)
            groups = feature_groups(ssm, study.features, statistics=statistics, sets=study.groups)
            job = _Job(study, ssm, tokenizer, asked, groups)
            identity = {
                "model": study.model,
                "commit": getattr(model.config, "_commit_hash", None),
                "options": study.options(),
                "weights": weights_hash(model),
                "prompts": digest([asdict(prompt) for prompt in asked]),
                "features": digest(groups),
            }
            store = Store(study_folder(folder, study.model), identity, len(job.shards), peers)
            versions = _versions()
            memory = default_memory(device_of(model))
            with ssm.edit(*held_on(study.held, ssm, statistics)):
                job.rehearse()
                with store.opened(versions, memory):
                    _tell_changed_versions(store, versions)
                    with _noted(store):
                        job.run(store, versions, progress)
                    return store.collect()


def check_study(study: Study) -> None:
    """Raise what `run_study` would, as far as the facts, the tokenizer and the model's config tell: no weights are
    loaded, and nothing is written.

    Raises:
        LoadError, PromptError, FlowError, FeatureError, InterventionError: as `run_study`.

    Example:
        >>> check_study(Study(model="tiny-mamba2", windows=[99]))
        Traceback (most recent call last):
        ssm_interp.flow.windows.WindowError: a window of 99 layers does not fit: this model has 10 of them; give 1 to 10
    """
    tokenizer = load_tokenizer(study.model, revision=study.revision)
    asked = StudyFacts(study).askable(tokenizer, say=False)
    check_edges_exist([tokenize(prompt, tokenizer) for prompt in asked], study.sources, study.targets, warn=False)
    with attach(load_outline(study.model, revision=study.revision)) as ssm:
        check_fits(study, ssm)


def check_fits(study: Study, ssm: Attachment) -> None:
    """Raise what a sweep over this model would, as far as that takes no weights to know."""
    layers = ssm.layers_with(study.through)
    for size in study.windows or ():
        windows(layers, size, study.align)
    known = [name for name in study.features if name in study.groups or not ssm.layers]  # ranks take weights
    check_complete(feature_groups(ssm, known, sets=study.groups), layers)
    check_held(study.held, ssm)


def load_for(study: Study, peers: Ranks) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a study, where it says, and its tokenizer.

    Raises:
        StudyError: there is no such device.
        LoadError: as `load`.
    """
    return load(
        study.model,
        dtype=getattr(torch, study.dtype),
        device=_device(study, peers),
        device_map=study.device_map,
        revision=study.revision,
    )


def study_folder(folder: str | Path, model: str) -> Path:
    """Where in a folder of studies that of a model is: its name, with what a file name should not have replaced.

    Example:
        >>> study_folder("out", "state-spaces/mamba-130m-hf").name
        'state-spaces--mamba-130m-hf'
    """
    name = re.sub(r"[^\w.-]+", "--", model.strip("/.~"))
    if len(name) > 120:
        name = f"{name[-100:]}-{sha256(model.encode()).hexdigest()[:12]}"
    return Path(folder) / (name or "model")


def weights_hash(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of a state dict, sorted by name; the same on every device.

    Cost: every weight once through the CPU, one at a time, also those that are offloaded.
    """
    found = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        place, _, own = name.rpartition(".")
        if not tensor.is_meta:
            found.update(_bytes(tensor))
            continue
        with align_module_device(model.get_submodule(place)):
            found.update(_bytes(getattr(model.get_submodule(place), own)))
    return found.hexdigest()


def _versions() -> dict[str, str]:
    packages = {package.__name__: str(package.__version__) for package in (ssm_interp, torch, transformers)}
    return packages | {"python": platform.python_version()}


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _device(study: Study, peers: Ranks) -> torch.device:
    cuda = torch.cuda.is_available()
    device = torch.device(study.device if study.device != "auto" else "cuda" if cuda else "cpu")
    if device.type != "cuda":
        return device
    if not cuda or (device.index or 0) >= torch.cuda.device_count():
        raise StudyError(
            f"there is no device {study.device!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if device.index is None and peers.count > 1:
        return torch.device("cuda", peers.local % torch.cuda.device_count())
    return device


class StudyFacts:
    """The prompts of a study, and the rows left out.

    Raises:
        PromptError: as `run_study`.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.bad: list[PromptError] = []
        on_bad = self.bad.append if study.skip_bad else None
        prompts = load_prompts(study.facts, columns=study.columns, on_bad=on_bad)
        if study.ids is not None:
            prompts = with_ids(prompts, study.ids)
        if 0 < study.limit < len(prompts):
            chosen = random.Random(study.seed).sample(range(len(prompts)), study.limit)
            prompts = [prompts[index] for index in sorted(chosen)]
        check_distinct(prompts)
        self.prompts = prompts

    def askable(self, tokenizer: PreTrainedTokenizerBase, *, say: bool) -> list[Prompt]:
        """The prompts that this tokenizer can take: all of them, unless the study leaves out others."""
        good, rows = [], len(self.bad)
        for prompt in self.prompts:
            try:
                tokenize(prompt, tokenizer, full_answer=self.study.full_answer)
                good.append(prompt)
            except PromptError as error:
                if not self.study.skip_bad:
                    raise
                self.bad.append(error)
        if self.bad and say:
            logger.warning(
                "%s: left out %d rows that are no prompts and %d prompts that the tokenizer cannot take; first: %s",
                self.study.facts, rows, len(self.bad) - rows, self.bad[0],
            )  # fmt: skip
        if not good:
            raise PromptError(f"the tokenizer can take none of the prompts of {self.study.facts!r}: {self.bad[-1]}")
        return good


class _Job:
    """What there is to compute, in shards."""

    def __init__(
        self,
        study: Study,
        ssm: Attachment,
        tokenizer: PreTrainedTokenizerBase,
        asked: list[Prompt],
        features: FeatureGroups,
    ) -> None:
        self.study, self.ssm, self.tokenizer, self.features = study, ssm, tokenizer, features
        self.shards = [asked[start : start + study.shard_size] for start in range(0, len(asked), study.shard_size)]

    def rehearse(self) -> None:
        """Raise, before anything is written, what the edits that are held on would in a forward pass."""
        if self.study.held:
            batch = pad([tokenize(self.shards[0][0], self.tokenizer)]).to(device_of(self.ssm.model))
            next(full_forwards(self.ssm, batch, [CLEAN]))

    def run(self, store: Store, versions: dict[str, str], progress: Progress | None) -> None:
        """Compute and store the shards of this rank that are not there yet."""
        mine = range(store.ranks.index, len(self.shards), store.ranks.count)
        left = [number for number in mine if store.names[number] not in store.records]
        memory = self.study.max_memory or store.manifest["max_memory"]
        total, done = sum(len(self.shards[number]) for number in left), 0
        for number in left:
            prompts = self.shards[number]
            report = _in_prompts(progress, done, len(prompts), total) if progress else None
            result = self._sweep(prompts, memory, report)
            store.write(store.names[number], len(prompts), result, versions)
            done += len(prompts)
            if progress:
                progress(done, total)

    def _sweep(self, prompts: list[Prompt], max_memory: int, progress: Progress | None) -> FlowResult | None:
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
                    features=self.features,
                    through=study.through,
                    answered_only=not study.all_prompts,
                    full_answer=study.full_answer,
                    allow_no_edges=True,
                    batch_size=study.batch_size,
                    max_memory=max_memory,
                    progress=progress,
                    name=study.label,
                )
        except NothingAnswered:
            return None


def _in_prompts(progress: Callable[[int, int], None], before: int, prompts: int, total: int) -> Progress:
    """A sweep's progress, counted in answers, as that of a study. The answers that decide which prompts are kept come
    first and count as nothing: how many there will be is not known before."""

    def report(done: int, answers: int) -> None:
        knockouts = answers - prompts
        progress(before + (prompts * max(0, done - prompts) // knockouts if knockouts else 0), total)

    return report


def _tell_changed_versions(store: Store, versions: dict[str, str]) -> None:
    if store.ranks.index:
        return
    for name, now in versions.items():
        others = {record["versions"][name] for record in store.records.values()} - {now}
        if others:
            logger.warning(
                "%s has shards made with %s %s (now: %s), which may differ by rounding; the manifest says which",
                store.folder, name, ", ".join(sorted(others)), now,
            )  # fmt: skip


@contextmanager
def _noted(store: Store) -> Iterator[None]:
    """Add to an error on its way out what is stored, and how to go on."""
    try:
        yield
    except BaseException as error:
        advice = "the same command continues from there"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"free some space, then {advice}"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            advice = f"with a smaller max_memory or batch_size, which change no result, {advice}"
        error.add_note(
            f"Nothing that was stored is lost: {len(store.records)} of {len(store.names)} shards are in "
            f"{store.folder}; {advice}."
        )
        raise
