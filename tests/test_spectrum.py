"""Eigenvalues against float64 singular values: every route, shape, dtype and device that is here."""

import pytest
import torch
from torch import Tensor

from alphaprune import cusolver, spectrum
from alphaprune.spectrum import EXACT, LONG_SIDED, TAIL

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def truth(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.double()).square().flip(0)


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 96), (300, 200), (300, 600), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("need", ["tail", "all"])
@pytest.mark.parametrize("solver", spectrum.SOLVERS)
def test_every_route_gives_the_squared_singular_values(shape, need, solver) -> None:
    weight = gaussian(*shape)
    found = spectrum.eigenvalues(weight, solver, "cpu", need)
    wanted = truth(weight)
    assert found.dtype == torch.float64 and found.shape == (min(shape),)
    assert (found.diff() >= 0).all() and (found >= 0).all()
    used = spectrum.choose(need, shape, CPU, solver)
    absolute = {TAIL: 2e-6, LONG_SIDED: 1e-6, EXACT: 1e-14}[used] * wanted[-1]
    assert ((found - wanted).abs() <= absolute).all()


def test_what_needs_the_smallest_gets_the_smallest() -> None:
    """The reason for `need`: on a square matrix float32 products lose λ_min, singular values keep it."""
    errors = {"kept": 0.0, "lost": 0.0}
    for seed in range(6):
        weight = gaussian(256, 256, seed)
        smallest = truth(weight)[0]
        kept = spectrum.eigenvalues(weight, device="cpu", need="all")[0]
        lost = spectrum._eigenvalues(spectrum._gram(weight[None], TAIL))[0, 0]
        errors = {
            k: max(e, float(abs(v / smallest - 1))) for (k, e), v in zip(errors.items(), (kept, lost), strict=True)
        }
    assert errors["kept"] < 1e-2 < errors["lost"]


def test_batches_and_single_matrices_agree() -> None:
    weights = [gaussian(80, 48, seed) for seed in range(3)]
    together = spectrum.eigenvalues(weights, device="cpu")
    assert together.shape == (3, 48)
    for row, weight in zip(together, weights, strict=True):
        torch.testing.assert_close(row, spectrum.eigenvalues(weight, device="cpu"), rtol=1e-5, atol=0)
    large = [gaussian(300, spectrum.BATCHED_UP_TO + 8, seed) for seed in range(2)]
    assert spectrum.eigenvalues(large, device="cpu").shape == (2, spectrum.BATCHED_UP_TO + 8)


def test_grams_of_one_size_are_solved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, solved, solve = [(48, 80), (64, 64), (80, 48), (48, 80), (48, 48)], [], cusolver.eigvalsh
    weights = [gaussian(*shape, seed) for seed, shape in enumerate(shapes)]
    wanted = [spectrum.solve([weight], "all", "cpu") for weight in weights]
    monkeypatch.setattr(cusolver, "eigvalsh", lambda gram: solved.append(tuple(gram.shape)) or solve(gram))
    found = spectrum.solve_all(weights, "all", "cpu")
    assert sorted(solved) == [(1, 64, 64), (4, 48, 48)]
    for (values, used), ((same, alone),) in zip(found, wanted, strict=True):
        assert used == alone
        torch.testing.assert_close(values, same, rtol=1e-9, atol=0)
    assert spectrum.solve_all([], "all", "cpu") == []
    steep = [gaussian(90, 70, seed) + 10.0 for seed in (1, 2)]
    solved.clear()
    found = spectrum.solve_all([gaussian(70, 70), *steep], "tail", "cpu")
    assert solved == [(3, 70, 70), (2, 70, 70)], "what needs float64 is solved again, together"
    assert [str(used) for _, used in found] == ["gram float32", "gram float64", "gram float64"]
    for (values, _), weight in zip(found[1:], steep, strict=True):
        torch.testing.assert_close(values[5:], truth(weight)[5:], rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_read_exactly(dtype: torch.dtype) -> None:
    weight = gaussian(60, 90).to(dtype)
    found = spectrum.eigenvalues(weight, "float64", "cpu")
    torch.testing.assert_close(found, truth(weight), rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [1e-37, 1e-30, 1e25, 3e38])
def test_no_square_leaves_the_range(factor: float) -> None:
    """bfloat16 holds 1e25, whose square float32 does not."""
    weight = (gaussian(40, 70) * factor).bfloat16()
    found = spectrum.eigenvalues(weight, device="cpu")
    torch.testing.assert_close(found, truth(weight), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_left_as_they_are(dtype: torch.dtype) -> None:
    weight = gaussian(12, 9).to(dtype)
    before = weight.clone()
    spectrum.solve([weight], device="cpu")
    spectrum.scaled(weight[None])
    assert torch.equal(weight, before)


def test_zero_weights_have_zero_eigenvalues() -> None:
    assert (spectrum.eigenvalues(torch.zeros(5, 9), device="cpu") == 0).all()


def test_steep_spectra_are_solved_in_float64() -> None:
    """One direction far above the rest drowns the bulk of a float32 Gram matrix in round-off."""
    weight = gaussian(200, 200, 5) + 10.0 / 200
    ((found, used),) = spectrum.solve([weight], "tail", "cpu")
    assert str(used) == "gram float64"
    torch.testing.assert_close(found[20:], truth(weight)[20:], rtol=1e-9, atol=0)
    both = spectrum.solve([gaussian(200, 200, 5), weight], "tail", "cpu")
    assert [str(used) for _, used in both] == ["gram float32", "gram float64"]


def test_a_long_matrix_with_a_small_eigenvalue_is_solved_in_float64() -> None:
    weight = gaussian(60, 200, 7)
    weight[3] = weight[4] + 3e-3 * gaussian(1, 200, 8)[0]
    ((found, used),) = spectrum.solve([weight], "all", "cpu")
    assert str(used) == "gram float64"
    torch.testing.assert_close(found, truth(weight), rtol=1e-7, atol=0)


def test_policy() -> None:
    def chosen(need, shape=(40, 60), solver="auto"):
        return str(spectrum.choose(need, shape, CPU, solver))

    assert chosen("tail") == "gram float32" and chosen("all") == "gram float64"
    assert chosen("all", (120, 60)) == chosen("all", (60, 120)) == "gram float32 solved in float64"
    assert chosen("tail", solver="float64") == chosen("all", (9, 60), "float64") == "gram float64"


@pytest.mark.parametrize(("capability", "all_"), [((9, 0), "gram float64"), ((8, 6), "gram float32 solved in float64")])
def test_policy_on_a_gpu(capability, all_, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail in float32 as on a CPU; a smallest eigenvalue in float64 where that costs little."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, shape = torch.device("cuda"), (120, 60)
    assert str(spectrum.choose("tail", shape, gpu)) == "gram float32"
    assert str(spectrum.choose("all", shape, gpu)) == all_
    assert str(spectrum.choose("tail", shape, gpu, "float64")) == "gram float64"


@pytest.mark.parametrize("torch_has, most, wanted", [(1, 4, 1), (3, None, 1), (5, 2, 2), (2, 2, 1)])
def test_a_pool_shares_what_torch_has(torch_has, most, wanted) -> None:
    torch.set_num_threads(torch_has)
    with spectrum.threads(most) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {wanted}
    assert torch.get_num_threads() == torch_has


def test_how_many_are_solved_at_once() -> None:
    assert spectrum.together((64, 200), 40, None) == 40  # small ones all, in one call
    assert spectrum.together((4096, 11008), 40, None) == 1
    assert spectrum.together((4096, 4096), 40, 12 << 30) == 16  # on a GPU by its memory


def test_the_users_precision_is_neither_used_nor_changed() -> None:
    weight = gaussian(128, 256)
    wanted = spectrum.eigenvalues(weight, device="cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(spectrum.eigenvalues(weight, device="cpu"), wanted)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(200, 200), (200, 320)])
@pytest.mark.parametrize("need", ["tail", "all"])
def test_cuda_agrees(shape, need) -> None:
    weight = gaussian(*shape)
    used = spectrum.choose(need, shape, torch.device("cuda"))
    found = spectrum.eigenvalues(weight, need=need)
    tolerance = 1e-13 if used.gram == torch.float64 else 2e-6
    assert found.device.type == "cpu"
    assert ((found - truth(weight)).abs() <= tolerance * found[-1]).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="solver 'fast'"):
        spectrum.eigenvalues(gaussian(4, 4), "fast")
    for device in ("abacus", "meta"):
        with pytest.raises(ValueError, match=f"--device {device}: wanted auto, cpu, cuda or cuda:N"):
            spectrum.eigenvalues(gaussian(4, 4), device=device)
    with pytest.raises(ValueError, match="--device cuda:99: "):
        spectrum.eigenvalues(gaussian(4, 4), device="cuda:99")
    for weights in ([gaussian(4, 4), gaussian(4, 5)], [torch.ones(4)], [torch.ones(0, 4)], []):
        with pytest.raises(ValueError, match="matrices of one shape"):
            spectrum.eigenvalues(weights)
    for value in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            spectrum.eigenvalues(torch.full((4, 4), value), device="cpu")
