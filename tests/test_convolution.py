"""The shared convolution update, against the host's own on a copy of every row's inputs."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from test_rows import error
from tiny_hosts import NAMES

from ssm_interp.hooks.seam.convolution import UPDATE, bind


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_share_their_inputs(name: str, with_bias: bool, activation: str | None) -> None:
    host = getattr(import_module(f"transformers.models.{name}.modeling_{name}"), UPDATE)
    generator = torch.Generator().manual_seed(0)
    blocks, n, d, taps = 5, 3, 7, 4
    newest, before, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((blocks * n, d, 1), (n, d, taps), (d, taps), (d,))
    )
    kept = before.clone()
    given = (newest, before, weight, bias if with_bias else None)
    found = bind(UPDATE, host, given, {"activation": activation}).run_shared()
    expected = host(newest, before.repeat(blocks, 1, 1), weight, bias if with_bias else None, activation)
    assert error(found, expected) <= 1e-14
    assert torch.equal(before, kept)
