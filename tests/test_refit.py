"""The refit of kept weights against an exact float64 solution per row, and what it must leave alone."""

import pytest
import torch
from layers import bad_inputs, correlated, gram_of, stat, weights
from torch import Tensor

from alphaprune import pruners
from alphaprune import refit as refit_module
from alphaprune.gram import Gram
from alphaprune.pattern import NM, Unstructured
from alphaprune.pruners import Cut
from alphaprune.refit import refit

pytestmark = pytest.mark.usefixtures("one_thread")


def row_errors(weight: Tensor, dense: Tensor, gram: Gram) -> Tensor:
    """[N] float64, (w − w₀) G (w − w₀)ᵀ of every row."""
    difference = weight.double() - dense.double()
    return (difference @ gram.matrix.double() * difference).sum(1)


def exact(dense: Tensor, mask: Tensor, gram: Gram) -> Tensor:
    """The least errors [N] float64 there are on each row's support, by a pseudo-inverse."""
    g, best = gram.matrix.double(), dense.double() * mask
    for row, keep in enumerate(mask):
        if keep.any():
            aim = g[keep] @ dense[row].double()
            best[row, keep] = torch.linalg.pinv(g[keep][:, keep], rtol=1e-9, hermitian=True) @ aim
    return row_errors(best, dense, gram)


def half_mask(dense: Tensor, sparsity: float, gram: Gram) -> Tensor:
    cut = Cut(round(sparsity * dense.numel()), Unstructured(), "row")
    return pruners.get("wanda").prune(dense, stat(gram), cut)[1]


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("rows, columns, tokens", [(30, 96, 400), (1, 33, 100), (2100, 17, 60)])
def test_reaches_the_exact_solution(sparsity: float, rows: int, columns: int, tokens: int) -> None:
    """To what is lost by the damping, 1e-4 of the diagonal; 2100 rows are more than are solved together."""
    dense, gram = weights(rows, columns, 1), gram_of(correlated(tokens, columns, tokens))
    mask = half_mask(dense, sparsity, gram)
    start = dense * mask
    found = refit(start, dense, mask, gram, iterations=60)
    least, before = exact(dense, mask, gram), row_errors(start, dense, gram)
    after = row_errors(found, dense, gram)
    assert found.dtype == torch.float32 and not found[~mask].any()
    assert bool((after <= 1.02 * least + 2e-4 * before).all())
    assert float(least.sum()) < 0.75 * float(before.sum())  # there was something to gain


@pytest.mark.parametrize("tokens", [1, 20, 60])
def test_fewer_tokens_than_columns(tokens: int) -> None:
    """G is singular: the least error is (nearly) zero on supports larger than the rank, and no weight runs away."""
    dense, gram = weights(25, 96, 2), gram_of(correlated(tokens, 96, 3))
    mask = half_mask(dense, 0.5, gram)
    found = refit(dense * mask, dense, mask, gram)
    before, after = row_errors(dense * mask, dense, gram), row_errors(found, dense, gram)
    assert bool((after <= before).all()) and float(after.sum()) < 0.1 * float(before.sum())
    assert float(found.abs().max()) < 20 * float(dense.abs().max())


@pytest.mark.parametrize("method", pruners.MEMBERS)
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_no_row_of_any_mask_gets_worse(method: str, pattern: Unstructured | NM) -> None:
    dense, gram = weights(40, 128, 3), gram_of(correlated(300, 128, 4))
    for zeros in (40 * 64,) if isinstance(pattern, NM) else (40 * 64, 4000):
        weight, mask = pruners.get(method).prune(dense, stat(gram), Cut(zeros, pattern, pruners.get(method).selection))
        found = refit(weight, dense, mask, gram)
        before, after = row_errors(weight, dense, gram), row_errors(found, dense, gram)
        assert bool((after <= before * (1 + 1e-5)).all()) and not found[~mask].any()
        assert float(after.sum()) < (1 + 1e-6 if method == "alps" else 0.95) * float(before.sum())


def test_a_worse_result_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damped heavily, conjugate gradients leave the exact solution for a worse one; the start must come back."""
    dense, gram = weights(12, 40, 1), gram_of(correlated(200, 40, 1))
    mask = half_mask(dense, 0.6, gram)
    best = refit(dense * mask, dense, mask, gram, iterations=100)
    best[6:] = dense[6:] * mask[6:]
    monkeypatch.setattr(refit_module, "DAMPING", 3.0)
    found = refit(best, dense, mask, gram)
    assert torch.equal(found[:6], best[:6]) and not torch.equal(found[6:], best[6:])
    assert bool((row_errors(found, dense, gram) <= row_errors(best, dense, gram)).all())


def test_nothing_or_everything_kept() -> None:
    dense, gram = weights(3, 40, 1), gram_of(correlated(100, 40, 1))
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1] = False
    found = refit(dense * mask, dense, mask, gram)
    assert torch.equal(found, dense * mask)
    far = refit(torch.zeros_like(dense), dense, mask, gram, iterations=200)
    assert float(row_errors(far, dense, gram)[0]) < 1e-4 * float(row_errors(far * 0, dense, gram)[0])


@pytest.mark.parametrize("kind", bad_inputs())
def test_bad_inputs(kind: str) -> None:
    dense, gram = weights(24, 96, 4).bfloat16(), gram_of(bad_inputs()[kind])
    mask = torch.rand(24, 96, generator=torch.Generator().manual_seed(5)) < 0.4
    found = refit(dense * mask, dense, mask, gram)
    assert bool(found.isfinite().all()) and not found[~mask].any() and found.dtype == torch.float32
    kept_and_dead = mask & gram.dead()
    assert torch.equal(found[kept_and_dead], dense.float()[kept_and_dead])
    start = row_errors(dense * mask, dense, gram)
    assert bool((row_errors(found, dense, gram) <= start * (1 + 1e-5)).all())


def test_kept_weights_of_dead_inputs_come_back() -> None:
    """SparseGPT's published rule zeroes them, and so may any method; the layer's outputs do not say otherwise."""
    dense, gram = weights(5, 96, 4), gram_of(bad_inputs()["dead inputs"])
    mask = torch.ones_like(dense, dtype=torch.bool)
    mask[:, 5] = False
    found = refit(torch.zeros_like(dense), dense, mask, gram)
    assert torch.equal(found[:, [0, 95]], dense[:, [0, 95]]) and not found[:, 5].any()


def test_a_gram_matrix_with_nan_is_refused() -> None:
    gram, dense = gram_of(correlated(50, 20, 1)), weights(4, 20, 1)
    gram.matrix[2, 2] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        refit(dense, dense, torch.ones(4, 20, dtype=torch.bool), gram)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    dense, gram = weights(30, 96, 1), gram_of(correlated(400, 96, 2))
    mask = half_mask(dense, 0.6, gram)
    here = refit(dense * mask, dense, mask, gram)
    there = refit((dense * mask).cuda(), dense.cuda(), mask.cuda(), Gram(gram.matrix.cuda(), 400)).cpu()
    torch.testing.assert_close(row_errors(there, dense, gram), row_errors(here, dense, gram), rtol=1e-3, atol=0)
