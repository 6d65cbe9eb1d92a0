"""The contract of every allocator: budget, bounds, order of the layers; and the published allocation."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import shared

from alphaprune import activity, allocators, cli, planning, sketches
from alphaprune.analysis import Analysis, LayerStat


def make_analysis(alphas: list[list[float]], shapes: list[tuple[int, int]]) -> Analysis:
    """One number per layer, by block, is its alpha; all that other allocators read follows from it and its place."""
    layers = {}
    for b, row in enumerate(alphas):
        mean = sum(row) / len(row)
        together = {"outliers": mean, "score_mean": mean**2}
        together_series = {"curve_sparsity": [0.0, 0.5, 0.8], "curve_loss": [0.0, mean / 9, mean**2 / 3]}
        for k, value in enumerate(row):
            own = {"alpha": value, "alpha_farms": value + 1, "outliers_matrix": value, "score_mean_matrix": value**2}
            own["removal_error"] = value**3 * shapes[k][0]
            generator = torch.Generator().manual_seed(round(100 * value))
            weight = value * torch.randn(shapes[k], generator=generator)
            series = {**sketches.series(weight), **together_series}
            layers[f"model.layers.{b}.{k}"] = LayerStat(b, shapes[k], {**together, **own}, series)
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


# How many ε a ratio may be away from 1: 1 of a linear rule, 2 of an additive one, which is around its mean. LSA's share
# of a small matrix is times mean size / size. Of some allocators ε is no part.
WIDEST = {"owl": 2, "dlp": 2, "lsa": 2 * (48 * 32 + 64 * 80) / 2 / (48 * 32)}
WITHOUT_EPSILON = ("uniform", "erk", "lamp", "global", "measured")


def ratios_of(name: str, analysis: Analysis, sparsity: float, epsilon: float, granularity: str) -> dict[str, float]:
    found = allocators.get(name)
    bounds = (planning.limits(sparsity),) if found.bounded else ()
    return found.ratios(analysis.layers, sparsity, epsilon, granularity, *bounds)


@pytest.mark.parametrize("name", allocators.MEMBERS)
@pytest.mark.parametrize("granularity", ["block", "matrix"])
@pytest.mark.parametrize(
    "sparsity, epsilon", [(0.0, 0.3), (0.3, 0.0), (0.5, 0.9), (0.7, 0.3), (0.93, 0.2), (0.99, 0.5)]
)
def test_every_allocator_keeps_budget_and_bounds(name, granularity, sparsity, epsilon) -> None:
    ratios = ratios_of(name, TOY, sparsity, epsilon, granularity)
    assert list(ratios) == list(TOY.layers)
    assert all(r > 0 and math.isfinite(r) for r in ratios.values())
    if name in WITHOUT_EPSILON:
        assert ratios == ratios_of(name, TOY, sparsity, 0.0, granularity)
    else:
        widest = WIDEST.get(name, 1) * epsilon + 1e-12
        assert all(max(1 - widest, 0) <= r <= 1 + widest for r in ratios.values())
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


def random_stats(blocks: int, shapes: list[tuple[int, int]], seed: int, column: str, alike: bool) -> Analysis:
    """A positive number per layer in one column, or one per block for all its layers; what else is needed is 1."""
    rng = np.random.default_rng(seed)
    values = rng.lognormal(size=(blocks, 1 if alike else len(shapes))) * np.ones((1, len(shapes)))
    layers = {
        f"{b}.{k}": LayerStat(b, shape, dict.fromkeys(activity.COLUMNS, 1.0) | {column: float(values[b, k])})
        for b in range(blocks)
        for k, shape in enumerate(shapes)
    }
    return Analysis("random", "", "float32", None, None, layers)


def published_kept(importance: np.ndarray, sparsity: float, shift: float) -> np.ndarray:
    """Kept part of every block or matrix as the published code of OWL, DLP and LSA has it, by position."""
    scaled = (importance - importance.min()) / (importance.max() - importance.min()) * 2 * shift
    return scaled - scaled.mean() + (1 - sparsity)


IMPORTANCE = {
    "owl": lambda outliers: outliers,
    "dlp": lambda scores: 1 - scores / scores.sum(),
    "lsa": lambda errors: 1 - errors / errors.sum(),
}
COLUMN = {
    "owl": ("outliers", "outliers_matrix"),
    "dlp": ("score_mean", "score_mean_matrix"),
    "lsa": ("removal_error", "removal_error"),
}


@pytest.mark.parametrize("name", IMPORTANCE)
@pytest.mark.parametrize("sparsity, shift", [(0.5, 0.04), (0.6, 0.08), (0.7, 0.15), (0.8, 0.12)])
def test_additive_rules_are_the_published_ones(name: str, sparsity: float, shift: float) -> None:
    for granularity, column in zip(("block", "matrix"), COLUMN[name], strict=True):
        alike = granularity == "block" and name != "lsa"
        analysis = random_stats(7, [(16, 24)] * 3, seed=len(name), column=column, alike=alike)
        values = np.array([s.columns[column] for s in analysis.layers.values()]).reshape(7, 3)
        values = values.mean(1, keepdims=True) if granularity == "block" else values
        wanted = 1 - published_kept(IMPORTANCE[name](values), sparsity, shift) * np.ones((1, 3))
        found = planning.real_sparsities(analysis, sparsity, name, shift / sparsity, granularity)
        assert np.abs(np.array(list(found.values())) - wanted.flatten()).max() < 1e-9
        assert np.ptp(wanted) == pytest.approx(2 * shift)


def test_lsa_by_matrix_weighs_the_shift_by_size_as_published() -> None:
    shapes = [(16, 24), (48, 24), (24, 96)]
    analysis = random_stats(5, shapes, 2, "removal_error", alike=False)
    errors = np.array([s.columns["removal_error"] for s in analysis.layers.values()])
    sizes = np.array([math.prod(s.shape) for s in analysis.layers.values()])
    imp = 1 - errors / errors.sum()
    d = (imp - imp.min()) / (imp.max() - imp.min()) * 2 * 0.07
    wanted = (0.7 * sizes + (d.mean() - d) * sizes.mean()) / sizes
    found = planning.real_sparsities(analysis, 0.7, "lsa", 0.1, "matrix")
    assert np.abs(np.array(list(found.values())) - wanted).max() < 1e-9


def test_what_the_additive_rules_protect() -> None:
    layers = {
        str(b): LayerStat(b, (8, 8), dict.fromkeys((c for p in COLUMN.values() for c in p), b + 1.0)) for b in (0, 1)
    }
    analysis = Analysis("two", "", "float32", None, None, layers)
    for granularity in ("block", "matrix"):
        pruned = {n: planning.real_sparsities(analysis, 0.6, n, 0.2, granularity) for n in IMPORTANCE}
        assert pruned["owl"]["1"] < pruned["owl"]["0"]  # more outliers: pruned less
        assert pruned["dlp"]["0"] < pruned["dlp"]["1"]  # smaller scores: pruned less
        assert pruned["lsa"]["0"] < pruned["lsa"]["1"]  # a smaller error: pruned less


def test_automatic_epsilon_is_the_published_shift() -> None:
    shifts = {
        "owl": {0.5: 0.08, 0.6: 0.08, 0.7: 0.08},
        "dlp": {0.5: 0.04, 0.55: 0.07, 0.6: 0.10, 0.65: 0.125, 0.7: 0.15, 0.75: 0.15},
        "lsa": {0.4: 0.04, 0.5: 0.04, 0.6: 0.10, 0.7: 0.15, 0.75: 0.135, 0.8: 0.12},
    }
    for name, known in shifts.items():
        auto = allocators.get(name).auto_epsilon
        for sparsity, shift in known.items():
            assert auto(sparsity, 0.95) == pytest.approx(shift / sparsity)
        for sparsity in (0.0, 0.01, 0.1, 0.3, 0.85, 0.9, 0.95, 0.99):
            high = planning.limits(sparsity)[1]
            assert 0 <= auto(sparsity, high) <= 0.5
            assert sparsity * (1 + auto(sparsity, high)) <= high + 1e-9
            assert planning.plan(TOY, sparsity, name).realized == pytest.approx(sparsity, abs=1e-4)


def test_auto_epsilon_stops_where_spread_has_no_meaning() -> None:
    for name in WITHOUT_EPSILON:
        assert planning.plan(TOY, 0.7, name).epsilon == 0.0


def published_erk(shapes: list[tuple[int, int]], sparsity: float) -> list[float]:
    """Densities as Evci et al. 2020 have them: the densest matrix over 1 becomes dense, and again."""
    dense: set[int] = set()
    while True:
        left = (1 - sparsity) * sum(n * k for n, k in shapes) - sum(math.prod(shapes[i]) for i in dense)
        scale = left / sum((n + k) for i, (n, k) in enumerate(shapes) if i not in dense)
        found = [1.0 if i in dense else scale * (n + k) / (n * k) for i, (n, k) in enumerate(shapes)]
        if max(found) <= 1:
            return found
        dense.add(max(range(len(shapes)), key=found.__getitem__))


@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.7, 0.9])
def test_erk_is_the_published_rule(sparsity: float) -> None:
    shapes = [(8, 96), (96, 96), (200, 96), (96, 200), (3, 5), (512, 640)]
    layers = {str(i): LayerStat(i // 2, shape) for i, shape in enumerate(shapes)}
    found = planning.real_sparsities(Analysis("e", "", "float32", None, None, layers), sparsity, "erk")
    wanted = published_erk(shapes, sparsity)
    assert [1 - s for s in found.values()] == pytest.approx(wanted, abs=1e-8) and wanted.count(1.0) >= 1


@pytest.mark.parametrize("file", ["llama-7b.json", "llama2-7b.json"])
def test_erk_on_real_shapes(file: str) -> None:
    analysis, _ = published(file)
    for sparsity in (0.3, 0.5, 0.7, 0.9):
        plan = planning.plan(analysis, sparsity, "erk")
        assert sum(p.zeros for p in plan.layers.values()) == round(sparsity * 6_476_005_376)
        attention = {p.sparsity for n, p in plan.layers.items() if "self_attn" in n}
        mlp = {p.sparsity for n, p in plan.layers.items() if "mlp" in n}
        assert max(attention) < sparsity < min(mlp)
        assert max(attention) - min(attention) < 1e-6 and max(mlp) - min(mlp) < 1e-6
        kept = (1 - max(attention)) / (1 - max(mlp))
        assert kept == pytest.approx((8192 / 4096**2) / (15104 / (4096 * 11008)), rel=1e-4)


def lamp_scores(weight: torch.Tensor) -> torch.Tensor:
    """w_u² / Σ w_v² over w_v² ≥ w_u², by the ranks of all weights; none are equal."""
    squares = weight.double().flatten().square()
    order = squares.argsort(descending=True)
    found = torch.empty_like(squares)
    found[order] = squares[order] / squares[order].cumsum(0)
    return found


@pytest.mark.parametrize("name", ["global", "lamp"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.9])
def test_global_thresholds_give_what_the_exact_selection_does(name: str, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(7)
    weights, layers = {}, {}
    for i, (scale, shape) in enumerate(zip((0.3, 1.0, 0.05, 2.5, 1.1), [(210, 97), (64, 400), (301, 77)] * 2)):  # noqa: B905
        weight = scale * torch.randn(shape, generator=generator)
        weights[str(i)] = weight * torch.rand(shape, generator=generator) ** (i % 3)
        layers[str(i)] = LayerStat(i, shape, {}, sketches.series(weights[str(i)]))
    plan = planning.plan(Analysis("g", "", "float32", None, None, layers), sparsity, name, bounds=(0.0, 1.0))
    scores = {n: lamp_scores(w) if name == "lamp" else w.abs().flatten() for n, w in weights.items()}
    together = torch.cat(list(scores.values())).sort().values
    threshold = together[round(sparsity * together.numel())]
    for layer, found in plan.layers.items():
        assert abs(found.sparsity - float((scores[layer] < threshold).double().mean())) < 2e-3
    assert max(p.sparsity for p in plan.layers.values()) - min(p.sparsity for p in plan.layers.values()) > 0.02


COMMON = ("--samples", "4", "--length", "32")


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.mark.parametrize("name", ["owl", "dlp", "lsa", "erk", "lamp", "global"])
def test_commands_make_what_an_allocator_reads(name, directory, text_file, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"lamp": ("--magnitudes",), "global": ("--magnitudes",), "erk": ()}
    given = options.get(name, ("--calibration", text_file, *COMMON))
    wanted = {*allocators.get(name).columns, *allocators.get(name).series}
    if wanted:
        assert run("analyze", directory, "-o", "plain.json") == 0
        capsys.readouterr()
        assert run("plan", "plain.json", "--sparsity", 0.7, "--allocator", name) == 2
        error = capsys.readouterr().err
        option = "--magnitudes" if "--magnitudes" in given else "--calibration FILE"
        assert any(f"allocator {name} reads {entry}, which this analysis lacks" in error for entry in wanted)
        assert f"with {option}" in error and "model.layers.0" in error
    assert run("analyze", directory, "-o", "a.json", *given) == 0
    assert run("plan", "a.json", "--sparsity", 0.7, "--allocator", name, "-o", "p.json") == 0
    made = {"--plan": "p.json"}, {"--sparsity": 0.7, "--allocator": name}
    for folder, how in zip(("steps", "once"), made, strict=True):
        flat = [item for pair in how.items() for item in pair]
        assert run("prune", directory, "-o", folder, *flat, "--calibration", text_file, *COMMON) == 0
    plan = planning.Plan.load("p.json")
    assert plan.realized == pytest.approx(0.7, abs=1e-5) and len({p.sparsity for p in plan.layers.values()}) > 1
    for file in (tmp_path / "steps").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "once" / file.name).read_bytes()


def test_prune_says_what_an_allocator_is_missing(directory, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("prune", directory, "-o", "o", "--sparsity", 0.7, "--method", "magnitude", "--allocator", "owl") == 2
    error = capsys.readouterr().err
    assert "--allocator owl needs --calibration FILE" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("file, searched", [("llama-7b.json", (0.2, 0.3)), ("llama2-7b.json", (0.2, 0.5))])
def test_automatic_epsilon_of_alpha_is_in_the_range_that_was_found_by_search(file: str, searched) -> None:
    """The published scripts have 0.2 to 0.3 for LLaMA-7B and 0.2 to 0.5 for LLaMA-2-7B, depending on the method."""
    analysis, _ = published(file)
    assert searched[0] <= planning.plan(analysis, 0.7, "alpha").epsilon <= searched[1]
