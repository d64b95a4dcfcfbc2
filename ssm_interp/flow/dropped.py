"""The prompts that a study leaves out, and what the model answered instead."""

from __future__ import annotations

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from ssm_interp.experiments import Study
from ssm_interp.flow.result import FlowResult
from ssm_interp.flow.study_facts import StudyFacts
from ssm_interp.flow.study_held import held_on, measured
from ssm_interp.flow.study_job import load_for
from ssm_interp.hooks import Attachment, attach
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.models import load_tokenizer
from ssm_interp.plots import token_label
from ssm_interp.prompts import TokenizedPrompt, pad, tokenize

COLUMNS = ["model", "prompt_id", "text", "answer", "answered"]


def dropped_prompts(study: Study, result: FlowResult) -> pd.DataFrame:
    """The prompts of a study that are not in its table, since the model answers something else.

    Args:
        study: as it was run.
        result: what it found.

    Returns:
        A row per prompt: `model`; `prompt_id`; `text`; `answer`, what was asked for; `answered`, the model's most
        likely token in its place (of a full answer, each of them after the right ones).

    Cost: nothing where no prompt was left out; else the model is loaded again, for one forward of those prompts.

    Example:
        >>> dropped_prompts(study, run_study(study, "studies"))[["prompt_id", "answered"]]       # doctest: +SKIP
    """
    if result.runs[0].kept == result.runs[0].asked:
        return pd.DataFrame(columns=COLUMNS)
    asked = StudyFacts(study).askable(load_tokenizer(study.model, revision=study.revision), say=False)
    kept = set(result.frame["prompt_id"])
    model, tokenizer = load_for(study)
    rows = [tokenize(prompt, tokenizer) for prompt in asked]
    left_out = [row for row in rows if (row.prompt.id or row.prompt.text) not in kept]
    with attach(model) as ssm:
        statistics = measured(ssm, rows, [edit.features for edit in study.held])
        with ssm.edit(*held_on(study.held, ssm, statistics)):
            answers = _answers(ssm, tokenizer, left_out, study)
    columns = [
        (study.label, row.prompt.id or row.prompt.text, row.prompt.text, row.asked, answer)
        for row, answer in zip(left_out, answers, strict=True)
    ]
    return pd.DataFrame(columns, columns=COLUMNS)


@torch.no_grad()
def _answers(
    ssm: Attachment, tokenizer: PreTrainedTokenizerBase, rows: list[TokenizedPrompt], study: Study
) -> list[str]:
    """The most likely tokens in the place of each answer, readable."""
    answers = []
    for start in range(0, len(rows), study.batch_size):
        part = rows[start : start + study.batch_size]
        asked = [len(row.answer_ids) if study.full_answer else 1 for row in part]
        batch = pad([row.continued() if study.full_answer else row for row in part]).to(device_of(ssm.model))
        likely = ssm.run(dict(batch), use_cache=False).logits[:, -max(asked) :].argmax(-1).tolist()
        answers += [token_label(str(tokenizer.decode(ids[-count:]))) for ids, count in zip(likely, asked, strict=True)]
    return answers
