"""Layer windows."""

import pytest

from ssm_interp.flow import FlowError, default_size, windows


def test_left_aligned_windows_are_never_truncated() -> None:
    found = windows(range(24), 9)
    assert [window.at for window in found] == list(range(16))  # the paper's 16 points for 24 layers at w = 9
    assert all(window.layers == tuple(range(window.at, window.at + 9)) for window in found)
    assert [len(windows(range(n), 9)) for n in (24, 48, 64)] == [16, 40, 56]


@pytest.mark.parametrize("n", [1, 2, 5, 24])
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_centred_windows_are_those_of_geva(n: int, size: int) -> None:
    if size > n:
        with pytest.raises(FlowError, match=f"a window of {size} layers does not fit: this model has {n} of them"):
            windows(range(n), size, "centre")
        return
    expected = [tuple(range(max(0, i - size // 2), min(n, i - (-size // 2)))) for i in range(n)]
    found = windows(range(n), size, "centre")
    assert [window.layers for window in found] == expected
    assert [window.at for window in found] == list(range(n))
    assert all(window.at in window.layers for window in found)


def test_a_hybrid_has_windows_over_its_ssm_layers_only() -> None:
    found = windows([1, 2, 4, 7], 2)
    assert [(window.at, window.layers) for window in found] == [(1, (1, 2)), (2, (2, 4)), (4, (4, 7))]
    assert [window.layers for window in windows([1, 2, 4, 7], 3, "centre")] == [(1, 2), (1, 2, 4), (2, 4, 7), (4, 7)]


def test_the_default_is_the_papers_share_of_the_layers() -> None:
    assert [default_size(range(n)) for n in (1, 2, 4, 10, 24, 48, 64)] == [1, 1, 2, 4, 9, 18, 24]


@pytest.mark.parametrize("size", [-1, 0, 11])
def test_windows_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(FlowError, match=f"a window of {size} layers does not fit: .* give 1 to 10"):
        windows(range(10), size)
