"""Columns from activations: against their published sentences in float64, odd shapes, dead inputs, sampled rows."""

import json
import math
from itertools import pairwise

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

from alphaprune import activity, calibrate
from alphaprune.analysis import analyze
from alphaprune.calibrate import InputStat
from alphaprune.gram import Gram
from alphaprune.model import Block, open_source

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def need(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def make_inputs(k: int, seed: int, tokens: int = 700) -> Tensor:
    """[tokens, K] float64, correlated, some inputs much louder than the others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    mixed += 0.7 * mixed.roll(1, 1)
    return mixed * torch.where(torch.rand(k, generator=generator) < 0.05, 30.0, 1.0)


def make_stat(x: Tensor, device: str = "cpu") -> InputStat:
    """As calibrate makes it of one sample."""
    x = x.to(device)
    return InputStat(x.square().sum(0).sqrt().float(), Gram((x.T @ x).float(), len(x)), len(x))


def make_block(weights: dict[str, Tensor]) -> Block:
    linears = {}
    for name, weight in weights.items():
        linears[name] = nn.Linear(
            weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype
        )
        linears[name].weight.data.copy_(weight)
    return Block(0, "b", nn.ModuleList(linears.values()), linears)


def random_weight(n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.rand(n, k, generator=generator).pow(2)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_outliers_and_means_are_the_published_ones(device: str) -> None:
    need(device)
    shapes = {"b.q": (37, 65), "b.k": (9, 65), "b.down": (65, 201)}
    weights = {name: random_weight(n, k, i) for i, (name, (n, k)) in enumerate(shapes.items())}
    x = {name: make_inputs(k, i + 10) for i, (name, (_, k)) in enumerate(shapes.items())}
    stats = {name: make_stat(x[name], device) for name in shapes}
    found = activity.columns(make_block({n: w.to(device) for n, w in weights.items()}), stats)
    scores = {name: weights[name].double().abs() * x[name].norm(dim=0) for name in shapes}
    together = torch.cat([s.flatten() for s in scores.values()])
    for name, columns in found.items():
        assert set(columns) == set(activity.COLUMNS)
        own = scores[name]
        assert columns["score_mean"] == pytest.approx(float(together.mean()), rel=1e-5)
        assert columns["score_mean_matrix"] == pytest.approx(float(own.mean()), rel=1e-5)
        outliers = 100 * float((together > 5 * together.mean()).double().mean())
        assert columns["outliers"] == pytest.approx(outliers, abs=1e-9) and outliers > 0
        assert columns["outliers_matrix"] == pytest.approx(
            100 * float((own > 5 * own.mean()).double().mean()), abs=1e-9
        )
    assert len({c["outliers_matrix"] for c in found.values()}) == 3


def greedy_error(weight: Tensor, gram: Tensor, group: int = 128) -> tuple[float, Tensor]:
    """Σ over rows of wᵀGw of what goes, where always that goes which adds least, by trying all in each group."""
    removed = torch.zeros_like(weight)
    for row, gone in zip(weight, removed, strict=True):
        for first in range(0, len(row), group):
            rest = list(range(first, min(first + group, len(row))))
            for _ in range(len(rest) // 2):
                added = [float(row[i] ** 2 * gram[i, i] + 2 * row[i] * (gram[i] @ gone)) for i in rest]
                gone[rest.pop(added.index(min(added)))] = 1.0
                gone *= (gone != 0).double()
                gone[gone != 0] = row[gone != 0]
    return float(torch.einsum("ij,jk,ik->", removed, gram, removed)), removed


@pytest.mark.parametrize("n, k", [(5, 12), (3, 301), (4, 128), (1, 129), (7, 1), (2, 3)])
@pytest.mark.parametrize("device", DEVICES)
def test_removal_error_is_that_of_the_greedy_search(n: int, k: int, device: str) -> None:
    need(device)
    weight, x = random_weight(n, k, n * k), make_inputs(k, k)
    wanted, removed = greedy_error(weight.double(), x.T @ x)
    assert wanted == pytest.approx(float((x @ removed.T).square().sum()), rel=1e-9)
    assert activity.removal_error(weight.to(device), make_stat(x, device).gram) == pytest.approx(wanted, rel=1e-3)


def test_removal_error_beats_magnitude_and_random_masks() -> None:
    weight, x = random_weight(60, 200, 1), make_inputs(200, 2)
    stat = make_stat(x)
    found = activity.removal_error(weight, stat.gram)
    scores = weight.abs() * stat.norms
    wanda = torch.where(scores.argsort(1).argsort(1) < 100, weight, 0.0)
    assert 0 < found < stat.gram.error(wanda) < stat.gram.error(weight)


def test_sampled_rows_stand_for_all() -> None:
    x = make_inputs(96, 3)
    few = random_weight(8, 96, 4)
    some, all_of_them = few.repeat(128, 1), activity.removal_error(few, make_stat(x).gram)
    assert activity.removal_error(some, make_stat(x).gram) == pytest.approx(128 * all_of_them, rel=1e-4)
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randn(4000, 1, generator=generator).exp()  # so that N / rows would be wrong by tens of per cent
    weight = torch.randn(4000, 96, generator=generator) * lengths
    parts = [activity.removal_error(weight[i : i + 125], make_stat(x).gram) for i in range(0, 4000, 125)]
    assert activity.removal_error(weight, make_stat(x).gram) == pytest.approx(sum(parts), rel=0.05)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 130, 257, 1000, 1024, 4096, 11008])
def test_sampled_rows_are_distinct_and_have_no_period(count: int) -> None:
    rows = activity._rows(count)
    assert len(set(rows)) == len(rows) == min(count, 128) and min(rows) >= 0 and max(rows) < count
    if count >= 1000:
        assert max(b - a for a, b in pairwise(rows)) < 3 * count / 128
        assert len({row % 32 for row in rows}) >= 16


@pytest.mark.parametrize(
    "kind", ["dead inputs", "zero weights", "no weight on a live input", "huge", "tiny", "bfloat16"]
)
def test_columns_are_finite_whatever_comes(kind: str) -> None:
    weight, x = random_weight(30, 70, 6), make_inputs(70, 7)
    if kind == "dead inputs":
        x.zero_()
    if kind == "no weight on a live input":
        x[:, ::2], weight[:, 1::2] = 0.0, 0.0
    weight = {"zero weights": 0 * weight, "huge": 1e30 * weight, "tiny": 1e-30 * weight}.get(kind, weight)
    x = {"huge": 1e12 * x, "tiny": 1e-12 * x}.get(kind, x)
    weight = weight.bfloat16() if kind == "bfloat16" else weight
    columns = activity.columns(
        make_block({"b.q": weight, "b.k": weight[:3]}), dict.fromkeys(("b.q", "b.k"), make_stat(x))
    )
    for found in columns.values():
        assert all(math.isfinite(v) and v >= 0 for v in found.values())
        assert all((v > 0) == (kind in ("huge", "tiny", "bfloat16")) for v in found.values()), found


def test_scaling_a_block_scales_its_columns() -> None:
    weight, x = random_weight(20, 90, 8), make_inputs(90, 9)
    plain = activity.columns(make_block({"q": weight}), {"q": make_stat(x)})["q"]
    scaled = activity.columns(make_block({"q": 4 * weight}), {"q": make_stat(8 * x)})["q"]
    factors = {"outliers": 1, "outliers_matrix": 1, "score_mean": 32, "score_mean_matrix": 32, "removal_error": 1024}
    assert scaled == pytest.approx({name: factor * plain[name] for name, factor in factors.items()}, rel=1e-5)


def test_analyze_fills_the_columns_of_every_layer() -> None:
    live, tokens = make_model(1), torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(0))
    found = analyze(live, None, tokens=tokens, calibration={"calibration": "x"})
    source = open_source(live)
    activations = calibrate.first_inputs(source, tokens)
    for block in source.blocks():
        wanted = activity.columns(block, calibrate.statistics(block, activations, "gram"))
        for name, columns in wanted.items():
            assert found.layers[name].columns == pytest.approx(columns)
            assert len(columns) == 5 and columns["removal_error"] > 0
        calibrate.run(block, activations)
    blocks = [found.layers[f"model.layers.{b}.mlp.up_proj"].columns for b in range(3)]
    assert len({b["score_mean"] for b in blocks}) == 3
    json.loads(found.to_json())
