"""The fits: known laws, the published loop, stability against round-off, and spectra that have no tail."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphaprune import alpha, spectrum

FAMILIES = ("gaussian", "heavy", "rows", "spiked", "deficient")


pytestmark = pytest.mark.usefixtures("one_thread")


def matrix(family: str, n: int, k: int, seed: int = 0) -> Tensor:
    """[n, k] float32: i.i.d. Gaussian; Student's t with 3 degrees; rows of very different size; a power law of
    directions over noise; rank 2/3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if family == "gaussian":
        found = normal(n, k)
    elif family == "heavy":
        found = normal(n, k) / (normal(3, n, k).square().mean(0)).sqrt()
    elif family == "rows":
        found = normal(n, k) * torch.exp(0.8 * normal(n, 1))
    elif family == "spiked":
        sizes = torch.arange(1, n // 4 + 1) ** -0.7
        found = normal(n, k) + 0.5 * (normal(n, n // 4) * sizes) @ normal(n // 4, k)
    else:
        found = normal(n, n * 2 // 3) @ normal(n * 2 // 3, k)
    return 0.02 * found


def law(weight: Tensor, method: str, solver: str = "auto") -> alpha.PowerLaw:
    ((values, used),) = spectrum.solve([weight], alpha.NEED[method], "cpu", solver)
    return alpha.fit(values, method, noise=used.noise)


def pareto(exponent: float, n: int) -> Tensor:
    """[n] the quantiles of p(λ) ∝ λ^−exponent, λ ≥ 1."""
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return (1 - levels) ** (-1 / (exponent - 1))


def published(values: Tensor) -> tuple[float, float, int]:
    """alpha, distance and tail by the published loop, candidate by candidate (AlphaPruning, lib/esd_utils.py)."""
    logs = torch.log10(values)
    low, high = logs.min().item(), logs.max().item()
    counts = torch.histc(logs, 100, min=low, max=high)
    edges = torch.linspace(low, high, 101, dtype=values.dtype)
    x2 = 10 ** edges[counts.argmax()].item()
    least, most = math.log10(0.95 * x2), 1.5 * x2
    n = len(values)
    alphas, distances = torch.zeros(n - 1), torch.ones(n - 1)
    for i, xmin in enumerate(values[:-1]):
        if not least <= xmin <= most:
            continue
        count = float(n - i)
        found = 1 + count / (torch.sum(torch.log(values[i:])) - count * torch.log(xmin))
        alphas[i] = found
        if found > 1:
            steps = torch.arange(count, dtype=values.dtype) / count
            distances[i] = torch.max(torch.abs(1 - (values[i:] / xmin) ** (1 - found) - steps))
    best = int(distances.argmin())
    return float(alphas[best]), float(distances[best]), n - best


@pytest.mark.parametrize("scale", [1.0, 50.0])  # the window's lower end means something only for large eigenvalues
@pytest.mark.parametrize("family", ["gaussian", "heavy", "rows", "spiked"])
def test_reference_is_the_published_loop(family: str, scale: float) -> None:
    for seed, shape in enumerate([(96, 96), (80, 200), (200, 64)]):
        ((values, used),) = spectrum.solve([scale * matrix(family, *shape, seed)], "all", "cpu")
        found = alpha.fit(values, "reference", noise=used.noise)
        wanted, distance, tail = published(values)
        assert found.tail == tail
        assert found.alpha == pytest.approx(wanted, rel=1e-5) and found.ks == pytest.approx(distance, rel=1e-5)


def test_reference_follows_the_smallest_eigenvalue_and_robust_does_not() -> None:
    values = spectrum.eigenvalues(matrix("gaussian", 256, 256, 1), "float64", "cpu")
    moved = [values * torch.tensor([factor] + [1.0] * 255, dtype=torch.float64) for factor in (0.1, 0.3, 0.6)]

    def change(method: str) -> float:
        here = alpha.fit(values, method, noise=1e-13).alpha
        return max(abs(alpha.fit(other, method, noise=1e-13).alpha - here) for other in moved)

    assert change("reference") > 0.1
    assert change("robust") < 1e-9


@pytest.mark.parametrize("scale", [1e-9, 0.01, 1000.0])
def test_robust_and_mid_do_not_depend_on_the_scale(scale: float) -> None:
    values = spectrum.eigenvalues(matrix("heavy", 128, 128, 1), "float64", "cpu")
    for method in ("robust", "mid"):
        here, there = alpha.fit(values, method), alpha.fit(values * scale, method)
        assert there.alpha == pytest.approx(here.alpha, abs=1e-9) and there.tail == here.tail
        assert there.xmin == pytest.approx(here.xmin * scale)


@pytest.mark.parametrize("shape", [(256, 256), (160, 400), (400, 160)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["robust", "mid"])
def test_float32_gram_is_exact_enough(method: str, family: str, shape: tuple[int, int]) -> None:
    """Why `robust` and `mid` may take the cheap solver: alpha within 1e-4 of float64."""
    weight = matrix(family, *shape)
    ((_, used),) = spectrum.solve([weight], alpha.NEED[method], "cpu")
    assert str(used) == "gram float32"
    assert law(weight, method).alpha == pytest.approx(law(weight, method, "float64").alpha, abs=1e-4)


@pytest.mark.parametrize("shape", [(344, 128), (96, 300), (200, 100)])
@pytest.mark.parametrize("family", FAMILIES[:4])
def test_of_a_long_matrix_float32_products_are_better_than_float32_singular_values(family, shape) -> None:
    """Why `reference` may take them: they are nearer to float64 than what the published estimator reads."""
    errors = {"here": 0.0, "published": 0.0}
    for seed in range(4):
        weight = matrix(family, *shape, seed)
        truth = torch.linalg.svdvals(weight.double()).square().flip(0)
        ((values, used),) = spectrum.solve([weight], alpha.NEED["reference"], "cpu")
        assert used == spectrum.LONG_SIDED
        assert abs(alpha.fit(values, "reference").alpha - alpha.fit(truth, "reference").alpha) < 1e-4
        singular = torch.linalg.svdvals(weight).double().square().flip(0)
        for name, found in (("here", values), ("published", singular)):
            errors[name] = max(errors[name], float((found / truth - 1).abs().max()))
    assert errors["here"] < max(2 * errors["published"], 1e-5)


def test_bfloat16_rounding_moves_robust_little_and_reference_far() -> None:
    weights = [matrix(f, *shape, seed) for f in FAMILIES[:4] for shape in ((160, 160), (128, 320)) for seed in range(3)]
    moves = {}
    for method in alpha.METHODS:
        pairs = [(law(w, method).alpha, law(w.bfloat16().float(), method).alpha) for w in weights]
        moves[method] = max(abs(a - b) for a, b in pairs)
    assert moves["robust"] < 0.02 and moves["mid"] < 0.02
    assert moves["reference"] > 0.2


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("method", ["robust", "mid"])
def test_a_true_power_law_is_found(method: str, exponent: float) -> None:
    found = alpha.fit(pareto(exponent, 2000), method, noise=0)
    assert abs(found.alpha - exponent) < 3 * found.stderr
    assert found.ks < 0.05 and not found.unstable
    assert found.stderr == pytest.approx((found.alpha - 1) / math.sqrt(found.tail))


def test_heavier_tails_have_smaller_alpha() -> None:
    for method in ("robust", "mid"):
        found = {family: law(matrix(family, 160, 400), method).alpha for family in ("gaussian", "spiked", "rows")}
        assert found["rows"] < found["spiked"] < found["gaussian"]


def test_what_is_no_power_law_is_called_unstable() -> None:
    """A Marchenko-Pastur bulk bends everywhere: alpha depends on where the tail is cut off."""
    ratio = 1024 / 2752
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    grid = torch.linspace(low, high, 100_001, dtype=torch.float64)[1:-1]
    mass = (((high - grid) * (grid - low)).sqrt() / grid).cumsum(0)
    values = grid[torch.searchsorted(mass / mass[-1], (torch.arange(4096) + 0.5) / 4096)]
    found = alpha.fit(values)
    assert found.unstable and found.spread > 0.2 * (found.alpha - 1)


@pytest.mark.parametrize("two_sided", [False, True])
def test_distances_are_those_of_a_loop(two_sided: bool) -> None:
    """The empirical law steps from j/n to (j + 1)/n at the j-th eigenvalue; the published distance sees the first."""
    values = spectrum.eigenvalues(matrix("heavy", 40, 60), "float64", "cpu")
    first, slopes = torch.tensor([5, 17, 33]), torch.tensor([1.5, 2.5, 4.0], dtype=torch.float64)
    found = alpha._distances(values.log(), first, values[first].log(), slopes, two_sided)
    for distance, i, slope in zip(found.tolist(), first.tolist(), slopes.tolist(), strict=True):
        n, wanted = 40 - i, 0.0
        for j in range(n):
            law_here = 1 - float(values[i + j] / values[i]) ** (1 - slope)
            wanted = max(wanted, abs(law_here - j / n), abs((j + 1) / n - law_here) if two_sided else 0.0)
        assert distance == pytest.approx(wanted, abs=1e-12)


def test_mid_is_hill_at_the_median() -> None:
    values = spectrum.eigenvalues(matrix("spiked", 101, 150), "float64", "cpu")
    tail = values[50:]
    assert alpha.fit(values, "mid").alpha == pytest.approx(1 + len(tail) / float((tail / tail[0]).log().sum()))
    assert alpha.fit(values, "mid").tail == 51


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=8, max_size=60), st.sampled_from(alpha.METHODS))
def test_any_spectrum_has_a_finite_law_or_a_sentence(values: list[float], method: str) -> None:
    try:
        found = alpha.fit(torch.tensor(sorted(values), dtype=torch.float64), method)
    except ValueError as error:
        assert "eigenvalues above round-off" in str(error) or str(error).startswith(f"fit {method}")
        assert method != "robust" or "at least, this spectrum has" in str(error)
        return
    assert all(math.isfinite(v) for v in found.columns().values())
    assert found.alpha > 1 and 1 <= found.tail <= len(values) and found.xmin > 0
    assert set(found.columns()) == {f.name for f in fields(found)}


def test_spectra_without_a_tail() -> None:
    equal = torch.full((64,), 3.0, dtype=torch.float64)  # an orthogonal matrix
    assert 10 < alpha.fit(equal).alpha <= 21.5
    for method in ("reference", "mid"):
        with pytest.raises(ValueError, match=r"equal.*use robust"):
            alpha.fit(equal, method)
    nothing = torch.zeros(64, dtype=torch.float64)
    for method in alpha.METHODS:
        with pytest.raises(ValueError, match="this spectrum has 0 of 64; the allocators uniform and ramp"):
            alpha.fit(nothing, method)
        with pytest.raises(ValueError, match="this spectrum has 5 of 5"):
            alpha.fit(torch.linspace(1, 2, 5, dtype=torch.float64), method)
    deficient = torch.cat([torch.zeros(60, dtype=torch.float64), pareto(2.0, 40)])
    assert alpha.fit(deficient).dropped == 60
    with pytest.raises(ValueError, match="60 of 100 eigenvalues are not; use robust"):
        alpha.fit(deficient, "mid")
    with pytest.raises(ValueError, match="some are zero; use robust"):
        alpha.fit(deficient, "reference")


def test_zeros_do_not_change_what_robust_sees() -> None:
    values = pareto(2.0, 400)
    padded = torch.cat([torch.full((30,), 1e-9, dtype=torch.float64), values])
    assert alpha.fit(padded).alpha == pytest.approx(alpha.fit(values).alpha, abs=5e-3)


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, float("nan")] * 8, "finite"),
        ([-1.0] + [1.0] * 10, "not negative"),
        ([2.0, 1.0] * 8, "ascending"),
    ],
)
def test_refusals(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alpha.fit(torch.tensor(values))
    with pytest.raises(ValueError, match="fit 'best'"):
        alpha.fit(pareto(2.0, 10), "best")
