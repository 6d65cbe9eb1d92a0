"""How good the embedded model is: held-out bits per byte beside `xz -9`, and its alphas beside their initialisation.

Every byte but the first token's is scored: windows of 512 tokens advance by 256, each scoring its second half. xz gets
exactly the scored bytes, once alone, and once as size(train + held-out) − size(train), with a dictionary that
holds all of it. `python bench/demo_model.py [--json] [--out FILE]`
"""

import argparse
import json
import lzma
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from alphaprune import analysis, data, hf
from alphaprune.demo import corpus
from alphaprune.demo.run import LENGTH, MODEL, alpha_of_blocks
from alphaprune.demo.train import initial_model
from alphaprune.files import atomic_write_text


def sliding_loss(model: nn.Module, tokens: Tensor) -> float:
    """Nats of all tokens but the first; each is predicted from at least LENGTH/2 tokens, or from all before it."""
    step, total = LENGTH // 2, 0.0
    starts = range(0, max(1, tokens.numel() - step), step)
    with torch.inference_mode():
        for first in tqdm(starts, desc="held-out", unit="window", leave=False, disable=None):
            window = tokens[first : first + LENGTH]
            scored = window.numel() - 1 if first == 0 else window.numel() - step
            logits = model(input_ids=window[None], use_cache=False).logits[0, -scored - 1 : -1].float()
            total += nn.functional.cross_entropy(logits, window[-scored:], reduction="sum").item()
    return total


def xz_size(text: bytes) -> int:
    """Bytes of `xz -9` with a dictionary large enough for the whole text."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(1 << 26, 1 << (len(text) - 1).bit_length())}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))


def mean_alphas(model) -> list[float]:
    return [block["mean"] for block in alpha_of_blocks(analysis.analyze(model))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--model", type=Path, default=MODEL)
    options = parser.parse_args()

    held_out, train = corpus.load("held-out"), corpus.load("train")
    text = data.encode(data.load_tokenizer(options.model), held_out.text, "held-out")
    scored = held_out.text.encode()[int(text.ends[0]) :]
    nats = sliding_loss(hf.load(options.model, dtype="float32"), text.tokens)
    before = train.text.encode()
    result = {
        "python": held_out.python,
        "held_out_sha256": held_out.sha256,
        "train_sha256": train.sha256,
        "bytes": len(scored),
        "tokens": text.tokens.numel() - 1,
        "bits_per_byte": nats / math.log(2) / len(scored),
        "xz_bits_per_byte": 8 * xz_size(scored) / len(scored),
        "xz_after_train_bits_per_byte": 8 * (xz_size(before + scored) - xz_size(before)) / len(scored),
        "alpha_of_blocks": mean_alphas(options.model),
        "alpha_of_blocks_before_training": mean_alphas(initial_model()),
    }
    if options.out:
        atomic_write_text(options.out, json.dumps(result, indent=2) + "\n")
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"Python {result['python']}, held-out {result['bytes']:,} bytes, {result['tokens']:,} tokens")
    print(f"bits per byte: model {result['bits_per_byte']:.4f}, xz -9 {result['xz_bits_per_byte']:.4f}, ", end="")
    print(f"xz -9 that has seen the training text {result['xz_after_train_bits_per_byte']:.4f}")
    for name in ("alpha_of_blocks_before_training", "alpha_of_blocks"):
        print(f"{name}: {', '.join(f'{a:.2f}' for a in result[name])}")


if __name__ == "__main__":
    main()
