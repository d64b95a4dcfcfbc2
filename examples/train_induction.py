"""Train the tiny induction models that ship with ssm_interp: a few thousand parameters, minutes on one CPU core.

    python examples/train_induction.py tiny-induction-mamba1 --out runs/tiny-induction-mamba1
    python examples/train_induction.py tiny-induction-mamba2 --out runs/tiny-induction-mamba2

They read random letters, and at every letter that came before they answer with the one that followed it last time.
Deterministic: one seed, and every batch is a function of the step. The trained model is written to `--out` in fp16,
with its tokenizer, in the ordinary transformers layout; `--ship` copies it into the package.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Annotated, NamedTuple

import cyclopts
import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import ssm_interp as si
from ssm_interp.prompts import INDUCTION_SYMBOLS, Prompt, induction_prompts, pad, tokenize

SEED = 0
ROWS, LENGTH = 64, 32
PEAK_LR, WARMUP = 1e-2, 30
TAPS = 2  # of the convolution: only the answer's own position sees both trigger and answer
SLOWER = 3.0  # than transformers' first guess: with a long memory from the start Mamba-1 learns several times faster
UNLABELLED = -100
END = "<|endoftext|>"
SHIPPED = Path(__file__).parents[1] / "ssm_interp" / "models" / "data"


class Size(NamedTuple):
    hidden: int
    state: int
    steps: int


SIZES = {"tiny-induction-mamba1": Size(32, 16, 900), "tiny-induction-mamba2": Size(16, 32, 2000)}


def build_model(name: str) -> PreTrainedModel:
    """A fresh model of two layers."""
    if name not in SIZES:
        raise SystemExit(f"no recipe for {name!r}; there are {' and '.join(SIZES)}")
    torch.manual_seed(SEED)
    hidden, state, _ = SIZES[name]
    shared = {
        "vocab_size": 1 + len(INDUCTION_SYMBOLS),
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "expand": 2,
        "state_size": state,
        "conv_kernel": TAPS,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if name.endswith("mamba1"):
        model = MambaForCausalLM(MambaConfig(**shared))
        for layer in model.backbone.layers:
            layer.mixer.A_log.data -= SLOWER
        return model
    return Mamba2ForCausalLM(Mamba2Config(**shared, num_heads=4, head_dim=hidden // 2, n_groups=1, chunk_size=32))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per letter, split at spaces; letters are tokens 1 to 26."""
    vocabulary = {symbol: number for number, symbol in enumerate((END, *INDUCTION_SYMBOLS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=END, padding_side="left"
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Random letters `[b t]`, and for each that came before, the letter that followed it last time."""
    rng = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    ids = torch.randint(1, 1 + len(INDUCTION_SYMBOLS), (ROWS, LENGTH), generator=rng)
    earlier = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    follower = (earlier * torch.arange(1, LENGTH + 1)).amax(-1)  # 0: none
    return ids, ids.gather(1, follower).where(follower > 0, torch.tensor(UNLABELLED))


def learning_rate(step: int, steps: int) -> float:
    return PEAK_LR * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> float:
    """Share of prompts (of one length) whose answer is the most likely letter."""
    rows = pad([tokenize(prompt, tokenizer) for prompt in prompts])
    best = model(rows.input_ids, use_cache=False).logits[:, -1].argmax(-1)
    return (best == rows.answer_ids).float().mean().item()


def train(
    name: Annotated[str, cyclopts.Parameter(help="tiny-induction-mamba1 or tiny-induction-mamba2")],
    out: Annotated[Path, cyclopts.Parameter(help="folder for the trained model")],
    steps: Annotated[int, cyclopts.Parameter(help="0: as many as the shipped model had")] = 0,
    every: Annotated[int, cyclopts.Parameter(help="steps between reports")] = 250,
    ship: Annotated[bool, cyclopts.Parameter(help="copy the trained model into the package")] = False,
) -> None:
    """Train one induction model."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model, tokenizer = build_model(name), build_tokenizer()
    steps = steps or SIZES[name].steps
    fresh = induction_prompts(2000, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    if name == "tiny-induction-mamba1":  # without kernels, transformers' Mamba-1 scan is slow to differentiate
        si.attach(model, own_operator=True)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    with Progress() as progress:
        for step in progress.track(range(steps), description=name):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            ids, labels = batch(step)
            logits = model(ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % every == 0:
                right = accuracy(model, tokenizer, fresh[:200])
                progress.console.print(f"step {step + 1}: loss {loss.item():.4f}, right answers {right:.1%}")
    if name == "tiny-induction-mamba1":
        si.attached(model).detach()
    model.eval().half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"right answers to {len(fresh)} fresh prompts: {accuracy(model.float(), tokenizer, fresh):.2%}")
    if ship:
        shutil.copytree(out, SHIPPED / name, dirs_exist_ok=True)


if __name__ == "__main__":
    cyclopts.run(train)
