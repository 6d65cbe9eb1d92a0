"""Spectral metrics: the published formulas written down from the weight, how they scale, weights without a rank; and
the allocators by them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphaprune import allocators, alpha, metrics, planning, spectrum
from alphaprune.analysis import Analysis, LayerStat, analyze

pytestmark = pytest.mark.usefixtures("one_thread")
LAW = alpha.PowerLaw(2.5, 1.0, 10, 0.1, 0.1, 0.1, False, 0)
SHAPES = [(60, 60), (45, 131), (131, 45), (9, 400)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def heavy(n: int, k: int) -> Tensor:
    """[n, k] float64, fresh on every call."""
    return torch.randn(n, k, dtype=torch.float64) * torch.exp(0.7 * torch.randn(n, 1, dtype=torch.float64))


def of(weight: Tensor, law: alpha.PowerLaw = LAW, solver: str = "float64") -> dict[str, float]:
    ((values, used),) = spectrum.solve([weight], "tail", "cpu", solver)
    return metrics.columns(values, law, tuple(weight.shape), used.noise)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_metric_is_its_formula(shape: tuple[int, int]) -> None:
    """The right-hand sides are those of WeightWatcher (apply_norm_metrics), with torch's norms and rank."""
    weight = heavy(*shape)
    found = of(weight)
    squares = torch.linalg.svdvals(weight).square().flip(0)
    norm, largest, law = float(weight.square().sum()), float(squares[-1]), 2.5
    assert list(found) == list(metrics.COLUMNS)
    tail = squares[len(squares) // 2 :]
    excess = math.fsum(math.log(v / float(tail[0])) for v in tail.tolist())
    shares = [v / norm for v in squares.tolist()]
    rank = int(torch.linalg.matrix_rank(weight))
    wanted = {
        "alpha_mid": 1 + len(tail) / excess,
        "alpha_hat": law * math.log10(largest),
        "stable_rank": norm / largest,
        "entropy": -math.fsum(p * math.log(p) for p in shares) / math.log(rank),
        "spectral_norm": float(torch.linalg.matrix_norm(weight, 2)),
        "frobenius_norm": float(torch.linalg.matrix_norm(weight)),
        "log_norm": math.log10(norm),
        "log_spectral_norm": math.log10(largest),
        "log_alpha_norm": math.log10(math.fsum(v**law for v in squares.tolist())),
    }
    kept = squares > alpha.round_off(squares, 0.0)
    close = 1e-9 if bool(kept.all()) else 2e-2  # the smallest of a square matrix may count as round-off
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=close), name


def test_float32_is_exact_enough() -> None:
    for shape in SHAPES:
        weight = heavy(*shape).float()
        exact, cheap = of(weight), of(weight, solver="auto")
        for name in set(metrics.COLUMNS) - {"entropy", "alpha_mid"}:
            assert cheap[name] == pytest.approx(exact[name], rel=1e-5, abs=1e-5), name
        for name in ("entropy", "alpha_mid"):  # of the smallest eigenvalues another may count as round-off
            assert cheap[name] == pytest.approx(exact[name], rel=2e-2), name


@pytest.mark.parametrize("factor", [1e-3, 0.5, 37.0])
def test_how_metrics_scale_with_the_weight(factor: float) -> None:
    weight = heavy(40, 90)
    here, there = of(weight), of(factor * weight)
    for name in ("alpha_mid", "stable_rank", "entropy", "mp_soft_rank"):
        assert there[name] == pytest.approx(here[name], rel=1e-9), name
    for name in ("spectral_norm", "frobenius_norm"):
        assert there[name] == pytest.approx(factor * here[name], rel=1e-9), name
    for name, power in {"log_norm": 2, "log_spectral_norm": 2, "alpha_hat": 2 * 2.5, "log_alpha_norm": 2 * 2.5}.items():
        assert there[name] == pytest.approx(here[name] + power * math.log10(factor), abs=1e-9), name


@pytest.mark.parametrize("shape", [(500, 500), (200, 800), (900, 90)])
def test_random_weights_end_at_the_bulk_edge_and_learnt_ones_beyond(shape: tuple[int, int]) -> None:
    noise = 0.02 * torch.randn(*shape, dtype=torch.float64)
    assert of(noise)["mp_soft_rank"] == pytest.approx(1, abs=0.08)
    edge = metrics.bulk_edge(spectrum.eigenvalues(noise, "float64", "cpu"), shape)
    assert edge == pytest.approx(0.02**2 * max(shape) * (1 + math.sqrt(min(shape) / max(shape))) ** 2, rel=0.05)
    direction = torch.outer(torch.randn(shape[0]), torch.randn(shape[1])).double()
    spiked = noise + direction * (5 * math.sqrt(edge) / float(torch.linalg.matrix_norm(direction, 2)))
    assert of(spiked)["mp_soft_rank"] == pytest.approx(1 / 25, rel=0.3)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1.0))
def test_median_of_the_marchenko_pastur_law(beta: float) -> None:
    """Half of the published density lies above the median, by the midpoint rule in θ (see the function)."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    median = metrics.marchenko_pastur_median(beta)
    end = math.acos((median - 1 - beta) / (2 * math.sqrt(beta)))
    theta = (torch.arange(20_000, dtype=torch.float64) + 0.5) * (end / 20_000)
    x = 1 + beta + 2 * math.sqrt(beta) * theta.cos()
    density = ((high - x) * (x - low)).clamp_min(0).sqrt() / (2 * math.pi * beta * x)
    mass = float((density * 2 * math.sqrt(beta) * theta.sin()).sum()) * end / 20_000
    assert mass == pytest.approx(0.5, abs=1e-6)


def test_published_values_of_the_optimal_threshold() -> None:
    """Gavish and Donoho 2014: ω(β) = λ*(β) / √μ_β is 2.858 for squares, and about 0.56β³ − 0.95β² + 1.82β + 1.43."""
    for beta in (0.05, 0.2, 0.5, 0.8, 1.0):
        best = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))
        omega = best / math.sqrt(metrics.marchenko_pastur_median(beta))
        assert omega == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)
    assert omega == pytest.approx(2.858, abs=5e-4)


def test_weights_of_low_rank() -> None:
    one = torch.outer(torch.randn(30), torch.randn(50)).double()
    found = of(one)
    assert found["stable_rank"] == pytest.approx(1) and found["entropy"] == 0 and found["mp_soft_rank"] == 0
    assert found["spectral_norm"] == pytest.approx(found["frobenius_norm"])
    for rank in (2, 10, 25):
        low = heavy(30, rank) @ heavy(rank, 50)
        found, flat = (
            of(low),
            torch.linalg.qr(torch.randn(30, rank, dtype=torch.float64)).Q @ torch.eye(rank, 50).double(),
        )
        assert all(math.isfinite(v) for v in found.values())
        assert (found["mp_soft_rank"] == 0) == (rank < 15)
        assert of(flat)["entropy"] == pytest.approx(1) and of(flat)["stable_rank"] == pytest.approx(rank)
        assert of(flat)["alpha_mid"] == pytest.approx(21)
        solid = torch.linalg.svdvals(low)[:rank].square().log().flip(0)
        tail = solid[rank // 2 :]
        assert found["alpha_mid"] == pytest.approx(1 + 1 / max(0.05, float((tail - tail[0]).mean())))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-250, 1e250)), min_size=1, max_size=40), st.floats(1.01, 50))
def test_any_spectrum_has_every_column(values: list[float], exponent: float) -> None:
    found = metrics.columns(
        torch.tensor(sorted(values), dtype=torch.float64), replace(LAW, alpha=exponent), (len(values), 64), 1e-6
    )
    assert list(found) == list(metrics.COLUMNS)
    assert all(math.isfinite(v) for v in found.values()), found
    assert 1 < found["alpha_mid"] <= 21 + 1e-9 and -1e-9 <= found["entropy"] <= 1 + 1e-9
    assert 0 <= found["stable_rank"] <= len(values) * (1 + 1e-9)


def toy() -> Analysis:
    layers = {}
    for block in range(4):
        for k, shape in enumerate([(48, 32), (64, 80)]):
            weight = heavy(*shape) * (1 + block)
            law = alpha.fit(spectrum.eigenvalues(weight, "float64", "cpu"))
            layers[f"model.layers.{block}.{k}"] = LayerStat(block, shape, {**law.columns(), **of(weight, law)})
    return Analysis("toy", "0" * 64, "float32", "robust", "gram float64", layers)


@pytest.mark.parametrize("name", metrics.COLUMNS)
@pytest.mark.parametrize("granularity", ["block", "matrix"])
def test_every_metric_is_an_allocator(name: str, granularity: str) -> None:
    made = toy()
    assert allocators.get(name).name == name and allocators.get(name).columns == (name,)
    total = sum(n * k for n, k in (s.shape for s in made.layers.values()))
    for sparsity, epsilon in [(0.0, 0.3), (0.3, 0.0), (0.7, 0.3), (0.93, 0.2), (0.99, 0.5)]:
        ratios = allocators.get(name).ratios(made.layers, sparsity, epsilon, granularity)
        assert list(ratios) == list(made.layers)
        assert all(1 - epsilon - 1e-12 <= r <= 1 + epsilon + 1e-12 and r > 0 for r in ratios.values())
        planned = planning.plan(made, sparsity, name, epsilon, granularity=granularity)
        assert sum(p.zeros for p in planned.layers.values()) == round(sparsity * total)
        low, high = planning.limits(sparsity)
        assert all(low <= p.sparsity <= high + 1e-9 for p in planned.layers.values())
    turned = replace(made, layers=dict(reversed(made.layers.items())))
    here = planning.real_sparsities(made, 0.7, name, 0.3, granularity, (0.0, 0.8))
    there = planning.real_sparsities(turned, 0.7, name, 0.3, granularity, (0.0, 0.8))
    assert all(abs(here[n] - there[n]) < 1e-12 for n in here)
    if granularity == "matrix":  # the larger, the sparser, and nothing else counts
        free = planning.real_sparsities(made, 0.5, name, 0.3, granularity)
        order = sorted(free, key=lambda n: made.layers[n].columns[name])
        assert [free[n] for n in order] == sorted(free.values())
        assert free[order[-1]] / free[order[0]] == pytest.approx(1.3 / 0.7)


def test_a_wrong_name_lists_members_and_metrics() -> None:
    with pytest.raises(ValueError, match=r"'best'; there are: uniform, .*ramp.*stable_rank.*mp_soft_rank"):
        allocators.get("best")


def test_analyses_have_the_columns_and_older_ones_still_load(tmp_path: Path) -> None:
    made = analyze(make_model(1), device="cpu")
    for stat in made.layers.values():
        assert set(metrics.COLUMNS) < set(stat.columns)
        assert stat.columns["alpha_hat"] == stat.columns["alpha"] * stat.columns["log_spectral_norm"]
    older = json.loads(made.to_json())
    for stat in older["layers"].values():
        stat["columns"] = {c: v for c, v in stat["columns"].items() if c not in metrics.COLUMNS}
    (tmp_path / "a.json").write_text(json.dumps(older))
    loaded = Analysis.load(tmp_path / "a.json")
    assert planning.plan(loaded, 0.7, "alpha") == planning.plan(made, 0.7, "alpha")
    with pytest.raises(ValueError, match=r"allocator entropy reads entropy, which this analysis lacks.*--fit"):
        planning.plan(loaded, 0.7, "entropy")
