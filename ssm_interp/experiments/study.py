"""A study: every option of one model's sweep over a file of facts, as data that can be stored and compared."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from ssm_interp.experiments.declared import KeyedError, Several, option
from ssm_interp.experiments.held import Held, under
from ssm_interp.experiments.parts import AsJob, InShards, Measured, Prompts, Sweep, Weights, check_measured
from ssm_interp.experiments.values import Name

WITHOUT_EFFECT = frozenset(AsJob.model_fields)
"""Options that change how a table is computed and not what is in it, beyond rounding."""


class Study(InShards, Measured, Sweep, Prompts, Weights):
    """One model asked for facts, under knockouts in every layer window; `run_study` runs it.

    Raises:
        pydantic.ValidationError: an unknown or a wrong option; `explain` says in a line what is wrong.

    Example:
        >>> Study(model="tiny-mamba2", windows=[1, 3], limit=64).model_dump_json(include={"model", "windows"})
        '{"windows":[1,3],"model":"tiny-mamba2"}'
    """

    model: Name = option(..., "Embedded name, local folder or hub id.")
    held: Several[Held] = option(
        (), "Edits held on in the clean run and under every knockout, which each take a full forward then."
    )

    @model_validator(mode="after")
    def _fits_full_answers(self) -> Study:
        check_measured(self.metric, self.full_answer, ("metric",))
        for number, edit in enumerate(self.held):
            if self.full_answer and edit.names_positions:
                message = "it names positions, which with full answers would count the answers' tokens; leave one out"
                raise KeyedError(("held", number), message)
        return self

    @property
    def label(self) -> str:
        """What tables and pictures call the model: its name, and what is held on in it."""
        return ", ".join([self.model, *under(self.held)])

    def options(self) -> dict[str, Any]:
        """What the table depends on, as JSON values."""
        return self.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))
