"""Feature groups of a study, and edits that it holds on: in the clean run and under every knockout alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ssm_interp import hooks
from ssm_interp.errors import FeatureError
from ssm_interp.features import STATISTICS, FeatureGroup, feature_groups, spectrum
from ssm_interp.features.groups import ALL, DECAY_NORM
from ssm_interp.hooks import Attachment, Intervention
from ssm_interp.hooks.asked import device_of
from ssm_interp.prompts import TokenizedPrompt, pad


def _group(value: str, info: Any) -> str:
    own = info.data.get("groups")  # absent where they are wrong themselves
    if value == ALL or own is None or value in own:
        return value
    try:
        FeatureGroup.named(value)
    except FeatureError as error:
        raise ValueError(f"{error}, or one of its own groups: {', '.join(own)}" if own else str(error)) from None
    return value


def _from_text(value: Any) -> Any:
    """TOML and JSON have text as keys alone, and no tuples."""
    if not isinstance(value, Mapping):
        return value
    return {
        int(layer) if isinstance(layer, str) and layer.isdecimal() and layer == str(int(layer)) else layer: [
            tuple(one) if isinstance(one, list) else one for one in features
        ]
        if isinstance(features, list | tuple)
        else features
        for layer, features in value.items()
    }


def _sets(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if name == ALL or _is_share(name):
            raise ValueError(f"{name!r} is the name of a group by rank; give yours another name")
    return value


def _is_share(name: str) -> bool:
    try:
        return bool(FeatureGroup.named(name))
    except FeatureError:
        return False


def _all_used(value: Any, info: Any) -> Any:
    asked = (value,) if isinstance(value, str) else value
    if unused := [name for name in info.data.get("groups", ()) if name not in asked]:
        raise ValueError(f"the group {unused[0]!r} is given and not used: name it in features, or leave it out")
    return value


def _once(value: list[int] | None) -> list[int] | None:
    if twice := [layer for layer, count in Counter(value).items() if count > 1]:
        raise ValueError(f"layer {twice[0]} occurs more than once; name each layer once")
    return value


Some = Field(min_length=1)
Heads = Annotated[list[int], Some]
Pairs = Annotated[list[tuple[int, int]], Some]
Set = Annotated[dict[int, Heads | Pairs], BeforeValidator(_from_text), Some]
Sets = Annotated[dict[str, Set], AfterValidator(_sets)]
Group = Annotated[str, AfterValidator(_group)]
"""The name of a group by rank, or of one of the sets in the field `groups`, which stands before it."""

AllUsed = AfterValidator(_all_used)
"""Of one group, or several: all sets in the field `groups` are among them."""

Statistics = Mapping[str, Mapping[int, Any]]
OWN_GROUPS = (
    "Feature groups of your own: name -> layer -> heads (in Mamba-1 channels), or [head, state dimension] pairs."
)


class _Held(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    groups: Sets = Field(default={}, description=OWN_GROUPS)
    features: Annotated[Group, AllUsed] = Field(
        default=ALL, validate_default=True, description="The feature group that it acts on."
    )
    layers: Annotated[list[int] | None, AfterValidator(_once)] = Field(
        default=None, min_length=1, description="Where; absent: in every SSM layer."
    )


class ScaleFeatures(_Held):
    """What the features give to y is multiplied, at every position; see `ssm_interp.ScaleFeatures`."""

    kind: Literal["ScaleFeatures"] = Field(description="The intervention.")
    factor: float = Field(allow_inf_nan=False, description="The multiplier: 0 silences, 1 changes nothing.")


class SetDelta(_Held):
    """The step dt is set, at every position; see `ssm_interp.SetDelta`."""

    kind: Literal["SetDelta"] = Field(description="The intervention.")
    value: float = Field(ge=0, allow_inf_nan=False, description="The step: 0 neither writes nor decays.")


Held = Annotated[ScaleFeatures | SetDelta, Field(discriminator="kind")]


def measured(ssm: Attachment, asked: Sequence[TokenizedPrompt], names: Iterable[str]) -> Statistics:
    """The statistics that groups of these names rank features by, on all prompts that a study asks.

    They are of the model as it is, without the edits that are held on, and fixed by its weights and the prompts.
    """
    ranked = {FeatureGroup.named(name).statistic for name in names if _is_share(name)}
    wanted = [one for one in STATISTICS if one in ranked and one != DECAY_NORM]
    if not wanted or not ssm.layers:
        return {}
    return spectrum(ssm, pad(asked).to(device_of(ssm.model)), statistics=wanted).statistics


def held_on(held: Sequence[ScaleFeatures | SetDelta], ssm: Attachment, statistics: Statistics) -> list[Intervention]:
    """The interventions on a model: one each, or one per layer where features are chosen.

    Args:
        statistics: as `measured` gives them.

    Raises:
        FeatureError: a group that a layer of this model has no features of.
        InterventionError: a layer that the model does not have.
    """
    return [one for edit in held for one in _interventions(edit, ssm, statistics)]


def check_held(held: Sequence[ScaleFeatures | SetDelta], ssm: Attachment) -> None:
    """Raise what `held_on` and `ssm.edit` would, as far as that takes no weights to know: ranks do."""
    for intervention in held_on([edit for edit in held if not _is_share(edit.features)], ssm, {}):
        ssm.check(intervention)


def _interventions(edit: ScaleFeatures | SetDelta, ssm: Attachment, statistics: Statistics) -> list[Intervention]:
    number = edit.model_dump(include={"factor", "value"})
    kind: Any = getattr(hooks, edit.kind)
    features = feature_groups(ssm, [edit.features], statistics=statistics, sets=edit.groups)[edit.features]
    if features is None:
        return [kind(**number, layers=edit.layers)]
    layers = edit.layers if edit.layers is not None else list(features)
    for layer in layers:
        if layer in ssm.layers and layer not in features:
            raise FeatureError(f"{edit.kind}: the feature group {edit.features!r} names no features for layer {layer}")
    return [kind(**number, layers=layer, features=features.get(layer)) for layer in layers]
