"""Many knockouts as rows of one step, against one hooked full forward each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_hosts import NAMES, build, inputs, padded
from torch import Tensor

import ssm_interp as si
from ssm_interp.hooks import rows as rows_module
from ssm_interp.hooks import run_each

LENGTH = 9
ROLES = {
    "first": [0],
    "last": [LENGTH - 1],
    "subject": [2, 3, 4],
    "relation": [0, 1, 5, 6, 7, 8],
    "context": [0, 1],
    "none": [],
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
        with torch.no_grad(), ssm.edit(*edits):
            logits = ssm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        last = [-1] * len(ids) if mask is None else [int(row.nonzero()[-1, 0]) for row in mask]
        found.append(logits[range(len(ids)), last])
    return torch.stack(found)


def windows(ssm: si.Attachment, through: object = None) -> list[tuple[int, ...]]:
    layers = ssm.layers_with(through)
    return [layers[s : s + size] for size in range(1, len(layers) + 1) for s in range(len(layers) - size + 1)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("target", ["last", "subject", "relation", "all"])
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
        assert moved.max() > 0.05  # there is something to get wrong


@pytest.mark.parametrize("name", NAMES)
def test_exact_in_float64(name: str) -> None:
    ids = inputs(batch=3, length=LENGTH)["input_ids"]
    # Nemotron-H routes to its experts in fp32, whatever the model's dtype: a matrix product that varies with the batch.
    dense = {"layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]}
    options = dense if name == "nemotron_h" else {}
    with si.attach(build(name, dtype=torch.float64, **options), own_operator=True) as ssm:
        variants = [
            si.Knockout(sources=ROLES[source], targets=ROLES[target], layers=window, features=features)
            for source in ("subject", "relation", "last")
            for target in ("last", "subject", "relation")
            for window in windows(ssm)[::2]
            for features in (None, [0, 2, 3], [(0, 1), (3, 0), (3, 2)])
        ]
        assert error(answers(ssm, ids, variants), forwards(ssm, ids, variants)) < 1e-9
