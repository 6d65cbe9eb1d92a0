"""Masks against a stable sort written down directly: counts, ties, patterns, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphaprune.mask import PAIRWISE_MAX, keep_mask
from alphaprune.pattern import NM, Unstructured


def sorted_out(values: np.ndarray, zeros: int) -> np.ndarray:
    """The truth for one group of scores: a stable ascending sort, and its first `zeros` entries go."""
    keep = np.ones(values.shape, dtype=bool)
    keep[np.argsort(values, kind="stable")[:zeros]] = False
    return keep


def truth(scores: Tensor, zeros: int, pattern, selection: str) -> Tensor:
    values = scores.double().numpy()
    rows, columns = values.shape
    if isinstance(pattern, NM):
        drop = pattern.of - pattern.keep
        groups = [sorted_out(group, drop) for group in values.reshape(-1, pattern.of)]
        keep = np.concatenate(groups).reshape(rows, columns)
    elif selection == "matrix":
        keep = sorted_out(values.reshape(-1), zeros).reshape(rows, columns)
    else:
        count, more = divmod(zeros, rows)
        keep = np.stack([sorted_out(row, count + (r < more)) for r, row in enumerate(values)])
    return torch.from_numpy(keep)


@st.composite
def cases(draw):
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 24))
    values = draw(st.sampled_from([2, 5, 1000]))  # few distinct values: many ties
    seed = draw(st.integers(0, 2**31))
    scores = torch.randint(0, values, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    if draw(st.booleans()):
        scores[0, 0] = draw(st.sampled_from([float("inf"), float("-inf"), -0.0]))
    return scores.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])))


@settings(max_examples=150, deadline=None)
@given(cases(), st.data(), st.sampled_from(["matrix", "row"]))
def test_counts_and_ties_are_those_of_a_stable_sort(scores: Tensor, data, selection: str) -> None:
    zeros = data.draw(st.integers(0, scores.numel()))
    mask = keep_mask(scores, zeros, Unstructured(), selection)
    assert mask.dtype == torch.bool and int((~mask).sum()) == zeros
    assert torch.equal(mask, truth(scores, zeros, None, selection))


@pytest.mark.parametrize("keep, of", [(2, 4), (1, 4), (4, 4), (5, 8), (1, 2), (7, PAIRWISE_MAX), (9, 32)])
@pytest.mark.parametrize("values", [2, 6, 10**6])
def test_patterns_keep_the_highest_of_every_group(keep: int, of: int, values: int) -> None:
    pattern = NM(keep, of)
    scores = torch.randint(0, values, (5, 3 * of), generator=torch.Generator().manual_seed(of)).float()
    zeros = 5 * 3 * (of - keep)
    mask = keep_mask(scores, zeros, pattern)
    assert torch.equal(mask, truth(scores, zeros, pattern, "matrix"))
    assert (mask.reshape(-1, of).sum(1) == keep).all()


def test_rows_share_the_remainder_from_the_first() -> None:
    mask = keep_mask(torch.rand(4, 10, generator=torch.Generator().manual_seed(0)), 14, None, "row")
    assert (~mask).sum(1).tolist() == [4, 4, 3, 3]


def test_a_large_matrix_keeps_what_is_above_its_quantile() -> None:
    scores = torch.randn(300, 1100, generator=torch.Generator().manual_seed(1)).abs()
    for selection in ("matrix", "row"):
        mask = keep_mask(scores, 231_017, None, selection)
        assert int((~mask).sum()) == 231_017
    mask = keep_mask(scores, 231_017)
    assert scores[mask].min() >= scores[~mask].max()


def test_scores_that_are_no_tensor_of_their_own() -> None:
    """Transposed and expanded scores, and scores with a gradient, are read as they look."""
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.equal(keep_mask(scores.t(), 9), keep_mask(scores.t().contiguous(), 9))
    assert (~keep_mask(torch.ones(1, 1).expand(3, 4), 5)).reshape(-1).tolist() == [True] * 5 + [False] * 7


@pytest.mark.parametrize(
    "scores, zeros, pattern, selection, message",
    [
        (torch.full((2, 4), float("nan")), 1, None, "matrix", "hold NaN"),
        (torch.rand(2, 4), 9, None, "matrix", "wanted 0 to 8"),
        (torch.rand(2, 4), -1, None, "row", "wanted 0 to 8"),
        (torch.rand(8), 1, None, "matrix", r"wanted \[N, K\]"),
        (torch.ones(2, 4, dtype=torch.int64), 1, None, "matrix", "floating point"),
        (torch.rand(2, 6), 6, NM(2, 4), "matrix", r"K % 4 == 0, got K = 6"),
        (torch.rand(2, 8), 9, NM(2, 4), "matrix", "makes 8 zeros, not 9"),
        (torch.rand(2, 4), 1, None, "column", "'row' or 'matrix'"),
        (torch.rand(2, 4), 1, "2:4", "matrix", "wanted Unstructured or NM"),
    ],
)
def test_refusals(scores: Tensor, zeros: int, pattern, selection: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_mask(scores, zeros, pattern, selection)
