"""Load a causal language model and its tokenizer by embedded name, local path or hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ssm_interp.errors import LoadError

EMBEDDED = ("tiny-mamba1", "tiny-mamba2", "tiny-llama")  # they know the embedded facts
INDUCTION = ("tiny-induction-mamba1", "tiny-induction-mamba2")
SHIPPED = (*EMBEDDED, *INDUCTION)

ORIGINAL = re.compile(r"state-spaces/(mamba|transformerpp)[\w.-]*(?<!-hf)")
"""Hub ids of weights in the layout of the package mamba_ssm."""
CONVERTED = ("130m", "370m", "790m", "1.4b", "2.8b")
"""Sizes of Mamba-1 that the same owner has in transformers' layout too."""
CONVERTED_2 = ("130m", "1.3b", "2.7b")
"""Sizes of Mamba-2 that somebody else has converted."""


def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    revision: str = "main",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode, and its tokenizer.

    Args:
        name: an embedded model (`tiny-mamba1`, `tiny-mamba2`, `tiny-llama`; for `prompts.induction_prompts`
            `tiny-induction-mamba1`, `tiny-induction-mamba2`), a local folder in transformers' layout, or a hub id.
        dtype: of the parameters; the embedded models are stored in float16 and computed in this.
        device: where the model goes.
        device_map: how to spread a model larger than a device over all of them (and the host's memory, and the disk)
            instead: "auto", "balanced", "sequential", or part -> device, see transformers' `from_pretrained`.
        revision: of a hub id.

    Raises:
        LoadError: nothing of that name, or no causal language model in it.

    Example:
        >>> model, tokenizer = load("tiny-mamba1")
    """
    with _location(name) as (location, local):
        options = {} if local else {"revision": revision}
        model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, device_map=device_map, **options)
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    model.config.name_or_path = str(name)
    return (model.to(device) if device_map is None else model).eval(), tokenizer


def load_tokenizer(name: str | Path, *, revision: str = "main") -> PreTrainedTokenizerBase:
    """A model's tokenizer alone.

    Args:
        name, revision: as of `load`.

    Raises:
        LoadError: nothing of that name, or no tokenizer in it.

    Example:
        >>> load_tokenizer("tiny-mamba1").is_fast
        True
    """
    with _location(name) as (location, local):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location, **({} if local else {"revision": revision})
        )
    return tokenizer


def load_outline(name: str | Path, *, revision: str = "main") -> PreTrainedModel:
    """A model without its weights (they are on the device "meta"): what its config alone says of layers and features.

    Args:
        name, revision: as of `load`.

    Raises:
        LoadError: nothing of that name, or no config of a causal language model in it.

    Cost: no memory; of a hub id, the download of its config.

    Example:
        >>> load_outline("tiny-mamba1").device.type
        'meta'
    """
    with _location(name) as (location, local), torch.device("meta"):
        config = AutoConfig.from_pretrained(location, **({} if local else {"revision": revision}))
        model: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_config(config).eval()
    return model


@contextmanager
def _location(name: str | Path) -> Iterator[tuple[str, bool]]:
    """Where a model is, and whether that is a local folder; errors inside become LoadErrors."""
    embedded = str(name) in SHIPPED
    location = str(files("ssm_interp.models") / "data" / str(name)) if embedded else str(name)
    local = Path(location).is_dir()
    if not local:
        _check_hub_id(str(name))
    elif not embedded:
        _check_format(Path(location))
    try:
        yield location, local
    except Exception as error:  # whatever a damaged file makes transformers, safetensors or tokenizers raise
        reason = " ".join(str(error).split())[:300]
        raise LoadError(
            f"cannot load {str(name)!r}: it is none of the embedded models ({', '.join(SHIPPED)}), and as a "
            f"{'local folder' if local else 'hub id'} it gives: {reason}"
        ) from error


def _check_hub_id(name: str) -> None:
    """Raise LoadError, before the hub is asked (which takes long where it does not answer), for a name that is
    certainly or very likely meant to be something else.

    A name that is no folder is a path if it says so or begins with a folder that there is; else it may be a hub id. One
    that is in the hub's cache is taken for what it is.
    """
    path = Path(name).expanduser()
    near = _folder_near(path)
    if name.startswith((".", "/", "~")) or path.exists() or (near and len(path.parts) > 1):
        hint = f"; did you mean {str(near)!r}?" if near else ""
        raise LoadError(f"{name!r} is not a folder that holds a model{hint}")
    if ORIGINAL.fullmatch(name):
        raise LoadError(_original_format(name))
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if shipped := get_close_matches(name, SHIPPED, n=1, cutoff=0.8):
        raise LoadError(f"there is no model {name!r}; did you mean the embedded {shipped[0]!r}?")
    if near:
        raise LoadError(
            f"there is no folder {name!r}; did you mean {str(near)!r}? (If {name!r} is on the hub, give owner/name.)"
        )


def _folder_near(path: Path) -> Path | None:
    """A folder with a model beside a path, whose name is like the path's but for a slip of the pen."""
    if not path.parent.is_dir():
        return None
    models = {folder.name: folder for folder in sorted(path.parent.iterdir()) if (folder / "config.json").is_file()}
    slips = [
        name
        for name in get_close_matches(path.name, models, n=len(models) or 1, cutoff=0.8)
        if abs(len(name) - len(path.name)) <= 2  # another size or variant has a longer suffix
    ]
    return models[slips[0]] if slips else None


def _original_format(name: str) -> str:
    """What to say of the hub's models in the layout of mamba_ssm."""
    what = f"{name!r} holds weights in the layout of the package mamba_ssm, which transformers cannot load"
    if name.partition("/mamba-")[2] in CONVERTED:
        return f"{what}; the same weights in transformers' layout are {name + '-hf'!r}"
    if (size := name.partition("/mamba2-")[2]) in CONVERTED_2:
        return (
            f"{what}, and its owner has no converted ones; 'AntonV/mamba2-{size}-hf' has the same weights converted to "
            "transformers' layout"
        )
    return f"{what}, and its owner has no converted ones; take converted weights, such as 'state-spaces/mamba-130m-hf'"


def _check_format(folder: Path) -> None:
    """Raise LoadError for a local folder in the layout of mamba_ssm."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers says what is wrong
    if isinstance(config, dict) and "model_type" not in config and {"d_model", "n_layer"} <= config.keys():
        raise LoadError(
            f"{str(folder)!r} is in the layout of the package mamba_ssm (its config has d_model and n_layer, and no "
            "model_type), which transformers cannot load; take weights in its own layout, such as "
            "'state-spaces/mamba-130m-hf'"
        )
