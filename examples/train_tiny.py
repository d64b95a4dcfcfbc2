"""Train the tiny language models that ship with ssm_interp on the embedded facts.

    python examples/train_tiny.py tiny-mamba1 --out runs/tiny-mamba1
    python examples/train_tiny.py tiny-mamba2 --out runs/tiny-mamba2
    python examples/train_tiny.py tiny-llama --out runs/tiny-llama

Deterministic (one seed; every batch is a function of the seed and the step) and resumable: the same command goes on
from the last checkpoint in `--out`. The trained model is written there in fp16, with its tokenizer, in the ordinary
transformers layout; `--ship` copies it into the package.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import cyclopts
import torch
from build_facts import facts, load_templates
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import ssm_interp as si
from ssm_interp.prompts import Fact, Prompt, load_prompts

SEED = 0
STEPS = 1400
ROWS = 128
POOL = 8
PEAK_LR = 4e-3
WARMUP = 200
ANSWER_WEIGHT = 4.0
VOCABULARY = 1024
END = "<|endoftext|>"
SHIPPED = Path(__file__).parents[1] / "ssm_interp" / "models" / "data"


def build_model(name: str) -> PreTrainedModel:
    """A fresh model of the embedded size; ten layers, so that a window study has something to show."""
    torch.manual_seed(SEED)
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "num_hidden_layers": 10,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    mamba = {"expand": 2, "residual_in_fp32": True}
    if name == "tiny-mamba1":
        return MambaForCausalLM(MambaConfig(**shared, **mamba, state_size=8))
    if name == "tiny-mamba2":
        return Mamba2ForCausalLM(
            Mamba2Config(**shared, **mamba, state_size=16, num_heads=12, head_dim=16, n_groups=2, chunk_size=32)
        )
    if name == "tiny-llama":
        return LlamaForCausalLM(
            LlamaConfig(**shared, intermediate_size=128, num_attention_heads=6, max_position_embeddings=128)
        )
    raise SystemExit(f"no recipe for {name!r}; there are tiny-mamba1, tiny-mamba2 and tiny-llama")


class Corpus:
    """Sentences that state the facts in the training templates; never in a held-out one."""

    def __init__(self) -> None:
        self.templates = load_templates()
        self.facts = facts()

    def sentence(self, fact: Fact, rng: random.Random) -> tuple[str, int]:
        """One sentence, and the character at which its answer begins (the leading space)."""
        body = rng.choice(self.templates[fact.relation]["train"]).replace("~", rng.choice(self.templates["asides"]))
        opener = rng.choice(self.templates["openers"])
        text = opener + body.replace("{}", fact.subject)
        text = text[0].upper() + text[1:]
        return f"{text} {fact.answer}.", len(text)


def build_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training sentences."""
    rng = random.Random(SEED)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((corpus.sentence(fact, rng)[0] for fact in corpus.facts for _ in range(6)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=END, padding_side="left"
    )


def batch(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, step: int) -> dict[str, torch.Tensor]:
    """Sentences of similar length (`POOL` batches are drawn together, sorted and dealt out in random order), padded on
    the right, with a loss weight per predicted token."""
    rng = random.Random(SEED * 1_000_003 + step // POOL)
    drawn = [corpus.sentence(rng.choice(corpus.facts), rng) for _ in range(ROWS * POOL)]
    deal = rng.sample(range(POOL), POOL)[step % POOL]
    rows = sorted(drawn, key=lambda row: len(row[0]))[deal * ROWS : (deal + 1) * ROWS]
    encoded = tokenizer(
        [text for text, _ in rows], return_tensors="pt", padding=True, padding_side="right", return_offsets_mapping=True
    )
    answer = torch.tensor([[start] for _, start in rows])
    weight = torch.where(encoded["offset_mapping"][..., 0] >= answer, ANSWER_WEIGHT, 1.0) * encoded["attention_mask"]
    return {"input_ids": encoded["input_ids"], "weight": weight}


def loss_of(model: PreTrainedModel, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=rows["input_ids"], use_cache=False).logits[:, :-1]
    targets, weight = rows["input_ids"][:, 1:], rows["weight"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (loss * weight.flatten()).sum() / weight.sum()


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> dict[str, float]:
    """Share of prompts whose first answer token is the most likely one, per relation and in all; one at a time in
    batches of equal length, so that no padding is involved."""
    model.eval()
    lengths = defaultdict(list)
    for prompt in prompts:
        ids = tokenizer(prompt.text)["input_ids"]
        lengths[len(ids)].append((ids, tokenizer(" " + prompt.answer)["input_ids"][0], prompt.relation))
    hits = defaultdict(list)
    for rows in lengths.values():
        best = model(torch.tensor([ids for ids, _, _ in rows]), use_cache=False).logits[:, -1].argmax(-1)
        for guess, (_, answer, relation) in zip(best.tolist(), rows, strict=True):
            hits[relation].append(guess == answer)
            hits["all"].append(guess == answer)
    model.train()
    return {name: sum(found) / len(found) for name, found in sorted(hits.items())}


def train(
    name: Annotated[str, cyclopts.Parameter(help="tiny-mamba1, tiny-mamba2 or tiny-llama")],
    out: Annotated[Path, cyclopts.Parameter(help="folder for checkpoints and the trained model")],
    steps: int = STEPS,
    every: Annotated[int, cyclopts.Parameter(help="steps between checkpoints")] = 250,
    threads: int = 1,
    ship: Annotated[bool, cyclopts.Parameter(help="copy the trained model into the package")] = False,
) -> None:
    """Train one embedded model (about an hour on one CPU core)."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus()
    tokenizer, prompts, model = build_tokenizer(corpus), load_prompts(), build_model(name)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    if name == "tiny-mamba1":  # without kernels, transformers' Mamba-1 scan takes minutes to differentiate
        si.attach(model, own_operator=True)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(corpus.facts)} facts")
    checkpoint, step = out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["steps"] != steps:
            raise SystemExit(f"{checkpoint} belongs to a run of {saved['steps']} steps, not {steps}; remove it first")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        print(f"going on from step {step}")
    model.train()
    with Progress() as progress:
        bar = progress.add_task(name, total=steps, completed=step)
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            loss = loss_of(model, batch(corpus, tokenizer, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            progress.update(bar, completed=step)
            if step % every == 0 or step == steps:
                _save(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, step, steps)
                held_out = accuracy(model, tokenizer, prompts)
                progress.console.print(step, f"loss {loss.item():.4f}", json.dumps(held_out), soft_wrap=True)
    if name == "tiny-mamba1":
        si.attached(model).detach()
    model.eval().half().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    print(json.dumps(accuracy(model.float(), tokenizer, prompts)))
    if ship:
        shutil.copytree(out / "model", SHIPPED / name, dirs_exist_ok=True)


def _save(path: Path, state: dict, step: int, steps: int) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state | {"step": step, "steps": steps}, partial)
    partial.replace(path)


if __name__ == "__main__":
    cyclopts.run(train)
