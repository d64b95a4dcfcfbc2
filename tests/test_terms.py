import pytest
import torch
from random_terms import as_users_run_it, parts, random_terms

from ssm_interp.scan import (
    Terms,
    TermsError,
    attention,
    attention_rows,
    knockout,
    reduced_attention,
    scan,
    states,
    write,
)

OK = {"x": (2, 5, 4, 3), "dt": (2, 5, 4), "A": (4, 1), "B": (2, 5, 2, 6), "C": (2, 5, 2, 6)}


def make(**shapes):
    return Terms(**{name: torch.ones(shape) for name, shape in {**OK, **shapes}.items()})


def test_reads_its_dimensions_off_the_tensors():
    terms = make()
    sizes = (terms.batch, terms.length, terms.heads, terms.head_dim, terms.groups, terms.state_size)
    assert sizes == (2, 5, 4, 3, 2, 6)
    assert terms.scalar_decay
    assert not make(A=(4, 6)).scalar_decay
    assert terms.log_decay.shape == (2, 5, 4, 1)
    assert make(A=(4, 6)).log_decay.shape == (2, 5, 4, 6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (2, 5, 4)}, r"x must have 4 dimensions, got \[2, 5, 4\]"),
        ({"A": (4,)}, r"A must have 2 dimensions, got \[4\]"),
        ({"dt": (2, 5, 3)}, r"dt \[2, 5, 3\].*expected x \[b t h p\]"),
        ({"dt": (2, 4, 4)}, r"dt \[2, 4, 4\]"),
        ({"A": (4, 5)}, r"A \[4, 5\]"),
        ({"A": (3, 1)}, r"A \[3, 1\]"),
        ({"B": (2, 5, 3, 6), "C": (2, 5, 3, 6)}, r"h a multiple of g"),
        ({"C": (2, 5, 1, 6)}, r"C \[2, 5, 1, 6\]"),
        ({"B": (1, 5, 2, 6), "C": (1, 5, 2, 6)}, r"B \[1, 5, 2, 6\]"),
        ({"x": (2, 0, 4, 3), "dt": (2, 0, 4), "B": (2, 0, 2, 6), "C": (2, 0, 2, 6)}, r"at least one of everything"),
    ],
)
@as_users_run_it()
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(TermsError, match=message):
        make(**shapes)


@as_users_run_it()
def test_dtypes_devices_and_types_that_do_not_fit_are_named():
    good = make()
    with pytest.raises(TermsError, match=r"share one of the dtypes.*'dt': torch.float64"):
        Terms(good.x, good.dt.double(), good.A, good.B, good.C)
    with pytest.raises(TermsError, match=r"share one of the dtypes.*torch.int64"):
        Terms(*(part.long() for part in parts(good)))
    with pytest.raises(TermsError, match=r"one device.*'C': 'meta'"):
        Terms(good.x, good.dt, good.A, good.B, good.C.to("meta"))
    with pytest.raises(TermsError, match="A must be a torch tensor, got list"):
        Terms(good.x, good.dt, [[1.0]], good.B, good.C)


def test_terms_cannot_be_changed_and_hash_by_identity():
    terms = make()
    with pytest.raises(AttributeError):
        terms.x = terms.x + 1
    assert {terms: 1}[terms] == 1
    assert terms != make()


@as_users_run_it()
def test_other_values_may_have_another_head_dim():
    terms = make().with_x(torch.zeros(2, 5, 4, 7))
    assert terms.head_dim == 7
    with pytest.raises(TermsError, match=r"x \[2, 6, 4, 7\]"):
        make().with_x(torch.zeros(2, 6, 4, 7))


@as_users_run_it()
def test_a_run_of_positions():
    terms = random_terms("mamba2-g2", 5)
    assert terms.at(slice(1, 3)).length == 2
    assert torch.equal(terms.at(slice(1, 3)).B, terms.B[:, 1:3])
    assert torch.equal(terms.at(slice(1, 3)).A, terms.A)
    with pytest.raises(TermsError, match="empty dimension"):
        terms.at(slice(5, 9))


EVERY_FUNCTION = {
    "scan": lambda terms: scan(terms)[0],
    "states": states,
    "write": write,
    "attention": attention,
    "attention_rows": lambda terms: attention_rows(terms, [0, -1]),
    "reduced_attention": lambda terms: reduced_attention(terms, "norm"),
    "knockout": lambda terms: knockout(terms, torch.eye(terms.length, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", EVERY_FUNCTION)
def test_half_precision_terms_are_computed_and_returned_in_fp32(name):
    function = EVERY_FUNCTION[name]
    for half in (torch.bfloat16, torch.float16):
        terms = random_terms("mamba2", 9, dtype=half)
        result = function(terms)
        assert result.dtype == torch.float32
        assert torch.equal(result, function(terms.to(torch.float32)))
    assert function(random_terms("mamba2", 9, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", EVERY_FUNCTION)
def test_autocast_does_not_lower_the_precision(name):
    terms = random_terms("mamba2", 9, dtype=torch.float32)
    plain = EVERY_FUNCTION[name](terms)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(EVERY_FUNCTION[name](terms), plain)


@as_users_run_it()
def test_errors_of_arguments_that_annotations_would_catch_first():
    terms = make()
    with pytest.raises(TermsError, match=r"reduction must be one of \['mean', 'mean_abs', 'norm'\], got 'max'"):
        reduced_attention(terms, "max")
    with pytest.raises(TermsError, match=r"a position must be an integer in \[-5, 5\) for t = 5, got 1.5"):
        attention_rows(terms, [1.5])
    with pytest.raises(TermsError, match=r"got tensor\(1.5000\)"):
        attention_rows(terms, [torch.tensor(1.5)])
    with pytest.raises(TermsError, match=r"initial state must be \[b h p n\] = \[2, 4, 3, 6\], got \[4, 3, 6\]"):
        scan(terms, torch.zeros(4, 3, 6))
