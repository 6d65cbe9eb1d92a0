"""Analyses: of live models and directories, their file, and refusals by layer name."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_model

import alphaprune
from alphaprune import alpha, metrics, spectrum
from alphaprune.analysis import Analysis, LayerStat, analyze
from alphaprune.model import describe

NAME = "model.layers.1.mlp.up_proj"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("fit", alpha.METHODS)
def test_every_layer_has_the_fit_of_its_own_spectrum(fit: str) -> None:
    live = make_model(1)
    found, known = analyze(live, fit, device="cpu"), describe(live)
    assert list(found.layers) == list(known.shapes)
    assert (found.model, found.fingerprint, found.dtype) == (known.name, known.fingerprint, "float32")
    assert found.fit == fit and found.versions["alphaprune"] == alphaprune.__version__
    for name, stat in found.layers.items():
        assert stat.shape == known.shapes[name] and stat.block == known.block_of[name]
        weight = live.get_submodule(name).weight.detach()
        ((values, used),) = spectrum.solve([weight], alpha.NEED[fit], "cpu")
        wanted = alpha.fit(values, fit, noise=used.noise)
        assert stat.columns["alpha"] == pytest.approx(wanted.alpha, rel=1e-6)
        beside = metrics.columns(values, wanted, stat.shape, used.noise)
        assert stat.columns == pytest.approx({**wanted.columns(), **beside}, rel=1e-5)


def test_solver_is_recorded_and_float64_is_had_on_request() -> None:
    live = make_model(1)
    assert analyze(live, device="cpu").solver == "gram float32"
    assert analyze(live, "reference", device="cpu").solver == "gram float32 solved in float64, gram float64"
    exact = analyze(live, device="cpu", solver="float64")
    assert exact.solver == "gram float64"
    for name, stat in analyze(live, device="cpu").layers.items():
        assert stat.columns["alpha"] == pytest.approx(exact.layers[name].columns["alpha"], abs=1e-4)


def test_live_and_lazy_agree(directory: Path) -> None:
    live, lazy = analyze(make_model(1), device="cpu"), analyze(directory, device="cpu")
    assert live.layers == lazy.layers and live.fingerprint == lazy.fingerprint


def test_shapes_only_reads_no_weights(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "solve", lambda *_: pytest.fail("a spectrum was computed"))
    found = analyze(directory, fit=None)
    assert found.fit is None and found.solver is None
    assert all(stat.columns == {} and stat.shape for stat in found.layers.values())


def test_progress_and_one_block_at_a_time(directory: Path) -> None:
    seen: list[str] = []
    analyze(directory, "mid", device="cpu", progress=seen.append)
    assert seen == [f"model.layers.{b}" for b in range(3)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    live = make_model(1)
    live.get_submodule(NAME).weight.data[7, 3] = value
    with pytest.raises(ValueError, match=rf"{NAME}: the weights hold NaN or infinity"):
        analyze(live, device="cpu")


def test_weights_without_a_spectrum_are_refused_by_name() -> None:
    live = make_model(1)
    live.get_submodule(NAME).weight.data.zero_()
    with pytest.raises(ValueError, match=rf"{NAME}: a power law needs 8 eigenvalues.*uniform and ramp"):
        analyze(live, device="cpu")
    assert NAME in analyze(live, fit=None).layers


def test_unknown_options() -> None:
    live = make_model(1)
    with pytest.raises(ValueError, match="fit 'best': wanted one of robust, reference, mid"):
        analyze(live, "best")
    with pytest.raises(ValueError, match="solver 'fast'"):
        analyze(live, solver="fast")
    with pytest.raises(ValueError, match="--device abacus: wanted auto"):
        analyze(live, device="abacus")


@pytest.fixture(scope="module")
def made() -> Analysis:
    return analyze(make_model(1), "mid", device="cpu")


def test_the_file_holds_all(made: Analysis, tmp_path: Path) -> None:
    made.save(tmp_path / "a.json")
    assert Analysis.load(tmp_path / "a.json") == made
    assert os.listdir(tmp_path) == ["a.json"]
    bare = analyze(make_model(1), fit=None)
    bare.save(tmp_path / "a.json")
    assert Analysis.load(tmp_path / "a.json") == bare


def test_no_file_is_made_of_what_could_not_be_read_back(made: Analysis, tmp_path: Path) -> None:
    broken = replace(made, layers={NAME: LayerStat(1, (8, 8), {"alpha": float("nan")})})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(tmp_path / "a.json")
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file(made: Analysis, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.json").write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="the disk is full"):
        made.save(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["layers"][NAME]["columns"].update(alpha=float("nan")), rf"{NAME}: alpha: wanted a finite number"),
        (lambda d: d["layers"][NAME]["columns"].update(ks="low"), rf"{NAME}: ks: wanted a finite number, got 'low'"),
        (lambda d: d["layers"][NAME]["columns"].pop("alpha"), rf"{NAME}: no alpha, which other layers have"),
        (lambda d: d["layers"][NAME].pop("columns"), rf"{NAME}: columns: wanted an object"),
        (lambda d: d["layers"][NAME].pop("block"), rf"{NAME}: block: wanted the number"),
        (lambda d: d["layers"][NAME].update(shape=[0, 4]), rf"{NAME}: shape: wanted two positive integers"),
        (lambda d: d["layers"].update({NAME: 3}), rf"{NAME}: wanted an object"),
        (lambda d: d.pop("fingerprint"), "this analysis has no fingerprint"),
        (lambda d: d.update(versions=None), "versions: wanted an object"),
        (lambda d: d.update(kind="plan"), "is no analysis file of alphaprune"),
        (lambda d: d.update(version=2), "analysis version 2; this release reads 1"),
    ],
)
def test_a_broken_file_is_refused_by_name(made: Analysis, tmp_path: Path, change, message: str) -> None:
    found = json.loads(made.to_json())
    change(found)
    (tmp_path / "a.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        Analysis.load(tmp_path / "a.json")


def test_a_truncated_file_is_refused(made: Analysis, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(made.to_json()[:400])
    with pytest.raises(ValueError, match="is no analysis file"):
        Analysis.load(tmp_path / "a.json")
