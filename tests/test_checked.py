"""The annotations of the package are checked while the tests run."""

from __future__ import annotations

import sys

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError
from random_terms import as_users_run_it

from ssm_interp.features.arguments import whole_number
from ssm_interp.scan import read


def test_arguments_and_results_are_checked_where_there_are_no_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BeartypeCallHintViolation, match="name"):
        whole_number(3, name=5)  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules[whole_number.__module__], "as_index", float)
    with pytest.raises(BeartypeCallHintViolation, match="return 3.0"):
        whole_number(3, name="layer")
    with as_users_run_it():
        assert whole_number(3, name=5) == 3  # type: ignore[arg-type]


def test_shapes_are_checked_against_each_other() -> None:
    state, C = torch.zeros(1, 2, 3, 4, 5), torch.zeros(1, 2, 3, 5)
    assert read(state, C).shape == (1, 2, 3, 4)
    with pytest.raises(TypeCheckError, match="C"):
        read(state, C[..., :4])
    with pytest.raises(TypeCheckError, match="state"):
        read(state[0], C)
