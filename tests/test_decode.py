"""Interventions on a cache: what was said of the prompt keeps its meaning token by token and in generate."""

from __future__ import annotations

import copy

import pytest
import torch
from support import cache_of, cached, decode, edited, logits, relative_error
from tiny_hosts import NAMES, build, inputs, padded, tokens_of

import ssm_interp as si

PROMPT, LENGTH = 5, 7


def whole(ssm: si.Attachment, *edits: si.Intervention) -> torch.Tensor:
    """All positions in one call, without a cache."""
    return edited(ssm, inputs(2, LENGTH) | {"use_cache": False}, *edits)


def stepwise(ssm: si.Attachment, *edits: si.Intervention) -> torch.Tensor:
    with ssm.edit(*edits):
        return decode(ssm.model, inputs(2, LENGTH)["input_ids"], PROMPT)


@pytest.mark.parametrize("name", NAMES)
def test_edits_of_the_prompt_in_decode_steps(name: str) -> None:
    """Positions in the prompt, counted from its end where negative, mean the same in one call over everything."""
    with si.attach(build(name)) as ssm:
        cases = [
            ([si.Knockout(sources=[1, 2], targets=-1)], [si.Knockout(sources=[1, 2], targets=4)]),
            ([si.Knockout(sources=[1, 2], targets=None)],) * 2,
            ([si.Knockout(sources=[-2], features=[0, 1])], [si.Knockout(sources=[3], features=[0, 1])]),
            ([si.Knockout(sources=[1], features=[(0, 1), (5, 2)])],) * 2,
            ([si.Knockout(), si.Knockout(sources=[1, 2])], [si.Knockout()]),
            ([si.PatchState(position=-1, state=0.0)], [si.PatchState(position=4, state=0.0)]),
            ([si.PatchState(position=2, state=0.0), si.Knockout(sources=[0, 3])],) * 2,
            ([si.SetDelta(value=0.3, positions=[-1])], [si.SetDelta(value=0.3, positions=[4])]),
            ([si.SetDelta(value=0.3, features=[0, 1])],) * 2,
            ([si.ScaleFeatures(factor=0.5, features=[(0, 1), (3, 0)])],) * 2,
            ([si.ScaleFeatures(factor=0.5, positions=-1)], [si.ScaleFeatures(factor=0.5, positions=4)]),
            ([si.EditAttention(edges=[(-1, 0)], value=0.5)], [si.EditAttention(edges=[(4, 0)], value=0.5)]),
        ]
        native = whole(ssm)
        for in_steps, at_once in cases:
            known = whole(ssm, *at_once)
            assert relative_error(stepwise(ssm, *in_steps), known) <= 1e-4, in_steps
            assert relative_error(known, native) > 1e-4, in_steps


@pytest.mark.parametrize("name", NAMES)
def test_generate_under_an_edit(name: str) -> None:
    """Greedy tokens under a lasting knockout equal those of full forwards without a cache."""
    model = build(name)
    with si.attach(model) as ssm, ssm.edit(si.Knockout(sources=[0, 1, 2])):
        ids = inputs(2, PROMPT)["input_ids"]
        found = model.generate(ids, max_new_tokens=5, do_sample=False)
        for _ in range(5):
            ids = torch.cat([ids, logits(model, {"input_ids": ids, "use_cache": False})[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(found, ids)


def test_generate_with_left_padding_and_rows() -> None:
    for name in ("mamba", "mamba2", "bamba"):
        model = build(name)
        case = padded([6, 4])
        with si.attach(model) as ssm:
            with ssm.edit(si.Knockout(sources=[[0, 1], [2, 3]])):
                found = model.generate(**case, max_new_tokens=4, do_sample=False)
            for row, ids in enumerate((case["input_ids"][:1], case["input_ids"][1:, 2:])):
                with ssm.edit(si.Knockout(sources=[0, 1])):
                    alone = model.generate(ids, max_new_tokens=4, do_sample=False)
                assert torch.equal(found[row, -4:], alone[0, -4:])


def test_beam_search_takes_the_removed_state_along() -> None:
    model = build("mamba2")
    ids = inputs(1, PROMPT)["input_ids"]
    with si.attach(model) as ssm, ssm.edit(si.Knockout(sources=[0, 1, 2])):
        beams = model.generate(
            ids, max_new_tokens=4, num_beams=3, do_sample=False, num_return_sequences=3, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        for row, score in zip(beams.sequences, beams.sequences_scores, strict=True):
            known = logits(model, {"input_ids": row[None], "use_cache": False}).log_softmax(-1)[0, PROMPT - 1 : -1]
            assert abs(float(known.gather(1, row[PROMPT:, None]).sum() / 4 - score)) <= 1e-4


def test_a_copied_cache_goes_its_own_way() -> None:
    model = build("mamba")
    ids = inputs(2, LENGTH)["input_ids"]
    with si.attach(model) as ssm, ssm.edit(si.Knockout(sources=[1, 2])), torch.no_grad():
        first = model(input_ids=ids[:, :PROMPT], use_cache=True)
        twin = copy.deepcopy(cache_of(first))
        once = model(input_ids=ids[:, PROMPT : PROMPT + 1], **cached(model, cache_of(first)), use_cache=True).logits
        model(input_ids=ids[:, PROMPT + 1 : PROMPT + 2], **cached(model, cache_of(first)), use_cache=True)
        assert torch.equal(model(input_ids=ids[:, PROMPT : PROMPT + 1], **cached(model, twin)).logits, once)


def test_several_tokens_on_a_filled_cache() -> None:
    """transformers' Mamba-2 goes on from the cached state, and so does the library's own operator in both families."""
    for name, own in (("mamba2", False), ("mamba2", True), ("mamba", True)):
        model = build(name)
        ids = inputs(2, LENGTH)["input_ids"]
        with si.attach(model, own_operator=own) as ssm:
            for edits in ([], [si.Knockout(sources=[1, 2])], [si.SetDelta(value=0.2)]):
                with ssm.edit(*edits), torch.no_grad():
                    first = model(input_ids=ids[:, :PROMPT], use_cache=True)
                    rest = model(input_ids=ids[:, PROMPT:], **cached(model, cache_of(first)), use_cache=True).logits
                known = whole(ssm, *edits)[:, PROMPT:]
                assert relative_error(rest, known) <= 1e-5


def test_hooks_in_decode_steps_see_this_calls_positions() -> None:
    for name in ("mamba", "mamba2"):
        model = build(name)
        shapes: list[tuple[int, ...]] = []
        with si.attach(model) as ssm:
            ssm.layers[0].hook_attn.add_hook(lambda attn, hook, shapes=shapes: shapes.append(tuple(attn.shape[2:])))
            decode(model, inputs(1, 4)["input_ids"], 3)
        assert shapes == [(3, 3), (1, 1)]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba", "bamba"])
def test_hooks_on_the_prompts_write_and_state_reach_the_cache(name: str) -> None:
    def halve(tensor: torch.Tensor, hook: si.HookPoint) -> torch.Tensor:
        if tensor.shape[1] == 1:  # a decode step
            return tensor
        return torch.cat([tensor[:, :2], 0.5 * tensor[:, 2:3], tensor[:, 3:]], dim=1)

    with si.attach(build(name)) as ssm:
        native = whole(ssm)
        for edits in ([], [si.Knockout(sources=[2, 3])]):
            for point in ("hook_write", "hook_state"):
                if edits and point == "hook_state":
                    continue
                for points in ssm.layers.values():
                    getattr(points, point).add_hook(halve)
                known = whole(ssm, *edits)
                assert relative_error(known, native) > 1e-4
                assert relative_error(stepwise(ssm, *edits), known) <= 1e-4, (point, edits)
                for points in ssm.layers.values():
                    getattr(points, point).remove_hooks()


def test_what_cannot_be_known_on_a_cache_is_refused() -> None:
    model = build("mamba")
    ids = inputs(2, LENGTH)["input_ids"]
    step = ids[:, PROMPT : PROMPT + 1]
    with si.attach(model) as ssm, torch.no_grad():
        first = model(input_ids=ids[:, :PROMPT], use_cache=True)
        late = pytest.raises(si.InterventionError, match="a prompt that this cache read without it")
        with late, ssm.edit(si.Knockout(sources=[1])):
            model(input_ids=step, **cached(model, cache_of(first)))
        with ssm.edit(si.Knockout(sources=[1]), si.Knockout(sources=[2])):
            first = model(input_ids=ids[:, :PROMPT], use_cache=True)
        other = pytest.raises(si.InterventionError, match="not those under which this cache read its prompt")
        with other, ssm.edit(si.Knockout(sources=[1])):
            model(input_ids=step, **cached(model, cache_of(first)))
        with ssm.edit(si.Knockout(sources=[1])):
            first = model(input_ids=ids[:, :PROMPT], use_cache=True)
        model(input_ids=step, **cached(model, cache_of(first)))  # a step without it
        with other, ssm.edit(si.Knockout(sources=[1])):
            model(input_ids=step, **cached(model, cache_of(first)))
        refused = pytest.raises(si.HookError, match="feed one token at a time, or attach with own_operator=True")
        with refused, ssm.edit(si.SetDelta(value=0.1)):
            model(input_ids=ids[:, PROMPT:], **cached(model, cache_of(first)))
    first = model(input_ids=ids[:, :PROMPT], use_cache=True)
    late = pytest.raises(si.InterventionError, match="read without it")
    with si.attach(model) as ssm, late, ssm.edit(si.Knockout(sources=[1])):
        model(input_ids=step, **cached(model, cache_of(first)))


@pytest.mark.parametrize("chunk", [2, PROMPT - 1])
def test_a_prompt_read_in_chunks_is_refused_where_its_end_matters(chunk: int) -> None:
    ids = inputs(2, PROMPT)["input_ids"]
    for name in ("jamba", "bamba"):  # of the pure Mambas transformers reads none in chunks
        model = build(name)
        options = {"max_new_tokens": 2, "do_sample": False}
        with si.attach(model, own_operator=True) as ssm:
            for edit in (
                si.Knockout(sources=[0], targets=-1),
                si.Knockout(sources=[0], targets=-1, through="conv"),
                si.PatchState(position=-1, state=0.0),
                si.SetDelta(value=0.1, positions=-1),
            ):
                with ssm.edit(edit), pytest.raises(si.InterventionError, match="chunks.*without prefill_chunk_size"):
                    model.generate(ids, prefill_chunk_size=chunk, **options)
                with ssm.edit(edit):
                    whole = model.generate(ids, **options)
                    assert torch.equal(model.generate(ids, prefill_chunk_size=PROMPT, **options), whole)
            with ssm.edit(si.ScaleFeatures(factor=0.5)):  # names no position
                whole = model.generate(ids, **options)
                assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **options), whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "zamba"])
def test_negative_positions_count_from_each_rows_last_token(name: str, side: str) -> None:
    batch = padded([7, 4], side=side)
    with si.attach(build(name)) as ssm:
        for edit in (
            si.Knockout(sources=[-3, -2], targets=-1),
            si.Knockout(edges=[(-1, -3), (-2, -2)]),
            si.Knockout(sources=-2, targets=-1, through="conv"),
            si.PatchState(position=-2, state=0.0),
            si.SetDelta(value=0.7, positions=-3),
            *([si.Knockout(sources=[-3], targets=-1, through="attention")] if ssm.attention else []),
        ):
            found = edited(ssm, batch, edit)
            for row in range(2):
                known = edited(ssm, tokens_of(batch, row), edit)[0, -1]
                last = int(batch["attention_mask"][row].nonzero()[-1, 0])
                assert relative_error(found[row, last], known) <= 1e-5, edit
            assert relative_error(found[:, -1], logits(ssm.model, batch)[:, -1]) > 1e-4


def test_right_padded_states_are_not_gone_on_from() -> None:
    batch = padded([6, 4], side="right")
    for name in ("mamba", "mamba2"):
        model = build(name)
        with si.attach(model) as ssm, torch.no_grad(), ssm.edit(si.Knockout(sources=[3])):
            cache = cache_of(model(**batch, use_cache=True))
            refused = pytest.raises(si.HookError, match=r"right-padded rows \(\[1\]\).*pad on the left")
            with refused:
                model(input_ids=batch["input_ids"][:, :1], **cached(model, cache))
            cache = cache_of(model(**padded([6, 4]), use_cache=True))
            model(input_ids=batch["input_ids"][:, :1], **cached(model, cache))


@pytest.mark.parametrize("name", ["mamba2", "jamba"])  # until 5.23 a Mamba-1 is given no cache for its second prompt
def test_guidance_reads_a_prompt_whose_positions_nobody_named(name: str) -> None:
    model = build(name)
    ids = inputs(1, PROMPT)["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "guidance_scale": 1.5}
    naming: list[si.Intervention] = [
        si.Knockout(sources=[2, 3], targets=-1),
        si.Knockout(sources=0),  # which the unconditional prompt, of one token, has too
        si.Knockout(edges=[(-1, 2)]),
        si.PatchState(position=3, state=0.0),
        si.SetDelta(value=0.0, positions=0),
    ]
    naming += [si.Knockout(sources=0, through="attention")] if name == "jamba" else []
    with si.attach(model) as ssm:
        native = model.generate(ids, **options)
        for edit in naming:
            with ssm.edit(edit), pytest.raises(si.InterventionError, match="with guidance_scale .* second, uncond"):
                model.generate(ids, **options)
        with ssm.edit(si.Knockout()):  # everywhere, in both prompts
            assert model.generate(ids, **options).shape == native.shape
        with ssm.edit(naming[0]):
            assert model.generate(ids, **options | {"guidance_scale": 1.0}).shape == native.shape
        assert torch.equal(model.generate(ids, **options), native)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])  # in 5.15 the reset of attention's part leaves its length
def test_a_reset_cache_holds_as_much_as_a_new_one(name: str) -> None:
    ids = inputs(2, LENGTH)["input_ids"]
    with si.attach(build(name)) as ssm, torch.no_grad():
        cache = None
        for sources in ([0, 1], [0, 1], [2], [1, 2]):
            with ssm.edit(si.Knockout(sources=sources)):
                options = {} if cache is None else cached(ssm.model, cache)
                output = ssm.model(input_ids=ids[:, :PROMPT], use_cache=True, **options)
                cache = cache_of(output)
                rest = ssm.model(input_ids=ids[:, PROMPT : PROMPT + 1], **cached(ssm.model, cache)).logits
                known = logits(ssm.model, {"input_ids": ids[:, : PROMPT + 1], "use_cache": False})[:, -1:]
            assert relative_error(rest, known) <= 1e-4
            assert {cache.layers[layer].number_of_states for layer in ssm.layers} == {2}
            assert all(sorted(cache.layers[layer].recurrent_states) == [0, 1] for layer in ssm.layers)
            cache.reset()
        native = ssm.model(input_ids=ids[:, :PROMPT], use_cache=True, **cached(ssm.model, cache)).logits
        assert torch.equal(native, logits(ssm.model, {"input_ids": ids[:, :PROMPT]}))
        assert {cache.layers[layer].number_of_states for layer in ssm.layers} == {1}


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "zamba"])
@pytest.mark.parametrize("own", [False, True])
def test_states_stay_those_of_the_last_token_over_padding(name: str, own: bool) -> None:
    batch = padded([6, 3], side="right")
    with si.attach(build(name), own_operator=own) as ssm:
        states = ssm.run(batch, read="state")["state"]
        alone = ssm.run(tokens_of(batch, 1), read="state")["state"]
        for layer in ssm.layers:
            for column in (2, 3, 5):
                assert relative_error(states[layer][1, column], alone[layer][0, -1]) <= 1e-5
