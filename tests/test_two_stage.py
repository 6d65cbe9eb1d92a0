"""The two-stage reduction against torch's eigenvalues: sizes around the band, what is read, threads, its absence."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alphaprune import spectrum, two_stage
from alphaprune.two_stage import BAND, PAYS_FROM, Library, Unusable

needs_openblas = pytest.mark.skipif(two_stage.library() is None, reason="numpy works without an OpenBLAS here")
pytestmark = pytest.mark.usefixtures("one_thread")


def symmetric(n: int, seed: int = 0) -> Tensor:
    matrix = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return matrix @ matrix.mT - n * torch.eye(n, dtype=torch.float64)  # of both signs


def assert_solved(found: Tensor, matrix: Tensor) -> None:
    wanted = torch.linalg.eigvalsh(matrix)
    assert found.shape == wanted.shape and (found.diff() >= 0).all()
    # Backward stable: the eigenvalues of a matrix within a small multiple of n·ε of this one.
    assert float((found - wanted).abs().max()) <= 4 * len(wanted) * 2.3e-16 * float(wanted.abs().max())


@needs_openblas
@pytest.mark.parametrize("n", [1, 2, 3, 17, BAND, BAND + 1, BAND + 2, 2 * BAND + 5, 300])
def test_every_size_is_solved_from_the_lower_triangle(n: int) -> None:
    matrix = symmetric(n, n)
    poisoned = matrix + torch.full_like(matrix, float("nan")).triu(1)
    before = poisoned.clone()
    assert_solved(two_stage.eigvalsh(poisoned), matrix)
    torch.testing.assert_close(poisoned, before, rtol=0, atol=0, equal_nan=True)


@needs_openblas
def test_any_strides_are_read() -> None:
    matrix = symmetric(120)
    assert_solved(two_stage.eigvalsh(matrix.mT), matrix)
    assert_solved(two_stage.eigvalsh(torch.block_diag(symmetric(40), matrix)[40:, 40:]), matrix)


@needs_openblas
def test_special_matrices() -> None:
    assert torch.equal(two_stage.eigvalsh(torch.zeros(130, 130, dtype=torch.float64)), torch.zeros(130).double())
    diagonal = torch.arange(200, dtype=torch.float64).flip(0)
    torch.testing.assert_close(two_stage.eigvalsh(diagonal.diag()), diagonal.flip(0), rtol=1e-14, atol=1e-12)


@needs_openblas
def test_many_at_once_give_the_bits_of_one_and_openblas_keeps_its_threads() -> None:
    found = two_stage.library()
    matrices = [symmetric(200, seed) for seed in range(6)]
    alone = [found.eigenvalues(matrix) for matrix in matrices]
    before = found._threads["get"]()
    found._threads["set"](3)
    try:
        results: dict[int, Tensor] = {}
        inside: set[int] = set()

        def work(i: int) -> None:
            results[i] = found.eigenvalues(matrices[i])
            inside.add(found._threads["get"]())

        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(matrices))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert inside <= {1, 3} and found._threads["get"]() == 3
        assert all(torch.equal(results[i], wanted) for i, wanted in enumerate(alone))
        with found._one_thread(), found._one_thread():
            assert found._threads["get"]() == 1
        with pytest.raises(torch.linalg.LinAlgError, match="dsterf of LAPACK returned -1"), found._one_thread():
            found._run("dsterf_", -3, torch.zeros(1), torch.zeros(1))
        assert found._threads["get"]() == 3
    finally:
        found._threads["set"](before)


@needs_openblas
def test_large_float64_matrices_on_a_cpu_go_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.empty(PAYS_FROM, PAYS_FROM, dtype=torch.float64)
    assert two_stage.serves(large) and not two_stage.serves(large[1:, 1:]) and not two_stage.serves(large.float())
    assert not two_stage.serves(large.to("meta"))
    monkeypatch.setattr(two_stage, "PAYS_FROM", 64)
    seen = []
    real = two_stage.eigvalsh
    monkeypatch.setattr(two_stage, "eigvalsh", lambda matrix: seen.append(matrix.shape) or real(matrix))
    weights = [torch.randn(70, 70, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    found = spectrum.eigenvalues(weights, "float64", "cpu")
    assert seen == [(70, 70)] * 2
    for row, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(row, torch.linalg.svdvals(weight.double()).square().flip(0), rtol=1e-9, atol=1e-12)


def test_without_an_openblas_torch_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stage, "library", lambda: None)
    assert not two_stage.serves(torch.empty(PAYS_FROM, PAYS_FROM, dtype=torch.float64))
    with pytest.raises(Unusable, match="without an OpenBLAS"):
        two_stage.eigvalsh(torch.eye(3, dtype=torch.float64))


def test_libraries_that_lack_a_function_are_named(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="cannot be loaded"):
        Library(str(tmp_path / "libopenblas.so"))
    with pytest.raises(Unusable, match="has no dsytrd_sy2sb"):
        Library("libm.so.6")


def test_the_loaded_libraries_are_found(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    lines = [
        "7f0 r-xp 0 08:01 1  /a b/libscipy_openblas64_-1.so",
        "7f1 r-xp 0 0 0",
        "7f2 r-xp 0 8:1 2  /openblas/libm.so",
    ]
    maps.write_text("\n".join([*lines, lines[0]]))
    assert two_stage.paths(str(maps)) == ["/a b/libscipy_openblas64_-1.so"]
    assert two_stage.paths(str(tmp_path / "none")) == []
