"""N:M per layer: which layers stay dense at 2:4 and 4:8 under a budget, and N:16 and N:32 down to the disk."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, shared, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import alphaprune
from alphaprune import cli, nm_planning
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.curves import BlockCurve, Curves, attach
from alphaprune.pattern import NM
from alphaprune.planning import Plan, plan

SHAPES = {"q": (64, 64), "k": (16, 64), "v": (16, 64), "up": (160, 64), "down": (64, 160)}
BLOCKS = 6
ALPHAS = [2.0, 5.0, 3.0, 4.0, 2.5, 3.5]


def toy(alphas: list[float] = ALPHAS) -> Analysis:
    layers = {
        f"layers.{b}.{name}": LayerStat(b, shape, {"alpha": alpha})
        for b, alpha in enumerate(alphas)
        for name, shape in SHAPES.items()
    }
    return Analysis("toy", "f" * 64, "float32", "robust", None, layers)


TOY = toy()
TOTAL = sum(n * k for n, k in (s.shape for s in TOY.layers.values()))


def pruned(found: Plan) -> list[str]:
    return [name for name, p in found.layers.items() if p.zeros]


def pruned_blocks(found: Plan) -> list[int]:
    """How many layers of each block have the pattern."""
    blocks = [int(name.split("layers.")[1].split(".")[0]) for name in found.layers]
    return [
        sum(p.zeros > 0 for b, p in zip(blocks, found.layers.values(), strict=True) if b == block)
        for block in range(1 + max(blocks))
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 0.5),
    st.sampled_from(["2:4", "4:8", "1:2"]),
    st.sampled_from(["alpha", "ramp", "uniform"]),
    st.sampled_from(["block", "matrix"]),
    st.lists(st.floats(1, 9), min_size=BLOCKS, max_size=BLOCKS),
)
def test_the_budget_is_met_within_half_of_the_smallest_layer(sparsity, pattern, allocator, granularity, alphas) -> None:
    found = plan(toy(alphas), sparsity, allocator, pattern=pattern, granularity=granularity)
    zeros = sum(p.zeros for p in found.layers.values())
    smallest = 16 * 64 // 2
    counts = {n: sum(found.layers[f"layers.{b}.{n}"].zeros > 0 for b in range(BLOCKS)) for n in ("k", "v")}
    free = 0 < sum(counts.values()) < 2 * BLOCKS
    assert abs(zeros - sparsity * TOTAL) <= smallest / (2 if free else 1) + 0.5
    fixed = NM(*map(int, pattern.split(":")))
    for p in found.layers.values():
        assert p.pattern in (fixed, NM(fixed.of, fixed.of))
        assert p.zeros == (p.shape[0] * p.shape[1] // 2 if p.pattern == fixed else 0)
    assert found == plan(toy(alphas), sparsity, allocator, pattern=pattern, granularity=granularity)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4, 7, 14]), st.floats(0.1, 3)), min_size=1, max_size=6), st.floats(0, 1)
)
def test_layers_with_larger_ratios_go_first(layers, share: float) -> None:
    """Of one size strictly; and no choice of layers comes nearer by more than the smallest, where there are any."""
    shapes = {str(i): (8 * n, 8) for i, (n, _) in enumerate(layers)}
    ratios = {str(i): r for i, (_, r) in enumerate(layers)}
    units = {name: n * k // 2 for name, (n, k) in shapes.items()}
    budget = round(share * sum(units.values()))
    found = nm_planning.mixed(shapes, ratios, {name: int(name) for name in shapes}, NM(2, 4), budget)
    assert list(found) == list(shapes)
    for first, second in itertools.permutations(shapes, 2):
        if units[first] == units[second] and ratios[first] > ratios[second]:
            assert found[first].zeros >= found[second].zeros
    miss = abs(sum(p.zeros for p in found.values()) - budget)
    sums = {sum(chosen) for count in range(len(units) + 1) for chosen in itertools.combinations(units.values(), count)}
    if min(abs(s - budget) for s in sums) <= min(units.values()):
        assert miss <= min(units.values())
    else:
        assert miss <= max(units.values()) / 2


def test_whole_blocks_first_and_the_largest_layers_of_the_last() -> None:
    block = sum(n * k for n, k in SHAPES.values())
    found = plan(TOY, 2 * block / 2 / TOTAL, "alpha", pattern="2:4")
    assert pruned_blocks(found) == [0, 5, 0, 5, 0, 0]  # alphas 5 and 4
    assert found.realized == pytest.approx(found.sparsity)
    more = plan(TOY, (2 * block + 160 * 64) / 2 / TOTAL, "alpha", pattern="2:4")
    assert [n for n in pruned(more) if n not in pruned(found)] == ["layers.5.up"]
    assert pruned_blocks(plan(TOY, 2 * block / 2 / TOTAL, "ramp", pattern="2:4")) == [0, 0, 0, 0, 5, 5]
    # Nothing prefers a block: pruned ones lie evenly over the depth.
    even = pruned_blocks(plan(toy([2.0] * 12), 0.25, "uniform", pattern="2:4"))
    assert sorted(even) == [0] * 6 + [5] * 6 and max(len(list(g)) for _, g in itertools.groupby(even)) <= 2


def test_sizes_do_not_stand_in_for_ratios() -> None:
    """Where all that is wanted is small or large layers, no others are pruned for the sake of their size."""
    for first in (("q", "k", "v"), ("up",), ("k", "down")):
        layers = {
            name: LayerStat(s.block, s.shape, {"alpha": s.block + (20.0 if name.split(".")[-1] in first else 1.0)})
            for name, s in TOY.layers.items()
        }
        stats = Analysis("toy", "f" * 64, "float32", "robust", None, layers)
        wanted = [name for name in layers if name.split(".")[-1] in first]
        share = sum(s.shape[0] * s.shape[1] for n, s in layers.items() if n in wanted) / TOTAL
        assert pruned(plan(stats, share / 2, "alpha", pattern="2:4", granularity="matrix")) == wanted


def test_any_epsilon_gives_the_same_order() -> None:
    plans = [plan(TOY, 0.3, "alpha", epsilon, pattern="2:4") for epsilon in ("auto", 0.05, 0.9)]
    assert pruned(plans[0]) == pruned(plans[1]) == pruned(plans[2]) != pruned(plan(TOY, 0.3, "alpha", 0, "2:4"))


def test_error_curves_choose_the_cheapest_blocks() -> None:
    losses = [0.4, 0.1, 0.3, 0.05, 0.9, 0.2]
    curves = {b: BlockCurve((0.0, 0.5, 0.75), (0.0, loss, 2 - loss)) for b, loss in enumerate(losses)}
    stats = attach(TOY, Curves("toy", "f" * 64, "wanda", "kl", curves))
    assert pruned_blocks(plan(stats, 0.25, "measured", pattern="2:4")) == [0, 5, 0, 5, 0, 5]
    assert pruned_blocks(plan(stats, 0.125, "measured", pattern="4:16")) == [0, 0, 0, 0, 5, 0]  # what 0.75 costs


def test_times_keep_layers_dense() -> None:
    never = {name: 0.6 if name.endswith("up") else 0.0 for name in TOY.layers}
    found = plan(TOY, 0.25, "alpha", pattern="2:4", break_even=never)
    assert not any(name.endswith("up") for name in pruned(found))
    assert abs(found.realized - 0.25) * TOTAL <= 16 * 64 / 4 + 1
    with pytest.raises(ValueError, match="2:4 would be slower than dense in 6 of 30 layers"):
        plan(TOY, 0.45, "alpha", pattern="2:4", break_even=never)
    with pytest.raises(ValueError, match="2:4 would be slower than dense in 30 of 30 layers"):
        plan(TOY, 0.1, "alpha", pattern="2:4", break_even=dict.fromkeys(TOY.layers, 0.7))
    everywhere = plan(TOY, 0.0, "alpha", pattern="2:4", break_even=dict.fromkeys(TOY.layers, 0.7))
    assert pruned(everywhere) == [] and everywhere.realized == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"sparsity": 0.7, "pattern": "2:4"},
            "pattern 2:4 has sparsity 0.5, not 0.7: give no more than that",
        ),
        ({"sparsity": 0.3, "pattern": "2:4", "bounds": (0.1, None)}, "of 0 or 0.5, which is not between 0.1 and 0.95"),
        ({"sparsity": 0.3, "pattern": "2:4", "bounds": (None, 0.4)}, "of 0 or 0.5, which is not between 0.0 and 0.4"),
        ({"sparsity": 0.3, "pattern": "2:24"}, r"layers\.0\.q: N:24 needs K to be a multiple of 24"),
        ({"sparsity": 0.3, "pattern": "4:4"}, "pattern 4:4 has sparsity 0, not 0.3"),
        ({"sparsity": -0.3, "pattern": "2:4"}, "wanted 0 ≤ sparsity < 1"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(TOY, **options)


def test_a_budget_above_all_is_refused() -> None:
    with pytest.raises(ValueError, match="33 zeros cannot be reached: 2:4 makes 32"):
        nm_planning.mixed({"a": (8, 8)}, {"a": 1.0}, {"a": 0}, NM(2, 4), 33)


@pytest.mark.parametrize("sparsity", [0.3, 0.4])
@pytest.mark.parametrize("file", ["llama2-7b.json", "llama-7b.json"])
def test_published_alphas_with_dense_layers(file: str, sparsity: float) -> None:
    found = json.loads((shared("data/alphas") / file).read_text())
    layers = {e["name"]: LayerStat(e["block"], tuple(e["shape"]), {"alpha": e["alpha"]}) for e in found["layers"]}
    made = plan(Analysis("llama", "", "float16", "reference", None, layers), sparsity, pattern="2:4")
    sizes = {n: p.shape[0] * p.shape[1] for n, p in made.layers.items()}
    assert abs(sum(p.zeros for p in made.layers.values()) - sparsity * sum(sizes.values())) <= 4096 * 4096 / 4
    means: dict[int, list[float]] = {}
    for stat in layers.values():
        means.setdefault(stat.block, []).append(stat.columns["alpha"])
    order = sorted(means, key=lambda b: -sum(means[b]) / len(means[b]))
    counts = pruned_blocks(made)
    whole = [b for b in order if counts[b] == 7]
    assert whole == order[: len(whole)] and all(counts[b] == 0 for b in order[len(whole) + 2 :])
    assert len(whole) >= int(sparsity * 2 * len(order)) - 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([8, 16, 32]), st.floats(0.01, 0.85), st.lists(st.floats(1, 9), min_size=BLOCKS, max_size=BLOCKS))
def test_families_meet_the_budget(of: int, sparsity: float, alphas: list[float]) -> None:
    found = plan(toy(alphas), sparsity, "alpha", 0.2, f"N:{of}")
    assert abs(sum(p.zeros for p in found.layers.values()) - sparsity * TOTAL) <= 16 * 64 / of
    assert all(p.pattern.of == of and p.pattern.keep >= 1 for p in found.layers.values())


def groups_hold(weight: torch.Tensor, pattern: NM) -> bool:
    kept = (weight != 0).reshape(weight.shape[0], -1, pattern.of).sum(-1)
    return bool((kept == pattern.keep).all())


@pytest.fixture(scope="module")
def even_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA whose K are multiples of 32."""
    folder = tmp_path_factory.mktemp("models") / "even"
    make_model(seed=3, intermediate_size=224).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("pattern, sparsity", [("N:16", 0.55), ("N:32", 0.62), ("2:4", 0.35), ("4:8", 0.2)])
def test_from_the_plan_to_the_loaded_model(even_directory, directory, tmp_path, monkeypatch, pattern, sparsity) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(even_directory if pattern.startswith("N") else directory)
    assert cli.main(["analyze", folder, "-o", "a.json"]) == 0
    asked = ["--sparsity", str(sparsity), "--pattern", pattern, "--epsilon", "0.3"]
    assert cli.main(["plan", "a.json", *asked, "-o", "p.json"]) == 0
    assert cli.main(["prune", folder, "-o", "out", "--plan", "p.json", "--method", "magnitude"]) == 0
    made, source, loaded = Plan.load("p.json"), alphaprune.load(folder), alphaprune.load("out")
    steps = int(pattern[2:]) if pattern.startswith("N") else 2  # the smallest layer's, in parts of it
    smallest = min(p.shape[0] * p.shape[1] // steps for p in made.layers.values())
    assert abs(made.realized - sparsity) * sum(p.shape[0] * p.shape[1] for p in made.layers.values()) <= smallest + 1
    assert len({p.pattern for p in made.layers.values()}) > 1
    for name, p in made.layers.items():
        layer, dense = loaded.get_submodule(name), source.get_submodule(name).weight
        if p.zeros == 0:
            assert type(layer) is torch.nn.Linear and torch.equal(layer.weight, dense)
            continue
        assert isinstance(layer, alphaprune.SparseLinear)
        weight = layer.to_linear().weight
        assert groups_hold(weight, p.pattern), name
        assert torch.equal(weight, dense * (weight != 0)) and int((weight == 0).sum()) == p.zeros
