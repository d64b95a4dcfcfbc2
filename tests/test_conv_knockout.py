"""Knockouts through the convolution: what the last tokens give to a target beside the SSM."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from support import decode, edited, logits, relative_error
from test_rows import answers, error, forwards, precise, windows
from tiny_hosts import NAMES, build, inputs, padded
from torch import Tensor
from transformers import PreTrainedModel

import ssm_interp as si

BOTH = ("ssm", "conv")
MADE_OF_IT = ("x", "dt", "B", "C")
STATELESS = ("mamba", "falcon_mamba", "mamba2")  # no attention layers
TAPS = 4


def by_hand(ssm: si.Attachment, ids: Tensor, sources: list[int], targets: list[int], layer: int) -> Tensor:
    """The targets' x, dt, B, C taken from a run whose convolution never got the sources; then the SSM's edges."""
    points = ssm.layers[layer]
    absent = points.hook_conv.add_hook(lambda conv, _: conv.index_fill(1, torch.tensor(sources), 0.0))
    made = ssm.run(ids, read=MADE_OF_IT, layers=layer, use_cache=False)
    absent.remove()
    with ExitStack() as stack:
        for name in MADE_OF_IT:
            stack.callback(points.point(name).add_hook(_put(made[name, layer], targets)).remove)
        return edited(ssm, {"input_ids": ids}, si.Knockout(sources=sources, targets=targets, layers=layer))


def _put(given: Tensor, targets: list[int]) -> object:
    left = list(given.split(1, dim=2)) if given.shape[2] > 1 else [given]

    def hook(tensor: Tensor, _: object) -> Tensor:
        part = torch.cat([left.pop(0) for _ in range(tensor.shape[2])], dim=2)  # Zamba computes its heads in two calls
        return tensor.index_copy(1, torch.tensor(targets), part[:, targets])

    return hook


@pytest.mark.parametrize(("sources", "targets"), [([6, 7], [8]), ([5], [5, 6, 7, 8]), ([8], [8]), ([0, 1, 2], [3, 8])])
def test_targets_are_computed_as_if_the_sources_inputs_were_absent(
    host: PreTrainedModel, sources: list[int], targets: list[int]
) -> None:
    ids = inputs(2, 9)["input_ids"]
    with si.attach(host) as ssm:
        layer = list(ssm.layers)[-2 if len(ssm.layers) > 1 else -1]
        found = edited(
            ssm, {"input_ids": ids}, si.Knockout(sources=sources, targets=targets, layers=layer, through=BOTH)
        )
        assert relative_error(found, by_hand(ssm, ids, sources, targets, layer)) <= 1e-5
        alone = edited(ssm, {"input_ids": ids}, si.Knockout(sources=sources, targets=targets, layers=layer))
        assert relative_error(found, alone) > 1e-3


@pytest.mark.parametrize("name", STATELESS)
def test_nothing_leaks_once_the_convolution_is_closed(name: str) -> None:
    """The last token, cut off from all others in every layer, no longer depends on them; without `conv` it does."""
    first, second = inputs(1, 7, seed=1)["input_ids"], inputs(1, 7, seed=2)["input_ids"]
    second[:, -1] = first[:, -1]
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        cut = si.Knockout(sources=range(6), targets=-1, through=BOTH)
        found = [edited(ssm, {"input_ids": ids}, cut)[:, -1] for ids in (first, second)]
        assert relative_error(*found) <= 1e-7  # the logits are float32
        leaky = si.Knockout(sources=range(6), targets=-1)
        assert relative_error(*(edited(ssm, {"input_ids": ids}, leaky)[:, -1] for ids in (first, second))) > 1e-2


def test_pairs_rows_and_overlaps(host: PreTrainedModel) -> None:
    case = inputs(2, 7)
    with si.attach(host) as ssm:
        product = edited(ssm, case, si.Knockout(sources=[4, 5], targets=[6], through="conv"))
        pairs = edited(ssm, case, si.Knockout(edges=[(6, 4), (6, 5)], through="conv"))
        assert torch.equal(pairs, product)
        twice = [si.Knockout(sources=source, targets=[6], through="conv") for source in ([4, 5], [5])]
        assert torch.equal(edited(ssm, case, *twice), product)
        rows = edited(ssm, case, si.Knockout(sources=[[4, 5], []], targets=[[6], [6]], through="conv"))
        assert torch.equal(rows[0], product[0])
        assert relative_error(rows[1], logits(host, case)[1]) <= 1e-5
        far = edited(ssm, case, si.Knockout(sources=[0, 1, 2], targets=[6], through="conv"))
        assert relative_error(far, logits(host, case)) <= 1e-6  # out of reach of the taps


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(host: PreTrainedModel, side: str) -> None:
    batch = padded([8, 5], side=side)
    rows = [row.nonzero()[:, 0].tolist() for row in batch["attention_mask"]]
    with si.attach(host) as ssm:
        cut = si.Knockout(sources=[row[-3:-1] for row in rows], targets=[row[-1:] for row in rows], through=BOTH)
        found = edited(ssm, batch, cut)
        for row, columns in enumerate(rows):
            alone = {"input_ids": batch["input_ids"][row : row + 1, columns]}
            known = edited(ssm, alone, si.Knockout(sources=[-3, -2], targets=-1, through=BOTH))
            assert relative_error(found[row, columns[-1]], known[0, -1]) <= 1e-4


@pytest.mark.parametrize("through", ["conv", BOTH])
@pytest.mark.parametrize("name", NAMES)
def test_decode_steps_equal_one_call(name: str, through: str | tuple[str, ...]) -> None:
    ids = inputs(2, 7)["input_ids"]
    with si.attach(build(name)) as ssm:
        cases = [
            (si.Knockout(sources=[3, 4], through=through),) * 2,
            (
                si.Knockout(sources=[3], targets=-1, through=through),
                si.Knockout(sources=[3], targets=4, through=through),
            ),
            (si.Knockout(through=through),) * 2,
        ]
        for in_steps, at_once in cases:
            known = edited(ssm, {"input_ids": ids, "use_cache": False}, at_once)
            with ssm.edit(in_steps):
                found = decode(ssm.model, ids, 5)
            assert relative_error(found, known) <= 1e-4


@pytest.mark.parametrize("target", [[8], [2, 3, 4], [0, 1, 5, 6, 7, 8]])
@pytest.mark.parametrize("name", NAMES)
def test_rows_equal_full_forwards(name: str, target: list[int]) -> None:
    ids = inputs(batch=2, length=9)["input_ids"]
    with si.attach(precise(name), own_operator=True) as ssm:
        variants = [
            si.Knockout(sources=source, targets=target, layers=window, through=through)
            for source in ([8], [6, 7], [0, 2, 3, 4])
            for window in windows(ssm)[::4]
            for through in ("conv", BOTH)  # the SSM alone is the business of test_rows
        ]
        expected = forwards(ssm, ids, variants)
        assert error(answers(ssm, ids, variants), expected) < (5e-7 if name == "zamba" else 1e-9)
        assert error(expected[::2], expected[1::2]) > 1e-2  # conv alone is another thing than both


def test_a_hook_on_the_inputs_reaches_the_cache(host: PreTrainedModel) -> None:
    ids = inputs(2, 7)["input_ids"]
    with si.attach(host) as ssm:
        for in_place in (False, True):
            hook = (lambda conv, _: conv.mul_(0.5) and None) if in_place else (lambda conv, _: conv * 0.5)
            handles = [points.hook_conv.add_hook(_halved if in_place else hook) for points in ssm.layers.values()]
            known = logits(host, {"input_ids": ids, "use_cache": False})
            for prompt in (2, 5):
                assert relative_error(decode(host, ids, prompt), known) <= 1e-4
            for handle in handles:
                handle.remove()
        assert relative_error(known, logits(host, {"input_ids": ids})) > 1e-2


def _halved(conv: Tensor, _: object) -> None:
    conv.mul_(0.5)


def test_what_makes_no_sense_is_refused() -> None:
    with si.attach(build("mamba2")) as ssm:
        for features in ([0, 1], [(0, 1)]):
            with pytest.raises(si.InterventionError, match=r"takes no features; leave them out, or give through="):
                edited(ssm, inputs(), si.Knockout(sources=0, features=features, through=BOTH))
        with pytest.raises(si.InterventionError, match=r"'ssm', 'conv', 'attention'"):
            si.Knockout(sources=0, through="convolution")
