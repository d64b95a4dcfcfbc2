"""Groups of features: a share of each layer's by the rank of a statistic, or sets that a user names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from itertools import product
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ssm_interp.arguments import as_features, as_list
from ssm_interp.errors import FeatureError, InterventionError
from ssm_interp.hooks import Attachment, HookPoints
from ssm_interp.words import ALL

SIDES = ("top", "bottom", "middle")
PARTS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4), "tenth": Fraction(1, 10)}
DECAY_NORM = "decay norm"
STATISTICS = (DECAY_NORM, "effective decay", "half-life", "mean distance", "mean dt", "dt variation")
"""The statistics of `spectrum`. The first depends on the weights alone, the others on what the model reads."""

NAMED = re.compile(rf"(?P<complement>all but )?(?P<side>{'|'.join(SIDES)}) (?P<part>\w+)(?: by (?P<statistic>.+))?")

Groups = Mapping[str, Mapping[int, Sequence[int] | Sequence[tuple[int, int]]] | None]
"""Name -> layer -> the features of the group; None: all features of every layer."""
PlainGroups = dict[str, dict[int, tuple[int, ...] | tuple[tuple[int, int], ...]] | None]


def check_attached(ssm: Any) -> None:
    """Refuse what is no attachment.

    Raises:
        FeatureError: a model, or anything else.
    """
    if not isinstance(ssm, Attachment):
        raise FeatureError(f"the model must be attached, ssm = attach(model); got {type(ssm).__name__}")


@dataclass(frozen=True)
class FeatureGroup:
    """A share of each layer's features, by rank.

    Attributes:
        side: "top", the features with the largest statistic; "bottom"; or "middle", of the thirds, what is in neither.
        part: how many of them: "half", "third", "quarter" or "tenth" of the layer's features, rounded down.
        complement: all the others instead.
        statistic: what ranks them: one of `STATISTICS`, or a name that a user gives to numbers of their own.

    Mamba Knockout (Endy et al., ACL 2025, section 5) ranks by `decay_norms` and speaks of knocking out the top third
    (context-dependent features: slow decay, long memory) or the bottom third; its released code knocks out all but the
    bottom third, and all but the top third. Both readings are groups here.

    Raises:
        FeatureError: another side or part.

    Example:
        >>> FeatureGroup("bottom", "third", complement=True).name
        'all but bottom third'
        >>> FeatureGroup("top", "tenth", statistic="half-life").name
        'top tenth by half-life'
    """

    side: Literal["top", "bottom", "middle"]
    part: str = "third"
    complement: bool = False
    statistic: str = DECAY_NORM

    def __post_init__(self) -> None:
        if self.side not in SIDES or self.part not in list(PARTS) or (self.side == "middle" and self.part != "third"):
            raise FeatureError(
                f"there is no group {self.side!r} {self.part!r}: it is the top or the bottom {', '.join(PARTS)}, "
                "or the middle third"
            )

    @property
    def name(self) -> str:
        by = "" if self.statistic == DECAY_NORM else f" by {self.statistic}"
        return f"{'all but ' if self.complement else ''}{self.side} {self.part}{by}"

    @staticmethod
    def named(name: str, statistics: Iterable[str] = STATISTICS) -> FeatureGroup:
        """The group of a name such as "top third", "all but bottom third" or "top tenth by half-life".

        Args:
            name: without "by" the statistic is the decay norm.
            statistics: those that there are.

        Raises:
            FeatureError: no such group or statistic; the message gives the nearest names.
        """
        if not isinstance(name, str):
            raise FeatureError(f"groups are asked for by name, such as {ALL!r} or 'top third', got {name!r:.200}")
        words = NAMED.fullmatch(name)
        by = (words["statistic"] or DECAY_NORM) if words else DECAY_NORM
        if by not in (ranks := dict.fromkeys([DECAY_NORM, *statistics])):
            raise FeatureError(f"{name!r}: {unknown_statistic(by, ranks)}")
        known = {group.name: group for group in _every_group(by)}
        if group := known.get(name.removesuffix(f" by {DECAY_NORM}")):
            return group
        raise FeatureError(
            f"there is no feature group {name!r}: {_nearest(name, [ALL, *known])}a group is {ALL!r}, the top or bottom "
            'half, third, quarter or tenth, or the middle third, such as "top third" (by decay norm) or "top third by '
            'half-life", or all but that, such as "all but top third"'
        )

    def of(self, statistic: Mapping[int, Float[Tensor, " h"]]) -> dict[int, tuple[int, ...]]:
        """The group's features in each layer.

        Args:
            statistic: per layer a number per feature. Of equal ones the feature with the lower index ranks lower.

        Raises:
            FeatureError: a statistic that is not finite; a layer with too few features for the group to have one.

        Example:
            >>> FeatureGroup("top", "half").of({0: torch.tensor([0.1, 0.9, 0.5, 0.2])})
            {0: (1, 2)}
        """
        if not isinstance(statistic, Mapping) or not all(
            getattr(values, "ndim", 0) == 1 for values in statistic.values()
        ):
            raise FeatureError(f"a statistic is layer -> a number per feature [h], got {statistic!r:.200}")
        return {layer: self._of_layer(layer, torch.as_tensor(values)) for layer, values in statistic.items()}

    def _of_layer(self, layer: int, values: Tensor) -> tuple[int, ...]:
        if bad := (~values.isfinite()).nonzero()[:, 0].tolist():
            raise FeatureError(
                f"the {self.statistic} of layer {layer} is not finite for {len(bad)} of its {len(values)} features, "
                f"the first of them {bad[0]}; they have no rank"
            )
        count = int(len(values) * PARTS[self.part])
        order = values.argsort(stable=True).tolist()
        end = len(order) - count
        chosen = {"top": order[end:], "bottom": order[:count], "middle": order[count:end]}[self.side]
        members = sorted(set(order) - set(chosen)) if self.complement else sorted(chosen)
        if not members:
            raise FeatureError(f"layer {layer} has {len(values)} features, of which the group {self.name!r} has none")
        return tuple(members)


def decay_norms(ssm: Attachment) -> dict[int, Float[Tensor, " h"]]:
    """How much of the state a unit step keeps, `exp(-exp(A_log))`, per layer and feature; large means a long memory.

    The L1 norm over the state dimensions in Mamba-1, one number per channel; the decay itself in Mamba-2, one per
    head. It depends on the weights alone, not on the data.

    Source: Mamba Knockout (Endy et al., ACL 2025), section 5.

    Example:
        >>> {layer: norms.median() for layer, norms in decay_norms(ssm).items()}      # doctest: +SKIP
    """
    return {layer: torch.exp(-torch.exp(A_log.double())).sum(1) for layer, A_log in _log_rates(ssm).items()}


def decay_rates(ssm: Attachment) -> dict[int, Float[Tensor, "h n"]]:
    """The continuous decay `A = -exp(A_log)` per layer, `[h, n]` (Mamba-2: `[h, 1]`), in float64 on the CPU.

    Rounded to fp32 on the way, as every host does, so that it is what the recurrence has.

    Example:
        >>> decay_rates(ssm)[0].shape                                                 # doctest: +SKIP
    """
    return {layer: -torch.exp(A_log.float()).double() for layer, A_log in _log_rates(ssm).items()}


def _log_rates(ssm: Attachment) -> dict[int, Float[Tensor, "h n"]]:
    """A_log on the CPU, [h n]."""
    check_attached(ssm)
    rates = {}
    for layer, mixer in ssm.mixers.items():
        module: Any = mixer
        with align_module_device(module):  # an offloaded layer has its weights elsewhere
            rates[layer] = module.A_log.detach().cpu().reshape(ssm.layers[layer].heads, -1)
    return rates


def feature_groups(
    ssm: Attachment,
    names: Sequence[str],
    *,
    statistics: Mapping[str, Mapping[int, Any]] | None = None,
    sets: Groups | None = None,
) -> PlainGroups:
    """Groups of a model's features by their names, as `flow.sweep(features=...)` takes them.

    Args:
        ssm: an attached model.
        names: "all" (no restriction); shares by rank, see `FeatureGroup`, such as "top third" (by decay norm),
            "all but bottom third", "top tenth by half-life"; names of `sets`.
        statistics: name -> layer -> a number per feature, for the shares by rank: those of `spectrum(ssm, inputs)`
            (its attribute `statistics`), or any others. The decay norm need not be given.
        sets: name -> layer -> features, heads (in Mamba-1 channels) or (head, state dimension) pairs, of a user's own.

    Returns:
        Name -> layer -> features, in the order of `names`; None for "all".

    Raises:
        FeatureError: an unknown name or statistic (with the nearest ones), one that depends on data and was not given;
            a statistic with NaN, of another length, or of layers that the model does not have; a set that is empty or
            names features that a layer does not have; groups other than "all" in a model without SSM layers.

    Example:
        >>> groups = feature_groups(ssm, ["all", "top third"])                                    # doctest: +SKIP
        >>> sweep(ssm, tokenizer, prompts, features=groups)                                       # doctest: +SKIP
        >>> measured = spectrum(ssm, tokenizer("To be or not to be", return_tensors="pt"))        # doctest: +SKIP
        >>> feature_groups(ssm, ["top third by half-life"], statistics=measured.statistics)       # doctest: +SKIP
        >>> feature_groups(ssm, ["induction"], sets={"induction": {3: [0, 7]}})                   # doctest: +SKIP
    """
    check_attached(ssm)
    names, sets = as_list(names), {} if sets is None else sets
    statistics = {} if statistics is None else statistics
    for what, given in (("statistics", statistics), ("sets", sets)):
        if not isinstance(given, Mapping) or not all(isinstance(layers, Mapping | None) for layers in given.values()):
            raise FeatureError(f"{what} must be name -> layer -> one entry per feature, got {given!r:.200}")
    known = {**dict.fromkeys(STATISTICS), **statistics}
    ranked = {name: FeatureGroup.named(name, known) for name in names if name not in [ALL, *sets]}
    if not ssm.layers and (ranked or set(names) & set(sets)):
        raise FeatureError(
            f"{type(ssm.model).__name__} has no SSM layers, whose features groups are of; its only group is {ALL!r}"
        )
    wanted = {group.statistic for group in ranked.values()}
    numbers = {name: _statistic(ssm, name, known[name]) for name in wanted}
    members: PlainGroups = {name: dict(group.of(numbers[group.statistic])) for name, group in ranked.items()}
    members |= check_groups(ssm, {name: sets.get(name) for name in names if name not in ranked})
    return {name: members[name] for name in names}


def check_groups(ssm: Attachment, groups: Groups, *, disjoint: bool = False) -> PlainGroups:
    """Refuse groups that this model does not have.

    Args:
        ssm: an attached model.
        groups: name -> layer -> features; None for all features.
        disjoint: whether a feature may be in one group alone, as where parts by group are to add up to a whole.

    Returns:
        The same groups in tuples of Python's integers, whatever array or sequence they were given in.

    Raises:
        FeatureError: a group without layers, or without features in one; a layer, head or state dimension that the
            model does not have; a feature that is named twice in a group, or (`disjoint`) in two of them.

    Example:
        >>> check_groups(ssm, {"a": {0: [0, 1]}, "b": {0: [(2, 0)]}}, disjoint=True)              # doctest: +SKIP
    """
    check_attached(ssm)
    if not isinstance(groups, Mapping):
        raise FeatureError(
            f"feature groups are name -> layer -> features, as feature_groups gives them, got {type(groups).__name__}"
        )
    tuples: PlainGroups = {}
    for name, group in groups.items():
        if not isinstance(group, Mapping | None):
            raise FeatureError(
                f"the feature group {name!r} must be layer -> features, or None for all, got {type(group).__name__}; "
                "feature_groups(ssm, [name]) makes one of a name"
            )
        if group is not None and not group:
            raise FeatureError(f"the feature group {name!r} names no layer; give layer -> features, or None for all")
        checked = [(layer, _of_layer(ssm, name, layer, features)) for layer, features in (group or {}).items()]
        tuples[name] = None if group is None else dict(sorted(checked))
    if disjoint:
        _check_disjoint(ssm, tuples)
    return tuples


def _of_layer(ssm: Attachment, name: str, layer: Any, features: Any) -> tuple[int, ...] | tuple[tuple[int, int], ...]:
    where = f"the feature group {name!r}"
    if layer not in ssm.layers:
        raise FeatureError(f"{where} names layer {layer!r}; the SSM layers of this model are {list(ssm.layers)}")
    try:
        members = as_features(features, where)
    except InterventionError:
        members = None
    if members is None:
        raise FeatureError(
            f"{where} must name heads or (head, state dimension) pairs, at least one, in layer {layer}, or leave the "
            f"layer out; got {features!r:.200}"
        )
    points = ssm.layers[layer]
    for feature in members:
        head, dimension = feature if isinstance(feature, tuple) else (feature, 0)
        if not (0 <= head < points.heads and 0 <= dimension < points.state_size):
            raise FeatureError(
                f"{where}: layer {layer} has no feature {feature!r}; it has heads 0 to {points.heads - 1} and state "
                f"dimensions 0 to {points.state_size - 1}"
            )
    if len(twice := np.argwhere(_times(points, members) > 1)):
        raise FeatureError(
            f"{where} names head {twice[0][0]} of layer {layer}, with state dimension {twice[0][1]}, twice; name each "
            "feature once"
        )
    return members


def _check_disjoint(ssm: Attachment, groups: Groups) -> None:
    for layer, points in ssm.layers.items():
        owners: dict[str, NDArray[np.int64]] = {}
        for name, group in groups.items():
            if group is not None and layer not in group:
                continue
            times = _times(points, range(points.heads) if group is None else group[layer])
            for other, others in owners.items():
                if len(both := np.argwhere((times > 0) & (others > 0))):
                    raise FeatureError(
                        f"the feature groups {other!r} and {name!r} overlap: both have head {both[0][0]} of layer "
                        f"{layer}, with state dimension {both[0][1]}; where parts by group are to add up to a whole, "
                        "a feature is in one group alone"
                    )
            owners[name] = times


def _times(points: HookPoints, features: Sequence[Any]) -> NDArray[np.int64]:
    """How often some features name each state dimension of each head, `[h, n]`; a head has all of its own."""
    times = np.zeros((points.heads, points.state_size), dtype=np.int64)
    for feature in features:
        times[feature] += 1
    return times


def _statistic(ssm: Attachment, name: str, given: Mapping[int, Any] | None) -> dict[int, Tensor]:
    """A number per feature of each layer, in float64."""
    if given is None:
        if name == DECAY_NORM:
            return decay_norms(ssm)
        raise FeatureError(
            f"the {name} depends on what the model reads; give statistics=spectrum(ssm, inputs).statistics"
        )
    if not given:
        raise FeatureError(f"the statistic {name!r} has no layers; give layer -> a number per feature")
    checked = {}
    for layer, numbers in given.items():
        if layer not in ssm.layers:
            raise FeatureError(
                f"the statistic {name!r} is given for layer {layer!r}; the SSM layers of this model are "
                f"{list(ssm.layers)}"
            )
        values, heads = _numbers(numbers), ssm.layers[layer].heads
        if values is None or values.shape != (heads,):
            raise FeatureError(
                f"the statistic {name!r} of layer {layer} must be a number per feature, [{heads}], got "
                f"{numbers if values is None else list(values.shape)}"
            )
        checked[layer] = values
    return checked


def _numbers(given: Any) -> Tensor | None:
    """As a tensor in float64 on the CPU; None for what is no numbers."""
    if isinstance(given, Tensor):
        return given.detach().double().cpu()
    try:
        return torch.from_numpy(np.array(given, dtype=np.float64))
    except (TypeError, ValueError):
        return None


def unknown_statistic(name: str, known: Iterable[str]) -> str:
    """What to say of a statistic that is none of those known."""
    return f"there is no statistic {name!r}: {_nearest(name, known)}there are {', '.join(known)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=2, cutoff=0.4)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def _every_group(statistic: str) -> list[FeatureGroup]:
    shares = [("middle", "third"), *product(("top", "bottom"), PARTS)]
    return [FeatureGroup(cast(Any, side), part, other, statistic) for side, part in shares for other in (False, True)]
