"""Groups of features, ranked within each layer by a statistic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Literal

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor

from ssm_interp.hooks import Attachment

ALL = "all"
PARTS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4), "tenth": Fraction(1, 10)}


class FeatureError(ValueError):
    """A group of features that does not exist, or has no features."""


@dataclass(frozen=True)
class FeatureGroup:
    """A share of each layer's features, by rank.

    Attributes:
        side: "top", the features with the largest statistic, or "bottom".
        part: how many of them: "half", "third", "quarter" or "tenth" of the layer's features, rounded down.
        complement: all the others instead.

    Mamba Knockout (Endy et al., ACL 2025, section 5) ranks by `decay_norms` and speaks of knocking out the top third
    (context-dependent features: slow decay, long memory) or the bottom third; its released code knocks out all but the
    bottom third, and all but the top third. Both readings are groups here.

    Raises:
        FeatureError: another side or part.

    Example:
        >>> FeatureGroup("bottom", "third", complement=True).name
        'all but bottom third'
    """

    side: Literal["top", "bottom"]
    part: str = "third"
    complement: bool = False

    def __post_init__(self) -> None:
        if self.side not in ("top", "bottom") or self.part not in PARTS:
            raise FeatureError(
                f"there is no group {self.side!r} {self.part!r}: it is the top or the bottom {', '.join(PARTS)}"
            )

    @property
    def name(self) -> str:
        return f"{'all but ' if self.complement else ''}{self.side} {self.part}"

    @staticmethod
    def named(name: str) -> FeatureGroup:
        """The group of a name such as "top third" or "all but bottom third".

        Raises:
            FeatureError: no such group; the message gives the nearest names.
        """
        known = {group.name: group for group in _every_group()}
        if name not in known:
            near = get_close_matches(name, [ALL, *known], n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise FeatureError(
                f"there is no feature group {name!r}: {hint}a group is {ALL!r}, or the top or bottom half, third, "
                'quarter or tenth, such as "top third", or all but that, such as "all but top third"'
            )
        return known[name]

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
        return {layer: self._of_layer(layer, values) for layer, values in statistic.items()}

    def _of_layer(self, layer: int, values: Tensor) -> tuple[int, ...]:
        if not values.isfinite().all():
            raise FeatureError(f"the statistic of layer {layer} is not finite for some features; they have no rank")
        count = int(len(values) * PARTS[self.part])
        order = values.argsort(stable=True).tolist()
        chosen = order[len(order) - count :] if self.side == "top" else order[:count]
        found = sorted(set(order) - set(chosen)) if self.complement else sorted(chosen)
        if not found:
            raise FeatureError(f"layer {layer} has {len(values)} features, of which the group {self.name!r} has none")
        return tuple(found)


def decay_norms(ssm: Attachment) -> dict[int, Float[Tensor, " h"]]:
    """How much of the state a unit step keeps, `exp(-exp(A_log))`, per layer and feature; large means a long memory.

    The L1 norm over the state dimensions in Mamba-1, one number per channel; the decay itself in Mamba-2, one per
    head. It depends on the weights alone, not on the data.

    Source: Mamba Knockout (Endy et al., ACL 2025), section 5.

    Example:
        >>> {layer: norms.median() for layer, norms in decay_norms(ssm).items()}      # doctest: +SKIP
    """
    return {layer: _norms(mixer, ssm.layers[layer].heads) for layer, mixer in ssm.mixers.items()}


def feature_groups(ssm: Attachment, names: Sequence[str]) -> dict[str, dict[int, tuple[int, ...]] | None]:
    """Groups by decay norm, as `flow.sweep(features=...)` takes them; "all" is no restriction.

    Raises:
        FeatureError: an unknown name; groups other than "all" in a model without SSM layers.

    Example:
        >>> sweep(ssm, tokenizer, prompts, features=feature_groups(ssm, ["all", "top third"]))      # doctest: +SKIP
    """
    names = [names] if isinstance(names, str) else names
    groups = {name: None if name == ALL else FeatureGroup.named(name) for name in names}
    if not ssm.layers and any(groups.values()):
        raise FeatureError(
            f"{type(ssm.model).__name__} has no SSM layers, whose decay ranks features; its only group is {ALL!r}"
        )
    norms = decay_norms(ssm)
    return {name: None if group is None else group.of(norms) for name, group in groups.items()}


@torch.no_grad()
def _norms(mixer: Any, heads: int) -> Tensor:
    with align_module_device(mixer):  # an offloaded layer has its weights elsewhere
        decay = torch.exp(-torch.exp(mixer.A_log.double().cpu()))
    return decay.reshape(heads, -1).sum(1)


def _every_group() -> list[FeatureGroup]:
    sides: tuple[Literal["top", "bottom"], ...] = ("top", "bottom")
    return [FeatureGroup(side, part, other) for side in sides for part in PARTS for other in (False, True)]
