"""The convolution, and the operator and the convolution as one matrix, on terms alone."""

from __future__ import annotations

import pytest
import torch
from random_terms import SHAPES, as_users_run_it, error, random_terms
from torch import Tensor

from ssm_interp.scan import Convolution, TermsError, attention, attention_rows, unified_rows
from ssm_interp.scan.naive import naive_attention


def convolution(heads: int, head_dim: int, taps: int = 4) -> Convolution:
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(heads, head_dim, taps, generator=random, dtype=torch.float64)
    return Convolution(weights, torch.randn(heads, head_dim, generator=random, dtype=torch.float64))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_the_convolution_is_that_of_torch(length: int, taps: int) -> None:
    conv, inputs = convolution(3, 2, taps), drawn(2, length, 3, 2)
    weight = conv.taps.flatten(0, 1).flip(-1)[:, None]
    channels = inputs.flatten(2).mT
    expected = torch.nn.functional.conv1d(channels, weight, conv.bias.flatten(), padding=taps - 1, groups=6)
    assert error(conv(inputs).flatten(2).mT, expected[..., :length]) < 1e-14


@pytest.mark.parametrize("length", [1, 3, 9])
def test_transposed_is_the_adjoint(length: int) -> None:
    conv, inputs, outputs = convolution(3, 2), drawn(2, length, 3, 2), drawn(2, length, 3, 2) + 1
    there = (outputs * (conv(inputs) - conv.bias)).sum()
    assert abs(float(there - (conv.transposed(outputs) * inputs).sum())) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_unified_rows_against_the_naive_matrix(shape: str) -> None:
    terms = random_terms(shape, 9)
    h, p = terms.heads, terms.head_dim
    conv, inputs, gate, skip = convolution(h, p), drawn(2, 9, h, p), drawn(2, 9, h, p) - 1, drawn(h)
    outputs = conv(inputs)
    secant = torch.sigmoid(outputs)
    matrix = naive_attention(terms) + torch.eye(9) * skip[:, None, None]
    expected = gate * torch.einsum("bhts,bshp->bthp", matrix, torch.nn.functional.silu(outputs))
    rows = unified_rows(attention(terms) + torch.eye(9) * skip[:, None, None], conv, secant, gate)
    found = torch.einsum("btshp,bshp->bthp", rows[:, :, :-1], inputs) + rows[:, :, -1] * conv.bias
    assert error(found, expected) < 1e-12
    assert error(found - rows[:, :, -1] * conv.bias, expected) > 0.01  # the bias's column is needed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 33])
def test_without_dt_it_is_the_matrix_divided_by_dt(shape: str, length: int) -> None:
    terms = random_terms(shape, length)
    expected = naive_attention(terms) / terms.dt.mT[:, :, None]
    assert error(attention(terms, fold_dt=False), expected) < 1e-12
    assert error(attention_rows(terms, [-1, 0], fold_dt=False), expected[:, :, [-1, 0]]) < 1e-12


def test_shapes_that_do_not_fit_are_named() -> None:
    terms = random_terms("mamba2", 5)
    rows, conv, secant = attention_rows(terms, [-1]), convolution(4, 3), drawn(2, 5, 4, 3)
    with as_users_run_it():
        with pytest.raises(TermsError, match=r"wants secant \[2, 5, 4, 3\], got \[2, 4, 4, 3\]"):
            unified_rows(rows, conv, secant[:, :4], secant[:, :1])
        with pytest.raises(TermsError, match=r"wants gate \[2, 1, 4, 3\], got \[2, 5, 4, 3\]"):
            unified_rows(rows, conv, secant, secant)
        with pytest.raises(TermsError, match=r"wants bias \[4, 3\], got \[3, 3\]"):
            unified_rows(rows, convolution(3, 3), secant, secant[:, :1])
