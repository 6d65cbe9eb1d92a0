"""The relative importance score against its definition, one weight at a time."""

import torch
from layers import correlated, gram_of, stat, weights

from alphaprune import pruners, scores
from alphaprune.mask import keep_mask
from alphaprune.pattern import Unstructured
from alphaprune.pruners import Cut


def test_the_score_is_the_published_one() -> None:
    weight, norms = weights(5, 7, 1), torch.linspace(0, 3, 7)
    found = scores.ria(weight, norms)
    w = weight.double().abs()
    for i in range(5):
        for j in range(7):
            wanted = (w[i, j] / w[:, j].sum() + w[i, j] / w[i].sum()) * norms[j].double().sqrt()
            torch.testing.assert_close(found[i, j].double(), wanted, rtol=1e-5, atol=0)


def test_rows_and_columns_of_zeros_score_zero() -> None:
    weight = weights(6, 8, 2)
    weight[2], weight[:, 3] = 0, 0
    found = scores.ria(weight, torch.ones(8))
    assert bool(found.isfinite().all()) and not found[2].any() and not found[:, 3].any()
    assert bool((found.any(1) == (torch.arange(6) != 2)).all())


def test_the_whole_matrix_is_compared_by_default() -> None:
    weight, gram = weights(20, 30, 3), gram_of(correlated(100, 30, 3))
    member = pruners.get("ria")
    found, mask = member.prune(weight, stat(gram), Cut(333, Unstructured(), member.selection))
    assert torch.equal(mask, keep_mask(scores.ria(weight, stat(gram).norms), 333, None, "matrix"))
    assert torch.equal(found, weight * mask) and len(set((~mask).sum(1).tolist())) > 2
