"""Which tokens of a prompt play which role (subject, relation, last, ...), and batches of tokenized prompts.

The roles are those of Endy et al. 2025 (arXiv 2505.24244), found by character offsets:

    first                [0], whatever it is: a subject token, or a BOS token that the tokenizer adds
    last                 [L - 1], where the model answers
    subject              every token whose characters overlap the subject's
    relation             every other token; the last one included, and the first unless it is the subject's
    context              the tokens before the subject
    all                  every token
    relation_minus_last  relation without the last token
    subject_first        the subject's first token
    subject_last         the subject's last token

Special tokens in front of the text (BOS) are tokens like any other: `first`, and in relation, context and all. A role
may be empty: a subject at the very beginning has no context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ssm_interp.errors import PromptError
from ssm_interp.prompts.prompt import Prompt
from ssm_interp.reprs import short_repr
from ssm_interp.words import ROLES


def check_role(role: str) -> None:
    """Raise PromptError, with the nearest valid name, if there is no such role."""
    if role not in ROLES:
        near = get_close_matches(role, ROLES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PromptError(f"there is no role {role!r}: {hint}the roles are {', '.join(ROLES)}")


@dataclass(frozen=True)
class Encoding:
    """The tokens of a text.

    Attributes:
        ids: token ids.
        tokens: readable tokens: the characters of the text that each one stands for, with the space before them (the
            bytes of one character show that character each); a special token by its name.
        spans: first and one-past-last character; equal where a token stands for no character.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    __repr__ = short_repr


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """Tokenize a text with character offsets, and with the special tokens that the tokenizer adds by itself.

    Raises:
        PromptError: the tokenizer is a slow one (it knows no offsets), or the text is empty, or yields no token.

    Example:
        >>> encode("The capital of France is", tokenizer).tokens      # doctest: +SKIP
        ('The', ' capital', ' of', ' Fr', 'ance', ' is')
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} is a slow tokenizer and gives no character offsets; "
            "load the fast one (AutoTokenizer.from_pretrained(..., use_fast=True))"
        )
    rows = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids = tuple(rows["input_ids"])
    if not text.strip():
        raise PromptError(f"the text {text!r} has no tokens: it is empty")
    if not ids:
        raise PromptError(
            f"the tokenizer gives no tokens for {text!r}; was it saved with the model, vocabulary and all?"
        )
    names = tokenizer.convert_ids_to_tokens(list(ids))
    covered, tokens, spans = 0, [], []
    for name, (start, end), special in zip(names, rows["offset_mapping"], rows["special_tokens_mask"], strict=True):
        spaced = int(covered < start and text[start - 1] == " ")
        tokens.append(name if special else text[start - spaced : end])
        trimmed = start == end and not special  # some tokenizers trim a token that is only a space to nothing
        spans.append((start - spaced if trimmed else start, end))
        covered = max(covered, end)
    return Encoding(ids, tuple(tokens), tuple(spans))


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt in the tokens of one tokenizer.

    Attributes:
        prompt: what was tokenized.
        ids: token ids, special tokens of the tokenizer included.
        tokens: readable tokens, see `Encoding`.
        roles: positions of each role of `ROLES`, ascending.
        answer_ids: the tokens of the answer, its leading space included.
        answer_tokens: the same, readable.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    roles: Mapping[str, tuple[int, ...]]
    answer_ids: tuple[int, ...]
    answer_tokens: tuple[str, ...]

    __repr__ = short_repr

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_id(self) -> int:
        """The first token of the answer, which is what is asked for unless the full answer is scored."""
        return self.answer_ids[0]

    @property
    def asked(self) -> str:
        """The answer where it is one token; else its first token, of which answer: `"·P" of "Prague"`."""
        if len(self.answer_ids) == 1:
            return self.prompt.answer
        return f'"{self.answer_tokens[0].replace(" ", "·")}" of "{self.prompt.answer}"'

    def continued(self) -> TokenizedPrompt:
        """The prompt with its answer behind it, but for the answer's last token: what a model reads as its answer is
        scored token by token. Roles and positions stay those of the prompt."""
        ids, tokens = self.answer_ids[:-1], self.answer_tokens[:-1]
        return replace(self, ids=self.ids + ids, tokens=self.tokens + tokens)

    def positions(self, role: str | int) -> tuple[int, ...]:
        """Positions of a role; PromptError, with the nearest valid name, if there is no such role. A position (7, or
        "7") stands for itself, and for none where the prompt is too short."""
        if isinstance(role, int) or role.isdecimal():
            return (int(role),) if 0 <= int(role) < len(self.roles["all"]) else ()
        check_role(role)
        return self.roles[role]


def tokenize(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, full_answer: bool = False) -> TokenizedPrompt:
    """Tokens, roles and answer of a prompt.

    Args:
        full_answer: whether all tokens of the answer are to be asked for, so that all must be known.

    Raises:
        PromptError: a slow tokenizer; no token covers the subject; the answer does not start with a token of its own
            after the text (the tokenizer merges it with the text, splits its space off, or does not know it).

    Example:
        >>> tokenized = tokenize(Prompt("The capital of France is", "France", "Paris"), tokenizer)  # doctest: +SKIP
        >>> tokenized.positions("subject"), tokenized.positions("relation")                         # doctest: +SKIP
        ((3, 4), (0, 1, 2, 5))
    """
    if not isinstance(prompt, Prompt):
        raise PromptError(f"tokenize takes a Prompt, got {type(prompt).__name__}")
    encoding = encode(prompt.text, tokenizer)
    roles = _roles(prompt, encoding)
    ids, tokens = _answer(prompt, encoding, tokenizer)
    if full_answer and tokenizer.unk_token_id in ids:
        raise PromptError(
            f"the answer {prompt.answer!r} of {prompt.text!r} cannot be asked for in full: the tokenizer does not know "
            f"{tokens[ids.index(tokenizer.unk_token_id)]!r} in it (it becomes {tokenizer.unk_token!r})"
        )
    return TokenizedPrompt(prompt, encoding.ids, encoding.tokens, roles, ids, tokens)


def _roles(prompt: Prompt, encoding: Encoding) -> dict[str, tuple[int, ...]]:
    start, end = prompt.subject_span
    everything = tuple(range(len(encoding.ids)))
    subject = tuple(i for i in everything if max(start, encoding.spans[i][0]) < min(end, encoding.spans[i][1]))
    if not subject:
        raise PromptError(
            f"no token of {prompt.text!r} covers its subject {prompt.subject!r} (characters {start} to {end}; token "
            f"spans {list(encoding.spans)}): the tokenizer drops it or gives no offsets"
        )
    relation = tuple(i for i in everything if i not in subject)
    return {
        "first": everything[:1],
        "last": everything[-1:],
        "subject": subject,
        "relation": relation,
        "context": everything[: subject[0]],
        "all": everything,
        "relation_minus_last": tuple(i for i in relation if i != everything[-1]),
        "subject_first": subject[:1],
        "subject_last": subject[-1:],
    }


def _answer(
    prompt: Prompt, encoding: Encoding, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The answer's ids and readable tokens."""
    length, start = len(encoding.ids), len(prompt.text) + 1
    whole = encode(f"{prompt.text} {prompt.answer}", tokenizer)
    problem = f"the answer {prompt.answer!r} does not start with a token of its own after {prompt.text!r}: "
    if len(whole.ids) <= length or whole.ids[:length] != encoding.ids:
        raise PromptError(
            f"{problem}with the answer the text's tokens become {list(whole.tokens)}, without it they are "
            f"{list(encoding.tokens)}; the tokenizer merges the two or adds a token at the end"
        )
    answer_id, (first, end) = whole.ids[length], whole.spans[length]
    if answer_id == tokenizer.unk_token_id:
        raise PromptError(f"{problem}the tokenizer does not know it (it becomes {tokenizer.unk_token!r})")
    if not first <= start < end:
        raise PromptError(
            f"{problem}the next token is {whole.tokens[length]!r} (characters {first} to {end}, the answer starts at "
            f"{start}); use a tokenizer that keeps the space with the word"
        )
    return whole.ids[length:], whole.tokens[length:]


@dataclass(frozen=True)
class Batch:
    """Prompts side by side, padded on the left, so that the last column is the last token of every row.

    A model is called with it as with what a tokenizer returns: `model(**batch)` gives it `input_ids` and
    `attention_mask`.

    Attributes:
        prompts: one per row.
        input_ids: `[b, t]`.
        attention_mask: `[b, t]`, 0 at padding.
        answer_ids: the first token of each answer, `[b]`; all tokens are `answers`.
    """

    prompts: tuple[TokenizedPrompt, ...]
    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]
    answer_ids: Int[Tensor, " b"]

    def keys(self) -> tuple[str, str]:
        """What a model is called with."""
        return ("input_ids", "attention_mask")

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, name: str) -> Tensor:
        """What a model is called with, by name.

        Raises:
            KeyError: another name; what else a batch has are its attributes.
        """
        if name not in self.keys():  # noqa: SIM118
            raise KeyError(f"a batch holds {' and '.join(self.keys())} for a model, not {name!r:.80}")
        tensor: Tensor = getattr(self, name)
        return tensor

    def __repr__(self) -> str:
        return f"Batch({len(self.prompts)} prompts, input_ids {list(self.input_ids.shape)})"

    def positions(self, role: str | int) -> list[list[int]]:
        """Columns of `input_ids` that play a role or are a position of the prompt (7, or "7"), one list per row; an
        empty one where a prompt has none."""
        width = self.input_ids.shape[1]
        return [[width - len(row) + i for i in row.positions(role)] for row in self.prompts]

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """All tokens of each answer."""
        return [row.answer_ids for row in self.prompts]

    def continued(self) -> Batch:
        """The prompts with their answers behind them, but for the last token: what asks for all tokens of each."""
        return pad([row.continued() for row in self.prompts]).to(self.input_ids.device)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        tensors = (self.input_ids, self.attention_mask, self.answer_ids)
        return Batch(self.prompts, *(tensor.to(device) for tensor in tensors))


def pad(prompts: Sequence[TokenizedPrompt], *, pad_id: int = 0) -> Batch:
    """Pad prompts on the left to a common length.

    Args:
        prompts: at least one.
        pad_id: what stands at padding; the attention mask hides it, so any id of the vocabulary will do.

    Raises:
        PromptError: no prompts, or some that are not tokenized.

    Example:
        >>> pad([short, long]).attention_mask           # doctest: +SKIP
        tensor([[0, 0, 1, 1, 1],
                [1, 1, 1, 1, 1]])
    """
    if not prompts:
        raise PromptError("a batch needs at least one prompt, got none")
    if wrong := [row for row in prompts if not isinstance(row, TokenizedPrompt)]:
        raise PromptError(f"pad takes what tokenize(prompt, tokenizer) gives, got {type(wrong[0]).__name__}")
    width = max(len(row) for row in prompts)
    ids = [[pad_id] * (width - len(row)) + list(row.ids) for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    firsts = [row.answer_id for row in prompts]
    return Batch(tuple(prompts), torch.tensor(ids), torch.tensor(mask), torch.tensor(firsts))
