"""ALPS against its published iteration in float64, its order among the methods, exact counts and bad inputs."""

import pytest
import torch
from layers import bad_inputs, correlated, gram_of, stat, weights
from torch import Tensor

from alphaprune import pruners
from alphaprune.gram import Gram
from alphaprune.mask import keep_mask
from alphaprune.pattern import NM, Unstructured
from alphaprune.pruners import Cut, alps

pytestmark = pytest.mark.usefixtures("one_thread")


def published(dense: Tensor, gram: Gram, cut: Cut, iterations: int) -> tuple[Tensor, Tensor]:
    """D and its mask after so many iterations of the published rule: dual not scaled, explicit inverse.

    ρ from 0.1, every third iteration ×1.3 / 1.2 / 1.1 as more than 10 % / 0.5 % / nothing of the support changed.
    """
    g = gram.matrix.double() + gram.damping() * torch.eye(len(gram.matrix), dtype=torch.float64)
    scale = g.diagonal().sqrt()
    g, w0 = g / scale / scale[:, None], dense.double() * scale

    def project(weight: Tensor) -> Tensor:
        return keep_mask(weight.abs(), cut.zeros, cut.pattern, cut.selection)

    looked = mask = project(w0)
    d, v, rho = w0 * mask, torch.zeros_like(w0), 0.1
    for step in range(1, iterations + 1):
        inverse = torch.linalg.inv(g + rho * torch.eye(len(g), dtype=torch.float64))
        w = (w0 @ g - v + rho * d) @ inverse
        mask = project(w + v / rho)
        d = (w + v / rho) * mask
        v = v + rho * (w - d)
        if step % 3 == 0:
            change, looked = int((mask != looked).sum()) / int(mask.sum()), mask
            rho *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
    return d / scale, mask


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("pattern, selection", [(None, "matrix"), (None, "row"), (NM(2, 4), "matrix")])
def test_iterates_are_the_published_ones(
    iterations: int, pattern: NM | None, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, gram = weights(32, 96, 1), gram_of(correlated(250, 96, 1))
    cut = Cut(dense.numel() // 2, pattern or Unstructured(), selection)
    monkeypatch.setattr(alps, "ITERATIONS", iterations)
    total, mask, first = alps.search(dense, gram, cut)
    wanted, support = published(dense, gram, cut, iterations)
    same = mask & support  # where a weight is kept, D is T
    assert int((mask != support).sum()) <= mask.numel() // 500 and (iterations == 1 or not torch.equal(mask, first))
    assert float((total.double() - wanted)[same].norm() / wanted[same].norm()) < 1e-3


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("rows, columns, tokens, seed", [(48, 160, 600, 1), (64, 128, 90, 2), (20, 300, 1000, 3)])
def test_the_order_of_the_methods(sparsity: float, rows: int, columns: int, tokens: int, seed: int) -> None:
    """alps < sparsegpt < wanda < magnitude in the error of the layer, whichever selection."""
    dense, gram = weights(rows, columns, seed), gram_of(correlated(tokens, columns, seed))
    for selection in ("matrix", "row"):
        cut = Cut(round(sparsity * dense.numel()), Unstructured(), selection)
        errors = [
            gram.relative_error(pruners.get(method).prune(dense, stat(gram), cut)[0], dense)
            for method in ("alps", "sparsegpt", "wanda", "magnitude")
        ]
        assert errors == sorted(errors) and errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 16), NM(16, 32)])
def test_patterns(pattern: NM) -> None:
    dense, gram = weights(40, 128, 5), gram_of(correlated(400, 128, 5))
    cut = Cut(dense.numel() // pattern.of * (pattern.of - pattern.keep), pattern, "matrix")
    found, mask = pruners.get("alps").prune(dense, stat(gram), cut)
    assert (mask.reshape(-1, pattern.of).sum(1) == pattern.keep).all() and not found[~mask].any()
    other, _ = pruners.get("sparsegpt").prune(dense, stat(gram), cut)
    assert gram.relative_error(found, dense) < gram.relative_error(other, dense)


@pytest.mark.parametrize("zeros", [0, 1, 777, 40 * 50 - 1, 40 * 50])
@pytest.mark.parametrize("selection", ["matrix", "row"])
def test_counts_are_exact(zeros: int, selection: str) -> None:
    dense, gram = weights(40, 50, 6), gram_of(correlated(200, 50, 6))
    found, mask = pruners.get("alps").prune(dense, stat(gram), Cut(zeros, Unstructured(), selection))
    assert int((~mask).sum()) == zeros and not found[~mask].any()
    if selection == "row":
        counts = (~mask).sum(1)
        assert int(counts.max() - counts.min()) <= 1


def test_without_correlations_the_largest_stay() -> None:
    """With a diagonal G nothing can be made up for: |w|·‖x‖ decides, where the dual would have pushed others in."""
    dense = weights(20, 60, 8)
    gram = Gram(torch.diag(torch.linspace(0.5, 4, 60)), 100)
    found, mask = alps.prune(dense, stat(gram), Cut(500, Unstructured(), "matrix"))
    wanted = keep_mask(dense.abs() * (gram.matrix.diagonal() + gram.damping()).sqrt(), 500)
    assert torch.equal(mask, wanted)
    torch.testing.assert_close(found, dense * mask, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", bad_inputs())
def test_bad_inputs(kind: str) -> None:
    dense, gram = weights(24, 96, 4), gram_of(bad_inputs()[kind])
    found, mask = alps.prune(dense, stat(gram), Cut(1500, Unstructured(), "matrix"))
    assert int((~mask).sum()) == 1500 and bool(found.isfinite().all()) and not found[~mask].any()
    assert gram.error(found - dense) <= gram.error(dense * mask - dense)
    if kind == "dead inputs":
        assert torch.equal(found[:, 5][mask[:, 5]], dense[:, 5][mask[:, 5]])


def test_ties_of_bfloat16_weights() -> None:
    dense = torch.randint(-2, 3, (16, 100), generator=torch.Generator().manual_seed(0)).bfloat16()
    found, mask = alps.prune(dense, stat(gram_of(correlated(400, 100, 2))), Cut(1111, Unstructured(), "matrix"))
    assert int((~mask).sum()) == 1111 and found.dtype == torch.float32


def test_a_gram_matrix_with_nan_is_refused() -> None:
    gram = gram_of(correlated(100, 20, 1))
    gram.matrix[2, 2] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        alps.prune(weights(4, 20, 1), stat(gram), Cut(10, Unstructured(), "matrix"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    dense, gram = weights(48, 160, 1), gram_of(correlated(500, 160, 1))
    cut = Cut(5000, Unstructured(), "matrix")
    here, _ = alps.prune(dense, stat(gram), cut)
    there, mask = alps.prune(dense.cuda(), stat(Gram(gram.matrix.cuda(), 500)), cut)
    assert int((~mask).sum()) == 5000
    assert gram.relative_error(there.cpu(), dense) == pytest.approx(gram.relative_error(here, dense), rel=0.02)
