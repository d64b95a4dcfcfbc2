"""Edits that a study holds on, as interventions on its model; and the statistics that its feature groups rank by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssm_interp.arguments import as_list
from ssm_interp.errors import FeatureError
from ssm_interp.experiments.values import is_share
from ssm_interp.features import STATISTICS, FeatureGroup, feature_groups, spectrum
from ssm_interp.features.groups import DECAY_NORM
from ssm_interp.hooks import Attachment, Intervention
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.prompts import TokenizedPrompt, pad

Statistics = Mapping[str, Mapping[int, Any]]


def measured(ssm: Attachment, asked: Sequence[TokenizedPrompt], names: Iterable[Any]) -> Statistics:
    """The statistics that groups of these names rank features by, on all prompts that a study asks.

    They are of the model as it is, without the edits that are held on, and fixed by its weights and the prompts. What
    is no name of such a group ranks by none.
    """
    ranked = {FeatureGroup.named(name).statistic for name in names if isinstance(name, str) and is_share(name)}
    wanted = [statistic for statistic in STATISTICS if statistic in ranked and statistic != DECAY_NORM]
    if not wanted or not ssm.layers:
        return {}
    return spectrum(ssm, pad(asked).to(device_of(ssm.model)), statistics=wanted).statistics


def held_on(held: Sequence[Intervention], ssm: Attachment, statistics: Statistics) -> list[Intervention]:
    """The interventions on a model: those that act on a feature group become one per layer.

    Args:
        statistics: as `measured` gives them.

    Raises:
        FeatureError: a group that a layer of this model has no features of.

    Example:
        >>> held_on([ScaleFeatures(factor=0, features="top half", layers=[3])], ssm, {})          # doctest: +SKIP
        [ScaleFeatures(layers=(3,), features=(1, 4), factor=0.0)]
    """
    return [of_layer for edit in held for of_layer in _by_layer(edit, ssm, statistics)]


def check_held(held: Sequence[Intervention], ssm: Attachment) -> None:
    """Raise what `held_on` and `ssm.edit` would, as far as that takes no weights to know: ranks do."""
    for intervention in held_on([edit for edit in held if not isinstance(edit.features, str)], ssm, {}):
        ssm.check(intervention)
    for edit in held:
        if isinstance(edit.features, str):
            ssm.check(edit.replace(features=None))


def _by_layer(edit: Intervention, ssm: Attachment, statistics: Statistics) -> list[Intervention]:
    if not isinstance(edit.features, str):
        return [edit]
    features = feature_groups(ssm, [edit.features], statistics=statistics)[edit.features]
    if features is None:
        return [edit.replace(features=None)]
    layers = list(features) if edit.layers is None else as_list(edit.layers)
    for layer in layers:
        if layer in ssm.layers and layer not in features:
            raise FeatureError(f"{edit.kind}: the feature group {edit.features!r} names no features for layer {layer}")
    return [edit.replace(layers=layer, features=features.get(layer)) for layer in layers]
