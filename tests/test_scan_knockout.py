import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_terms import SHAPES, as_users_run_it, error, parts, random_terms, with_grad
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from ssm_interp.scan import Terms, TermsError, knockout, removed, scan
from ssm_interp.scan.knockout import edge_mask, scan_values
from ssm_interp.scan.naive import naive_attention, naive_scan


class Counting:
    """Our own operator, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, terms):
        self.calls += 1
        return scan_values(terms)


def knocked_out_matrix(terms, mask, features):
    """M with the masked entries set to zero, state dimension by state dimension. mask [b, t, s], features [h, n]."""
    matrix = 0
    for n in range(terms.state_size):
        only_n = torch.arange(terms.state_size) == n
        entries = naive_attention(replace(terms, C=terms.C * only_n))
        matrix = matrix + entries.masked_fill(mask[:, None] & features[:, n, None, None], 0)
    return matrix


CASES = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(sorted(SHAPES)),
        "length": st.sampled_from([1, 2, 5, 17]),
        "batch": st.integers(1, 3),
        "rows": st.sampled_from(["shared", "one", "each"]),
        "edges": st.sampled_from(["mask", "pair", "mixed pair"]),
        "features": st.sampled_from([None, "heads", "pairs"]),
        "density": st.sampled_from([0.05, 0.5, 0.95]),
        "seed": st.integers(0, 2**20),
    }
)


def build(case):
    """Terms, mask and features of a drawn case."""
    terms = random_terms(case["shape"], case["length"], batch=case["batch"], seed=case["seed"])
    random = torch.Generator().manual_seed(case["seed"])
    b, t, h, n = terms.batch, terms.length, terms.heads, terms.state_size
    rows = {"shared": (), "one": (1,), "each": (b,)}[case["rows"]]

    def flags(*shape):
        return torch.rand(*shape, generator=random) < case["density"]

    mask = {
        "mask": flags(*rows, t, t),
        "pair": (flags(*rows, t), flags(*rows, t)),
        "mixed pair": (flags(t), flags(b, t)),
    }[case["edges"]]
    return terms, mask, {None: None, "heads": flags(h), "pairs": flags(h, n)}[case["features"]]


def written_out(terms, mask, features):
    """The same mask as [b, t, s], the same features as [h, n]."""
    if isinstance(mask, tuple):
        mask = mask[0][..., :, None] & mask[1][..., None, :]
    if features is None:
        features = torch.ones(terms.heads, dtype=torch.bool)
    pairs = features if features.ndim > 1 else features[:, None]
    return mask.expand(terms.batch, -1, -1), pairs.expand(-1, terms.state_size)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(CASES)
def test_knockout_is_zeroing_those_entries_of_the_matrix(case):
    terms, mask, features = build(case)
    edges, pairs = written_out(terms, mask, features)
    expected = torch.einsum("bhts,bshp->bthp", knocked_out_matrix(terms, edges, pairs), terms.x)
    whole = naive_scan(terms)[0]
    actual = knockout(terms, mask, features)
    assert float((actual - expected).abs().max()) <= 1e-10 * float(whole.abs().max())
    assert error(removed(terms, mask, features) + actual, scan(terms)[0]) <= 1e-14


@settings(max_examples=60, deadline=None, derandomize=True)
@given(CASES)
def test_positions_that_read_no_knocked_out_source_are_unchanged(case):
    terms, mask, features = build(case)
    touched = written_out(terms, mask, features)[0].tril().any(-1)  # b t
    assert not removed(terms, mask, features)[~touched].any()
    assert torch.equal(knockout(terms, mask, features)[~touched], scan(terms)[0][~touched])


def test_random_cases_do_remove_something():
    """Guards the property tests: their masks are not all empty."""
    terms = random_terms("mamba2-g2", 17)
    mask = torch.rand(17, 17) < 0.5
    for features in (None, torch.tensor([True] + [False] * 5), torch.rand(6, 3) < 0.5):
        carried = removed(terms, mask, features)
        assert carried.abs().max() > 0.1
    assert not removed(terms, mask, torch.tensor([True] + [False] * 5))[:, :, 1:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_to_the_future_change_nothing_and_cost_nothing(shape):
    terms, operator = random_terms(shape, 63), Counting()
    future = torch.ones(63, 63, dtype=torch.bool).triu(1)
    position = torch.arange(63)
    for mask in (future, future.expand(2, -1, -1), (position < 10, position >= 10), torch.zeros_like(future)):
        assert not removed(terms, mask, operator=operator).any()
        assert torch.equal(knockout(terms, mask), scan(terms)[0])
    assert operator.calls == 0
    past = edge_mask(position == 20, (position == 3) | (position == 40))
    assert torch.equal(removed(terms, past | future, operator=operator), removed(terms, past, operator=operator))
    assert operator.calls == 2


def test_sources_that_agree_up_to_their_targets_share_a_call():
    position = torch.arange(9)

    def calls(mask, batch=2, features=None):
        operator = Counting()
        removed(random_terms("mamba2", 9, batch=batch), mask, features, operator=operator)
        return operator.calls

    targets, sources = (position == 4) | (position == 8), (position == 1) | (position == 6)
    assert calls((targets, sources)) == 1
    assert calls(targets[:, None] & sources) == 1
    assert calls((targets, sources), features=torch.ones(4, 3, dtype=torch.bool)) == 1
    assert calls(torch.ones(9, 9, dtype=torch.bool)) == 1
    assert calls(torch.eye(9, dtype=torch.bool)) == 9
    two = edge_mask(position == 8, position == 1) | edge_mask(position == 7, position == 2)
    assert calls(two) == 2
    per_row = torch.stack([edge_mask(position == 8, position == 1), edge_mask(position == 7, position == 2)])
    assert calls(per_row) == 1
    assert calls(torch.stack([two, edge_mask(position == 8, position == 5)])) == 2
    nested = edge_mask(position == 8, position < 6) | edge_mask(position == 4, position < 6)
    assert calls(nested) == 1


def test_each_row_of_a_batch_has_its_own_knockout():
    terms = random_terms("mamba1", 17, batch=3)
    mask = torch.rand(3, 17, 17) < 0.3
    together = knockout(terms, mask)
    for row in range(3):
        one = Terms(*(part if part is terms.A else part[row, None] for part in parts(terms)))
        assert error(together[row, None], knockout(one, mask[row])) <= 1e-14


def test_an_initial_state_is_still_read():
    terms = random_terms("mamba2-g2", 9)
    start = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    everything = torch.ones(9, 9, dtype=torch.bool)
    silent = scan(terms.with_x(torch.zeros_like(terms.x)), start)[0]
    assert error(knockout(terms, everything, initial_state=start), silent) <= 1e-12
    with pytest.raises(TermsError, match="initial state must be"):
        knockout(terms, everything, initial_state=start[:1])


def host_operator(terms):
    operator = inspect.unwrap(mamba2_chunk_scan)
    return operator(terms.x, terms.dt, terms.A[:, 0], terms.B, terms.C, chunk_size=16)


@pytest.mark.parametrize("features", [None, "heads", "pairs"])
def test_any_operator_does_also_the_one_of_the_host(features):
    terms = random_terms("mamba2-g2", 63, dtype=torch.float32)
    chosen = {None: None, "heads": torch.arange(6) % 2 == 0, "pairs": torch.rand(6, 3) < 0.5}[features]
    mask = (torch.arange(63) > 40, torch.arange(63) < 20)
    assert error(removed(terms, mask, chosen, operator=host_operator), removed(terms, mask, chosen)) <= 1e-5


def test_the_operator_sees_the_dtype_of_the_terms_and_the_result_is_fp32():
    terms = random_terms("mamba2", 9, dtype=torch.bfloat16)
    seen = []

    def operator(terms):
        seen.append(terms.x.dtype)
        return scan_values(terms).to(torch.bfloat16)

    mask = torch.ones(9, 9, dtype=torch.bool)
    assert removed(terms, mask, operator=operator).dtype == torch.float32
    assert removed(terms, ~mask, operator=operator).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_values_outside_the_edges_do_not_leak():
    terms = random_terms("mamba2", 9)
    broken = terms.with_x(terms.x.index_fill(1, torch.tensor([5]), torch.nan))
    mask = (torch.arange(9) == 8, torch.arange(9) < 3)
    assert torch.equal(removed(broken, mask), removed(terms, mask))


@pytest.mark.parametrize("features", [None, [True, False, True, True, True, False], "pairs"], ids=str)
def test_gradients_are_those_of_the_function(features):
    terms = with_grad(random_terms("mamba2-g2", 4, batch=1, largest_dt=1.0))
    if features is not None:
        features = torch.rand(6, 3) < 0.5 if features == "pairs" else torch.tensor(features)
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *operands: knockout(Terms(*operands), mask, features), parts(terms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_finite_and_reach_every_operand_with_large_dt(shape, dtype):
    random = random_terms(shape, 63, dtype=dtype)
    dt = torch.where(torch.arange(63)[:, None] % 3 == 0, 20.0, random.dt)
    terms = with_grad(Terms(random.x, dt.to(dtype), random.A, random.B, random.C))
    y = knockout(terms, (torch.arange(63) > 40, torch.arange(63) < 50))
    for gradient in torch.autograd.grad(y.square().sum(), parts(terms)):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_edge_mask_is_targets_by_sources_without_the_future():
    targets, sources = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    assert edge_mask(targets, sources).nonzero().tolist() == [[0, 0], [2, 0], [2, 1]]
    per_row = edge_mask(torch.stack([targets, ~targets]), torch.stack([sources, sources]))
    assert per_row.nonzero().tolist() == [[0, 0, 0], [0, 2, 0], [0, 2, 1], [1, 1, 0], [1, 1, 1]]


FLAGS = torch.ones(5, dtype=torch.bool)


@as_users_run_it()
@pytest.mark.parametrize(
    ("mask", "features", "message"),
    [
        (torch.ones(4, 5, dtype=torch.bool), None, r"mask must be \[t, s\] = \[5, 5\].*\[2, 5, 5\]; got \[4, 5\]"),
        (torch.ones(3, 5, 5, dtype=torch.bool), None, r"got \[3, 5, 5\]"),
        (FLAGS, None, r"mask must be \[t, s\].*got \[5\]"),
        (torch.ones(5, 5), None, r"mask must be a bool tensor, True where.*got torch.float32"),
        ([[True]], None, r"mask must be a bool tensor.*got list"),
        ((FLAGS, FLAGS[:4]), None, r"sources must be \[s\] = \[5\].*\[2, 5\]; got \[4\]"),
        ((FLAGS.expand(3, -1), FLAGS), None, r"targets must be \[t\] = \[5\].*got \[3, 5\]"),
        ((FLAGS, 3), None, r"sources must be a bool tensor.*got int"),
        ((FLAGS, FLAGS, FLAGS), None, r"a pair of targets and sources.*a tuple of 3"),
        ((FLAGS, FLAGS), FLAGS, r"features must be heads \[h\] = \[4\] or pairs \[h, n\] = \[4, 3\], got \[5\]"),
        ((FLAGS, FLAGS), FLAGS[:4, None], r"features must be.*got \[4, 1\]"),
        ((FLAGS, FLAGS), torch.ones(4), r"features must be a bool tensor.*got torch.float32"),
    ],
)
def test_masks_and_features_that_do_not_fit_are_named(mask, features, message):
    terms = random_terms("mamba2", 5)
    for function in (removed, knockout):
        with pytest.raises(TermsError, match=message):
            function(terms, mask, features)
