"""Hooks that somebody left on hook points, and that what is measured now is measured under."""

from __future__ import annotations

import warnings

from ssm_interp.errors import HookedWarning
from ssm_interp.hooks.attachment import Attachment

SHOWN = 3


def warn_hooked(ssm: Attachment, what: str, *, stacklevel: int = 2) -> None:
    """Warn that something runs under hooks on hook points, and name the points.

    Args:
        what: the name of what runs, such as "the sweep".

    Example:
        >>> ssm.layers[3].hook_y.add_hook(lambda y, hook: 0 * y)                    # doctest: +SKIP
        >>> warn_hooked(ssm, "the sweep")                                            # doctest: +SKIP
        HookedWarning: the sweep runs under the hooks on hook_y of layer 3, its clean run too; ssm.reset_hooks() ...
    """
    hooked = [
        f"hook_{point.name} of layer {layer}"
        for layer, points in ssm.layers.items()
        for point in points.points()
        if point.has_hooks()
    ]
    if hooked:
        more = f" and {len(hooked) - SHOWN} more hook points" if len(hooked) > SHOWN else ""
        warnings.warn(
            f"{what} runs under the hooks on {', '.join(hooked[:SHOWN])}{more}, its clean run too; "
            "ssm.reset_hooks() removes all hooks",
            HookedWarning,
            stacklevel=stacklevel + 1,
        )
