"""What answers are asked of: a batch, as a model is called with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssm_interp.arguments import Positions, as_positions
from ssm_interp.errors import HookError, InterventionError
from ssm_interp.hooks.active import edits_here
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.edits.masks import Columns, last_columns
from ssm_interp.hooks.intervention import HasRoles, Intervention
from ssm_interp.hooks.rows.forwards import logits_of_text
from ssm_interp.hooks.rows.trial import obstacle
from ssm_interp.hooks.seam.cache import CACHES
from ssm_interp.hooks.seam.inputs import as_inputs
from ssm_interp.hooks.seam.virtual import refuse_virtual_tokens

UNFIT = (*CACHES, "labels", "use_cache", "logits_to_keep", "inputs_embeds", "seq_idx", "cu_seqlens", "cu_seq_lens_q")


@dataclass(frozen=True)
class Asked:
    """What the answers are of.

    Attributes:
        ssm: the attached model.
        inputs: what it is called with, on its device, `input_ids` among it.
        mask: 0 at padding, `[b t]`, on the CPU.
        roles: the batch that knows where roles are; None: nothing does.
        answer_ids: first tokens of the answers, `[b]`; None: the prompts have none.
        full_answers: all tokens of each answer, where those are asked for: the inputs are then the prompts with their
            answers behind them.
        prompt: the columns of the prompts as they were given, without their answers.
        shift: how far they stand further right in the inputs, row by row.
    """

    ssm: Attachment
    inputs: Mapping[str, Any]
    mask: Int[Tensor, "b t"]
    roles: HasRoles | None = None
    answer_ids: Int[Tensor, " b"] | None = None
    full_answers: Sequence[Sequence[int]] | None = None
    prompt: Columns | None = None
    shift: Sequence[int] = ()

    @staticmethod
    def of(ssm: Attachment, batch: Any, *, full_answer: bool = False) -> Asked:
        """A batch as `answers` takes it; raises as that."""
        if not isinstance(ssm, Attachment):
            raise HookError(f"the model must be attached, ssm = attach(model); got {type(ssm).__name__}")
        given_batch = batch
        if full_answer:
            if not hasattr(batch, "continued"):
                raise HookError("full answers are those of a Batch of prompts, as pad(...) gives it")
            if any(edit.intervention.names_positions for edit in edits_here()):
                raise HookError(
                    "an edit is at work that names positions: with full answers they would count the answers' tokens "
                    "too; give the intervention as part of the variants"
                )
            batch = batch.continued()
        with_roles = batch if isinstance(batch, HasRoles) else None
        refuse_virtual_tokens(ssm.model, "a row must be one whole text, column by column")
        device = device_of(ssm.model)
        given = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in as_inputs(batch, ssm.model).items()
        }
        if unfit := [name for name in UNFIT if name in given]:
            raise HookError(f"the inputs hold {unfit[0]}, but a row must be one whole text, as ids; leave it out")
        if "input_ids" not in given:
            raise HookError(f"the inputs must have input_ids [b t]; these have {list(given)}")
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids)).long().cpu()
        answer_ids = getattr(batch, "answer_ids", None)
        asked = Asked(ssm, given, mask, with_roles, answer_ids)
        if not full_answer:
            return asked
        before = given_batch.attention_mask.long().cpu()
        behind = torch.tensor([len(answer) - 1 for answer in batch.answers])  # tokens of the answers, b
        shift: list[int] = (last_columns(mask) - behind - last_columns(before)).tolist()
        prompt = Columns(len(before), before.shape[1], before)
        return replace(asked, full_answers=batch.answers, prompt=prompt, shift=shift)

    def in_columns(self, intervention: Intervention) -> Intervention:
        """An intervention with columns of the inputs as its positions.

        Raises:
            InterventionError: a role that nothing knows; single edges under full answers.
        """
        if intervention.roles and self.roles is None:
            raise InterventionError(
                f"{intervention!r} names the role {intervention.roles[0]!r}, and only a batch of prompts knows where "
                "that is; give the batch, pad([tokenize(prompt, tokenizer), ...]), in place of ids"
            )
        if self.prompt is None:
            return intervention if self.roles is None else intervention.resolve(self.roles)
        if getattr(intervention, "edges", None) is not None:
            raise InterventionError(
                f"{intervention.kind}.edges names single edges, which full answers do not take; give sources and "
                "targets"
            )
        positions = {name: self._moved(getattr(intervention, name), name) for name in intervention.position_fields}
        return intervention.replace(**positions)

    def _moved(self, positions: Positions | None, name: str) -> list[list[int]] | None:
        """Positions of the prompts as they were given, and roles, as columns of the inputs."""
        named = as_positions(positions, name)
        if named is None or self.prompt is None or self.roles is None:
            return None
        roles = [position for position in named if isinstance(position, str)]
        columns = [position for position in named if not isinstance(position, str)]
        rows: list[list[int]] = [[] for _ in self.shift]
        if columns:
            mask = self.prompt.positions(columns, name)  # type: ignore[arg-type]
            rows = [
                [column + by for column in row.nonzero()[:, 0].tolist()]
                for row, by in zip(mask, self.shift, strict=True)
            ]
        for role in roles:
            rows = [[*row, *more] for row, more in zip(rows, self.roles.positions(role), strict=True)]
        return rows

    @cached_property
    def clean(self) -> Float[Tensor, "b v"]:
        """The logits of the clean run at each row's last token."""
        with torch.no_grad():
            return logits_of_text(self.ssm, self.inputs, self.mask)

    @cached_property
    def obstacle(self) -> str | None:
        """Why rows of one step cannot be exact, whatever the variants; None: they are."""
        return obstacle(self.ssm)


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: with its first weight that is not offloaded."""
    return next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
