"""Random models of the classes that the recipes for hub models name, in folders, and facts that all of them answer."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tiny_flow import word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    GPT2Config,
    Mamba2Config,
    MambaConfig,
    PreTrainedModel,
)

from ssm_interp.prompts import Prompt, save_prompts

LAYERS = 16
WORDS = 5
NAMES = ("gpt2", "mamba2", "falcon_mamba", "mamba")
IDS = ["18566", "2720", "16634", "140", "p4", "p5"]
FAMILIES = {
    "state-spaces/mamba-": "mamba",
    "TRI-ML/mamba-7b-rw": "mamba",
    "AntonV/mamba2-": "mamba2",
    "tiiuae/falcon-mamba-": "falcon_mamba",
    "gpt2-": "gpt2",
}


def family(hub_id: str) -> str:
    """The model type of a hub id that a recipe names."""
    (found,) = [name for start, name in FAMILIES.items() if hub_id.startswith(start)]
    return found


def random_model(name: str) -> PreTrainedModel:
    """Of 16 layers, with weights scaled up so that what a layer carries decides the answer."""
    shared = {"vocab_size": WORDS + 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    mamba = shared | {"hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4, "tie_word_embeddings": False}
    config = {
        "mamba": lambda: MambaConfig(**mamba),
        "falcon_mamba": lambda: FalconMambaConfig(**mamba),
        "mamba2": lambda: Mamba2Config(**mamba, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
        "gpt2": lambda: GPT2Config(**shared, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=16),
    }[name]()
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.ndim == 2):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def zoo(folder: Path) -> dict[str, Path]:
    """Saves a model of each family as `folder/<family>`, and facts that all of them answer alike as facts.jsonl."""
    models, tokenizer, drawn = [random_model(name) for name in NAMES], word_tokenizer(), random.Random(0)
    ids = torch.tensor([[drawn.randint(1, WORDS) for _ in range(6)] for _ in range(4000)])
    answers = models[0](input_ids=ids).logits[:, -1].argmax(-1)
    for model in models[1:]:
        alike = (model(input_ids=ids).logits[:, -1].argmax(-1) == answers) & (answers > 0)
        ids, answers = ids[alike], answers[alike]
    rows = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    targets = tokenizer.convert_ids_to_tokens(answers.tolist())
    singles = [(row, [word for word in row if row.count(word) == 1]) for row in rows]
    usable = [(row, once[0], target) for (row, once), target in zip(singles, targets, strict=True) if once]
    named = zip(IDS, usable, strict=False)
    asked = [Prompt(" ".join(row), subject, target, id=name) for name, (row, subject, target) in named]
    assert len(asked) == len(IDS)
    save_prompts(asked, folder / "facts.jsonl")
    for name, model in zip(NAMES, models, strict=True):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in NAMES}
