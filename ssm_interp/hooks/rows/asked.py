"""What answers are asked of: a batch, as a model is called with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssm_interp.errors import HookError
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.intervention import HasRoles
from ssm_interp.hooks.rows.forwards import logits_of_text
from ssm_interp.hooks.rows.trial import obstacle
from ssm_interp.hooks.seam.inputs import as_inputs
from ssm_interp.hooks.seam.virtual import refuse_virtual_tokens


@dataclass(frozen=True)
class Asked:
    """What the answers are of.

    Attributes:
        ssm: the attached model.
        inputs: what it is called with, on its device, `input_ids` among it.
        mask: 0 at padding, `[b t]`, on the CPU.
        roles: the batch that knows where roles are; None: nothing does.
        targets: first tokens of the answers, `[b]`; None: the prompts have none.
        full_answers: all tokens of each answer, where those are asked for.
    """

    ssm: Attachment
    inputs: Mapping[str, Any]
    mask: Int[Tensor, "b t"]
    roles: HasRoles | None = None
    targets: Int[Tensor, " b"] | None = None
    full_answers: Sequence[Sequence[int]] | None = None

    @staticmethod
    def of(ssm: Attachment, batch: Any, *, full_answer: bool = False) -> Asked:
        """A batch as `answers` takes it; raises as that."""
        if not isinstance(ssm, Attachment):
            raise HookError(f"the model must be attached, ssm = attach(model); got {type(ssm).__name__}")
        with_roles = batch if isinstance(batch, HasRoles) else None
        if full_answer:
            if not hasattr(batch, "continued"):
                raise HookError("full answers are those of a Batch of prompts, as pad(...) gives it")
            with_roles = batch = batch.continued()
        refuse_virtual_tokens(ssm.model, "a row must be one whole text, column by column")
        device = device_of(ssm.model)
        given = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in as_inputs(batch, ssm.model).items()
        }
        if "input_ids" not in given:
            raise HookError(f"the inputs must have input_ids [b t]; these have {list(given)}")
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids)).long().cpu()
        targets = getattr(batch, "target_ids", None)
        return Asked(ssm, given, mask, with_roles, targets, batch.answers if full_answer else None)

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
