"""Settings → candidates: who is in it, which are the same model, and what is made for them once."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_model

from alphaprune import allocators, analysis, calibrate, candidates, curves, data, pruners
from alphaprune.candidates import Settings, Shared
from alphaprune.model import LiveSource
from alphaprune.plan_file import Plan


@contextmanager
def no_bar(total: int, description: str, unit: str):
    yield lambda step: None


def text(seed: int, count: int = 600) -> data.Text:
    tokens = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))
    return data.Text(f"text {seed}", f"sha {seed}", count, tokens, torch.arange(1, count + 1))


@pytest.fixture
def source() -> LiveSource:
    return LiveSource(make_model(1))


def shared(source: LiveSource, folder: Path, **changes) -> Shared:
    settings = {"sparsities": (0.7,), "allocators": ("uniform", "ramp", "alpha"), "methods": ("wanda",)}
    settings |= {"samples": 4, "length": 32, **changes}
    return Shared(source, Settings(**settings), text(0), folder, no_bar)


def test_baselines_are_always_in_it_and_first() -> None:
    assert candidates.with_baselines(["alpha"]) == ("uniform", "ramp", "alpha")
    assert candidates.with_baselines(["alpha", "ramp", "uniform"]) == ("uniform", "ramp", "alpha")
    every = candidates.with_baselines(["all"])
    assert every[:2] == candidates.BASELINES and sorted(every) == sorted(allocators.MEMBERS)
    more = candidates.with_baselines(["all", "metrics"])
    assert set(more) == {*allocators.MEMBERS, *allocators.METRICS} and len(more) == len(set(more))
    assert set(candidates.default_methods()) <= set(pruners.MEMBERS) and "wanda" in candidates.default_methods()


def test_every_combination_is_a_candidate_with_an_exact_plan_in_a_file(source: LiveSource, tmp_path: Path) -> None:
    made = shared(source, tmp_path, sparsities=(0.6, 0.7), methods=("wanda", "magnitude"))
    found = made.candidates
    assert [c.id for c in found][:3] == ["0.60-uniform-wanda", "0.60-uniform-magnitude", "0.60-ramp-wanda"]
    assert len(found) == 12 and len({c.id for c in found}) == 12 and all(c.twin is None for c in found)
    sizes = sum(n * k for n, k in source.description().shapes.values())
    for candidate in found:
        assert sum(p.zeros for p in candidate.plan.layers.values()) == round(candidate.plan.sparsity * sizes)
        assert Plan.load(tmp_path / candidate.file) == candidate.plan
        assert candidate.recipe.prefix == "dense" and not candidate.recipe.refit


def test_the_same_plan_twice_is_one_model(source: LiveSource, tmp_path: Path) -> None:
    """Up to 0.5 epsilon auto is 0, so all of these are uniform; of the same method, not of another."""
    found = {c.id: c for c in shared(source, tmp_path, sparsities=(0.5,), methods=("wanda", "magnitude")).candidates}
    assert {c.twin for c in found.values() if c.plan.allocator == "uniform"} == {None}
    for allocator in ("ramp", "alpha"):
        for method in ("wanda", "magnitude"):
            assert found[f"0.50-{allocator}-{method}"].twin == f"0.50-uniform-{method}"


def test_an_epsilon_that_changes_nothing_makes_no_candidate(source: LiveSource, tmp_path: Path) -> None:
    made = shared(source, tmp_path, allocators=("uniform", "ramp"), epsilons=("auto", 0.3, 0.1))
    found = [c.id for c in made.candidates]
    assert found == [
        "0.70-uniform-auto-wanda",  # uniform has no use for any
        "0.70-ramp-auto-wanda",  # auto is 0.3 here
        "0.70-ramp-0.1-wanda",
    ]


def test_patterns(source: LiveSource, tmp_path: Path) -> None:
    found = shared(source, tmp_path, sparsities=(None,), pattern="2:4").candidates
    assert [c.id for c in found] == ["0.50-uniform-wanda", "0.50-ramp-wanda", "0.50-alpha-wanda"]
    assert [c.twin for c in found] == [None, "0.50-uniform-wanda", "0.50-uniform-wanda"]
    (tmp_path / "n8").mkdir()
    family = shared(source, tmp_path / "n8", pattern="N:8").candidates
    assert all(str(p.pattern).endswith(":8") for c in family for p in c.plan.layers.values())


def test_no_more_is_found_out_than_anybody_reads(source: LiveSource, tmp_path: Path, monkeypatch) -> None:
    needs, original = [], calibrate.statistics
    monkeypatch.setattr(calibrate, "statistics", lambda b, a, need: needs.append(need) or original(b, a, need))
    for number, (changes, wanted) in enumerate([
        ({"methods": ("magnitude",)}, set()),
        ({"methods": ("magnitude", "wanda")}, {"norms"}),
        ({"methods": ("wanda",), "refit": True}, {"gram"}),
    ]):  # fmt: skip
        needs.clear()
        (tmp_path / str(number)).mkdir()
        made = shared(source, tmp_path / str(number), allocators=("uniform", "ramp"), **changes)
        assert len(made.candidates) == 2 * len(made.settings.methods) and made.analysis.fit is None and not needs
        assert len([made.observed(block) for block in source.blocks()]) == 3
        assert set(needs) == wanted


def test_the_analysis_shares_the_statistics_of_the_methods(source: LiveSource, tmp_path: Path, monkeypatch) -> None:
    if "owl" not in allocators.MEMBERS:
        pytest.skip("there is no allocator of activations")
    passes, original = [], calibrate.first_inputs
    monkeypatch.setattr(calibrate, "first_inputs", lambda *a: passes.append(1) or original(*a))
    made = shared(source, tmp_path, allocators=("uniform", "ramp", "owl"))
    found = made.analysis
    assert [made.observed(block) for block in source.blocks()] and len(passes) == 1
    monkeypatch.undo()
    windows = data.sample_windows(text(0), 4, 32, 0)
    wanted = analysis.analyze(source, fit=None, tokens=windows)
    for name, stat in wanted.layers.items():
        assert stat.columns == {k: v for k, v in found.layers[name].columns.items() if k in stat.columns} != {}
    assert found.calibration == {"calibration": "sha 0", "samples": 4, "length": 32, "seed": 0}


def test_files_of_an_earlier_run_are_taken(source: LiveSource, tmp_path: Path, monkeypatch) -> None:
    options = {"allocators": ("uniform", "ramp", "alpha", "measured")}
    first = shared(source, tmp_path, **options).candidates
    names = {f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file()}
    plans = {f"plans/0.70-{name}.json" for name in options["allocators"]}
    assert names == {"analysis.json", "curves.json", *plans}
    made = curves.Curves.load(tmp_path / "curves.json")
    assert made.method == "wanda" and made.data["seed"] == 1 and made.data["calibration"] == "sha 0"
    layers = json.loads((tmp_path / "analysis.json").read_text())["layers"]
    assert set(layers["model.layers.0.mlp.up_proj"]["series"]) == {"eigenvalues"}
    monkeypatch.setattr(candidates, "analyze", None)
    monkeypatch.setattr(candidates.planning, "plan", None)
    monkeypatch.setattr(candidates.curves_measure, "measure", None)
    assert shared(source, tmp_path, **options).candidates == first


def test_settings_that_cannot_be() -> None:
    good = {"sparsities": (0.7,), "allocators": ("uniform",), "methods": ("wanda",)}
    Settings(**good).check()
    for changes, message in (
        ({"sparsities": (0.5, 1.5)}, "sparsity 1.5"),
        ({"sparsities": (0.0,)}, "sparsity 0"),
        ({"allocators": ("magic",)}, "magic"),
        ({"methods": ("magic",)}, "magic"),
        ({"epsilons": ("auto", 1.0)}, "epsilon 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**{**good, **changes}).check()


def test_labels_tell_sparsities_apart() -> None:
    assert [candidates.label(s) for s in (0.7, 0.75, 0.705, 0.5)] == ["0.70", "0.75", "0.705", "0.50"]


def test_statistics_of_a_killed_run_are_deleted_in_the_end(source: LiveSource, tmp_path: Path) -> None:
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics/block-00000.safetensors").write_bytes(b"x")
    shared(source, tmp_path).close()
    assert not list(tmp_path.iterdir())
    shared(source, tmp_path).close()  # nothing there is fine, too
