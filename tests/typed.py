"""Every public name as a user types it: `mypy` reads this file, nothing runs it.

A line with `type: ignore` is wrong on purpose; mypy complains where it would be right.
"""

from torch import Tensor, nn

import alphaprune


def steps(model: nn.Module, tokens: Tensor) -> nn.Module:
    analysis: alphaprune.Analysis = alphaprune.analyze(model)
    alphas: list[float] = [stat.columns["alpha"] for stat in analysis.layers.values()]
    analysis.save("analysis.json")
    again: alphaprune.Analysis = alphaprune.Analysis.load("analysis.json")
    plan: alphaprune.Plan = alphaprune.plan(again, sparsity=0.7, allocator="alpha", epsilon="auto")
    share: float = plan.realized + sum(alphas)
    masks: dict[str, Tensor] = alphaprune.prune(model, plan, method="wanda", tokens=tokens)
    alphaprune.plan(again, sparsity="much")  # type: ignore[arg-type]
    alphaprune.plan(model, sparsity=share)  # type: ignore[arg-type]
    sparse = alphaprune.sparsify(model, masks)
    alphaprune.save(sparse, "pruned")
    rounded: nn.Module = alphaprune.round_activations(alphaprune.sparsify(model, masks, values="int8"))
    alphaprune.round_activations(rounded, to=8)  # type: ignore[arg-type]
    return alphaprune.load("pruned", activations="int8")


def layer(linear: nn.Linear, mask: Tensor, x: Tensor) -> Tensor:
    packed: alphaprune.SparseLinear = alphaprune.SparseLinear.from_linear(linear, mask)
    alphaprune.SparseLinear.from_linear(x)  # type: ignore[arg-type]
    bias: Tensor | None = packed.bias
    y: Tensor = packed.forward(x)
    return y if bias is None else y - bias


def others(model: nn.Module) -> str:
    tree: alphaprune.Tree = alphaprune.Tree(model, blocks="stages.*.blocks")
    alphaprune.analyze(tree)
    generator = alphaprune.TextGeneration("pruned")
    version: str = alphaprune.__version__
    return version + str(generator) + str(alphaprune.AlphaPruneConfig())
