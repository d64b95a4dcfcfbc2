import pytest
import torch
from random_terms import LENGTHS, SHAPES, error, parts, random_terms, with_grad

from ssm_interp.scan import TermsError, read, scan, states, write
from ssm_interp.scan.naive import naive_attention, naive_scan
from ssm_interp.scan.recurrence import accumulate


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_and_states_are_the_loop(shape, length):
    terms = random_terms(shape, length)
    y, every_state = naive_scan(terms)
    assert error(scan(terms)[0], y) <= 1e-12
    assert error(scan(terms)[1], every_state[:, -1]) <= 1e-12
    assert error(states(terms), every_state) <= 1e-12
    assert error(read(states(terms), terms.C), y) <= 1e-12
    assert error(scan(terms.to(torch.float32))[0], y) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loops_agree_with_each_other(shape):
    terms = random_terms(shape, 9)
    assert error(torch.einsum("bhts,bshp->bthp", naive_attention(terms), terms.x), naive_scan(terms)[0]) <= 1e-13


@pytest.mark.parametrize("cut", [1, 30, 62])
@pytest.mark.parametrize("shape", SHAPES)
def test_going_on_from_a_state_is_one_run(shape, cut):
    terms = random_terms(shape, 63)
    whole, last = scan(terms)
    first, state = scan(terms.at(slice(0, cut)))
    rest, end = scan(terms.at(slice(cut, None)), state)
    assert error(torch.cat([first, rest], dim=1), whole) <= 1e-12
    assert error(end, last) <= 1e-12
    later_states = states(terms.at(slice(cut, None)), state)
    assert error(later_states, states(terms)[:, cut:]) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_accumulating_the_own_writes_gives_the_states(shape):
    terms = random_terms(shape, 5)
    start = torch.randn(2, terms.heads, terms.head_dim, 3, dtype=torch.float64)
    assert torch.stack(list(accumulate(terms, write(terms), start)), dim=1).equal(states(terms, start))
    doubled = torch.stack(list(accumulate(terms, 2 * write(terms))), dim=1)
    assert error(doubled, 2 * states(terms)) <= 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_reach_every_term_and_the_initial_state(shape):
    terms = with_grad(random_terms(shape, 4, batch=1))
    start = torch.randn(1, terms.heads, terms.head_dim, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: scan(type(terms)(*args[:5]), args[5]), (*parts(terms), start))


def test_terms_that_do_not_belong_together_are_named():
    terms = random_terms("mamba2", 5)
    with pytest.raises(TermsError, match=r"initial state must be \[b h p n\] = \[2, 4, 3, 3\], got \[2, 4, 3, 2\]"):
        scan(terms, torch.zeros(2, 4, 3, 2))
    with pytest.raises(TermsError, match=r"initial state must be"):
        states(terms, torch.zeros(1, 4, 3, 3))
    with pytest.raises(TermsError, match=r"writes must be \[b t h p n\] = \[2, 5, 4, 3, 3\], got \[2, 4, 4, 3, 3\]"):
        accumulate(terms, torch.zeros(2, 4, 4, 3, 3))
    with pytest.raises(TermsError, match=r"state \[b t h p n\] = \[2, 5, 3, 1, 3\] and C \[b t g n\] = \[2, 5, 2, 3\]"):
        read(torch.zeros(2, 5, 3, 1, 3), torch.zeros(2, 5, 2, 3))


def test_an_initial_state_takes_on_the_dtype_of_the_terms():
    terms = random_terms("mamba1", 5, dtype=torch.float32)
    start = torch.ones(2, 5, 1, 3, dtype=torch.bfloat16)
    assert torch.equal(scan(terms, start)[0], scan(terms, start.float())[0])
    assert scan(terms, start)[1].dtype == torch.float32
