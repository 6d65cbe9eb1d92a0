"""SparseGPT against the published algorithm in float64, its factor, exact counts, and inputs that break others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SAMPLES, bad_inputs, correlated, gram_of, stat, weights
from torch import Tensor

from alphaprune import gram as gram_module
from alphaprune.gram import Gram, factorize
from alphaprune.pattern import NM, Unstructured
from alphaprune.pruners import Cut, sparsegpt

pytestmark = pytest.mark.usefixtures("one_thread")


def published_factor(x: Tensor) -> Tensor:
    """U [K, K] float64 of H = 2/n Σ x xᵀ with 1 where an input is dead and 1 % of the mean diagonal added."""
    h = 2 / SAMPLES * x.double().T @ x.double()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def published(weight: Tensor, x: Tensor, sparsity: float = 0.0, pattern: NM | None = None) -> Tensor:
    """The weight [N, K] float64 that the published algorithm leaves (IST-DASLab/sparsegpt, sparsegpt.py)."""
    upper, w = published_factor(x), weight.double().clone()
    w[:, (x == 0).all(0)] = 0
    columns = w.shape[1]
    for i1 in range(0, columns, 128):
        i2 = min(i1 + 128, columns)
        block, own, errors = w[:, i1:i2].clone(), upper[i1:i2, i1:i2], torch.zeros(len(w), i2 - i1).double()
        loss = block.square() / own.diagonal().square()
        gone = loss <= loss.flatten().sort().values[int(loss.numel() * sparsity)]
        if pattern:
            gone = torch.zeros_like(gone)
        for i in range(i2 - i1):
            if pattern and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                loss = block[:, group].square() / own.diagonal()[group].square()
                lowest = loss.topk(pattern.of - pattern.keep, dim=1, largest=False).indices
                gone[:, group] = torch.zeros_like(gone[:, group]).scatter(1, lowest, True)
            column = block[:, i].clone()
            left = torch.where(gone[:, i], 0, column)
            errors[:, i] = (column - left) / own[i, i]
            block[:, i:] -= errors[:, i : i + 1] * own[i : i + 1, i:]
            w[:, i1 + i] = left
        w[:, i2:] -= errors @ upper[i1:i2, i2:]
    return w


def exact_error(weight: Tensor, dense: Tensor, x: Tensor) -> float:
    """‖(W − W₀)X‖² / ‖W₀X‖² in float64."""
    x = x.double()
    return float(((weight.double() - dense.double()) @ x.T).norm() ** 2 / (dense.double() @ x.T).norm() ** 2)


def published_zeros(shape: tuple[int, int], sparsity: float) -> int:
    """`<=` at sorted[int(numel·s)] removes one more than int(numel·s) of every block."""
    rows, columns = shape
    return sum(int(rows * min(128, columns - i) * sparsity) + 1 for i in range(0, columns, 128))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("rows, columns, tokens, dead", [(96, 384, 700, 0), (64, 320, 201, 0), (48, 256, 500, 9)])
def test_agrees_with_the_published_rule(sparsity: float, rows: int, columns: int, tokens: int, dead: int) -> None:
    """Where float32 decides a near tie at a threshold otherwise, later blocks differ, and the error by some 1e-3."""
    x, weight = correlated(tokens, columns, dead), weights(rows, columns, tokens)
    x[:, torch.randperm(columns, generator=torch.Generator().manual_seed(dead))[:dead]] = 0
    wanted = published(weight, x, sparsity)
    cut = Cut(published_zeros(weight.shape, sparsity), Unstructured(), "matrix")
    found, mask = sparsegpt.prune(weight, stat(gram_of(x)), cut)
    live = (x != 0).any(0)
    assert int((~mask).sum()) == cut.zeros and not found[~mask].any()
    assert exact_error(found, weight, x) == pytest.approx(exact_error(wanted, weight, x), rel=1e-4)
    assert int((mask != (wanted != 0))[:, live].sum()) <= mask.numel() // 10_000


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(5, 16), NM(16, 32)])
def test_patterns_agree_with_the_published_rule(pattern: NM) -> None:
    x, weight = correlated(500, 288, 3), weights(40, 288, 3)
    wanted = published(weight, x, pattern=pattern)
    zeros = weight.numel() // pattern.of * (pattern.of - pattern.keep)
    found, mask = sparsegpt.prune(weight, stat(gram_of(x)), Cut(zeros, pattern, "matrix"))
    assert (mask.reshape(-1, pattern.of).sum(1) == pattern.keep).all() and not found[~mask].any()
    assert exact_error(found, weight, x) == pytest.approx(exact_error(wanted, weight, x), rel=1e-4)
    assert int((mask != (wanted != 0)).sum()) <= mask.numel() // 5_000


@pytest.mark.parametrize("pattern", [NM(2, 3), NM(3, 5), NM(100, 150)])
def test_blocks_hold_whole_groups(pattern: NM) -> None:
    """Widths that do not divide 128, and one above it."""
    columns = 2 * pattern.of if pattern.of > 128 else 60 * pattern.of
    weight, x = weights(7, columns, 5), correlated(200, columns, 5)
    zeros = weight.numel() // pattern.of * (pattern.of - pattern.keep)
    _, mask = sparsegpt.prune(weight, stat(gram_of(x)), Cut(zeros, pattern, "matrix"))
    assert (mask.reshape(-1, pattern.of).sum(1) == pattern.keep).all()
    with pytest.raises(ValueError, match="does not make"):
        sparsegpt.prune(weight, stat(gram_of(x)), Cut(zeros + 1, pattern, "matrix"))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from(["matrix", "row"]), st.data())
def test_counts_are_exact(rows: int, columns: int, selection: str, data: st.DataObject) -> None:
    zeros = data.draw(st.integers(0, rows * columns))
    x = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(zeros))
    weight = weights(rows, columns, 1)
    found, mask = sparsegpt.prune(weight, stat(gram_of(x)), Cut(zeros, Unstructured(), selection))
    assert int((~mask).sum()) == zeros and not found[~mask].any() and bool(found.isfinite().all())
    blocks = (~mask).split(128, dim=1)
    if selection == "row":
        counts = (~mask).sum(1)
        assert counts.tolist() == sorted(counts.tolist(), reverse=True) and int(counts[0] - counts[-1]) <= 1
        assert all(int(b.sum(1).max() - b.sum(1).min()) <= 1 for b in blocks)
    else:
        assert all(abs(int(b.sum()) - zeros * b.shape[1] / columns) <= 1 for b in blocks)


def test_the_last_zeros_by_row_go_where_there_is_room() -> None:
    """Blocks of 128, 128 and 1 columns: 256 of every row fill the first and the last, one more goes in the second."""
    x, weight = correlated(300, 257, 1), weights(3, 257, 1)
    _, mask = sparsegpt.prune(weight, stat(gram_of(x)), Cut(3 * 256 + 2, Unstructured(), "row"))
    assert (~mask).sum(1).tolist() == [257, 257, 256]


@pytest.mark.parametrize("columns", [1, 40, gram_module.BLOCK, 2 * gram_module.BLOCK + 57])
def test_the_factor_is_the_inverse_of_the_published_one(columns: int) -> None:
    """H = 2G here: U of the published rule is ours divided by √2."""
    x = correlated(columns // 2 + 3, columns, 11)
    x[:, 0] = 0
    gram = gram_of(x)
    factor = gram.factor()
    assert torch.equal(factor.matrix, factor.matrix.triu()) and bool((factor.matrix.diagonal() > 0).all())
    wanted = published_factor(x) * 2**0.5
    inverse = torch.linalg.inv(factor.matrix.double())
    assert float((inverse - wanted).norm() / wanted.norm()) < 1e-3
    right = weights(5, columns, 2)
    solved = factor.solve_(right.clone())
    full = factor.matrix.double() @ factor.matrix.double().T
    torch.testing.assert_close(solved.double() @ full, right.double(), rtol=0, atol=1e-3 * float(right.abs().max()))
    assert gram.factor() is factor


def test_damping_grows_until_the_factorisation_succeeds() -> None:
    matrix = torch.diag(torch.linspace(1, 3, 20))
    matrix[4, 5] = matrix[5, 4] = 1.5  # an eigenvalue of about −0.06, below 1 % of the mean and above 10 %
    gram = Gram(matrix, 100)
    assert float(torch.linalg.eigvalsh(matrix.double())[0]) < -gram.damping()
    factor = gram.factor()
    assert factor.damping == pytest.approx(10 * gram.damping())
    damped = matrix + factor.damping * torch.eye(20)
    torch.testing.assert_close(factor.matrix @ factor.matrix.T, damped, rtol=1e-5, atol=1e-5)


def test_float64_where_float32_cannot() -> None:
    x = torch.randint(-3, 4, (4, 30), generator=torch.Generator().manual_seed(0)).float()
    matrix = x.T @ x  # exact, of rank 4
    factor = factorize(matrix, matrix.diagonal().clone(), 1e-10)
    assert factor.damping < 2e-8 and factor.matrix.dtype == torch.float32
    torch.testing.assert_close(factor.matrix @ factor.matrix.T, matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", bad_inputs())
@pytest.mark.parametrize("selection", ["matrix", "row"])
def test_never_dies_on_bad_inputs(kind: str, selection: str) -> None:
    weight, x = weights(24, 96, 4), bad_inputs()[kind]
    found, mask = sparsegpt.prune(weight, stat(gram_of(x)), Cut(1500, Unstructured(), selection))
    assert int((~mask).sum()) == 1500 and bool(found.isfinite().all()) and not found[~mask].any()
    if kind != "nothing but zeros":
        assert exact_error(found, weight, x) <= exact_error(weight * mask, weight, x)


def test_dead_inputs_go_first_and_stay_as_they_are() -> None:
    x, weight = bad_inputs()["dead inputs"], weights(24, 96, 4)
    _, mask = sparsegpt.prune(weight, stat(gram_of(x)), Cut(100, Unstructured(), "matrix"))
    assert not mask[:, [0, 5, 95]].any()
    found, mask = sparsegpt.prune(weight, stat(gram_of(x)), Cut(50, Unstructured(), "matrix"))
    dead = torch.zeros_like(mask)
    dead[:, [0, 5, 95]] = True
    assert mask[~dead].all() and torch.equal(found[dead & mask], weight[dead & mask])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(value: float) -> None:
    gram = gram_of(correlated(200, 64, 1))
    gram.matrix[3, 7] = gram.matrix[7, 3] = value
    with pytest.raises(ValueError, match="second moments of its inputs hold NaN or infinity"):
        sparsegpt.prune(weights(8, 64, 1), stat(gram), Cut(100, Unstructured(), "matrix"))


def test_an_indefinite_gram_matrix_is_refused() -> None:
    gram = Gram(torch.diag(torch.tensor([1.0, 1.0, -50.0])), 10)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        gram.factor()


def test_large_finite_moments_are_no_overflow() -> None:
    Gram(torch.full((4, 4), 3e38), 10).check()


def test_ties_of_bfloat16_weights_do_not_change_the_count() -> None:
    weight = torch.randint(-2, 3, (16, 200), generator=torch.Generator().manual_seed(0)).bfloat16()
    for selection in ("matrix", "row"):
        cut = Cut(1111, Unstructured(), selection)
        found, mask = sparsegpt.prune(weight, stat(gram_of(correlated(400, 200, 2))), cut)
        assert int((~mask).sum()) == 1111 and found.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu() -> None:
    x, weight = correlated(300, 320, 1), weights(40, 320, 1)
    for pattern, zeros in ((Unstructured(), 9000), (NM(2, 4), 6400)):
        here, _ = sparsegpt.prune(weight, stat(gram_of(x)), Cut(zeros, pattern, "matrix"))
        there, mask = sparsegpt.prune(weight.cuda(), stat(gram_of(x.cuda())), Cut(zeros, pattern, "matrix"))
        assert int((~mask).sum()) == zeros
        assert exact_error(there.cpu(), weight, x) == pytest.approx(exact_error(here, weight, x), rel=1e-3)
