"""A random model that answers some prompts correctly: its tokenizer knows whole words, and the answers are its own."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ssm_interp.prompts import Prompt

LAYERS = 4
WORDS = [first + second for first in ("ba", "du", "ki", "lo", "me", "ra") for second in ("n", "s", "t", "l", "x", "m")]


@dataclass(frozen=True)
class World:
    """`prompts` are answered correctly, `wrong` are not."""

    model: PreTrainedModel
    tokenizer: FastTokenizer
    prompts: list[Prompt]
    wrong: list[Prompt]


def word_tokenizer() -> FastTokenizer:
    vocabulary = {word: index for index, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return FastTokenizer(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Random weights in float64, scaled up so that what the SSM carries decides the answer."""
    torch.manual_seed(seed)
    shared = {
        "vocab_size": len(WORDS) + 1,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family == "mamba1":
        model: PreTrainedModel = MambaForCausalLM(MambaConfig(**shared, state_size=8))
    else:
        sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8}
        model = Mamba2ForCausalLM(Mamba2Config(**shared, **sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight", "embeddings.weight")):
                weight.normal_(std=2 / weight.shape[-1] ** 0.5)
    return model.double().eval()


def world(family: str, count: int = 7, seed: int = 0) -> World:
    model, tokenizer, rng = tiny_model(family, seed), word_tokenizer(), random.Random(seed)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        words = rng.sample(WORDS, rng.randint(3, 9))
        start = rng.choice([0, 1, len(words) - 2])
        best = answer(model, tokenizer, " ".join(words))
        if best:
            subject = " ".join(words[start : start + 2])
            prompts.append(Prompt(" ".join(words), subject, best, id=f"p{len(prompts)}"))
    wrong = [
        Prompt(prompt.text, prompt.subject, next(w for w in WORDS if w != prompt.answer), id=f"wrong {prompt.id}")
        for prompt in prompts[:2]
    ]
    return World(model, tokenizer, prompts, wrong)


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: FastTokenizer, text: str) -> str:
    """The most likely next word; empty if that is the unknown one."""
    best = int(model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax())
    return WORDS[best - 1] if best else ""
