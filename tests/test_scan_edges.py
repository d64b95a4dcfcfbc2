"""Products of all edges at once, beside those of the materialised matrix."""

import sys

import pytest
import torch
from random_terms import LENGTHS, SHAPES, as_users_run_it, error, parts, random_terms, with_grad

from ssm_interp.scan import Terms, TermsError, edge_products
from ssm_interp.scan.naive import naive_attention


def weights_for(terms):
    return torch.randn(terms.x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(terms.x)


def expected_products(terms, weights):
    """Head by head, `[b h t s]`."""
    terms, weights = terms.to(torch.float64), weights.double()
    return torch.einsum("bthp,bhts,bshp->bhts", weights, naive_attention(terms), terms.x)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_matrix(shape, length):
    terms = random_terms(shape, length)
    weights = weights_for(terms)
    expected = expected_products(terms, weights).sum(1)
    found = edge_products(terms, weights)
    assert error(found, expected) <= 1e-12
    assert error(edge_products(terms.to(torch.float32), weights.float()), expected) <= 1e-5
    assert not found.triu(1).any()


@pytest.mark.parametrize("block", [1, 2, 8, 512])
@pytest.mark.parametrize("slab_bytes", [1, 2**24])
@pytest.mark.parametrize("shape", SHAPES)
def test_neither_blocks_nor_slabs_matter(shape, slab_bytes, block, monkeypatch):
    monkeypatch.setattr(sys.modules["ssm_interp.scan.edges"], "SLAB_BYTES", slab_bytes)
    terms = random_terms(shape, 37)
    weights = weights_for(terms)
    assert error(edge_products(terms, weights, block=block), expected_products(terms, weights).sum(1)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_sixteen_overflows_nothing(shape, dtype):
    random = random_terms(shape, 65, dtype=dtype)
    dt = torch.where(torch.arange(65)[:, None] % 4 == 0, 16.0, random.dt).to(dtype)
    A = torch.where(torch.arange(random.heads)[:, None] % 2 == 0, -16.0, random.A).to(dtype)
    terms = Terms(random.x, dt, A, random.B, random.C)
    weights = weights_for(terms)
    found = edge_products(terms, weights)
    assert error(found, expected_products(terms, weights).sum(1)) <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("slab_bytes", [1, 2**24])
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_parts_of_the_sum(shape, slab_bytes, monkeypatch):
    monkeypatch.setattr(sys.modules["ssm_interp.scan.edges"], "SLAB_BYTES", slab_bytes)
    terms = random_terms(shape, 21)
    weights, h, n = weights_for(terms), terms.heads, terms.state_size
    generator = torch.Generator().manual_seed(3)
    heads = torch.zeros(h, 1, dtype=torch.bool)
    heads[[1, h - 1]] = True
    pairs = torch.rand(h, n, generator=generator) < 0.5
    pairs[0] = False
    everything, nothing = torch.ones(h, 1, dtype=torch.bool), torch.zeros(h, n, dtype=torch.bool)
    found = edge_products(terms, weights, [heads, pairs, ~pairs, everything, nothing])
    by_head = expected_products(terms, weights)
    assert error(found[:, 0], by_head[:, [1, h - 1]].sum(1)) <= 1e-12
    assert error(found[:, 1] + found[:, 2], by_head.sum(1)) <= 1e-12
    assert error(found[:, 3], by_head.sum(1)) <= 1e-12
    assert not found[:, 4].any()
    only = Terms(terms.x, terms.dt, terms.A, *(p.repeat_interleave(h // terms.groups, 2) for p in (terms.B, terms.C)))
    only = Terms(only.x, only.dt, only.A, only.B, torch.where(pairs, only.C, 0.0))
    assert error(found[:, 1], expected_products(only, weights).sum(1)) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_reach_every_operand(shape):
    terms = with_grad(random_terms(shape, 9))
    weights = weights_for(terms).requires_grad_()
    square = edge_products(terms, weights).square().sum()
    found = torch.autograd.grad(square, [*parts(terms), weights])
    again = with_grad(terms)
    C_B = torch.einsum(
        "bthn,bshn->bhtsn", *(p.repeat_interleave(again.heads // again.groups, 2) for p in parts(again)[:2:-1])
    )
    total = again.log_decay.cumsum(1)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[..., None]
    log = (total[:, :, None] - total[:, None]).permute(0, 3, 1, 2, 4)
    M = (C_B * torch.where(mask, log, 0).exp() * mask).sum(-1) * again.dt.transpose(1, 2)[:, :, None]
    weights_again = weights.detach().clone().requires_grad_()
    slow = torch.einsum("bthp,bhts,bshp->bts", weights_again, M, again.x).square().sum()
    for one, other in zip(found, torch.autograd.grad(slow, [*parts(again), weights_again]), strict=True):
        assert error(one, other) <= 1e-9


def test_half_precision_is_cast_up():
    terms = random_terms("mamba2", 12).to(torch.bfloat16)
    weights = weights_for(terms)
    found = edge_products(terms, weights)
    assert found.dtype == torch.float32
    assert error(found, expected_products(terms, weights).sum(1)) <= 1e-5


def test_bad_input_is_named():
    terms = random_terms("mamba1", 5)
    weights = weights_for(terms)
    with pytest.raises(TermsError, match=r"weights must be \[b t h p\] = \[2, 5, 5, 1\].*got \[2, 4, 5, 1\]"):
        edge_products(terms, weights[:, :4])
    with pytest.raises(TermsError, match="power of two .*got 24"):
        edge_products(terms, weights, block=24)
    with pytest.raises(TermsError, match="no groups"):
        edge_products(terms, weights, [])
    with as_users_run_it():
        with pytest.raises(TermsError, match=r"heads \[h, 1\] = \[5, 1\] or pairs \[h, n\] = \[5, 3\], got \[4, 1\]"):
            edge_products(terms, weights, [torch.ones(4, 1, dtype=torch.bool)])
        with pytest.raises(TermsError, match="must be a bool tensor.*float32"):
            edge_products(terms, weights, [torch.ones(5, 1)])
        with pytest.raises(TermsError, match="must be a bool tensor.*list"):
            edge_products(terms, weights, [[True] * 5])
