"""The prompts that a study asks: read, drawn, and taken by the model's tokenizer."""

from __future__ import annotations

import logging
import random

from transformers import PreTrainedTokenizerBase

from ssm_interp.errors import PromptError
from ssm_interp.experiments import Study
from ssm_interp.flow.sweep import check_distinct
from ssm_interp.prompts import Prompt, load_prompts, tokenize, with_ids

logger = logging.getLogger(__name__)


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
