"""What a model's forward takes by name, so that nothing is given to it that it would swallow without a word."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from ssm_interp.errors import HookError
from ssm_interp.hooks.seam.cache import CACHES

OF_THE_TEXT = (  # what tokenizers, and programs made for other models, say about a text beside its ids
    "token_type_ids",
    "position_ids",
    "special_tokens_mask",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "length",
    "num_truncated_tokens",
)


def options_of(model: nn.Module) -> tuple[str, ...] | None:
    """The names that a model's forward takes; None: any, as far as can be seen.

    Where it takes more than it names (`**kwargs`), those of the modules inside that read ids count too (the base model,
    what an adapter wraps), and the keys that an annotation `Unpack[...]` lists.

    Example:
        >>> options_of(model)                                                                     # doctest: +SKIP
        ('input_ids', 'attention_mask', ..., 'logits_to_keep')
    """
    names, takes_more = _names(model.forward)
    if not takes_more:
        return names
    inside = [_names_of_class(type(part).forward)[0] for part in model.modules() if part is not model]
    reading = [names, *(group for group in inside if "input_ids" in group), _of_decorators(model)]
    options = tuple(dict.fromkeys(name for group in reading for name in group if name != "self"))
    return options if "input_ids" in options else None


def _of_decorators(model: nn.Module) -> list[str]:
    """What the decorators around the forwards of transformers' models take, which is in no signature."""
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [f"output_{name}" for part in models for name in part.can_record_outputs] + ["return_dict"] * bool(models)


def named_as(
    model: nn.Module, given: Mapping[str, Any], takes: Collection[str] | None, own: Collection[str] = ()
) -> dict[str, Any]:
    """What is given, by the names that a model takes it by: a cache has another one in each version of transformers.

    Left out is what is said about the text alone, where the model does not take it: that it is one text, from left to
    right.

    Args:
        model: who is called.
        given: by name.
        takes: as `options_of` gives it.
        own: the names that the function takes itself which was given these.

    Raises:
        HookError: a name that the model does not take.
    """
    if takes is None:
        return dict(given)
    named: dict[str, Any] = {}
    for name, value in given.items():
        if name in takes:
            named[name] = value
        elif name in CACHES and (cached := _cache_in(takes)):
            if cached in given or cached in named:
                raise HookError(f"the cache is given twice, the second time as {name!r}; give it once")
            named[cached] = value
        elif name not in OF_THE_TEXT:
            raise HookError(_unknown(model, name, takes, own))
        elif not _one_text(name, value):
            raise HookError(f"{type(model).__name__} takes no {name}, which here tell several texts of a row apart")
    return named


def _one_text(name: str, value: Any) -> bool:
    """Whether something says no more than that each row is one text, from left to right."""
    if name not in ("token_type_ids", "position_ids"):
        return True
    try:
        steps = torch.as_tensor(value).diff(dim=-1)
    except (TypeError, ValueError, RuntimeError):
        return False
    return bool(((steps >= 0) & (steps <= (name == "position_ids"))).all())


def _unknown(model: nn.Module, name: str, takes: Collection[str], own: Collection[str]) -> str:
    known = [*own, *takes]
    near = get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    itself = f"`run` takes {', '.join(own)}; the model" if own else "It"
    return f"{type(model).__name__} takes no {name!r}{hint} {itself} takes {', '.join(takes)}"


def _cache_in(takes: Collection[str]) -> str | None:
    return next((name for name in takes if name in CACHES), None)


@cache
def _names_of_class(forward: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    return _names(forward)


def _names(function: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """The names that a function takes, and whether it takes others too."""
    names, takes_others = [], False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_others = True
            names += [key for kind in get_args(parameter.annotation) for key in getattr(kind, "__annotations__", ())]
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            names.append(name)
    return tuple(names), takes_others
