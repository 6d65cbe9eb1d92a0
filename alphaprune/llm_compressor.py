"""A plan as a recipe of llm-compressor, whose pruning modifiers take a ratio for each target, in the model's order."""

from pathlib import Path
from typing import Any

import yaml

from alphaprune.files import atomic_write_text
from alphaprune.pattern import NM
from alphaprune.plan_file import LayerPlan, Plan

MODIFIERS = {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}
DIGITS = 6  # of a ratio: finer than one weight of a row, and a half stays a half

Layers = dict[str, LayerPlan]


def write(plan: Plan, file: "str | Path", modifier: str = "wanda") -> dict[str, Any]:
    """Writes the recipe of `recipe` as YAML and returns it; the file appears whole or not at all."""
    made = recipe(plan, modifier)
    origin = f"# {plan.model}: sparsity {plan.realized:.6g}, allocator {plan.allocator}, epsilon {plan.epsilon:.4g}\n"
    atomic_write_text(file, origin + yaml.safe_dump(made, sort_keys=False, width=100))
    return made


def recipe(plan: Plan, modifier: str = "wanda") -> dict[str, Any]:
    """One stage with a modifier for each pattern of the plan.

    Targets are decoder blocks where the layers of every block have one ratio, up to the rounding of counts, otherwise
    the layers themselves; `sparsity` has a number for each. Layers without zeros are no targets. mask_structure is what
    llm-compressor means by N:M, N zeros of M, which is M - keep of what a plan calls keep:M; 0:0 for unstructured.
    ValueError for an unknown modifier, or if the plan prunes nothing.
    """
    if modifier not in MODIFIERS:
        raise ValueError(f"modifier {modifier!r}: wanted one of {', '.join(MODIFIERS)}")
    patterns: dict[str, Layers] = {}
    for name, layer in plan.layers.items():
        if layer.zeros:
            patterns.setdefault(_structure(layer), {})[name] = layer
    if not patterns:
        raise ValueError(f"the plan for {plan.model} prunes nothing, so there is no recipe for it")
    stage = {}
    for structure, layers in patterns.items():
        targets = _blocks(layers, plan) or {name: layer.sparsity for name, layer in layers.items()}
        group = "pruning" if len(patterns) == 1 else f"pruning_{structure.replace(':', '_of_')}"
        stage[f"{group}_modifiers"] = {
            MODIFIERS[modifier]: {
                "sparsity": [round(ratio, DIGITS) for ratio in targets.values()],
                "mask_structure": structure,
                "targets": list(targets),
            }
        }
    return {"pruning_stage": stage}


def _structure(layer: LayerPlan) -> str:
    pattern = layer.pattern
    return f"{pattern.of - pattern.keep}:{pattern.of}" if isinstance(pattern, NM) else "0:0"


def _blocks(layers: Layers, plan: Plan) -> dict[str, float]:
    """{block: ratio} if these are all layers of their blocks and have one ratio in each; else nothing.

    A count is the ratio times the weights, rounded to one side or the other.
    """
    blocks: dict[str, Layers] = {}
    for name, layer in layers.items():
        blocks.setdefault(_block_of(name), {})[name] = layer
    whole = [name for name in plan.layers if _block_of(name) in blocks]
    if len(whole) != len(layers):
        return {}
    ratios = {}
    for block, inside in blocks.items():
        sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in inside.items()}
        ratios[block] = sum(layer.zeros for layer in inside.values()) / sum(sizes.values())
        if any(abs(layer.zeros - ratios[block] * sizes[name]) > 1 for name, layer in inside.items()):
            return {}
    return ratios


def _block_of(name: str) -> str:
    """model.layers.3 of model.layers.3.mlp.up_proj: everything up to the first number."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])
