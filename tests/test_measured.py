"""Error curves, their file, the division of a budget by them, and plans for a latency or a loss."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import curve, linear, made

from alphaprune import cli, planning, speed_planning
from alphaprune.allocators import measured
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.curves import BlockCurve, Curves, attach
from alphaprune.kernels import table
from alphaprune.pattern import NM
from alphaprune.planning import plan

SHAPES = {"q": (64, 64), "k": (16, 64), "up": (160, 64)}
SIZE = sum(n * k for n, k in SHAPES.values())


def bare(blocks: int) -> Analysis:
    layers = {f"layers.{b}.{name}": LayerStat(b, shape, {}) for b in range(blocks) for name, shape in SHAPES.items()}
    return Analysis("toy", "f" * 64, "float32", None, None, layers)


def with_curves(*curves: tuple[list[float], list[float]]) -> Analysis:
    found = {b: BlockCurve(tuple(s), tuple(losses)) for b, (s, losses) in enumerate(curves)}
    return attach(bare(len(curves)), Curves("toy", "f" * 64, "wanda", "kl", found))


def cubic(*factors: float) -> Analysis:
    """Blocks that lose c·s³ each, which the interpolation meets exactly."""
    return with_curves(*(([0, 0.97], [0, c * 0.97**3]) for c in factors))


def shares(found: planning.Plan) -> list[float]:
    """The sparsity of each block, the same in its layers up to the rounding of counts."""
    blocks = 1 + max(int(name.split(".")[1]) for name in found.layers)
    rows = [[found.layers[f"layers.{b}.{name}"].sparsity for name in SHAPES] for b in range(blocks)]
    assert all(max(row) - min(row) < 2 / 1024 for row in rows)
    return [row[-1] for row in rows]


@st.composite
def noisy(draw):
    count = draw(st.integers(1, 6))
    places = sorted(draw(st.sets(st.integers(1, 96), min_size=count, max_size=count)))
    return [0.0, *(p / 100 for p in places)], [0.0, *(draw(st.floats(-0.1, 4)) for _ in places)]


@settings(max_examples=80, deadline=None)
@given(noisy())
def test_a_loss_never_falls_and_lies_as_near_to_the_measured_points_as_that_allows(case) -> None:
    sparsities, values = case
    loss = measured.losses(with_curves(case).layers)[0]
    count = len(values)
    for i in range(1, count):  # isotonic regression by its formula of largest smallest means
        nearest = max(min(np.mean(values[j : k + 1]) for k in range(i, count)) for j in range(1, i + 1))
        assert loss([sparsities[i]])[0] == pytest.approx(max(0.0, nearest), abs=1e-12)
    everywhere = loss(np.linspace(0, 1, 400))
    assert everywhere[0] == 0 and (np.diff(everywhere) >= -1e-12).all()


def test_losses_grow_as_a_cube_from_nothing_then_exponentially_and_steeply_past_the_end() -> None:
    loss = measured.losses(with_curves(([0, 0.4, 0.6], [0, 0.008, 0.064]), ([0, 0.5], [0, 2.0])).layers)[0]
    assert loss([0, 0.1, 0.2, 0.4]) == pytest.approx([0, 0.008 / 64, 0.001, 0.008])
    assert loss([0.45, 0.5]) == pytest.approx([0.008 * 8**0.25, 0.008 * 8**0.5])
    sudden = measured.losses(with_curves(([0, 0.4, 0.6], [0, 1e-9, 0.08])).layers)[0]
    assert sudden([0.5])[0] == pytest.approx(0.01)  # not the 9e-6 of an exponential: a cube from nothing
    assert loss([0.6, 0.65, 0.7]) == pytest.approx([0.064, 0.064 + 2.0 * 9, 0.064 + 2.0 * 99])  # 2.0: of any block
    flat = measured.losses(with_curves(([0, 0.5], [0, 0.0])).layers)[0]
    assert flat([0.5])[0] == 0 and flat([0.6])[0] == pytest.approx(99)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.floats(0.05, 0.6), st.sampled_from([0.0, 0.02]))
def test_the_division_meets_the_one_that_is_known(factors, sparsity: float, low: float) -> None:
    """Σ c·s³ under a budget is least where c·s² is the same: s ∝ 1/√c inside the bounds."""
    found = plan(cubic(*factors), sparsity, "measured", bounds=(low, 0.95))
    exact = planning.water_fill([SIZE] * len(factors), [c**-0.5 for c in factors], sparsity, low, 0.95)
    step = len(factors) / max(measured.LEAST_UNITS, measured.STEPS * len(factors))
    assert shares(found) == pytest.approx(exact, abs=2 * step + 2 / 1024)
    assert sum(p.zeros for p in found.layers.values()) == round(sparsity * SIZE * len(factors))


@settings(max_examples=30, deadline=None)
@given(st.lists(noisy(), min_size=2, max_size=2), st.floats(0.1, 0.8), st.floats(0, 0.1), st.floats(0, 0.15))
def test_no_division_inside_the_bounds_is_better(cases, sparsity: float, below: float, above: float) -> None:
    stats = with_curves(*cases)
    low, high = sparsity - below, sparsity + above
    known = measured.losses(stats.layers)
    wanted = measured.ratios(stats.layers, sparsity, 0.0, "block", (low, high))
    found = [wanted["layers.0.q"], wanted["layers.1.q"]]
    step = 2 / measured.LEAST_UNITS
    assert all(low - 1e-9 <= s <= high + 1e-9 for s in found)
    assert sum(found) == pytest.approx(2 * sparsity, abs=2 * step)
    reached = sum(float(known[b]([s])[0]) for b, s in enumerate(found))
    first = np.linspace(max(low, 2 * sparsity - high), min(high, 2 * sparsity - low), 2001)
    least = (known[0](first) + known[1](2 * sparsity - first)).min()
    slack = [max(s - 2 * step, 0.0) for s in found]  # what two steps less would lose
    assert sum(float(known[b]([s])[0]) for b, s in enumerate(slack)) <= least + 1e-9
    assert reached >= 0


def test_the_plan_has_the_sparsities_of_the_search() -> None:
    """Bounds, budget and counts leave them as they are: the common factor of the ratios is one."""
    steep, flat = ([0, 0.3, 0.9], [0, 0.01, 9.0]), ([0, 0.5, 0.6, 0.9], [0, 0.002, 0.5, 3.0])
    stats = with_curves(steep, flat, steep, flat, ([0, 0.9], [0, 0.05]))
    for sparsity, bounds in ((0.3, None), (0.5, (0.2, 0.7)), (0.7, (0.5, None)), (0.8, (None, 0.81))):
        found = plan(stats, sparsity, "measured", bounds=bounds)
        low, high = planning.limits(sparsity, bounds)
        searched = measured.ratios(stats.layers, sparsity, 0.0, "block", (low, high))
        for name, p in found.layers.items():
            assert p.sparsity == pytest.approx(searched[name], abs=1 / 4096 + 1 / 1024)
            assert low - 1e-9 <= p.sparsity <= high + 1e-9
        assert found.allocator == "measured" and found.epsilon == 0.0
        if bounds is None:
            assert plan(stats, sparsity, "measured", granularity="matrix") == found


def test_extremes_of_the_budget() -> None:
    stats = cubic(1.0, 2.0)
    assert plan(stats, 0.0, "measured").realized == 0.0
    assert plan(stats, 0.7, "measured", bounds=(0.699, 0.7005)).realized == pytest.approx(0.7, abs=1 / SIZE)
    assert plan(stats, 0.9375, "measured", bounds=(0.9375, 1.0)).realized == 0.9375
    unbounded = planning.real_sparsities(stats, 0.6, "measured")
    assert sum(unbounded.values()) == pytest.approx(0.6 * 6) and max(unbounded.values()) <= 1
    free = with_curves(([0, 0.9], [0, 0.0]), ([0, 0.9], [0, 5.0]))
    assert shares(plan(free, 0.4, "measured")) == pytest.approx([0.8, 0.0], abs=2 / 1024)


def test_a_block_goes_past_its_measurements_only_when_the_others_are_at_their_end() -> None:
    stats = with_curves(([0, 0.5], [0, 1e-6]), ([0, 0.8], [0, 3.0]))
    assert shares(plan(stats, 0.6, "measured"))[0] == pytest.approx(0.5, abs=0.01)
    assert min(shares(plan(stats, 0.7, "measured"))) > 0.5


def test_families_take_the_wanted_sparsities() -> None:
    found = plan(cubic(1.0, 4.0), 0.45, "measured", pattern="N:8")
    assert abs(sum(p.zeros for p in found.layers.values()) - 0.45 * 2 * SIZE) <= 16 * 64 / 8
    assert [found.layers[f"layers.{b}.up"].pattern for b in range(2)] == [NM(3, 8), NM(6, 8)]  # 0.6 and 0.3


# Times: a kernel that takes 1.3 at density 1 and 0.1 at 0, times the dense layer's; packing pays from some 0.25 on.
DENSE_SECONDS = {name: n * k * 1e-9 for name, (n, k) in SHAPES.items()}
KNOWN_TIMES = {
    name: [t, *(min(t, t * (0.1 + 1.2 * (1 - s))) for s in speed_planning.TIMED[1:])]
    for name, t in DENSE_SECONDS.items()
}


def times(stats: Analysis) -> dict[str, list[float]]:
    return {name: KNOWN_TIMES[name.rpartition(".")[2]] for name in stats.layers}


def every_choice(stats: Analysis, levels: list[float]):
    """(seconds, loss) of all combinations of levels of the blocks."""
    known, blocks = measured.losses(stats.layers), sorted({s.block for s in stats.layers.values()})
    seconds = [sum(float(np.interp(s, speed_planning.TIMED, t)) for t in KNOWN_TIMES.values()) for s in levels]
    lost = [[float(known[b]([s])[0]) for s in levels] for b in blocks]
    for picks in itertools.product(range(len(levels)), repeat=len(blocks)):
        yield sum(seconds[p] for p in picks), sum(lost[b][p] for b, p in zip(blocks, picks, strict=True))


BUMPY = with_curves(
    ([0, 0.25, 0.5, 0.75], [0, 0.01, 0.3, 0.9]),
    ([0, 0.25, 0.5, 0.75], [0, 0.2, 0.21, 0.4]),
    ([0, 0.25, 0.5, 0.75], [0, 0.0, 0.02, 4.0]),
)
LEVELS = {"N:4": [0, 0.25, 0.5, 0.75], "2:4": [0, 0.5], "N:8": [i / 8 for i in range(8)]}
DENSE = 3 * sum(DENSE_SECONDS.values())


@pytest.mark.parametrize("pattern", LEVELS)
@pytest.mark.parametrize("share", [1.0, 0.93, 0.8, 0.71, 0.55, 0.5])
def test_the_best_within_a_latency_and_the_fastest_within_a_loss(pattern: str, share: float) -> None:
    choices = list(every_choice(BUMPY, LEVELS[pattern]))
    rounding = 4 * DENSE / measured.TIME_UNITS
    within = [lost for seconds, lost in choices if seconds <= share * DENSE]
    if not within:
        with pytest.raises(ValueError, match="cannot be reached: the least within the bounds is"):
            plan(BUMPY, None, "measured", pattern=pattern, latency=share * DENSE, times=times(BUMPY))
        return
    found = plan(BUMPY, None, "measured", pattern=pattern, latency=share * DENSE, times=times(BUMPY))
    assert speed_planning.predicted_seconds(found, times(BUMPY)) <= share * DENSE * (1 + 1e-9)
    lost = speed_planning.predicted_loss(found, BUMPY)
    assert lost >= min(within) - 1e-12
    assert lost <= min(lost for seconds, lost in choices if seconds <= share * DENSE - rounding) + 1e-12
    assert found.sparsity == found.realized and found.pattern == pattern
    again = plan(BUMPY, None, "measured", pattern=pattern, max_loss=lost * (1 + 1e-9), times=times(BUMPY))
    quickest = min(seconds for seconds, other in choices if other <= lost * (1 + 1e-9))
    assert speed_planning.predicted_loss(again, BUMPY) <= lost * (1 + 1e-9)
    assert speed_planning.predicted_seconds(again, times(BUMPY)) <= quickest + rounding


def test_unstructured_plans_for_speed() -> None:
    loose = plan(BUMPY, None, "measured", latency=DENSE, times=times(BUMPY))
    assert loose.realized == 0.0  # the dense model is in time, and loses nothing
    assert plan(BUMPY, None, "measured", max_loss=0.0, times=times(BUMPY)).realized == 0.0  # 0.25 pays nothing
    tight = plan(BUMPY, None, "measured", latency=0.6 * DENSE, times=times(BUMPY), bounds=(None, 0.8))
    assert speed_planning.predicted_seconds(tight, times(BUMPY)) == pytest.approx(0.6 * DENSE, rel=0.02)
    assert 0.25 <= max(p.sparsity for p in tight.layers.values()) <= 0.8
    assert all(p.sparsity == 0 or p.sparsity > 0.25 for p in tight.layers.values())
    least = plan(BUMPY, None, "measured", latency=0.6 * DENSE, times=times(BUMPY), bounds=(0.3, None))
    assert min(p.sparsity for p in least.layers.values()) >= 0.3
    alone = {**times(BUMPY), "layers.1.up": [DENSE_SECONDS["up"]] * 101}  # which no kernel makes faster
    kept = plan(BUMPY, None, "measured", latency=0.7 * DENSE, times=alone)
    assert kept.layers["layers.1.up"].zeros == 0 and kept.layers["layers.1.q"].zeros > 0
    assert speed_planning.predicted_seconds(kept, alone) <= 0.7 * DENSE * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 2.0))
def test_a_loss_is_used_up_and_not_exceeded(most: float) -> None:
    found = plan(BUMPY, None, "measured", max_loss=most, times=times(BUMPY))
    assert 0.8 * most <= speed_planning.predicted_loss(found, BUMPY) <= most * (1 + 1e-3)


def test_layers_that_lose_by_a_table_stay_dense_under_a_budget() -> None:
    found = plan(BUMPY, 0.3, "measured", break_even=dict.fromkeys(BUMPY.layers, 0.4))
    assert sum(p.zeros for p in found.layers.values()) == round(0.3 * 3 * SIZE)
    assert all(p.zeros == 0 or p.sparsity > 0.399 for p in found.layers.values())


def test_predicted_loss_is_the_sum_over_blocks() -> None:
    stats = cubic(1.0, 3.0)
    zeros = {name: round(0.5 * s.shape[0] * s.shape[1]) * (s.block == 1) for name, s in stats.layers.items()}
    assert measured.predicted(stats.layers, zeros) == pytest.approx(3 * 0.125)
    zeros["layers.1.up"] = 0  # a part of the block counts as the whole: the curve knows no more
    assert measured.predicted(stats.layers, zeros) == pytest.approx(3 * 0.125)
    assert measured.predicted(stats.layers, dict.fromkeys(zeros, 0)) == 0


SPEED = {"allocator": "measured", "times": times(BUMPY)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latency": 0.1 * DENSE, **SPEED}, "a latency of .* s cannot be reached: the least within the bounds is .* s"),
        ({"max_loss": 0.1, "bounds": (0.5, None), **SPEED}, "a loss of 0.1 cannot be reached: the least .* is 0.53"),
        ({"latency": 1.0, "max_loss": 1.0, **SPEED}, "a latency or a loss, not both"),
        ({"latency": 1.0, "sparsity": 0.5, **SPEED}, "one of a sparsity, a latency and a loss"),
        ({"latency": float("nan"), **SPEED}, "latency nan: wanted a number from 0"),
        ({"max_loss": -1.0, **SPEED}, "loss -1.0: wanted a number from 0"),
        ({"latency": 1.0, **SPEED, "times": None}, "needs the times of the layers: --times FILE, or auto"),
        ({"latency": 1.0, **SPEED, "times": {}}, r"layers\.0\.q: wanted its seconds at 101 sparsities"),
        ({"latency": 1.0, **SPEED, "allocator": "ramp"}, "allocator ramp: for a latency or a loss only measured"),
        ({"latency": 1.0, **SPEED, "pattern": "N:24"}, r"layers\.0\.q: N:24 needs K"),
        ({"latency": 1.0, **SPEED, "pattern": "2:4", "bounds": (0.1, 0.4)}, "pattern 2:4 has no sparsity between 0.1"),
        ({"sparsity": 0.7, **SPEED, "bounds": (0.8, None)}, "cannot be reached"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(BUMPY, **options)


def test_curves_that_are_missing_say_what_makes_them() -> None:
    for options in ({"sparsity": 0.5}, {"latency": 1.0, "times": {}}, {"sparsity": 0.3, "pattern": "2:4"}):
        with pytest.raises(
            ValueError, match=r"layers\.0\.q: allocator measured .* `alphaprune compare` makes, --curves"
        ):
            plan(bare(2), allocator="measured", **options)


def test_the_file_and_the_analysis_hold_what_was_measured(tmp_path: Path) -> None:
    known = Curves(
        "toy", "f" * 64, "wanda", "kl", {1: BlockCurve([0, 0.5], [0, 1]), 0: BlockCurve((0, 0.7), (0, -0.1))}
    )
    known.save(tmp_path / "curves.json")
    assert Curves.load(tmp_path / "curves.json") == known
    assert list(json.loads((tmp_path / "curves.json").read_text())["blocks"]) == ["0", "1"]
    with_data = replace(known, data={"text": "a" * 64, "windows": 3})
    with_data.save(tmp_path / "curves.json")
    assert Curves.load(tmp_path / "curves.json") == with_data
    found = attach(bare(2), known)
    assert found.layers["layers.1.up"].series == {"curve_sparsity": [0.0, 0.5], "curve_loss": [0.0, 1.0]}
    found.save(tmp_path / "analysis.json")
    assert Analysis.load(tmp_path / "analysis.json") == found
    with pytest.raises(ValueError, match=r"measured on another model: toy with fingerprint ffff.* run `alphaprune com"):
        attach(replace(bare(2), fingerprint="0" * 64), known)
    with pytest.raises(ValueError, match=r"layers\.2\.q: the curves of toy lack its block, number 2"):
        attach(bare(3), known)


def broken(change) -> str:
    found = json.loads(Curves("toy", "f" * 64, "wanda", "kl", {3: BlockCurve((0, 0.5), (0, 1))}).to_json())
    change(found)
    return json.dumps(found)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no curves file"),
        ('{"kind": "plan"}', "is no curves file of alphaprune"),
        (broken(lambda d: d.update(version=9)), "curves version 9; this release reads 1"),
        (broken(lambda d: d.pop("method")), "this curves has no method"),
        (broken(lambda d: d.update(measure=3)), "measure: wanted a text, got 3"),
        (broken(lambda d: d.update(data=3)), "data: wanted an object"),
        (broken(lambda d: d.update(blocks={})), "blocks: wanted an object with a block at least"),
        (broken(lambda d: d["blocks"].update({"3": []})), "block 3: wanted an object"),
        (broken(lambda d: d["blocks"].update({"x": d["blocks"]["3"]})), "block x: wanted the number of a block"),
        (broken(lambda d: d["blocks"]["3"].pop("losses")), "block 3: losses: wanted a list of numbers, got None"),
        (broken(lambda d: d["blocks"]["3"].update(losses=[0])), "block 3: wanted a loss for every sparsity"),
        (broken(lambda d: d["blocks"]["3"].update(losses=[0, None])), "block 3: losses: wanted finite numbers"),
        (broken(lambda d: d["blocks"]["3"].update(losses=[0, math.inf])), "block 3: losses: wanted finite numbers"),
        (broken(lambda d: d["blocks"]["3"].update(losses=[1, 1])), "block 3: losses: wanted 0 at sparsity 0, got 1"),
        (broken(lambda d: d["blocks"]["3"].update(sparsities=[0.1, 0.5])), "block 3: sparsities: .* rise from 0"),
        (broken(lambda d: d["blocks"]["3"].update(sparsities=[0, 1])), "block 3: sparsities: .* stay below 1"),
        (broken(lambda d: d["blocks"]["3"].update(sparsities=[0, 0])), "block 3: sparsities: .* rise from 0"),
    ],
)
def test_a_broken_file_is_refused_by_block(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "curves.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Curves.load(tmp_path / "curves.json")


def test_the_command(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    stats = bare(2)
    stats.save("a.json")
    known = Curves("toy", "f" * 64, "wanda", "kl", {b: BlockCurve((0, 0.5, 0.9), (0, 0.1, 2.0 + b)) for b in range(2)})
    known.save("c.json")
    replace(known, fingerprint="0" * 64).save("other.json")
    made(*linear("scalar", 1.3, 0.1), curve(table.DENSE, 0, [1] * 4)).save("t.json")

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main(["plan", "a.json", "--allocator", "measured", *map(str, arguments)])
        return status, *capsys.readouterr()

    status, out, _ = run("--curves", "c.json", "--sparsity", 0.6)
    assert status == 0 and "predicted loss" in out and "dense" not in out
    out = run("--curves", "c.json", "--sparsity", 0.6, "--times", "t.json", "--tokens", 4, "--json")[1]
    found = json.loads(out)
    assert {"predicted_loss", "predicted_seconds", "dense_seconds"} <= found.keys()
    assert found["predicted_seconds"] < found["dense_seconds"]
    assert run("--curves", "c.json", "--times", "t.json", "--latency", 0.7 * found["dense_seconds"])[0] == 0
    out = run("--curves", "c.json", "--times", "t.json", "--max-loss", 0.05, "--json")[1]
    loss = json.loads(out)
    assert 0 < loss["predicted_loss"] <= 0.05 and loss["predicted_seconds"] < loss["dense_seconds"]
    assert planning.Plan.load("plan.json").sparsity == loss["sparsity"] > 0.1
    for arguments, message in (
        (("--sparsity", 0.5), "`alphaprune compare` makes, --curves FILE"),
        (("--curves", "other.json", "--sparsity", 0.5), "the curves were measured on another model"),
        (("--curves", "none.json", "--sparsity", 0.5), "none.json: cannot be read"),
        (("--curves", "c.json", "--latency", 1), "needs the times of the layers: --times FILE"),
        (("--curves", "c.json", "--max-loss", 1), "needs the times of the layers: --times FILE"),
        (("--curves", "c.json", "--times", "t.json", "--latency", 1e-9), "cannot be reached: the least"),
        (("--curves", "c.json", "--times", "t.json", "--latency", 1, "--epsilon", "x"), "--epsilon x"),
    ):
        status, _, err = run(*arguments)
        assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    with pytest.raises(SystemExit):
        run("--curves", "c.json", "--latency", 1, "--sparsity", 0.5)


def test_pruning_by_curves_asks_for_a_plan(directory: Path, tmp_path: Path, capsys) -> None:
    arguments = ("prune", directory, "-o", tmp_path / "o", "--sparsity", 0.5, "--allocator", "measured")
    assert cli.main([*map(str, arguments), "--method", "magnitude"]) == 2
    err = capsys.readouterr().err
    assert "needs error curves, which `alphaprune compare` makes" in err and len(err.strip().splitlines()) == 1
