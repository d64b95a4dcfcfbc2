"""What single values of a declaration may be. What knows it (roles, feature groups, devices) is loaded to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import AfterValidator, BeforeValidator, Field

from ssm_interp.words import ALL, ROLES

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Align = Literal["left", "centre"]
Interval = Literal["bootstrap", "t"]


def _role(value: Any) -> Any:
    if isinstance(value, str) and value not in ROLES:
        from ssm_interp.prompts import check_role

        check_role(value)
    return value


def _role_or_position(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, bool):
        raise ValueError(f"it is a role, or a position counted from 0, not {str(value).lower()}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"there is no position {value}: positions in a prompt count from 0")
    return _role(value)


def _device(value: str) -> str:
    if value != "auto":
        import torch

        try:
            torch.device(value)
        except RuntimeError:
            raise ValueError(f"there is no device {value!r}; give auto, cpu, cuda, cuda:1, ...") from None
    return value


def _columns(value: Any) -> Any:
    """FIELD=COLUMN pairs, of a command line, as a mapping."""
    if isinstance(value, Mapping):
        return value
    value = value if isinstance(value, list | tuple) else [value]
    if wrong := [pair for pair in value if "=" not in str(pair)]:
        raise ValueError(f"{wrong[0]}: give FIELD=COLUMN, such as text=question")
    return {field: column for field, _, column in (pair.partition("=") for pair in value)}


def _fields(value: dict[str, str]) -> dict[str, str]:
    if value:
        from ssm_interp.prompts.facts_file import check_columns

        check_columns(value)
    return value


def is_share(name: Any) -> bool:
    """Whether a feature group is one by rank, such as "top third"."""
    from ssm_interp.features import FeatureError, FeatureGroup

    try:
        return bool(FeatureGroup.named(name))
    except FeatureError:
        return False


def check_share(value: str) -> str:
    """Raise FeatureError, with the nearest valid name, if there is no such feature group by rank."""
    if value != ALL:
        from ssm_interp.features import FeatureGroup

        FeatureGroup.named(value)
    return value


def _group(value: str, info: Any) -> str:
    own = (info.data or {}).get("groups")  # absent where they are wrong themselves
    if own is None or value in own:
        return value
    try:
        return check_share(value)
    except ValueError as error:
        raise ValueError(f"{error}, or one of its own groups: {', '.join(own)}" if own else str(error)) from None


def _from_text(value: Any) -> Any:
    """TOML and JSON have text as keys alone, and no tuples."""
    if not isinstance(value, Mapping):
        return value
    return {
        int(layer) if isinstance(layer, str) and layer.isdecimal() and layer == str(int(layer)) else layer: [
            tuple(feature) if isinstance(feature, list) else feature for feature in features
        ]
        if isinstance(features, list | tuple)
        else features
        for layer, features in value.items()
    }


def _own_names(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if name == ALL or is_share(name):
            raise ValueError(f"{name!r} is the name of a group by rank; give yours another name")
    return value


def _all_used(value: Any, info: Any) -> Any:
    if unused := [name for name in (info.data or {}).get("groups", ()) if name not in value]:
        raise ValueError(f"the group {unused[0]!r} is given and not used: name it in features, or leave it out")
    return value


def _not_of_conv(value: Any, info: Any) -> Any:
    groups = [name for name in (info.data or {}).get("features", ()) if name != ALL]
    if groups and "conv" in (value or ()):
        raise ValueError(
            f"the convolution feeds all features together, so a knockout through it takes no group such as "
            f"{groups[0]!r}; leave out the features, or conv"
        )
    return value


def _statistic(value: str) -> str:
    from ssm_interp.features import STATISTICS
    from ssm_interp.features.groups import unknown_statistic

    if value not in STATISTICS:
        raise ValueError(unknown_statistic(value, STATISTICS))
    return value


Name = Annotated[str, Field(min_length=1)]
Role = Annotated[str, AfterValidator(_role)]
Source = Annotated[str | int, BeforeValidator(_role_or_position)]
"""A role, or a position counted from 0."""
Device = Annotated[str, AfterValidator(_device)]
Share = Annotated[str, AfterValidator(check_share)]
"""A feature group by rank, or "all"."""
Group = Annotated[str, AfterValidator(_group)]
"""The same, or one of those in the field `groups`, which stands before it."""
Statistic = Annotated[str, AfterValidator(_statistic)]
AllUsed = AfterValidator(_all_used)
"""Of feature groups: all of those in the field `groups` are among them."""
NotOfConv = AfterValidator(_not_of_conv)
"""Of streams: where conv is one of them, the field `features`, which stands before, has no group but "all"."""

Heads = Annotated[list[int], Field(min_length=1)]
Pairs = Annotated[list[tuple[int, int]], Field(min_length=1)]
OwnGroup = Annotated[dict[int, Heads | Pairs], BeforeValidator(_from_text), Field(min_length=1)]
OwnGroups = Annotated[dict[str, OwnGroup], AfterValidator(_own_names), Parameter(parse=False)]

if TYPE_CHECKING:
    Columns = dict[str, str]
else:  # a command line gives pairs, which it takes for a list; what is kept is the mapping
    Columns = Annotated[tuple[str, ...] | dict[str, str], BeforeValidator(_columns), AfterValidator(_fields)]
