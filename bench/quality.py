"""Layer errors and perplexities of every pruning method on small real models, good or bad.

Layer error: Σ‖(Ŵ − W)X‖² / Σ‖WX‖² over all layers, with X of the dense model, uniform ratios, the same tokens for every
method. Perplexity: of the model pruned as `alphaprune prune` does it, behind the pruned prefix, on held-out text.
`python bench/quality.py [--model demo|FOLDER --calibration FILE --text FILE] [--out FILE]`; rows of earlier runs stay.
"""

import argparse
import copy
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rows import replace
from tqdm import tqdm

import alphaprune
from alphaprune import calibrate, data, evaluate, hf, permute, pruners, timing
from alphaprune.calibrate import InputStat
from alphaprune.demo import corpus
from alphaprune.demo.run import MODEL, spread
from alphaprune.model import LiveSource, open_source
from alphaprune.pruning import Recipe, prune_blocks

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
PATTERNS = ("2:4",)
# Methods were published with different selections; layer errors are to be compared within one.
OTHER_SELECTION = {"magnitude": "row", "wanda": "matrix"}
LENGTH = 512  # tokens per window: the context of both models


def texts(options: argparse.Namespace) -> tuple[str, str, str]:
    """Name of the model, calibration text, held-out text."""
    if options.model == "demo":
        return "demo", corpus.load("calibration").text, corpus.load("held-out").text
    if not (options.calibration and options.text):
        raise SystemExit("a model of your own needs --calibration FILE and --text FILE")
    return Path(options.model).name, data.read_text(options.calibration), data.read_text(options.text)


def dense_statistics(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, InputStat]:
    """What is known of all layers' inputs in the dense model."""
    source, found = open_source(model), {}
    activations = calibrate.first_inputs(source, tokens)
    for block in source.blocks():
        found |= calibrate.statistics(block, activations, "gram")
        calibrate.run(block, activations)
    return found


def layer_error(model: torch.nn.Module, plan: Any, recipe: Recipe, known: dict[str, InputStat]) -> tuple[float, float]:
    """The error over all layers of a copy that is pruned with these statistics; and the seconds that took."""
    pruned, changed, whole = copy.deepcopy(model), 0.0, 0.0
    started = perf_counter()
    for _ in prune_blocks(pruned, plan, recipe, statistics=lambda block: {n: known[n] for n in block.linears}):
        pass
    seconds = perf_counter() - started
    before, known = permuted(model, plan, known) if recipe.channel_permute else (model, known)
    for name, inputs in known.items():
        dense, weight = (m.get_submodule(name).weight.detach().float() for m in (before, pruned))
        changed, whole = changed + inputs.gram.error(weight - dense), whole + inputs.gram.error(dense)
    return changed / whole, seconds


def permuted(
    model: torch.nn.Module, plan: Any, known: dict[str, InputStat]
) -> tuple[torch.nn.Module, dict[str, InputStat]]:
    """The dense model with its channels in the order that a mask of the plan is given, and its layers' inputs."""
    moved, found = copy.deepcopy(model), {}
    for block in open_source(moved).blocks():
        found |= permute.block(block, {n: known[n] for n in block.linears}, plan.layers, model.config)
    return moved, found


def cases(stats: Any) -> list[tuple[Any, Recipe]]:
    """Every plan with every method, with and without a refit; N:M also with permuted channels."""
    plans = [alphaprune.plan(stats, s, allocator="uniform") for s in SPARSITIES]
    plans += [alphaprune.plan(stats, pattern=p, allocator="uniform") for p in PATTERNS if divisible(stats, p)]
    found = []
    for plan in plans:
        for method in sorted(pruners.MEMBERS):
            refits = (False,) if method == "alps" else (False, True)  # alps ends with one
            found += [(plan, Recipe(method, refit=refit)) for refit in refits]
            if plan.pattern == "unstructured" and method in OTHER_SELECTION:
                found.append((plan, Recipe(method, OTHER_SELECTION[method])))
            if plan.pattern != "unstructured" and method != "magnitude":  # which knows no inputs to order channels by
                found.append((plan, Recipe(method, channel_permute=True)))
    return found


def divisible(stats: Any, pattern: str) -> bool:
    return all(stat.shape[1] % int(pattern.split(":")[1]) == 0 for stat in stats.layers.values())


def row(
    model: torch.nn.Module,
    plan: Any,
    recipe: Recipe,
    known: dict[str, InputStat],
    tokens: torch.Tensor,
    text: data.Text,
) -> dict[str, Any]:
    """Layer error behind the dense prefix, perplexity behind the pruned one."""
    error, seconds = layer_error(model, plan, recipe, known)
    pruned = copy.deepcopy(model)
    for _ in prune_blocks(pruned, plan, recipe, tokens):
        pass
    selection = recipe.selection or pruners.get(recipe.method).selection
    how = {"method": recipe.method, "selection": selection, "refit": recipe.refit}
    shape = {"channel_permute": recipe.channel_permute, "pattern": plan.pattern, "sparsity": plan.realized}
    return how | shape | {"layer_error": error, "seconds": seconds} | quality(evaluate.evaluate(pruned, text, LENGTH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--out", type=Path, help="a file of rows; those of this model are replaced")
    options = parser.parse_args()
    name, calibration, held_out = texts(options)
    model = hf.load(MODEL if options.model == "demo" else options.model).float()
    tokenizer = data.load_tokenizer(MODEL if options.model == "demo" else options.model)
    tokens = data.sample_windows(data.encode(tokenizer, calibration), options.samples, LENGTH, seed=0)
    text = spread(data.encode(tokenizer, held_out), options.windows)
    known = dense_statistics(model, tokens)
    stats = alphaprune.analyze(LiveSource(model), fit=None)
    dense = evaluate.evaluate(model, text, LENGTH)
    common = {"model": name, "machine": timing.machine(), "tokens": tokens.numel(), "data_sha256": text.sha256}
    rows = [common | {"method": "dense", "sparsity": 0.0, **quality(dense)}]
    for plan, recipe in tqdm(cases(stats), desc=name, unit="model", disable=None):
        rows.append(common | row(model, plan, recipe, known, tokens, text))
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        replace(options.out, rows, "model")


def quality(found: evaluate.Evaluation) -> dict[str, Any]:
    return {n: getattr(found, n) for n in ("perplexity", "stderr", "bits_per_byte", "windows", "length")}


if __name__ == "__main__":
    main()
