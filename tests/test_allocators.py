"""The contract of every allocator: budget, bounds, order of the layers; and the published allocation."""

import json
import math
from itertools import pairwise

import pytest
from conftest import shared

from alphaprune import allocators, planning
from alphaprune.analysis import Analysis, LayerStat


def make_analysis(alphas: list[list[float]], shapes: list[tuple[int, int]]) -> Analysis:
    layers = {
        f"model.layers.{b}.{k}": LayerStat(b, shapes[k], {"alpha": value})
        for b, row in enumerate(alphas)
        for k, value in enumerate(row)
    }
    return Analysis("toy", "0" * 64, "float32", "robust", "gram float32", layers)


TOY = make_analysis([[2.0, 3.0], [2.5, 2.1], [5.0, 4.0], [3.3, 2.7]], [(48, 32), (64, 80)])


def published(file: str) -> tuple[Analysis, list[dict]]:
    found = json.loads((shared("data/alphas") / file).read_text())
    layers = {e["name"]: LayerStat(e["block"], tuple(e["shape"]), {"alpha": e["alpha"]}) for e in found["layers"]}
    return Analysis(found["model"], "", "float16", "reference", None, layers), found["reference_allocation_uncapped"]


def published_formula(analysis: Analysis, sparsity: float, epsilon: float, per_block: bool) -> dict[str, float]:
    """AlphaPruning, lib/prune.py, ww_sparsity, written down directly, by position as there."""
    names = list(analysis.layers)
    metrics = [s.columns["alpha"] for s in analysis.layers.values()]
    if per_block:
        size = len(names) // (1 + max(s.block for s in analysis.layers.values()))
        means = [sum(metrics[i : i + size]) / size for i in range(0, len(metrics), size)]
        metrics = [m for m in means for _ in range(size)]
    weights = [s.shape[0] * s.shape[1] for s in analysis.layers.values()]
    low, high = min(metrics), max(metrics)
    ratios = [(m - low) / (high - low) * 2 * epsilon + 1 - epsilon for m in metrics]
    scale = sparsity * sum(weights) / sum(w * r for w, r in zip(weights, ratios, strict=True))
    return {name: r * scale for name, r in zip(names, ratios, strict=True)}


@pytest.mark.parametrize("file", ["llama-7b.json", "llama2-7b.json"])
def test_alpha_is_the_published_formula(file: str) -> None:
    analysis, cases = published(file)
    clipped = 0
    for case in cases:
        sparsity, epsilon = case["sparsity"], case["epsilon"]
        free = planning.real_sparsities(analysis, sparsity, "alpha", epsilon)
        for name, stat in analysis.layers.items():
            assert free[name] == pytest.approx(case["block_sparsity"][stat.block], abs=1e-8)  # 8 digits are stored
        wanted = published_formula(analysis, sparsity, epsilon, per_block=True)
        assert max(abs(free[n] - wanted[n]) for n in wanted) < 1e-9
        matrices = planning.real_sparsities(analysis, sparsity, "alpha", epsilon, "matrix")
        wanted_matrices = published_formula(analysis, sparsity, epsilon, per_block=False)
        assert max(abs(matrices[n] - wanted_matrices[n]) for n in wanted) < 1e-9
        low, high = planning.limits(sparsity)
        bounded = planning.real_sparsities(analysis, sparsity, "alpha", epsilon, bounds=(low, high))
        if max(wanted.values()) < high:
            assert max(abs(bounded[n] - wanted[n]) for n in wanted) < 1e-9
        else:
            clipped += 1
            assert max(bounded.values()) == high
        plan = planning.plan(analysis, sparsity, "alpha", epsilon)
        assert all(abs(p.sparsity - bounded[n]) <= 1 / (p.shape[0] * p.shape[1]) for n, p in plan.layers.items())
        assert sum(p.zeros for p in plan.layers.values()) == round(sparsity * 6_476_005_376)
    assert 0 < clipped < len(cases)


@pytest.mark.parametrize("name", allocators.MEMBERS)
@pytest.mark.parametrize("granularity", ["block", "matrix"])
@pytest.mark.parametrize(
    "sparsity, epsilon", [(0.0, 0.3), (0.3, 0.0), (0.5, 0.9), (0.7, 0.3), (0.93, 0.2), (0.99, 0.5)]
)
def test_every_allocator_keeps_budget_and_bounds(name, granularity, sparsity, epsilon) -> None:
    ratios = allocators.get(name).ratios(TOY.layers, sparsity, epsilon, granularity)
    assert list(ratios) == list(TOY.layers)
    assert all(1 - epsilon - 1e-12 <= r <= 1 + epsilon + 1e-12 and r > 0 for r in ratios.values())
    plan = planning.plan(TOY, sparsity, name, epsilon, granularity=granularity)
    total = sum(n * k for n, k in (s.shape for s in TOY.layers.values()))
    assert sum(p.zeros for p in plan.layers.values()) == round(sparsity * total)
    low, high = planning.limits(sparsity)
    assert all(low <= p.sparsity <= high + 1e-9 for p in plan.layers.values())


@pytest.mark.parametrize("name", allocators.MEMBERS)
@pytest.mark.parametrize("granularity", ["block", "matrix"])
def test_every_allocator_is_blind_to_the_order_of_layers(name, granularity) -> None:
    turned = Analysis("toy", "", "float32", "robust", None, dict(reversed(TOY.layers.items())))
    here = planning.real_sparsities(TOY, 0.7, name, 0.3, granularity, (0.0, 0.8))
    there = planning.real_sparsities(turned, 0.7, name, 0.3, granularity, (0.0, 0.8))
    assert all(abs(here[n] - there[n]) < 1e-12 for n in here)


def test_uniform_is_uniform() -> None:
    found = planning.real_sparsities(TOY, 0.7, "uniform", 0.3)
    assert all(abs(s - 0.7) < 1e-12 for s in found.values())


def test_ramp_is_linear_in_depth() -> None:
    found = planning.real_sparsities(TOY, 0.6, "ramp", 0.2)
    by_block = [found[f"model.layers.{b}.0"] for b in range(4)]
    steps = [b - a for a, b in pairwise(by_block)]
    assert all(s == pytest.approx(steps[0]) and s > 0 for s in steps)
    assert by_block[-1] / by_block[0] == pytest.approx(1.2 / 0.8)


def test_larger_alphas_are_pruned_more_by_block_or_matrix() -> None:
    by_block = planning.real_sparsities(TOY, 0.6, "alpha", 0.3)
    assert by_block["model.layers.2.0"] == by_block["model.layers.2.1"] == max(by_block.values())
    by_matrix = planning.real_sparsities(TOY, 0.6, "alpha", 0.3, "matrix")
    order = sorted(TOY.layers, key=lambda n: TOY.layers[n].columns["alpha"])
    assert [by_matrix[n] for n in order] == sorted(by_matrix.values())


def test_equal_alphas_are_pruned_alike() -> None:
    flat = make_analysis([[2.0, 2.0]] * 3, [(8, 8), (8, 24)])
    for granularity in ("block", "matrix"):
        found = planning.real_sparsities(flat, 0.7, "alpha", 0.3, granularity)
        assert all(math.isclose(s, 0.7) for s in found.values())


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="no allocator is called 'best'; there are: uniform, alpha, ramp"):
        planning.plan(TOY, 0.5, "best")
