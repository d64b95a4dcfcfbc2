"""What can go wrong where the mathematics meets a model, and what it is to be warned of."""


class HookError(ValueError):
    """Something asked of the hooks cannot be done; nothing was changed."""


class InterventionError(HookError):
    """An intervention does not fit the model, the batch or the prompt."""


class UnsupportedModelError(HookError):
    """A model, or a version of its library, whose SSM operator cannot be hooked."""


class MissingError(HookError, KeyError):
    """No such layer, or a tensor that was not read."""

    __str__ = Exception.__str__  # a KeyError would show its message quoted


class SsmInterpWarning(UserWarning):
    """Numbers are right, and may mean something else than one thinks. All warnings of this package are of this kind."""


class HookedWarning(SsmInterpWarning):
    """Something is measured while hooks of the user's are on hook points, and so under them."""
