"""What LoRA recovery wins back of the loss that pruning costs, on the embedded model.

Pruned as `alphaprune demo` does it, recovered on text of the training split, taught by the dense model, judged on the
held-out split; loss in nats per token. `python bench/recover.py [--sparsity 0.6,0.7,0.8] [--out FILE]`; rows of other
sparsities stay.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rows import replace
from tqdm import tqdm

import alphaprune
from alphaprune import data, evaluate, hf, recovery, timing
from alphaprune.demo import corpus
from alphaprune.demo.run import CALIBRATED, EVALUATED, LENGTH, METHOD, MODEL, encode, spread

DOCUMENTS = 16  # of the training split every so many-th is read: more text than the steps see
ALLOCATOR = "alpha"


def training_text(tokenizer: Any) -> data.Text:
    documents = corpus.load("train").documents[::DOCUMENTS]
    text = corpus.END_OF_TEXT.join(text for _, text in documents)
    return data.encode(tokenizer, text, "standard library, part of train")


def loss(model: torch.nn.Module, text: data.Text) -> float:
    with recovery.computing_in(model, torch.float32):
        return math.log(evaluate.evaluate(model, text, LENGTH).perplexity)


def row(
    sparsity: float, stats: Any, texts: dict[str, Any], settings: recovery.Settings, distil: bool
) -> dict[str, Any]:
    """Loss before and after; zeros are counted before and after, too."""
    model = hf.load(MODEL)
    teacher = hf.load(MODEL).float() if distil else None
    plan = alphaprune.plan(stats, sparsity, allocator=ALLOCATOR)
    masks = alphaprune.prune(model, plan, METHOD, texts["calibration"], refit=True)
    before, zeros = loss(model, texts["held-out"]), count_zeros(model, masks)
    started = perf_counter()
    with tqdm(total=settings.steps, desc=f"{sparsity:.0%}", unit="step", disable=None) as bar:
        training = alphaprune.recover(
            model, masks, texts["train"], torch.float32, lambda _: bar.update(), teacher=teacher, **asdict(settings)
        )
    seconds = perf_counter() - started
    if any(bool(model.get_submodule(name).weight[~mask].any()) for name, mask in masks.items()):
        raise SystemExit("a zero was filled in")
    return {
        "sparsity": sparsity,
        "zeros": [zeros, count_zeros(model, masks)],
        "pruned": before,
        "recovered": loss(model, texts["held-out"]),
        "training_first_last": [sum(part) / len(part) for part in (training[:10], training[-10:])],
        "seconds": seconds,
    }


def count_zeros(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> int:
    return sum(int((model.get_submodule(name).weight == 0).sum()) for name in masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", default="0.6,0.7,0.8")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text-only", action="store_true", help="learn the text's tokens, not the dense model's")
    parser.add_argument("--out", type=Path, help="a file of rows; those of these sparsities are replaced")
    options = parser.parse_args()
    settings = recovery.Settings(options.rank, None, options.learning_rate, options.steps, options.batch)
    tokenizer, stats = data.load_tokenizer(MODEL), alphaprune.analyze(MODEL)
    text = training_text(tokenizer)
    held_out = spread(encode(tokenizer, "held-out"), EVALUATED)
    texts = {
        "train": evaluate.windows_of(text, LENGTH),
        "calibration": data.sample_windows(encode(tokenizer, "calibration"), CALIBRATED, LENGTH, seed=0),
        "held-out": held_out,
    }
    common = {"model": "demo", "machine": timing.machine(), "threads": torch.get_num_threads(), "method": METHOD}
    common |= {"refit": True, "allocator": ALLOCATOR, **asdict(settings), "length": LENGTH, "dtype": "float32"}
    common |= {"distil": not options.text_only}
    common |= {"data_sha256": held_out.sha256, "windows": held_out.tokens.numel() // LENGTH}
    common["dense"] = loss(hf.load(MODEL), held_out)
    made = []
    for sparsity in (float(s) for s in options.sparsity.split(",")):
        found = row(sparsity, stats, texts, settings, not options.text_only)
        lost = found["pruned"] - common["dense"]
        found["won_back"] = (found["pruned"] - found["recovered"]) / lost
        made.append(common | found)
        print(json.dumps(made[-1]), flush=True)
        if options.out:
            replace(options.out, made[-1:], "sparsity")


if __name__ == "__main__":
    main()
