"""Edits that a study holds on: in the clean run and under every knockout alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ssm_interp import hooks
from ssm_interp.features import FeatureGroup, feature_groups
from ssm_interp.features.groups import ALL
from ssm_interp.hooks import Attachment, Intervention


def _group(value: str) -> str:
    if value != ALL:
        FeatureGroup.named(value)
    return value


Group = Annotated[str, AfterValidator(_group)]


class _Held(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    features: Group = Field(default=ALL, description="The feature group that it acts on.")
    layers: list[int] | None = Field(default=None, min_length=1, description="Where; absent: in every SSM layer.")


class ScaleFeatures(_Held):
    """What the features give to y is multiplied, at every position; see `ssm_interp.ScaleFeatures`."""

    kind: Literal["ScaleFeatures"] = Field(description="The intervention.")
    factor: float = Field(allow_inf_nan=False, description="The multiplier: 0 silences, 1 changes nothing.")


class SetDelta(_Held):
    """The step dt is set, at every position; see `ssm_interp.SetDelta`."""

    kind: Literal["SetDelta"] = Field(description="The intervention.")
    value: float = Field(ge=0, allow_inf_nan=False, description="The step: 0 neither writes nor decays.")


Held = Annotated[ScaleFeatures | SetDelta, Field(discriminator="kind")]


def held_on(held: Sequence[ScaleFeatures | SetDelta], ssm: Attachment) -> list[Intervention]:
    """The interventions on a model: one each, or one per layer where features are chosen.

    Raises:
        FeatureError: a group that a layer of this model has no features of.
        InterventionError: a layer that the model does not have.
    """
    return [one for edit in held for one in _interventions(edit, ssm)]


def _interventions(edit: ScaleFeatures | SetDelta, ssm: Attachment) -> list[Intervention]:
    number = edit.model_dump(include={"factor", "value"})
    kind: Any = getattr(hooks, edit.kind)
    features = feature_groups(ssm, [edit.features])[edit.features]
    if features is None:
        return [kind(**number, layers=edit.layers)]
    layers = edit.layers if edit.layers is not None else list(features)
    return [kind(**number, layers=layer, features=features.get(layer)) for layer in layers]
