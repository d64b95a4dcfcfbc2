"""States at the border of two runs of positions, against the loop."""

from __future__ import annotations

import pytest
import torch
from random_terms import LENGTHS, SHAPES, as_users_run_it, error, parts, random_terms, with_grad

from ssm_interp.scan import Terms, TermsError, initial, leave, one_step, read_initial, scan
from ssm_interp.scan.naive import naive_scan


def joined(first: Terms, second: Terms) -> Terms:
    """The positions of both, one after the other, with the decays of the first."""
    x, dt, _, B, C = (
        torch.cat(pair, dim=1) if pair[0].ndim > 2 else pair[0]
        for pair in zip(parts(first), parts(second), strict=True)
    )
    return Terms(x, dt, first.A, B, C)


@pytest.mark.parametrize("slab", [1, 2**18])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_read_of_a_shared_state_is_what_the_loop_goes_on_with(
    shape: str, length: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "SLAB", slab)
    before, after = random_terms(shape, 7, batch=2), random_terms(shape, length, batch=6, seed=1)
    repeated = Terms(*(part if part is before.A else part.repeat(3, *[1] * (part.ndim - 1)) for part in parts(before)))
    y, _ = naive_scan(joined(repeated, after))
    later = Terms(after.x, after.dt, before.A, after.B, after.C)
    found = read_initial(later, scan(before)[1]) + scan(later)[0]
    assert error(found, y[:, 7:]) <= 1e-12
    assert error(read_initial(later.to(torch.float32), scan(before)[1]), read_initial(later, scan(before)[1])) <= 1e-5


@pytest.mark.parametrize("slab", [1, 2**18])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_positions_leave_is_the_state_of_the_loop_on_them_alone(
    shape: str, length: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "SLAB", slab)
    terms = random_terms(shape, length)
    weights = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = leave(terms, weights)
    for weight, state in zip(weights, found, strict=True):
        _, states = naive_scan(terms.with_x(terms.x * weight[:, :, None, None]))
        assert error(state, states[:, -1]) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_is_the_diagonal(shape: str) -> None:
    terms = random_terms(shape, 5)
    for position in range(5):
        alone = terms.at(slice(position, position + 1))
        assert error(one_step(terms)[:, position : position + 1], naive_scan(alone)[0]) <= 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_reach_everything(shape: str) -> None:
    terms, other = with_grad(random_terms(shape, 3)), with_grad(random_terms(shape, 3))
    state = scan(random_terms(shape, 7))[1]
    (read_initial(terms, state) + scan(terms)[0]).sum().backward()
    scan(other, state)[0].sum().backward()
    for found, expected in zip(parts(terms), parts(other), strict=True):
        assert error(found.grad, expected.grad) <= 1e-12


def test_bad_shapes_are_named() -> None:
    terms = random_terms("mamba2", 5, batch=4)
    with as_users_run_it():
        with pytest.raises(
            TermsError, match=r"\[m h p n\] = \['m', 4, 3, 3\] with m a divisor of the 4 rows, got \[3,"
        ):
            read_initial(terms, torch.zeros(3, 4, 3, 3))
        with pytest.raises(TermsError, match=r"the weights must be \[k b t\] = \['k', 4, 5\], got \[2, 4, 6\]"):
            leave(terms, torch.zeros(2, 4, 6))
