"""What an output layer with int8 values is worth: steps of a pruned model with it and with the one in bfloat16.

python bench/head.py --out bench/results/head.jsonl

Both models are in one process, share their blocks, and step by turns, so that neither has the faster memory. Random
weights; the output layer of each model has memory of its own, on huge pages where the system has them. Rows, one JSON
object each, seconds and bytes: machine, threads, torch, bandwidth of the moment; model, sparsity, values; tokens, the
vocabulary; seconds and dense_seconds, medians of a step of our decoder with the one and the other; ratio, the median of
the quotients within a turn; head_bytes, dense_head_bytes, other_bytes: of the weights that a step reads. Rows of the
embedded model have no times but losses instead: loss and dense_loss, nats per token of held-out text with the one and
the other, dense and pruned as `alphaprune demo` does it.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from math import log
from time import perf_counter
from typing import Any

import by_turns
import torch

from alphaprune import analysis, data, decoding, evaluate, hf, layer, pages, planning, pruning
from alphaprune.decoder import Decoder
from alphaprune.demo import run
from alphaprune.head import name_of, round_head
from alphaprune.model import open_source

PROMPT, WARM = 16, 3


def measure(model: str, sparsity: float, values: str, rounds: int) -> dict[str, Any]:
    made = decoding.random_model(model, sparsity, values=getattr(torch, values))
    whole, inside = made.get_submodule(name_of(made)), made.get_input_embeddings().weight
    sizes = {"dense_head_bytes": whole.weight.nbytes}
    sizes["other_bytes"] = sum(t.nbytes for t in made.state_dict().values()) - inside.nbytes - whole.weight.nbytes
    plain = Decoder(made)
    rounded = Decoder(pages.huge_pages(round_head(made)))
    sizes["head_bytes"] = made.get_submodule(name_of(made)).packed.nbytes
    prompt = torch.randint(0, made.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    ways = [(decoder, decoder.state(1, PROMPT + WARM + rounds + 1)) for decoder in (rounded, plain)]
    new = [decoder.prefill(state, prompt).argmax(-1) for decoder, state in ways]
    pairs = []
    for turn in range(WARM + rounds):
        taken = [0.0, 0.0]
        for way in (0, 1) if turn % 2 else (1, 0):
            decoder, state = ways[way]
            start = perf_counter()
            new[way] = decoder.step(state, new[way]).argmax(-1)
            taken[way] = perf_counter() - start
        pairs.append(taken)
    pairs = pairs[WARM:]
    found = {"seconds": statistics.median(one for one, _ in pairs)}
    found["dense_seconds"] = statistics.median(other for _, other in pairs)
    return found | {"ratio": statistics.median(other / one for one, other in pairs)} | sizes


def judge() -> Iterator[dict[str, Any]]:
    """Losses of the embedded model, dense and pruned."""
    tokenizer, source = data.load_tokenizer(run.MODEL), open_source(run.MODEL)
    text = run.spread(run.encode(tokenizer, "held-out"), run.EVALUATED)
    tokens = data.sample_windows(run.encode(tokenizer, "calibration"), run.CALIBRATED, run.LENGTH, seed=0)
    stats = analysis.analyze(source, fit=None)
    for sparsity in (0.0, 0.7):
        made = hf.load(run.MODEL)
        if sparsity:
            plan = planning.plan(stats, sparsity, allocator="uniform")
            made = layer.sparsify(made, pruning.prune(made, plan, run.METHOD, tokens, refit=True))
        found = {"dense_loss": log(evaluate.evaluate(made, text, run.LENGTH).perplexity)}
        found["loss"] = log(evaluate.evaluate(round_head(made), text, run.LENGTH).perplexity)
        yield {"model": "embedded", "sparsity": sparsity, "values": "bfloat16", **found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", default="llama3.2-1b,llama3-8b", help="names of alphaprune.decoding.MODELS; '' none"
    )
    parser.add_argument("--sparsity", default="0.5,0.7,0.8")
    parser.add_argument("--values", default="bfloat16,int8", help="of the packed weights inside the blocks")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each")
    by_turns.out(parser)
    options = parser.parse_args(arguments)
    by_turns.tell(itertools.chain(times(options), (by_turns.here() | row for row in judge())), options.out)
    return 0


def times(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of steps."""
    for model, values, sparsity in itertools.product(
        filter(None, options.models.split(",")), options.values.split(","), map(float, options.sparsity.split(","))
    ):
        what = {"model": model, "sparsity": sparsity, "values": values}
        what["tokens"] = decoding.config_of(model).vocab_size
        yield by_turns.here() | what | measure(model, sparsity, values, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
