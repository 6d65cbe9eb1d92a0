"""A plan as a recipe of llm-compressor: every ratio, for every target, in the model's order."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import make_model

import alphaprune
from alphaprune import llm_compressor
from alphaprune.pattern import NM, Unstructured
from alphaprune.plan_file import LayerPlan, Plan, patterned

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def analysis():
    return alphaprune.analyze(make_model(1, num_hidden_layers=4))


def modifiers(recipe: dict) -> list[tuple[str, dict]]:
    """(name, arguments) as llm-compressor finds them: in every group of the stage that ends in _modifiers."""
    (stage, groups), *more = recipe.items()
    assert stage.endswith("_stage") and not more and all(name.endswith("_modifiers") for name in groups)
    return [pair for group in groups.values() for pair in group.items()]


def ratios(recipe: dict, plan: Plan) -> dict[str, float]:
    """The ratio of every layer, as the modifiers would look it up: modules that are targets, in the model's order."""
    found: dict[str, float] = {}
    for _, settings in modifiers(recipe):
        blocks = list(dict.fromkeys(n.split(".self_attn")[0].split(".mlp")[0] for n in plan.layers))
        modules = [m for block in blocks for m in (block, *(f"{block}.{part}" for part in PARTS))]
        targets = [m for m in modules if m in settings["targets"]]
        assert len(targets) == len(settings["targets"]) == len(settings["sparsity"])
        for target, ratio in zip(targets, settings["sparsity"], strict=True):
            for layer in plan.layers:
                if layer == target or layer.startswith(f"{target}."):
                    assert layer not in found
                    found[layer] = ratio
    return found


@pytest.mark.parametrize("per", ["block", "matrix"])
@pytest.mark.parametrize("modifier", ["wanda", "sparsegpt"])
def test_every_ratio_is_that_of_the_plan(analysis, tmp_path: Path, per: str, modifier: str) -> None:
    plan = alphaprune.plan(analysis, 0.7, allocator="alpha", epsilon=0.2, granularity=per)
    llm_compressor.write(plan, tmp_path / "recipe.yaml", modifier)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    ((name, settings),) = modifiers(recipe)
    assert name == llm_compressor.MODIFIERS[modifier] and settings["mask_structure"] == "0:0"
    assert len(settings["targets"]) == (4 if per == "block" else 28)
    found = ratios(recipe, plan)
    assert found.keys() == plan.layers.keys() and len(set(found.values())) > 3
    for layer, entry in plan.layers.items():
        weights = entry.shape[0] * entry.shape[1]
        assert abs(found[layer] * weights - entry.zeros) <= 1 + 1e-6 * weights


def test_a_half_stays_a_half(analysis) -> None:
    recipe = llm_compressor.recipe(alphaprune.plan(analysis, 0.5, allocator="uniform"))
    assert modifiers(recipe)[0][1]["sparsity"] == [0.5] * 4
    assert modifiers(recipe)[0][1]["targets"] == [f"model.layers.{i}" for i in range(4)]


@pytest.mark.parametrize(("pattern", "structure"), [("2:4", "2:4"), ("1:4", "3:4"), ("3:8", "5:8")])
def test_a_structure_counts_zeros_where_a_pattern_counts_what_is_kept(analysis, pattern: str, structure: str) -> None:
    ((_, settings),) = modifiers(llm_compressor.recipe(alphaprune.plan(analysis, pattern=pattern)))
    assert settings["mask_structure"] == structure
    zeros, of = map(int, structure.split(":"))
    assert settings["sparsity"] == pytest.approx([zeros / of] * 4)


def test_patterns_of_their_own_and_layers_that_stay_dense() -> None:
    shape = (32, 64)
    layers = {f"model.layers.{b}.{part}": patterned(shape, NM(4 if b else 2, 8)) for b in range(2) for part in PARTS}
    layers["model.layers.1.mlp.up_proj"] = LayerPlan(shape, 0, NM(8, 8))
    layers |= {f"model.layers.2.{part}": LayerPlan(shape, 500 + (part == PARTS[0]), Unstructured()) for part in PARTS}
    plan = Plan("m", "f", 0.5, "measured", 0.0, "N:8", layers)
    recipe = llm_compressor.recipe(plan)
    by_structure = {settings["mask_structure"]: settings for _, settings in modifiers(recipe)}
    assert by_structure.keys() == {"6:8", "4:8", "0:0"} and len(recipe["pruning_stage"]) == 3
    assert by_structure["6:8"]["targets"] == ["model.layers.0"]
    assert by_structure["4:8"]["targets"] == [n for n in layers if ".1." in n and "up_proj" not in n]
    assert by_structure["0:0"]["targets"] == ["model.layers.2"]
    found = ratios(recipe, plan)
    assert found.keys() == {n for n in layers if n != "model.layers.1.mlp.up_proj"}
    assert all(found[n] == pytest.approx(layers[n].sparsity, abs=1 / 2048 + 1e-6) for n in found)


def test_nothing_to_prune_and_unknown_modifiers(analysis) -> None:
    layers = {"model.layers.0.mlp.up_proj": LayerPlan((4, 4), 0, Unstructured())}
    with pytest.raises(ValueError, match="prunes nothing"):
        llm_compressor.recipe(Plan("m", "f", 0.0, "uniform", 0.0, "unstructured", layers))
    with pytest.raises(ValueError, match=r"modifier 'magic': wanted one of wanda, sparsegpt"):
        llm_compressor.recipe(alphaprune.plan(analysis, 0.5), "magic")


def test_the_command(run, directory: Path) -> None:
    run("analyze", directory, "-o", "a.json")
    run("plan", "a.json", "--sparsity", 0.7, "-o", "plan.json")
    status, out, _ = run("convert", "plan.json", "recipe.yaml", "--modifier", "sparsegpt")
    assert status == 0 and out == "recipe.yaml: SparseGPTModifier, 0:0, 3 targets\n"
    plan = Plan.load("plan.json")
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    assert ratios(recipe, plan).keys() == plan.layers.keys()
    status, out, _ = run("convert", "plan.json", "recipe.yaml", "--json")
    assert json.loads(out) == yaml.safe_load(Path("recipe.yaml").read_text())
    assert "WandaPruningModifier" in out
    before = Path("plan.json").read_bytes()
    Path("link.json").symlink_to("plan.json")
    for same in ("plan.json", "./plan.json", "link.json"):
        status, _, err = run("convert", "plan.json", same)
        assert status == 2 and "is the plan itself" in err
    assert Path("plan.json").read_bytes() == before
    status, _, err = run("convert", "plan.json", "nowhere/recipe.yaml")
    assert status == 2 and "no folder" in err
