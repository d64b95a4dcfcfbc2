"""What the commands ask, and whom: single prompts by id, as texts or from facts; a model where the options say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssm_interp.cli.output import tell
from ssm_interp.errors import FlowError, PromptError
from ssm_interp.experiments import Study
from ssm_interp.experiments.commands import flat
from ssm_interp.experiments.parts import Facts, OnDevice, Picked, Weights
from ssm_interp.flow.study_facts import StudyFacts
from ssm_interp.flow.study_job import load_for
from ssm_interp.prompts import Prompt, TokenizedPrompt, load_prompts, tokenize, with_ids

OWN_TEXT = "For a text of your own, give its answer too: --answer Paris"


def loaded(name: str, model: Weights, computed: OnDevice) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, where and as the options say; raises as `load_for`."""
    options = {"model": name, "revision": model.revision, "dtype": model.dtype}
    how = {"device": computed.device, "device_map": computed.device_map}
    return load_for(Study.model_validate(options | how))


def check_once(models: Sequence[str]) -> None:
    """Raise FlowError if a model is named twice."""
    if len(set(models)) < len(models):
        raise FlowError(f"give each --model once, got {', '.join(models)}")


def picked(asked: Picked) -> list[Prompt]:
    """The prompts that words name: ids of facts, or texts with their answers; without any, a draw from the facts.

    Raises:
        PromptError: no such id; a text without its answer, or an answer without a text; else as `load_prompts`.
    """
    if not asked.words:
        if asked.answer or asked.subject:
            raise PromptError("--answer and --subject are of a text of your own, and there is none; give one")
        return drawn(asked)
    facts = _facts(asked)
    ids = {prompt.id for prompt in facts}
    texts = [word for word in asked.words if word not in ids]
    if not texts and (asked.answer or asked.subject):
        raise PromptError(
            f"{asked.words[0]} is the id of a prompt, which has its own answer and subject; leave --answer and "
            "--subject out"
        )
    if texts and not asked.answer:
        try:
            with_ids(facts, texts)
        except PromptError as error:
            error.add_note(OWN_TEXT)
            raise
    for name, values in (("--answer", asked.answer), ("--subject", asked.subject or texts)):
        if len(values) != len(texts):
            raise PromptError(f"there are {len(texts)} texts and {len(values)} of {name}; give one for each text")
    parts = zip(texts, asked.subject or texts, asked.answer, strict=True)
    own = {text: Prompt(text, subject=subject, answer=answer) for text, subject, answer in parts}
    return [own[word] if word in own else with_ids(facts, [word])[0] for word in asked.words]


def picked_alone(asked: Picked) -> Prompt:
    """The one prompt that is picked.

    Raises:
        PromptError: there are several; else as `picked`.
    """
    first, *others = picked(asked)
    if others and not asked.words:
        raise PromptError(
            f"{asked.facts} holds {1 + len(others)} prompts, and one is asked; name it by its id, such as "
            f"{first.id or first.text!r}, or give a text"
        )
    if others:
        raise PromptError(f"one prompt is asked here, and {1 + len(others)} are given: {', '.join(asked.words)}")
    return first


def drawn(asked: Facts) -> list[Prompt]:
    """As many prompts of the facts as are asked for, drawn as a study draws them."""
    fields = {name: value for name, value in flat(asked).items() if name in Study.model_fields}
    facts = StudyFacts(Study.model_validate({"model": "any"} | fields))
    if facts.bad:
        tell(f"{asked.facts}: rows left out: {len(facts.bad)}, no prompts; first: {facts.bad[0]}")
    return facts.prompts


def tokenized(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, skip_bad: bool
) -> list[TokenizedPrompt]:
    """Prompts in the tokens of a model; those that its tokenizer cannot take raise, or are left out and told."""
    rows, bad = [], []
    for prompt in prompts:
        try:
            rows.append(tokenize(prompt, tokenizer))
        except PromptError as error:
            bad.append(error)
            if not skip_bad or len(bad) == len(prompts):
                raise
    if bad:
        tell(f"left out {len(bad)} of {len(prompts)} prompts, which the tokenizer cannot take; first: {bad[0]}")
    return rows


def _facts(asked: Facts) -> list[Prompt]:
    left_out: list[PromptError] = []
    on_bad: Callable[[PromptError], object] | None = left_out.append if asked.skip_bad else None
    return load_prompts(asked.facts, columns=asked.columns, on_bad=on_bad)
