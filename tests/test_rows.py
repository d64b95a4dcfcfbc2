"""Many knockouts as rows of one step, against one hooked full forward each."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from random_terms import as_users_run_it
from tiny_hosts import NAMES, build, inputs, padded
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ssm_interp as si
from ssm_interp.hooks.rows import site as rowsite
from ssm_interp.hooks.rows import steps as rows_module
from ssm_interp.hooks.rows.engine import run_each
from ssm_interp.hooks.rows.trial import obstacle
from ssm_interp.hooks.seam.blocks import blocks_of, entering
from ssm_interp.hooks.seam.operators import OPERATORS, Operator

LENGTH = 9
ROLES = {
    "first": [0],
    "last": [LENGTH - 1],
    "subject": [2, 3, 4],
    "relation": [0, 1, 5, 6, 7, 8],
    "context": [0, 1],
    "none": [[], []],
    "all": list(range(LENGTH)),
}


def answers(ssm: si.Attachment, ids: Tensor, variants: Sequence[object], **options: object) -> Tensor:
    """Logits of every variant and row, `[v b vocabulary]`; each must come once."""
    found: dict[tuple[int, int], Tensor] = {}
    for variants_here, rows, logits in run_each(ssm, ids, variants, **options):
        for i, variant in enumerate(variants_here):
            for j, row in enumerate(rows):
                assert (variant, row) not in found
                found[variant, row] = logits[i, j]
    return torch.stack([torch.stack([found[v, r] for r in range(len(ids))]) for v in range(len(variants))])


def forwards(ssm: si.Attachment, ids: Tensor, variants: Sequence[object], mask: Tensor | None = None) -> Tensor:
    """The same by a full forward each."""
    found = []
    for variant in variants:
        edits = (variant,) if isinstance(variant, si.Knockout) else variant
        edits = [edit for edit in edits if not swapped(edit)]
        with torch.no_grad(), ssm.edit(*edits):
            logits = ssm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        last = [-1] * len(ids) if mask is None else [int(row.nonzero()[-1, 0]) for row in mask]
        found.append(logits[range(len(ids)), last])
    return torch.stack(found)


def swapped(knockout: si.Knockout) -> bool:
    """Whether all sources come after all targets, so that there is no edge, which `edit` would refuse."""
    sources, targets = knockout.sources, knockout.targets
    flat = all(named and isinstance(named[0], int) and min(named) >= 0 for named in (sources, targets))
    return flat and min(sources) > max(targets)


def windows(ssm: si.Attachment, through: object = None) -> list[tuple[int, ...]]:
    layers = ssm.layers_with(through)
    return [layers[s : s + size] for size in range(1, len(layers) + 1) for s in range(len(layers) - size + 1)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def precise(name: str) -> PreTrainedModel:
    """In float64. Nemotron-H would route to experts in fp32 all the same, by a product that varies with the batch."""
    dense = {"layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]}
    return build(name, dtype=torch.float64, **(dense if name == "nemotron_h" else {}))


@pytest.mark.parametrize("target", ["first", "context", "last", "subject", "relation", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_a_full_forward_for_every_role_and_window(name: str, target: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(build(name)) as ssm:
        variants = [()] + [
            si.Knockout(sources=source, targets=ROLES[target], layers=window)
            for source in ROLES.values()
            for window in windows(ssm)
        ]
        expected = forwards(ssm, ids, variants)
        assert error(answers(ssm, ids, variants), expected) < 1e-5
        moved = (expected - expected[0]).abs().amax((1, 2)) / expected[0].abs().max()
        assert moved.max() > (1e-3 if target in ("first", "context") else 0.05)  # there is something to get wrong


@pytest.mark.parametrize("name", NAMES)
def test_exact_in_float64(name: str) -> None:
    ids = inputs(batch=3, length=LENGTH)["input_ids"]
    with si.attach(precise(name), own_operator=True) as ssm:
        variants = [
            si.Knockout(sources=ROLES[source], targets=ROLES[target], layers=window, features=features)
            for source in ("subject", "relation", "last")
            for target in ("last", "subject", "relation")
            for window in windows(ssm)[::2]
            for features in (None, [0, 2, 3], [(0, 1), (3, 0), (3, 2)])
        ]
        assert error(answers(ssm, ids, variants), forwards(ssm, ids, variants)) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_and_batches_change_nothing(name: str, side: str) -> None:
    batch = padded([7, 9, 4, 9, 7], side=side)
    mask = batch["attention_mask"]
    rows = [row.nonzero()[:, 0].tolist() for row in mask]
    with si.attach(precise(name), own_operator=True) as ssm:
        layers = ssm.layers_with()
        variants = [
            si.Knockout(sources=[row[1:3] for row in rows], targets=[row[-1:] for row in rows], layers=layers[:2]),
            si.Knockout(sources=[row[1:3] for row in rows], targets=[row[2:4] for row in rows], layers=layers[1:]),
            (),
            si.Knockout(sources=[row[:1] if len(row) > 4 else [] for row in rows], targets=None),
        ]
        found = answers(ssm, batch["input_ids"], variants, attention_mask=mask)
        for row, columns in enumerate(rows):
            alone = batch["input_ids"][row : row + 1, columns]
            shift = columns[0]
            single = [
                si.Knockout(
                    sources=[[column - shift for column in variant.sources[row]]],
                    targets=None if variant.targets is None else [[column - shift for column in variant.targets[row]]],
                    layers=variant.layers,
                )
                if variant
                else ()
                for variant in variants
            ]
            assert error(found[:, row : row + 1], forwards(ssm, alone, single)) < 1e-9


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba"])
def test_memory_only_changes_how_many_rows_go_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = inputs(batch=5, length=LENGTH)["input_ids"]
    with si.attach(build(name)) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=[6, 8], layers=window) for window in windows(ssm)]
        steps: list[int] = []
        step = rows_module._Group._step
        assert obstacle(ssm) is None  # whose trial makes steps of its own

        def counted(group: object, cache: object, some: Sequence[int]) -> Tensor:
            steps.append(len(some))
            return step(group, cache, some)

        monkeypatch.setattr(rows_module._Group, "_step", counted)
        whole = answers(ssm, ids, variants)
        assert steps == [len(variants)]
        steps.clear()
        assert error(answers(ssm, ids, variants, max_memory=1), whole) < 1e-5
        assert steps == [1] * len(variants) * len(ids)


def test_out_of_memory_halves_the_rows_and_then_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    step, most = rows_module._Group._step, 3
    steps: list[int] = []

    def scarce(group: object, cache: object, some: Sequence[int]) -> Tensor:
        steps.append(len(some))
        if len(some) > most:
            torch.empty(10**15)  # what a CPU that is out of memory raises
        return step(group, cache, some)

    with si.attach(build("mamba2")) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=-1, layers=window) for window in windows(ssm)]
        expected = answers(ssm, ids, variants)
        monkeypatch.setattr(rows_module._Group, "_step", scarce)
        assert error(answers(ssm, ids, variants), expected) < 1e-5
        assert steps == [10, 5, 2, 2, 2, 2, 2]
        most = 0
        with pytest.raises(si.HookError, match="out of memory with 2 prompts and 1 variant in a step; set a smaller"):
            answers(ssm, ids, variants)


def test_the_host_that_forgets_its_clamp_in_decode_is_exact_all_the_same() -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(build("mamba2", time_step_limit=(0.5, 0.8))) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=-1, layers=window) for window in windows(ssm)]
        expected = forwards(ssm, ids, variants)
        assert error(answers(ssm, ids, variants), expected) < 1e-5
    with si.attach(build("mamba2", time_step_limit=(0.0, float("inf")))) as ssm:
        assert error(forwards(ssm, ids, variants), expected) > 0.01  # the clamp matters


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_kernel_is_called_once_more_for_each_set_of_sources(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(build(name)) as ssm:
        variants = [si.Knockout(sources=source, targets=-1) for source in ([2, 3], [0], [8])]
        expected = forwards(ssm, ids, variants)
        calls: list[int] = []
        assert obstacle(ssm) is None
        monkeypatch.setattr(Operator, "is_reference", property(lambda self: False))
        for adapter in OPERATORS.values():
            run = adapter.run
            monkeypatch.setattr(adapter, "run", lambda self, given, run=run: (calls.append(1), run(self, given))[1])
        assert error(answers(ssm, ids, variants), expected) < 1e-5
        heads = 2 if name == "zamba" else 1
        assert len(calls) == len(ssm.layers) * heads * (1 + 3)


def test_threads_do_not_see_each_others_rows() -> None:
    model = build("mamba2")
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(model) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=-1, layers=window) for window in windows(ssm)]
        expected, clean = answers(ssm, ids, variants), forwards(ssm, ids, [()])
        found: list[Tensor] = []

        def read() -> None:
            for _ in range(20):
                found.append(forwards(ssm, ids, [()]))

        thread = threading.Thread(target=read)
        thread.start()
        while thread.is_alive():
            assert torch.equal(answers(ssm, ids, variants), expected)
        thread.join()
        assert len(found) == 20
        assert all(torch.equal(one, clean) for one in found)
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_rows_cannot_be_exact_with_is_refused_by_name() -> None:
    ids = inputs()["input_ids"]
    knockout = si.Knockout(sources=0, targets=-1)
    with si.attach(build("mamba")) as ssm:
        handle = ssm.layers[2].hook_x.add_hook(lambda x, hook: x)
        with pytest.raises(si.HookError, match="hook_x of layer 2 is hooked or exposed; use one forward per knockout"):
            run_each(ssm, ids, [knockout])
        handle.remove()
        handle = ssm.model.backbone.layers[1].register_forward_hook(lambda *_: None)
        with pytest.raises(si.HookError, match=r"backbone\.layers\.1 has forward hooks"):
            run_each(ssm, ids, [knockout])
        handle.remove()
        with ssm.edit(knockout), pytest.raises(si.HookError, match="other edits are at work"):
            run_each(ssm, ids, [knockout])
        ssm.model.train()
        with pytest.raises(si.HookError, match="MambaForCausalLM is in training mode"):
            run_each(ssm, ids, [knockout])
        ssm.model.eval()
        assert obstacle(ssm) is None
    with pytest.raises(si.HookError, match="this attachment was detached"):
        run_each(ssm, ids, [()])
    with si.attach(ssm.model.backbone) as headless:
        assert obstacle(headless) == "MambaModel has no language-model head, and gives no logits"


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_captures_of_transformers_stay_on_the_modules_and_do_no_harm(host: PreTrainedModel, option: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    if option == "output_attentions":
        host.set_attn_implementation("eager")
    with si.attach(host) as ssm:
        captured = ssm.model(input_ids=ids, **{option: True})
        assert obstacle(ssm) is None
        variants = [si.Knockout(sources=[2, 3], targets=-1, layers=window) for window in windows(ssm)]
        expected = forwards(ssm, ids, variants)
        assert error(answers(ssm, ids, variants), expected) < 1e-5
        name = option.removeprefix("output_")
        again = ssm.model(input_ids=ids, **{option: True})
        pairs = list(zip(getattr(captured, name, ()), getattr(again, name, ()), strict=True))
        assert len(pairs) == {"hidden_states": host.config.num_hidden_layers + 1}.get(name, len(ssm.attention))
        assert all(torch.equal(one, other) for one, other in pairs)
        host.config.output_hidden_states = True  # now rows are captured, for nobody
        assert error(answers(ssm, ids, variants), expected) < 1e-5


QUANTISED = ["zamba", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"]  # others take `in_proj.weight`


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*:UserWarning")
@pytest.mark.parametrize("name", QUANTISED)
def test_activations_that_are_quantised_per_batch_are_found_by_a_trial(name: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    model = torch.ao.quantization.quantize_dynamic(build(name), {torch.nn.Linear}, dtype=torch.qint8)
    with si.attach(model) as ssm:
        assert "depends on the others in its batch" in str(obstacle(ssm))
        with pytest.raises(si.HookError, match="quantised per batch do that.*; use one forward per knockout inside"):
            run_each(ssm, ids, [()])
        assert si.hooks.answers(ssm, ids, [()], lambda logits: logits[:, 0]).how.startswith("full forwards: a row of")


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*:UserWarning")
def test_a_model_that_is_quantised_after_the_trial_is_tried_again() -> None:
    with si.attach(build("bamba")) as ssm:
        assert obstacle(ssm) is None
        torch.ao.quantization.quantize_dynamic(ssm.model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        assert "depends on the others in its batch" in str(obstacle(ssm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_trial_in_another_precision_finds_nothing(host: PreTrainedModel, dtype: torch.dtype) -> None:
    with si.attach(host.to(dtype)) as ssm:
        assert obstacle(ssm) is None


def test_rows_that_are_off_are_found_by_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rowsite.read_initial
    monkeypatch.setattr(rowsite, "read_initial", lambda terms, state: 1.05 * right(terms, state))
    with si.attach(build("mamba2")) as ssm:
        assert "rows of variants through Mamba2ForCausalLM are off by" in str(obstacle(ssm))


def test_a_model_without_weights_takes_no_rows() -> None:
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(build("mamba2").config).eval()
    with si.attach(outline) as ssm:
        assert obstacle(ssm) == "the model has no weights: they are on the device meta"


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_what_comes_up_between_two_answers_is_refused_too(name: str) -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    knockout = si.Knockout(sources=0, targets=-1)
    with si.attach(build(name)) as ssm:
        variants = [si.Knockout(sources=[2, 3], targets=-1, layers=window) for window in windows(ssm)]
        expected = answers(ssm, ids, variants)
        for variants_here, rows, logits in run_each(ssm, ids, variants, max_memory=1):
            forwards(ssm, ids, [knockout])  # an edit that has ended by the next step
            assert error(logits, expected[variants_here][:, rows]) < 1e-5
        going = run_each(ssm, ids, variants, max_memory=1)
        next(going)
        with ssm.edit(knockout), pytest.raises(si.HookError, match="other edits are at work"):
            next(going)
        going = run_each(ssm, ids, variants, max_memory=1)
        next(going)
    with pytest.raises(si.HookError, match="this attachment was detached"):
        next(going)


def test_a_hook_that_another_thread_takes_off_meanwhile_does_nothing() -> None:
    model, found = build("mamba2"), list[Tensor]()
    blocks = blocks_of(model)
    assert blocks is not None
    clean = model(**inputs()).logits
    with entering(blocks, lambda *_: pytest.fail("not of this call")):
        for block in blocks:
            block._forward_pre_hooks_with_kwargs.clear()  # where torch is between the two tables of a hook
        thread = threading.Thread(target=lambda: found.append(model(**inputs()).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], clean)


def test_bad_variants() -> None:
    ids = inputs(batch=2, length=LENGTH)["input_ids"]
    with si.attach(build("mamba2")) as ssm:
        for given, message in [
            ([], "at least one variant"),
            ([si.PatchState(position=0, state=0.0)], "takes knockouts, got PatchState"),
            ([si.Knockout(edges=[(3, 1)])], "given by sources and targets, not by single edges"),
            ([si.Knockout(sources=9, targets=-1)], "Knockout.sources names position 9, but the prompt has 9 positions"),
            ([si.Knockout(sources=0, layers=7)], r"no such layer \[7\]; this model has \[0, 1, 2, 3\]"),
            ([si.Knockout(sources=0, features=[8])], "has no feature 8; it has heads 0 to 7"),
            ([si.Knockout(sources=0, through="attention")], "Mamba2ForCausalLM has no attention layers"),
            ([(si.Knockout(sources=0), si.Knockout(sources=1, layers=2))], "variant 0 has two knockouts at the ssm of"),
            ([si.Knockout(sources=[[0], [1], [2]])], "names the positions of 3 rows, but the batch has 2"),
        ]:
            with pytest.raises((si.HookError, si.InterventionError), match=message):
                run_each(ssm, ids, given)
        with pytest.raises(si.HookError, match=r"input_ids must be \[b t\] with at least one token, got \[9\]"):
            run_each(ssm, ids[0], [()])
        with as_users_run_it():
            for bad_ids, given, options, message in [
                (ids.tolist(), [()], {}, "at least one token, got list"),
                (ids, si.Knockout(sources=0), {}, r"a sequence of variants, got one Knockout; write \[knockout\]"),
                (ids, [()], {"attention_mask": [1]}, r"the attention mask is a list, but input_ids are \[2, 9\]"),
                (ids, [()], {"max_memory": 0}, "max_memory must be a whole number of bytes, at least 1, got 0"),
                (ids, [()], {"max_memory": 1e9}, "whole number of bytes, at least 1, got 1000000000.0"),
            ]:
                with pytest.raises(si.HookError, match=message):
                    run_each(ssm, bad_ids, given, **options)
        hole = torch.ones_like(ids)
        hole[1, 4] = 0
        with pytest.raises(si.HookError, match="row 1 of the attention mask is not one run of ones"):
            list(run_each(ssm, ids, [()], attention_mask=hole))
        with pytest.raises(si.HookError, match=r"the attention mask is \[2, 4\], but input_ids are \[2, 9\]"):
            run_each(ssm, ids, [()], attention_mask=torch.ones(2, 4, dtype=torch.long))
