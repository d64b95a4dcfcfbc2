"""Tiny random models of the ten Mamba families of transformers, with weights that make the SSM path matter.

A freshly initialised tiny model hides errors: its state-space path adds next to nothing to the logits. Here every
parameter is drawn anew (decays, steps, skips, gates and norms included, so that nothing is one or zero by default).

    model = build("bamba")                                   # 4 layers, 2 groups, one attention layer; eval mode
    logits = model(**inputs(batch=2, length=9)).logits
    logits = model(**padded([9, 4], side="left")).logits
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
PAD = 0

MAMBA1_KIND = {"expand": 2, "state_size": 4, "conv_kernel": 4, "time_step_rank": 2, "num_hidden_layers": 4}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
ZAMBA_LAYERS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
MAMBA2_KIND = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": MAMBA1_KIND,
    "falcon_mamba": MAMBA1_KIND,
    "jamba": ATTENTION
    | {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
    },
    "zamba": ATTENTION
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ZAMBA_LAYERS,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
    },
    "mamba2": {
        "num_hidden_layers": 4,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 8,
        "chunk_size": 8,
    },
    "bamba": ATTENTION | MAMBA2_KIND | {"num_hidden_layers": 4, "attn_layer_indices": [1]},
    "falcon_h1": ATTENTION
    | MAMBA2_KIND
    | {
        "num_hidden_layers": 3,
        "mamba_d_ssm": 64,
        "ssm_multipliers": [0.8, 1.2, 1.1, 0.9, 0.7],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.9,
        "attention_out_multiplier": 0.8,
        "key_multiplier": 0.9,
        "embedding_multiplier": 1.5,
    },
    "granitemoehybrid": ATTENTION
    | MAMBA2_KIND
    | {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 48,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.25,
    },
    "nemotron_h": ATTENTION
    | {
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "zamba2": ATTENTION
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ZAMBA_LAYERS,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "adapter_rank": 4,
    },
}
NAMES = tuple(CONFIGS)
FAMILY: dict[str, Literal["mamba1", "mamba2"]] = {
    name: "mamba1" if name in ("mamba", "falcon_mamba", "jamba", "zamba") else "mamba2" for name in NAMES
}


def build(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, training: bool = False, **config_overrides: Any
) -> PreTrainedModel:
    """A tiny causal language model of one of the ten families; equal arguments give equal weights.

    Args:
        name: one of `NAMES`, the model type of the transformers config.
        seed: of the weights. The global random state is left as it was.
        dtype: of all floating-point weights (they are drawn in float64, so dtypes differ by rounding alone).
        training: train mode instead of eval mode.
        config_overrides: config fields to set or to change.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> build("zamba2", dtype=torch.float64, chunk_size=4).config.mamba_ngroups
        2
    """
    if name not in CONFIGS:
        raise ValueError(f"there is no tiny host {name!r}; there are {', '.join(NAMES)}")
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "experts_implementation": "eager",  # the grouped kernel knows no float64
    }
    config = AutoConfig.for_model(name, **shared | CONFIGS[name] | config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).train(training)


def inputs(batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Model inputs without padding: `input_ids` `[batch, length]`, never the pad token."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(PAD + 1, VOCABULARY, (batch, length), generator=generator)}


def padded(lengths: Sequence[int], side: Literal["left", "right"] = "left", seed: int = 0) -> dict[str, Tensor]:
    """Model inputs with padding: row i holds `lengths[i]` tokens; `input_ids` and `attention_mask` `[batch, longest]`.

    The tokens of a row do not depend on `side`; `tokens_of` gives a row back without its padding.
    """
    longest = max(lengths)
    columns = torch.arange(longest)
    starts = torch.tensor([longest - length if side == "left" else 0 for length in lengths])[:, None]
    mask = (columns >= starts) & (columns < starts + torch.tensor(lengths)[:, None])
    input_ids = torch.full(mask.shape, PAD)
    input_ids[mask] = inputs(1, sum(lengths), seed)["input_ids"][0]
    return {"input_ids": input_ids, "attention_mask": mask.long()}


def tokens_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a padded batch as a batch of one, without its padding: `input_ids` `[1, length]`."""
    return {"input_ids": batch["input_ids"][row, batch["attention_mask"][row].bool()][None]}


@torch.no_grad()
def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(_draw(name, parameter, generator))


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """New values for one parameter; what it is follows from its name and its shape."""
    shape = parameter.shape
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    *modules, leaf = name.split(".")
    module = modules[-1]
    if leaf == "A_log":
        return math.log(0.1) + uniform * math.log(2 / 0.1)
    if leaf in ("dt_bias", "dt_proj_bias") or (module == "dt_proj" and leaf == "bias"):
        return _inverse_softplus(0.05 * (2 / 0.05) ** uniform)
    if leaf == "D" or (leaf == "weight" and parameter.ndim == 1):
        return 0.5 + uniform
    if leaf == "bias":
        return 0.2 * normal
    if module.startswith("embed"):
        return 0.3 * normal
    gain = {"out_proj": 2.0, "conv1d": 1.5}.get(module, 1.0)
    fan_in = parameter[0].numel() if parameter.ndim == 2 or module == "conv1d" else shape[-1]
    return gain * fan_in**-0.5 * normal


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))
