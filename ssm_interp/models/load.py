"""Load a causal language model and its tokenizer by embedded name, local path or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = ("tiny-mamba1", "tiny-mamba2", "tiny-llama")  # they know the embedded facts
INDUCTION = ("tiny-induction-mamba1", "tiny-induction-mamba2")


class LoadError(ValueError):
    """A name under which no model can be loaded."""


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
    with _place(name) as (place, local):
        options = {} if local else {"revision": revision}
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, device_map=device_map, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
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
    with _place(name) as (place, local):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, **({} if local else {"revision": revision})
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
    with _place(name) as (place, local), torch.device("meta"):
        config = AutoConfig.from_pretrained(place, **({} if local else {"revision": revision}))
        model: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_config(config).eval()
    return model


@contextmanager
def _place(name: str | Path) -> Iterator[tuple[str, bool]]:
    """Where a model is, and whether that is a local folder; errors inside become LoadErrors."""
    shipped = (*EMBEDDED, *INDUCTION)
    embedded = str(name) in shipped
    place = str(files("ssm_interp.models") / "data" / str(name)) if embedded else str(name)
    local = Path(place).is_dir()
    if not local and (str(name).startswith((".", "/", "~")) or Path(place).exists()):
        raise LoadError(f"{str(name)!r} is not a folder that holds a model")
    if not (embedded or local) and (near := get_close_matches(str(name), shipped, n=1, cutoff=0.8)):
        raise LoadError(f"there is no model {str(name)!r}; did you mean the embedded {near[0]!r}?")
    try:
        yield place, local
    except Exception as error:  # whatever a damaged file makes transformers, safetensors or tokenizers raise
        reason = " ".join(str(error).split())[:300]
        raise LoadError(
            f"cannot load {str(name)!r}: it is none of the embedded models ({', '.join(shipped)}), and as a "
            f"{'local folder' if local else 'hub id'} it gives: {reason}"
        ) from error
