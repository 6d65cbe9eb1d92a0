"""One model's column of the paper's Table 2, rerun: WikiText-2 perplexity at 70 % for 3 methods × 3 allocations.

    python bench/paper.py MODEL_DIR --c4 c4-train.00000-of-01024.json.gz --wikitext wiki.test.raw [--device cuda]
        [--cells dense,wanda/alpha,…] [--alphas published.json] [-o paper.jsonl]

Protocol as published (AlphaPruning, which takes it from locuslab/wanda): 128 windows of 2048 tokens from the first
shard of C4, seed 0; each block calibrated behind the pruned ones; WikiText-2 raw *test* text in whole windows of 2048
tokens, float16; alphas by the reference fit, spread over blocks with the ε published for this size, ratios not clipped
to a bound. A row per cell is printed and appended to the results file; what stands there already is not run again. The
model is read block by block, for pruning and for evaluation: one block and the hidden states must fit in memory.

Three things differ from the published code: counts are exact (its masks also take what ties with the threshold),
losses are computed in float32 from the logits, and where a ratio is above 1, magnitude and SparseGPT, which stop there
with an IndexError, take 0.99999 as the code of FARMS does. Rows say how many ratios were above 1.
"""

import argparse
import gzip
import hashlib
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import append
from torch import Tensor, nn

import alphaprune
from alphaprune import calibrate, data, planning, pruning
from alphaprune.analysis import Analysis, analyze
from alphaprune.commands.shared import window
from alphaprune.console import bar
from alphaprune.evaluate import windows_of
from alphaprune.model import DirectorySource, resolve
from alphaprune.pattern import Unstructured
from alphaprune.planning import LayerPlan, Plan

METHODS, ALLOCATIONS = ("magnitude", "wanda", "sparsegpt"), ("uniform", "owl", "alpha")
CELLS = ("dense", *(f"{method}/{allocation}" for method in METHODS for allocation in ALLOCATIONS))
SPARSITY = 0.7
OWL_SHIFT = 0.08  # λ of OWL; its M is that of the column `outliers`
MOST = 0.99999  # for methods whose published code cannot prune a whole layer

# Hidden size, blocks and positions (2048 for LLaMA, 4096 for LLaMA-2), and the published ε at 70 % per method.
SIZES = {
    "7b": ((4096, 32, 2048), (0.3, 0.2, 0.2)),
    "13b": ((5120, 40, 2048), (0.5, 0.3, 0.3)),
    "30b": ((6656, 60, 2048), (0.4, 0.3, 0.3)),
    "65b": ((8192, 80, 2048), (0.4, 0.3, 0.3)),
    "llama2-7b": ((4096, 32, 4096), (0.5, 0.3, 0.2)),
    "llama2-13b": ((5120, 40, 4096), (0.4, 0.3, 0.3)),
    "llama2-70b": ((8192, 80, 4096), (0.4, 0.3, 0.3)),
}
# Published perplexities at 70 %, only those that were read in print: dense from BESA's README, uniform and OWL from
# OWL's and DLP's, alpha from the table itself.
PUBLISHED = {
    "dense": dict(zip(SIZES, (5.68, 5.09, 4.10, 3.53, 5.47, 4.88, 3.31), strict=True)),
    "magnitude/uniform": {"7b": 48419.12, "13b": 84539.45, "30b": 977.73, "65b": 46.89},
    "magnitude/owl": {"llama2-13b": 57.55},
    "magnitude/alpha": {"13b": 2029.20},
    "wanda/uniform": {"7b": 85.77, "13b": 55.90, "30b": 17.37, "65b": 15.23},
    "wanda/owl": {"7b": 24.55, "13b": 17.17, "30b": 10.75, "65b": 8.61},
    "wanda/alpha": {"7b": 23.86, "13b": 14.21, "30b": 9.68, "llama2-7b": 28.87, "llama2-13b": 14.16},
    "sparsegpt/uniform": {"7b": 26.30, "13b": 19.24, "30b": 12.56, "65b": 10.45},
    "sparsegpt/owl": {"7b": 19.49, "13b": 14.55, "30b": 10.28, "65b": 8.28, "llama2-7b": 19.71, "llama2-13b": 15.12},
}
IDENTITY = ("cell", "fingerprint", "dtype", "sparsity", "epsilon", "calibration", "text", "length", "windows")


class Protocol(NamedTuple):
    """What all cells share. calibration: [samples, length] or None; text: [windows, length]; both int64."""

    source: DirectorySource
    size: str
    sparsity: float
    epsilon: float | None
    calibration: Tensor | None
    text: Tensor
    text_sha256: str
    seed: int


def read_documents(file: str) -> list[str]:
    """The `text` of every document of a JSON-lines file, which may be compressed; a JSON list is read, too."""
    opened = gzip.open if file.endswith(".gz") else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            first = lines.read(1)
            lines.seek(0)
            found = json.load(lines) if first == "[" else [json.loads(line) for line in lines if line.strip()]
        texts = [document["text"] for document in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: cannot be read as JSON lines with a "text" each ({error!r})') from error
    if not texts:
        raise ValueError(f"{file}: there is no document in it")
    return texts


def draw_windows(tokenizer: Any, documents: list[str], samples: int, length: int, seed: int) -> Tensor:
    """[samples, length] int64 as locuslab/wanda draws it (lib/data.py, get_c4).

    For every window documents are drawn until one has more than `length` tokens, then the place inside it. ValueError
    once every document was found too short.
    """
    draw, tokens, longer = random.Random(seed), {}, []
    short: set[int] = set()
    for _ in range(samples):
        while True:
            place = draw.randint(0, len(documents) - 1)
            if place in short:
                continue
            if place not in tokens:
                tokens[place] = tokenizer(documents[place], verbose=False)["input_ids"]
            if len(tokens[place]) > length:
                break
            del tokens[place]
            short.add(place)
            if len(short) == len(documents):
                raise ValueError(f"none of {len(documents)} documents has more than {length} tokens; give another file")
        start = draw.randint(0, len(tokens[place]) - length - 1)
        longer.append(tokens[place][start : start + length])
    return torch.tensor(longer, dtype=torch.int64)


def size_of(config: Any) -> str:
    """The name in SIZES of a model of this shape; ValueError if it has none."""
    positions = 2048 if getattr(config, "max_position_embeddings", 0) <= 2048 else 4096
    shape = (config.hidden_size, config.num_hidden_layers, positions)
    for name, (known, _) in SIZES.items():
        if known == shape:
            return name
    raise ValueError(f"no column of the table has hidden size, blocks and positions {shape}: give --size")


def epsilon_of(cell: str, protocol: Protocol) -> float | None:
    """The published ε of a cell that has one, or what the user gave instead for alpha."""
    method, _, allocation = cell.partition("/")
    if allocation == "owl":
        return OWL_SHIFT / protocol.sparsity
    if allocation != "alpha":
        return None
    if protocol.epsilon is None and protocol.sparsity != SPARSITY:
        raise ValueError(f"ε is published for sparsity {SPARSITY} only: give --epsilon for {protocol.sparsity}")
    return SIZES[protocol.size][1][METHODS.index(method)] if protocol.epsilon is None else protocol.epsilon


def ratios_of(cell: str, protocol: Protocol, known: Analysis) -> dict[str, float]:
    """Sparsities of all layers by the published formulas, unbounded."""
    allocation, epsilon = cell.partition("/")[2], epsilon_of(cell, protocol)
    if allocation == "uniform":
        return dict.fromkeys(known.layers, protocol.sparsity)
    return planning.real_sparsities(known, protocol.sparsity, allocation, epsilon, bounds=(0.0, math.inf))


def zeros_of(method: str, shape: tuple[int, int], ratio: float) -> int:
    """How many weights the published code of a method removes from a layer [N, K], but for ties.

    wanda: int(K·s) of every row.   The others everything up to the weight at place int(n·s) in order: magnitude of the
    matrix, sparsegpt of each 128 columns.
    """
    rows, columns = shape
    if method == "wanda":
        return rows * min(int(columns * ratio), columns)
    widths = [columns]
    if method == "sparsegpt":
        widths = [min(128, columns - start) for start in range(0, columns, 128)]
    return sum(int(rows * width * min(ratio, MOST)) + 1 for width in widths)


def plan_of(cell: str, protocol: Protocol, known: Analysis) -> tuple[Plan, int]:
    """The plan of a cell, and how many published ratios are above 1."""
    method, _, allocation = cell.partition("/")
    ratios = ratios_of(cell, protocol, known)
    layers = {
        name: LayerPlan(stat.shape, zeros_of(method, stat.shape, ratios[name]), Unstructured())
        for name, stat in known.layers.items()
    }
    epsilon = epsilon_of(cell, protocol) or 0.0
    made = Plan(known.model, known.fingerprint, protocol.sparsity, allocation, epsilon, "unstructured", layers)
    return made, sum(ratio > 1 for ratio in ratios.values())


def mean_loss(source: DirectorySource, activations: calibrate.Activations, text: Tensor) -> float:
    """Mean over windows of the mean loss per token in nats, from the last block's outputs; text [windows, length]."""
    source.load_outside()
    decoder = source.skeleton.get_submodule(source.prefix.rpartition(".")[0])
    tied = source.config.tie_word_embeddings
    head = (source.skeleton.get_input_embeddings() if tied else source.skeleton.get_output_embeddings()).weight
    head, norm, losses, done = head.to(source.device), decoder.norm.to(source.device), [], 0
    with torch.inference_mode():
        for hidden in activations.hidden:
            for row in hidden:  # [length, D]: the logits of one window are 0.25 GB
                logits = nn.functional.linear(norm(row[:-1].to(source.device)), head).float()
                losses.append(nn.functional.cross_entropy(logits, text[done, 1:].to(source.device)).double())
                done += 1
    source.unload_outside()
    return float(torch.stack(losses).mean())


def run_cell(cell: str, protocol: Protocol, known: Analysis) -> dict[str, Any]:
    """Prunes and evaluates in one pass over the blocks, and returns what is not known beforehand."""
    source, started = protocol.source, time.perf_counter()
    activations = calibrate.first_inputs(source, protocol.text)
    found: dict[str, Any] = {}
    if cell == "dense":
        blocks = source.blocks()
    else:
        plan, above = plan_of(cell, protocol, known)
        recipe = pruning.Recipe(cell.partition("/")[0])
        tokens = protocol.calibration if recipe.need != "nothing" else None
        blocks = (pruned.block for pruned in pruning.prune_blocks(source, plan, recipe, tokens))
        found = {"realized": plan.realized, "ratios_above_1": above}
    with bar(source.block_count(), cell, "block") as tick:
        for block in blocks:
            calibrate.run(block, activations)
            tick(block.name)
    loss = mean_loss(source, activations, protocol.text)
    perplexity = math.exp(loss) if loss < 700 else None  # null where it is no number that JSON has
    return {"perplexity": perplexity, "loss": loss, **found, "seconds": round(time.perf_counter() - started, 1)}


def describe_cell(cell: str, protocol: Protocol, fingerprint: str) -> dict[str, Any]:
    """What is known of a cell before it is run; IDENTITY of it says whether a row is of the same run."""
    calibration, text, exact = protocol.calibration, protocol.text, cell != "dense"
    needs = exact and not (cell.startswith("magnitude/") and not cell.endswith("/owl"))
    published = PUBLISHED.get(cell, {}).get(protocol.size)
    return {
        "cell": cell,
        "size": protocol.size,
        "published": published if protocol.sparsity == SPARSITY or not exact else None,
        "sparsity": protocol.sparsity if exact else 0.0,
        "epsilon": epsilon_of(cell, protocol),
        "seed": protocol.seed if needs else None,
        "samples": len(calibration) if needs else None,
        "calibration": hashlib.sha256(calibration.numpy().tobytes()).hexdigest() if needs else None,
        "text": protocol.text_sha256,
        "windows": len(text),
        "length": text.shape[1],
        "model": protocol.source.name,
        "fingerprint": fingerprint,
        "dtype": str(protocol.source.dtype or "as stored").removeprefix("torch."),
        "device": str(protocol.source.device),
        "versions": {"alphaprune": alphaprune.__version__, "torch": torch.__version__},
    }


def analysis_of(protocol: Protocol, cells: list[str], compared: bool, file: Path) -> Analysis:
    """What the allocations of these cells read; `file` holds it for the next time."""
    source, known = protocol.source, protocol.source.description()
    fit = "reference" if compared or any(cell.endswith("/alpha") for cell in cells) else None
    tokens = protocol.calibration if any(cell.endswith("/owl") for cell in cells) else None
    seen = None if tokens is None else {"tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}
    if file.exists():
        found = Analysis.load(file)
        same = found.fingerprint == known.fingerprint and (seen is None or found.calibration == seen)
        if same and fit in (None, found.fit):
            return found
    with bar(source.block_count(), "analyze", "block") as tick:
        found = analyze(source, fit, str(source.device), progress=tick, tokens=tokens, calibration=seen)
    if fit or seen:
        found.save(file)
    return found


def compare_alphas(known: Analysis, file: str) -> dict[str, Any]:
    """How far our reference alphas are from a published file of them, by layer name."""
    try:
        published = {entry["name"]: float(entry["alpha"]) for entry in json.loads(Path(file).read_text())["layers"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read as a list of layers with name and alpha ({error!r})") from error
    missing = set(known.layers) ^ set(published)
    if missing:
        raise ValueError(f"{file}: {len(missing)} layers are not in both, such as {min(missing)}: is it of this model?")
    apart = [abs(stat.columns["alpha"] - published[name]) for name, stat in known.layers.items()]
    return {
        "alphas": len(apart),
        "median_difference": statistics.median(apart),
        "within_0.02": sum(d <= 0.02 for d in apart) / len(apart),
        "largest_difference": max(apart),
        "file_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
    }


def read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        return [dict(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: is no results file of this script ({error})") from error


def make_protocol(options: argparse.Namespace, cells: list[str]) -> Protocol:
    dtype = None if options.dtype == "stored" else getattr(torch, options.dtype)
    folder = resolve(options.model)
    source = DirectorySource(folder, dtype, options.device)
    window(options.length, source.config)
    tokenizer = data.load_tokenizer(folder)
    text = data.encode(tokenizer, data.read_text(options.wikitext, wikitext=True), options.wikitext)
    windows = windows_of(text, options.length)
    calibration = None
    if options.c4 is not None:
        documents = read_documents(options.c4)
        calibration = draw_windows(tokenizer, documents, options.samples, options.length, options.seed)
    elif any(cell.startswith(("wanda/", "sparsegpt/")) or cell.endswith("/owl") for cell in cells):
        raise ValueError("these cells need calibration text: give --c4 FILE, or --cells dense,magnitude/uniform,…")
    size, sparsity = options.size or size_of(source.config), options.sparsity
    return Protocol(source, size, sparsity, options.epsilon, calibration, windows, text.sha256, options.seed)


def run(options: argparse.Namespace) -> None:
    cells = list(CELLS) if options.cells is None else options.cells.split(",")
    unknown = [cell for cell in cells if cell not in CELLS]
    if unknown:
        raise ValueError(f"no cell is called {unknown[0]!r}; there are: {', '.join(CELLS)}")
    if not 0 < options.sparsity < 1:
        raise ValueError(f"sparsity {options.sparsity}: wanted more than 0 and less than 1")
    protocol, output = make_protocol(options, cells), Path(options.output)
    fingerprint = protocol.source.description().fingerprint
    rows = {tuple(row.get(key) for key in IDENTITY): row for row in read_rows(output)}
    wanted = [describe_cell(cell, protocol, fingerprint) for cell in cells]
    open_cells = [w["cell"] for w in wanted if tuple(w[key] for key in IDENTITY) not in rows]
    file = output.with_name(f"{output.name}.{options.dtype}.analysis.json")
    known = analysis_of(protocol, open_cells, options.alphas is not None, file)
    if options.alphas is not None:
        print(json.dumps(compare_alphas(known, options.alphas)), flush=True)
    for cell in wanted:
        row = rows.get(tuple(cell[key] for key in IDENTITY))
        if row is None:
            row = cell | run_cell(cell["cell"], protocol, known)
            append(output, row)
        print(json.dumps(row), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL_DIR", help="LLaMA or LLaMA-2 in the Hugging Face layout")
    parser.add_argument("--wikitext", metavar="FILE", required=True, help="wiki.test.raw of WikiText-2")
    parser.add_argument("--c4", metavar="FILE", help="en/c4-train.00000-of-01024.json.gz of allenai/c4")
    parser.add_argument("--size", choices=tuple(SIZES), help="whose ε and figures; by default from the shape")
    parser.add_argument("--sparsity", type=float, default=SPARSITY)
    parser.add_argument("--epsilon", type=float, help="for allocation alpha, instead of the published ones")
    parser.add_argument("--cells", help=f"some of {', '.join(CELLS)}")
    parser.add_argument("--alphas", metavar="FILE", help="published alphas to compare ours with")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "stored"), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=128, help="as published; fewer for a trial")
    parser.add_argument("--length", type=int, default=2048, help="as published; shorter for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", metavar="FILE", default="paper.jsonl", help="results, and where to continue")
    try:
        run(parser.parse_args(arguments))
    except ValueError as error:
        print(f"paper.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
