"""Token roles by character offsets, under tokenizers that differ in what they do with spaces and special tokens."""

import random
from functools import cache

import pytest
import torch
from random_terms import as_users_run_it
from tiny_flow import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, PythonBackend

from ssm_interp.prompts import ROLES, Prompt, PromptError, check_role, encode, load_prompts, pad, tokenize

FRANCE = Prompt("The capital of France is", "France", "Paris")


@cache
def byte_tokenizer(*, trim: bool = False, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-NeoX has it; `trim` leaves the space out of a token's characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{p.text} {p.answer}" for p in load_prompts()], trainer)
    pattern = f"{'<s>' if bos else ''} $A {'</s>' if eos else ''}".strip()
    specials = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim),
            processors.TemplateProcessing(single=pattern, special_tokens=specials),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with the space in front, the first word included, as SentencePiece makes them."""
    vocabulary = [("<unk>", 0.0), *((p, -3.0) for p in ("▁The", "▁capital", "▁of", "▁Fr", "ance", "▁is", "▁Par", "is"))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_roles_of_a_whole_word_tokenizer() -> None:
    # ban dus kit lox mes: the subject is the third and fourth word
    tokenized = tokenize(Prompt("ban dus kit lox mes", "kit lox", "rat"), word_tokenizer())
    assert dict(tokenized.roles) == {
        "first": (0,),
        "last": (4,),
        "subject": (2, 3),
        "relation": (0, 1, 4),
        "context": (0, 1),
        "all": (0, 1, 2, 3, 4),
        "relation_minus_last": (0, 1),
        "subject_first": (2,),
        "subject_last": (3,),
    }
    assert tuple(tokenized.roles) == ROLES
    assert word_tokenizer().decode([tokenized.answer_id]) == "rat"


def test_subject_at_either_end() -> None:
    at_start = tokenize(Prompt("kit lox ban", "kit lox", "rat"), word_tokenizer())
    assert at_start.positions("first") == (0,)
    assert at_start.positions("context") == ()
    assert at_start.positions("relation") == (2,)
    at_end = tokenize(Prompt("ban kit lox", "kit lox", "rat"), word_tokenizer())
    assert at_end.positions("last") == (2,)
    assert at_end.positions("relation") == at_end.positions("relation_minus_last") == (0,)
    alone = tokenize(Prompt("kit", "kit", "rat"), word_tokenizer())
    assert [role for role in ROLES if not alone.positions(role)] == ["relation", "context", "relation_minus_last"]


@pytest.mark.parametrize("trim", [False, True])
def test_subject_tokens_are_the_same_whether_spans_hold_the_space_or_not(trim: bool) -> None:
    tokenizer = byte_tokenizer(trim=trim)
    for prompt in random.Random(0).sample(load_prompts(), 200):
        tokenized = tokenize(prompt, tokenizer)
        subject = tokenized.positions("subject")
        assert subject == tuple(range(subject[0], subject[-1] + 1))
        assert tokenizer.decode([tokenized.ids[i] for i in subject]).strip() == prompt.subject
        assert sorted(subject + tokenized.positions("relation")) == list(range(len(tokenized)))
        assert tokenizer.encode(" " + prompt.answer)[0] == tokenized.answer_id


@pytest.mark.parametrize("trim", [False, True])
def test_tokens_read_as_the_text_does(trim: bool) -> None:
    for prompt in load_prompts()[:50]:
        assert "".join(encode(prompt.text, byte_tokenizer(trim=trim)).tokens) == prompt.text


def test_the_bytes_of_one_character_all_belong_to_the_subject() -> None:
    tokenized = tokenize(Prompt("In Łódź they speak", "Łódź", "Polish"), byte_tokenizer())
    subject = tokenized.positions("subject")
    assert byte_tokenizer().decode([tokenized.ids[i] for i in subject]).strip() == "Łódź"
    assert len(subject) > 4
    assert all("\N{REPLACEMENT CHARACTER}" not in token for token in tokenized.tokens)


def test_a_token_that_overlaps_the_subject_in_part_belongs_to_it() -> None:
    prompt = Prompt("The capital of Franceland is", "France", "Paris")
    tokenized = tokenize(prompt, byte_tokenizer())
    covered = "".join(tokenized.tokens[i] for i in tokenized.positions("subject"))
    assert covered.lstrip().startswith("France")
    plain = Prompt("The capitals of France are", "capital", "Paris")
    assert tokenize(plain, byte_tokenizer()).positions("subject_first") == (1,)


def test_a_bos_token_is_the_first_position_and_no_part_of_the_subject() -> None:
    prompt = Prompt("France has as its capital the city of", "France", "Paris")
    plain, with_bos = tokenize(prompt, byte_tokenizer()), tokenize(prompt, byte_tokenizer(bos=True))
    assert with_bos.ids == (0, *plain.ids)
    assert with_bos.tokens[0] == "<s>"
    assert with_bos.positions("first") == with_bos.positions("context") == (0,)
    assert with_bos.positions("subject") == tuple(i + 1 for i in plain.positions("subject"))
    assert 0 in with_bos.positions("relation")
    assert with_bos.answer_id == plain.answer_id


def test_metaspace_pieces() -> None:
    tokenized = tokenize(FRANCE, metaspace_tokenizer())
    assert tokenized.tokens == ("The", " capital", " of", " Fr", "ance", " is")
    assert tokenized.positions("subject") == (3, 4)
    assert metaspace_tokenizer().convert_ids_to_tokens(tokenized.answer_id) == "▁Par"


def test_answers_without_a_token_of_their_own_are_refused() -> None:
    with pytest.raises(PromptError, match="adds a token at the end"):
        tokenize(FRANCE, byte_tokenizer(eos=True))
    with pytest.raises(PromptError, match=r"the tokenizer does not know it \(it becomes '\[UNK\]'\)"):
        tokenize(Prompt("ban dus", "dus", "Paris"), word_tokenizer())
    spaces = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, " ": 3, "a b": 4}, unk_token="[UNK]"))
    spaces.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    split = PreTrainedTokenizerFast(tokenizer_object=spaces, unk_token="[UNK]")
    with pytest.raises(PromptError, match="the next token is ' '.* keeps the space with the word"):
        tokenize(Prompt("a", "a", "b"), split)
    spaces = Tokenizer.from_str(spaces.to_str())
    spaces.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    merging = PreTrainedTokenizerFast(tokenizer_object=spaces, unk_token="[UNK]")
    with pytest.raises(PromptError, match=r"the text's tokens become \['a b'\], without it they are \['a'\]"):
        tokenize(Prompt("a", "a", "b"), merging)


def test_a_tokenizer_that_drops_the_subject_is_refused() -> None:
    dropping = Tokenizer(models.WordLevel({"a": 1, "b": 2, "[UNK]": 0}, unk_token="[UNK]"))
    dropping.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "removed"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=dropping, unk_token="[UNK]")
    with pytest.raises(PromptError, match="no token of 'a x a' covers its subject 'x'"):
        tokenize(Prompt("a x a", "x", "b"), tokenizer)
    with pytest.raises(PromptError, match="no tokens"):
        encode("", tokenizer)
    with pytest.raises(PromptError, match="no tokens"):
        encode("xx", tokenizer)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow(PythonBackend):
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(PromptError, match="Slow is a slow tokenizer .* use_fast=True"):
        encode("a", Slow())


def test_an_unknown_role_names_the_nearest_one() -> None:
    with pytest.raises(PromptError, match="no role 'subjects': did you mean 'subject'?"):
        check_role("subjects")
    with pytest.raises(PromptError, match="no role 'zzz': the roles are first, last"):
        tokenize(Prompt("ban dus", "dus", "kit"), word_tokenizer()).positions("zzz")


def test_padding_shifts_the_roles() -> None:
    texts = ["dus", "ban dus", "ban kit lox mes dus"]
    batch = pad([tokenize(Prompt(text, "dus", "rat"), word_tokenizer()) for text in texts], pad_id=3)
    assert batch.input_ids.shape == (3, 5)
    assert batch.attention_mask.tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert (batch.input_ids[batch.attention_mask == 0] == 3).all()
    assert batch.positions("last") == batch.positions("subject") == [[4], [4], [4]]
    assert batch.positions("first") == [[4], [3], [0]]
    assert batch.positions("context") == [[], [3], [0, 1, 2, 3]]
    for row, prompt in enumerate(batch.prompts):
        shown = batch.input_ids[row, torch.tensor(batch.positions("all")[row])]
        assert tuple(shown.tolist()) == prompt.ids
    assert batch.to("cpu").answer_ids.tolist() == [prompt.answer_id for prompt in batch.prompts]
    with pytest.raises(PromptError, match="at least one prompt"):
        pad([])
    with as_users_run_it():
        with pytest.raises(PromptError, match="pad takes what tokenize.* gives, got Prompt"):
            pad([Prompt("a dus", "dus", "rat")])  # type: ignore[list-item]
        with pytest.raises(PromptError, match="tokenize takes a Prompt, got str"):
            tokenize("a dus", word_tokenizer())  # type: ignore[arg-type]
