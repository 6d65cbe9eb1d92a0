"""Plans: exact counts, epsilon, bounds, patterns, their file, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaprune import planning
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.model import Description
from alphaprune.pattern import NM, Unstructured
from alphaprune.planning import Plan, auto_epsilon, plan

SHAPES = {"q": (64, 64), "k": (16, 64), "up": (160, 64), "down": (64, 160)}


def make_analysis(blocks: int = 3) -> Analysis:
    layers = {
        f"model.layers.{b}.{name}": LayerStat(b, shape, {"alpha": 2.0 + (7 * b + 3 * i) % 5 / 2})
        for b in range(blocks)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return Analysis("toy", "f" * 64, "float32", "robust", "gram float32", layers)


TOY = make_analysis()
TOTAL = sum(n * k for n, k in (s.shape for s in TOY.layers.values()))


def describe(analysis: Analysis) -> Description:
    shapes = {n: s.shape for n, s in analysis.layers.items()}
    return Description("toy", analysis.fingerprint, "float32", shapes, {n: s.block for n, s in analysis.layers.items()})


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.999), st.sampled_from(["alpha", "ramp"]), st.sampled_from([0.0, 0.3, 0.9, "auto"]))
def test_zeros_sum_to_the_budget(sparsity: float, allocator: str, epsilon) -> None:
    found = plan(TOY, sparsity, allocator, epsilon)
    assert sum(p.zeros for p in found.layers.values()) == round(sparsity * TOTAL)
    assert found.realized == pytest.approx(sparsity, abs=1 / TOTAL)
    assert list(found.layers) == list(TOY.layers)
    assert all(p.pattern == Unstructured() and p.shape == TOY.layers[n].shape for n, p in found.layers.items())
    assert plan(TOY, sparsity, allocator, epsilon) == found


def test_epsilon_auto() -> None:
    assert auto_epsilon(0.0, 0.95) == auto_epsilon(0.5, 0.95) == 0.0
    assert auto_epsilon(0.55, 0.95) == pytest.approx(0.15)
    assert auto_epsilon(0.6, 0.95) == auto_epsilon(0.7, 0.95) == 0.3
    assert auto_epsilon(0.8, 0.95) == pytest.approx(0.95 / 0.8 - 1)
    assert auto_epsilon(0.99, 0.995) == pytest.approx(0.995 / 0.99 - 1)
    assert plan(TOY, 0.8, "ramp").epsilon == auto_epsilon(0.8, 0.95)
    # For a metric no more than the metric is spread itself, which by matrix is more.
    means = [sum(s.columns["alpha"] for s in TOY.layers.values() if s.block == b) / len(SHAPES) for b in range(3)]
    apart = (max(means) - min(means)) / (max(means) + min(means))
    assert plan(TOY, 0.8).epsilon == pytest.approx(apart) and 0 < apart < auto_epsilon(0.8, 0.95)
    wide = planning.real_sparsities(TOY, 0.8, epsilon=plan(TOY, 0.8).epsilon)
    most, least = max(wide.values()), min(wide.values())
    assert most / least == pytest.approx(max(means) / min(means))
    assert plan(TOY, 0.8, granularity="matrix").epsilon == auto_epsilon(0.8, 0.95)
    assert plan(TOY, 0.8, epsilon=0.1).epsilon == 0.1
    assert len({p.sparsity for p in plan(TOY, 0.5).layers.values()}) == 1
    assert len(set(planning.real_sparsities(TOY, 0.7, epsilon=0.3).values())) == 3  # one per block


def test_bounds() -> None:
    assert planning.limits(0.7) == (0.0, 0.95)
    assert planning.limits(0.9) == (0.0, 0.95)
    assert planning.limits(0.98) == (0.0, pytest.approx(0.99))
    assert planning.limits(0.7, (0.6, None)) == (0.6, 0.95)
    found = plan(TOY, 0.7, epsilon=0.9, bounds=(0.6, 0.75))
    sparsities = [p.sparsity for p in found.layers.values()]
    assert min(sparsities) >= 0.6 and max(sparsities) <= 0.75
    assert min(sparsities) < 0.61 and sum(p.zeros for p in found.layers.values()) == round(0.7 * TOTAL)


@pytest.mark.parametrize("of", [2, 4, 8, 16])
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.45])
@pytest.mark.parametrize("allocator, epsilon", [("alpha", 0.5), ("uniform", 0.0), ("ramp", 0.9)])
def test_families_choose_legal_patterns_near_the_budget(of, sparsity, allocator, epsilon) -> None:
    found = plan(TOY, sparsity, allocator, epsilon, f"N:{of}")
    for p in found.layers.values():
        assert isinstance(p.pattern, NM) and p.pattern.of == of and 1 <= p.pattern.keep <= of
        assert p.zeros * of == p.shape[0] * p.shape[1] * (of - p.pattern.keep)
    smallest_step = 16 * 64 / of
    assert abs(sum(p.zeros for p in found.layers.values()) - sparsity * TOTAL) <= smallest_step
    wanted = planning.real_sparsities(TOY, sparsity, allocator, epsilon, bounds=(0.0, 0.95))
    assert all(abs(p.sparsity - wanted[n]) < 2 / of for n, p in found.layers.items())


def test_families_keep_user_bounds() -> None:
    found = plan(TOY, 0.5, "ramp", 0.9, "N:8", bounds=(0.3, 0.7))
    assert {p.pattern.keep for p in found.layers.values()} <= {3, 4, 5}


def test_a_fixed_pattern_implies_the_sparsity() -> None:
    found = plan(TOY, pattern="2:4")
    assert found.sparsity == found.realized == 0.5 and found.pattern == "2:4" and found.epsilon == 0.0
    assert all(p.pattern == NM(2, 4) for p in found.layers.values())
    assert plan(TOY, 0.5, pattern="2:4") == plan(TOY, pattern=NM(2, 4)) == found


def test_the_file_holds_all_and_says_what_it_is(tmp_path: Path) -> None:
    for pattern in ("unstructured", "2:4", "N:8"):
        found = plan(TOY, 0.5, epsilon=0.2, pattern=pattern)
        found.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == found
    text = (tmp_path / "plan.json").read_text()
    assert '"kind": "plan"' in text and '"version": 1' in text and '"pattern": "N:8"' in text
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


LAYER = "model.layers.1.up"


def broken(change) -> str:
    found = plan(TOY, 0.7).to_dict()
    change(found)
    return json.dumps(found)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no plan file"),
        ("[]", "is no plan file of alphaprune"),
        ('{"kind": "analysis"}', "is no plan file of alphaprune"),
        (broken(lambda d: d.update(version=9)), "plan version 9"),
        (broken(lambda d: d.pop("fingerprint")), "this plan has no fingerprint"),
        (broken(lambda d: d.update(model=3)), "model: wanted a text"),
        (broken(lambda d: d.update(sparsity=float("nan"))), "sparsity: wanted 0 to 1, got nan"),
        (broken(lambda d: d.update(sparsity="much")), "sparsity: wanted 0 to 1, got 'much'"),
        (broken(lambda d: d.update(layers={})), "a layer at least"),
        (broken(lambda d: d["layers"].update({LAYER: None})), rf"{LAYER}: wanted an object"),
        (broken(lambda d: d["layers"][LAYER].update(zeros=float("nan"))), rf"{LAYER}: zeros: wanted a count, got nan"),
        (broken(lambda d: d["layers"][LAYER].update(zeros=-1)), rf"{LAYER}: zeros: wanted a count"),
        (broken(lambda d: d["layers"][LAYER].update(zeros=True)), rf"{LAYER}: zeros: wanted a count"),
        (broken(lambda d: d["layers"][LAYER].update(zeros=10**9)), rf"{LAYER}: zeros: 1000000000 is more than"),
        (broken(lambda d: d["layers"][LAYER].pop("zeros")), rf"{LAYER}: zeros: wanted a count, got None"),
        (broken(lambda d: d["layers"][LAYER].update(shape=[3])), rf"{LAYER}: shape: wanted two positive integers"),
        (broken(lambda d: d["layers"][LAYER].update(pattern="4:2")), rf"{LAYER}: pattern 4:2"),
        (broken(lambda d: d["layers"][LAYER].update(pattern=None)), rf"{LAYER}: pattern: wanted a text"),
        (broken(lambda d: d["layers"][LAYER].update(pattern="2:4")), rf"{LAYER}: zeros: 2:4 on shape"),
        (broken(lambda d: d["layers"][LAYER].update(pattern="2:7")), rf"{LAYER}: N:7 needs K to be a multiple"),
        ('{"kind": "plan", "kind": "plan"}', "kind stands there twice"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no plan file"):
        Plan.load(tmp_path / "plan.json")


def test_check_refuses_other_models() -> None:
    found, known = plan(TOY, 0.7), describe(TOY)
    found.check(known)
    with pytest.raises(ValueError, match="for another model: toy with fingerprint ffff"):
        found.check(replace(known, fingerprint="0" * 64))
    less = replace(found, layers={n: p for n, p in found.layers.items() if n != LAYER})
    with pytest.raises(ValueError, match=rf"{LAYER}: the plan for toy has no such layer"):
        less.check(known)
    more = replace(found, layers={**found.layers, "model.layers.9.up": found.layers[LAYER]})
    with pytest.raises(ValueError, match=r"model\.layers\.9\.up: in the plan, but toy has no such"):
        more.check(known)
    other = replace(known, shapes={**known.shapes, LAYER: (160, 72)})
    with pytest.raises(ValueError, match=rf"{LAYER}: the plan is for shape \(160, 64\), the layer has \(160, 72\)"):
        found.check(other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsity": 1.0}, "wanted 0 ≤ sparsity < 1"),
        ({"sparsity": -0.1}, "wanted 0 ≤ sparsity < 1"),
        ({"sparsity": float("nan")}, "wanted 0 ≤ sparsity < 1"),
        ({"sparsity": None}, "give one, such as 0.7"),
        ({"sparsity": 0.8, "bounds": (None, 0.7)}, "cannot be reached with layers between 0.0 and 0.7"),
        ({"sparsity": 0.2, "bounds": (0.3, None)}, "cannot be reached"),
        ({"sparsity": 0.5, "bounds": (0.9, 0.1)}, "is above the most"),
        ({"sparsity": 0.5, "bounds": (-1, None)}, "wanted sparsities from 0 to 1"),
        ({"sparsity": 0.5, "epsilon": 1.0}, "epsilon 1.0"),
        ({"sparsity": 0.5, "epsilon": "much"}, "epsilon 'much'"),
        ({"sparsity": 0.5, "granularity": "model"}, "'block' or 'matrix'"),
        ({"sparsity": 0.5, "pattern": "checkered"}, "pattern 'checkered'"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "pattern 2:4 has sparsity 0.5, not 0.7"),
        ({"pattern": "4:2"}, "needs 0 < N <= M"),
        ({"pattern": "2:7"}, r"model\.layers\.0\.q: N:7 needs K to be a multiple of 7, got shape \(64, 64\)"),
        ({"sparsity": 0.5, "pattern": "N:12"}, r"model\.layers\.0\.q: N:12 needs K"),
        ({"sparsity": 0.5, "pattern": "N:1"}, "M of 2 at least"),
        ({"sparsity": 0.8, "pattern": "N:2"}, "N:2 has 0.5 at most inside the bounds"),
        ({"pattern": "2:4", "bounds": (0.6, None)}, "cannot be reached"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(TOY, **{"sparsity": None, **options})


def test_a_column_that_was_not_measured_says_how_to_get_it() -> None:
    bare = replace(TOY, layers={n: replace(s, columns={}) for n, s in TOY.layers.items()})
    assert plan(bare, 0.7, "ramp").allocator == "ramp"
    with pytest.raises(ValueError, match=r"model\.layers\.0\.q: allocator alpha reads alpha.*alphaprune analyze"):
        plan(bare, 0.7, "alpha")


LAYERS = list(TOY.layers)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 0.9),
    st.sampled_from(["uniform", "ramp", "alpha"]),
    st.lists(st.sampled_from([0.0, 0.2, 0.45, 0.7, 1.0]), min_size=len(LAYERS), max_size=len(LAYERS)),
    st.sampled_from(["unstructured", "N:8"]),
)
def test_layers_that_would_lose_get_no_zeros(sparsity, allocator, points, pattern) -> None:
    break_even = dict(zip(LAYERS, points, strict=True))
    try:
        plain = plan(TOY, sparsity, allocator, 0.3, pattern)
    except ValueError:
        return
    try:
        found = plan(TOY, sparsity, allocator, 0.3, pattern, break_even=break_even)
    except ValueError as error:
        assert "layers stay dense" in str(error) or pattern == "N:8"  # whose steps may miss the rest of the budget
        assert any(p.sparsity < break_even[n] for n, p in plain.layers.items())
        return
    assert list(found.layers) == LAYERS
    if pattern == "unstructured":
        assert sum(p.zeros for p in found.layers.values()) == round(sparsity * TOTAL)
    for name, p in found.layers.items():
        size = p.shape[0] * p.shape[1]
        assert p.zeros == 0 or p.zeros + 1 > break_even[name] * size
        assert p.zeros <= 0.95 * size + 1e-6 and (pattern == "unstructured" or p.pattern.of == 8)
    if all(p.sparsity >= break_even[n] for n, p in plain.layers.items()):
        assert found == plain


def test_the_farthest_below_gives_its_share_first() -> None:
    every = dict.fromkeys(LAYERS, 0.0)
    assert plan(TOY, 0.3, break_even=every) == plan(TOY, 0.3)
    one = plan(TOY, 0.3, break_even={**every, LAYER: 0.9})
    assert one.layers[LAYER].zeros == 0 and sum(p.zeros for p in one.layers.values()) == round(0.3 * TOTAL)
    shares = [p.sparsity for n, p in one.layers.items() if n != LAYER]
    assert min(shares) > 0.3 and max(shares) - min(shares) < 0.002
    # Uniform 0.3 below 0.4 everywhere: just so many layers go dense that the others reach it.
    some = plan(TOY, 0.3, break_even=dict.fromkeys(LAYERS, 0.4))
    dense = [n for n, p in some.layers.items() if p.zeros == 0]
    assert dense and min(p.sparsity for n, p in some.layers.items() if n not in dense) > 0.399
    family = plan(TOY, 0.5, pattern="N:8", break_even={**every, LAYER: 1.0})
    assert family.layers[LAYER].pattern == NM(8, 8) and family.layers[LAYER].zeros == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsity": 0.5, "break_even": dict.fromkeys(LAYERS, 1.0)}, "8 of 12 layers stay dense, since"),
        ({"sparsity": 0.5, "bounds": (0.2, None), "break_even": dict.fromkeys(LAYERS, 0.9)}, "leave out the least"),
        ({"pattern": "2:4", "break_even": dict.fromkeys(LAYERS, 0.6)}, r"layers\.0\.q: 2:4 would be slower than dense"),
    ],
)
def test_budgets_that_nobody_can_take(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(TOY, **{"sparsity": None, **options})
