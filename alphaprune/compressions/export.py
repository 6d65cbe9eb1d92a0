"""A plan of bits as the settings of tools that quantize with kernels of their own: GPTQModel and llm-compressor.

GPTQModel: https://github.com/ModelCloud/GPTQModel, `QuantizeConfig.dynamic`: regular expression → what is different
there, "-:" before it for layers that are left alone; the first that matches counts.
llm-compressor: https://github.com/vllm-project/llm-compressor, config_groups as in its examples of non-uniform
quantization; "re:" before a target makes it a regular expression on the name of a module.

Both are read by vLLM, which fuses q, k, v and gate, up into one matrix: there a block needs one number of bits, which
is what plans have by default.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from alphaprune.analysis import need
from alphaprune.compressions.parts import WHOLE
from alphaprune.compressions.plans import CompressionPlan
from alphaprune.files import atomic_write_text
from alphaprune.formats.quantize import GROUP


def write(plan: CompressionPlan, file: "str | Path") -> dict[str, Any]:
    """Writes the plan for GPTQModel (.json) or llm-compressor (.yaml), by the ending of `file`, and returns it.

    The file appears whole or not at all. ValueError for a plan of anything but bits, or another ending.
    """
    ending = Path(file).suffix.lower()
    need(ending in (".json", ".yaml", ".yml"), f"{file}: wanted .json for GPTQModel, or .yaml for llm-compressor")
    if ending == ".json":
        made = gptqmodel(plan)
        atomic_write_text(file, json.dumps(made, indent=2) + "\n")
        return made
    made = llm_compressor(plan)
    origin = f"# {plan.model}: {plan.realized:.6g} bits, allocator {plan.allocator}, epsilon {plan.epsilon:.4g}\n"
    atomic_write_text(file, origin + yaml.safe_dump(made, sort_keys=False, width=100))
    return made


def gptqmodel(plan: CompressionPlan) -> dict[str, Any]:
    """The keyword arguments of a QuantizeConfig: the most frequent bits for all, and others where they differ."""
    bits = _bits(plan)
    weights: Counter[int] = Counter()
    for name, amount in bits.items():
        weights[amount] += plan.parts[name].weights
    usual = max((amount for amount in weights if amount != WHOLE), key=weights.__getitem__)
    dynamic: dict[str, dict[str, int]] = {}
    for pattern, amount in _patterns(bits).items():
        if amount == WHOLE:
            dynamic[f"-:{pattern}"] = {}
        elif amount != usual:
            dynamic[f"+:{pattern}"] = {"bits": amount}
    return {"bits": usual, "group_size": GROUP, "sym": True, "dynamic": dynamic}


def llm_compressor(plan: CompressionPlan) -> dict[str, Any]:
    """A recipe with a config group for each number of bits."""
    patterns, groups = _patterns(_bits(plan)), {}
    for number, amount in enumerate(sorted(set(patterns.values()) - {WHOLE})):
        scheme = {"num_bits": amount, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
        targets = [f"re:{pattern}" for pattern, own in patterns.items() if own == amount]
        groups[f"group_{number}"] = {"weights": scheme, "targets": targets}
    ignore = ["lm_head", *(f"re:{pattern}" for pattern, own in patterns.items() if own == WHOLE)]
    return {"quant_stage": {"quant_modifiers": {"GPTQModifier": {"ignore": ignore, "config_groups": groups}}}}


def _bits(plan: CompressionPlan) -> dict[str, int]:
    need(plan.method == "bits", f"the plan is one of {plan.method}, and other tools take plans of bits only")
    bits = {name: kept.amount for name, kept in plan.parts.items()}
    need(set(bits.values()) != {WHOLE}, f"the plan for {plan.model} rounds nothing, so there are no settings for it")
    return bits


def _patterns(bits: dict[str, int]) -> dict[str, int]:
    """Regular expressions on layer names → bits: one for a block that has one number, one for each layer otherwise."""
    blocks: dict[str, dict[str, int]] = {}
    for name, amount in bits.items():
        found = re.match(r".*?\.\d+(?=\.)", name)
        blocks.setdefault(found[0] if found else name, {})[name] = amount
    patterns = {}
    for block, inside in blocks.items():
        if len(set(inside.values())) == 1 and block not in inside:
            patterns[rf"{re.escape(block)}\..*"] = next(iter(inside.values()))
        else:
            patterns |= {f"{re.escape(name)}$": amount for name, amount in inside.items()}
    return patterns
