"""Error curves against whole models pruned in one block; the model is dense again; interruptions change nothing."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import make_model
from test_evaluate import direct

from alphaprune import analysis, curves, curves_measure, evaluate, observed, planning, pruning
from alphaprune.model import LiveSource
from alphaprune.pattern import Unstructured
from alphaprune.plan_file import LayerPlan, Plan

SPARSITIES = (0.4, 0.8)


def tokens(seed: int, windows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 257, (windows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def source(tmp_path: Path):
    found = LiveSource(make_model(1))
    found.statistics = observed.gather(found, tokens(5, 6), "gram", tmp_path / "statistics")
    return found


def measure(source: LiveSource, part: Path, recipe: pruning.Recipe, progress=None) -> curves.Curves:
    windows = tokens(7)
    return curves_measure.measure(source, recipe, source.statistics, windows, SPARSITIES, part, {"seed": 7}, progress)


@pytest.mark.parametrize("recipe", [pruning.Recipe("magnitude"), pruning.Recipe("wanda", refit=True)])
def test_a_loss_is_that_of_the_model_with_one_block_pruned(
    source: LiveSource, tmp_path: Path, recipe: pruning.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 80)  # parts of another size than hidden states have
    dense, known = copy.deepcopy(source.skeleton), source.description()
    found = measure(source, tmp_path / "part.json", recipe)
    assert (found.method, found.measure, found.data, found.fingerprint) == (
        recipe.method, "kl", {"seed": 7}, known.fingerprint
    )  # fmt: skip
    assert sorted(found.blocks) == [0, 1, 2]
    for block, curve in found.blocks.items():
        assert curve.sparsities == (0.0, *SPARSITIES) and curve.losses[0] == 0
        for sparsity, loss in zip(SPARSITIES, curve.losses[1:], strict=True):
            layers = {
                name: LayerPlan((n, k), round(sparsity * n * k) * (known.block_of[name] == block), Unstructured())
                for name, (n, k) in known.shapes.items()
            }
            plan = Plan(known.name, known.fingerprint, sparsity, "uniform", 0.0, "unstructured", layers)
            pruned = copy.deepcopy(dense)
            pruning.prune(pruned, plan, recipe.method, tokens(5, 6), refit=recipe.refit, prefix="dense")
            assert loss == pytest.approx(direct(dense, pruned, tokens(7))[1].mean().item(), rel=1e-3)
    for name, parameter in source.skeleton.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), f"{name} is not dense again"


def test_an_interrupted_measurement_goes_on(source: LiveSource, tmp_path: Path) -> None:
    recipe, steps = pruning.Recipe("wanda"), []
    whole = measure(source, tmp_path / "whole.json", recipe)

    def stop(step: str) -> None:
        steps.append(step)
        if len(steps) == 4:  # after the second block, before it is remembered
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(source, tmp_path / "part.json", recipe, stop)
    assert sorted(curves.Curves.load(tmp_path / "part.json").blocks) == [0]
    again = []
    assert measure(source, tmp_path / "part.json", recipe, again.append) == whole
    assert len(again) == 6 and (tmp_path / "part.json").read_text() == (tmp_path / "whole.json").read_text()


def test_finished_blocks_are_not_measured_again(source: LiveSource, tmp_path: Path, monkeypatch) -> None:
    whole = measure(source, tmp_path / "part.json", pruning.Recipe("wanda"))
    monkeypatch.setattr(curves_measure, "prune_blocks", None)
    assert measure(source, tmp_path / "part.json", pruning.Recipe("wanda")) == whole


def test_a_figure_that_is_not_finite_is_refused(source: LiveSource, tmp_path: Path, monkeypatch) -> None:
    judge = evaluate.judge

    def broken(model, tokens, states, dense=None):
        found = judge(model, tokens, states, dense)
        return found if dense is None else evaluate.Judged(found.losses, found.divergences * float("nan"))

    monkeypatch.setattr(evaluate, "judge", broken)
    with pytest.raises(ValueError, match=r"model\.layers\.0: losses: wanted finite numbers"):
        measure(source, tmp_path / "part.json", pruning.Recipe("magnitude"))


def test_curves_make_plans(source: LiveSource, tmp_path: Path) -> None:
    found = measure(source, tmp_path / "part.json", pruning.Recipe("wanda"))
    found.save(tmp_path / "curves.json")
    stats = curves.attach(analysis.analyze(source, fit=None), curves.Curves.load(tmp_path / "curves.json"))
    plan = planning.plan(stats, 0.6, "measured")
    sizes = {name: n * k for name, (n, k) in source.description().shapes.items()}
    assert sum(p.zeros for p in plan.layers.values()) == round(0.6 * sum(sizes.values()))
    block_of = source.description().block_of
    share = {b: sum(plan.layers[n].zeros for n in sizes if block_of[n] == b) for b in range(3)}
    losses = {b: curve.losses[-1] for b, curve in found.blocks.items()}
    assert share[min(losses, key=losses.get)] > share[max(losses, key=losses.get)]  # the block that bears it best


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ((0.7,), [0.5, 0.7, 0.8, 0.9]),
        ((0.5, 0.6), [0.3, 0.4, 0.5, 0.6, 0.7, 0.9]),
        ((0.95,), [0.75, 0.9, 0.95]),
        ((0.1,), [0.1, 0.2, 0.9]),
    ],
)
def test_levels_are_around_what_is_asked(asked: tuple[float, ...], wanted: list[float]) -> None:
    assert curves_measure.levels(asked) == wanted
