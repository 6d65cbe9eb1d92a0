"""Attention of a decode step on a CPU in bfloat16, ours beside torch's, keys and values from memory, by turns.

python bench/attention.py --out bench/results/attention.jsonl

Ours is the whole call: rotation, store of the new key and value, softmax, over a cache with a stretch for each head
(as decoder.py has it) and over pages of 32 positions (as a server has it). torch's is scaled_dot_product_attention
alone, over the first kind of cache, with one row of queries per head or all that share a key head in one product, at
least two, whichever is faster: one row of half precision takes it three times as long as two.
Rows, one JSON object each, seconds and bytes: machine, threads, torch; heads, key_heads, dim, sequences, context;
seconds, paged_seconds, torch_seconds, medians of calls on caches in distinct memory on huge pages; ratio, torch's over
ours; bytes of keys and values; bandwidth of the moment.

python bench/attention.py --prompts 64,128,256,512,1024 --out bench/results/prompt_attention.jsonl

Instead: a prompt of so many new tokens, which see each other and those before; rows of machine, threads, torch, model,
prompt, seconds, torch_seconds, ratio.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import by_turns
import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import pages
from alphaprune.kernels import cpu, cpu_attention

MODELS = {"llama2-7b": (32, 32, 128), "llama3-8b": (32, 8, 128)}  # heads, key heads, dim
PAGE = 32
CPU = torch.device("cpu")


class Case:
    """The caches of one problem, as many as fill `total` bytes, and the calls that go round them."""

    def __init__(self, heads: int, key_heads: int, dim: int, sequences: int, context: int, total: int) -> None:
        self.dim, self.sequences, self.last, self.isa = dim, sequences, context - 1, cpu.best()
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator)
        self.q, self.k = (draw(sequences, count * dim).bfloat16() for count in (heads, key_heads))
        angles = draw(1, dim // 2)
        self.turns = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.positions = torch.full((sequences,), self.last)
        self.slots = torch.arange(sequences)
        room = -(-context // PAGE) * PAGE  # positions of a sequence
        shape = (2, sequences, key_heads, room, dim)
        self.bytes = 2 * sequences * key_heads * context * dim * 2
        first = pages.empty(shape, torch.bfloat16, CPU).copy_(draw(shape))
        count = max(2, total // first.nbytes)
        self.caches = [first, *(pages.empty(shape, torch.bfloat16, CPU).copy_(first) for _ in range(count - 1))]
        self.table = torch.randperm(sequences * room // PAGE, generator=generator).view(sequences, -1)

    def ours(self, cache: Tensor) -> Tensor:
        where = self.slots, self.positions, self.slots[:, None]
        return cpu_attention.attend_new(self.q, self.k, self.k, cache.transpose(2, 3), *where, self.turns, isa=self.isa)

    def paged(self, cache: Tensor) -> Tensor:
        _, _, key_heads, _, dim = cache.shape
        cache = cache.view(2, -1, PAGE, key_heads, dim)  # the same memory in another order
        where = self.slots, self.positions, self.table
        return cpu_attention.attend_new(self.q, self.k, self.k, cache, *where, self.turns, isa=self.isa)

    def torch(self, cache: Tensor, together: bool) -> Tensor:
        keys, values = cache[:, :, :, : self.last + 1]
        heads, shared = self.q.shape[1] // self.dim, self.q.shape[1] // self.k.shape[1]
        if not together:
            q = self.q.view(self.sequences, heads, 1, self.dim)
            return functional.scaled_dot_product_attention(q, keys, values, enable_gqa=shared > 1)
        q = self.q.view(self.sequences, -1, shared, self.dim)
        q = q.expand(-1, -1, 2, -1) if shared == 1 else q
        return functional.scaled_dot_product_attention(q, keys, values)

    def measure(self, rounds: int) -> dict[str, float]:
        """Medians."""
        ways = {
            "seconds": self.ours,
            "paged_seconds": self.paged,
            "one": functools.partial(self.torch, together=False),
            "together": functools.partial(self.torch, together=True),
        }
        calls = {}
        for place, (name, way) in enumerate(ways.items()):  # no two of a round on the same cache
            turned = self.caches[place % len(self.caches) :] + self.caches[: place % len(self.caches)]
            calls[name] = [functools.partial(way, cache) for cache in turned]
        medians = by_turns.medians(calls, rounds)
        medians["torch_seconds"] = min(medians.pop("one"), medians.pop("together"))
        return medians | {"ratio": medians["torch_seconds"] / medians["seconds"]}


def prompts(model: str, counts: list[int], rounds: int) -> list[dict[str, float]]:
    """Ours beside torch's for prompts of these lengths; medians of calls by turns."""
    heads, key_heads, dim = MODELS[model]
    made = []
    for count in counts:
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
        q = draw(1, count, heads, dim).bfloat16().transpose(1, 2)  # as a decoder has it
        k, v = (draw(1, key_heads, count, dim).bfloat16() for _ in range(2))
        how = {"is_causal": True, "enable_gqa": heads > key_heads}
        torchs = functools.partial(functional.scaled_dot_product_attention, q, k, v, **how)
        ours = functools.partial(cpu_attention.attend_prompt, q, k, v, 0)
        medians = by_turns.medians({"seconds": [ours], "torch_seconds": [torchs]}, rounds)
        ratio = medians["torch_seconds"] / medians["seconds"]
        made.append({"model": model, "prompt": count, **medians, "ratio": ratio})
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sequences", default="1,8")
    parser.add_argument("--context", default="32,512,2048")
    parser.add_argument("--prompts", help="lengths of prompts, instead of steps")
    by_turns.options(parser, "keys and values", 0.5)
    options = parser.parse_args(arguments)
    common = by_turns.here()
    if options.prompts:
        counts = list(map(int, options.prompts.split(",")))
        found = (row for name in options.models.split(",") for row in prompts(name, counts, options.rounds))
        by_turns.tell((common | row for row in found), options.out)
        return 0
    by_turns.tell((common | row for row in steps(options)), options.out)
    return 0


def steps(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of decode steps."""
    numbers = [list(map(int, given.split(","))) for given in (options.sequences, options.context)]
    for model, sequences, context in itertools.product(options.models.split(","), *numbers):
        heads, key_heads, dim = MODELS[model]
        case = Case(heads, key_heads, dim, sequences, context, int(options.gigabytes * (1 << 30)))
        what = {"model": model, "heads": heads, "key_heads": key_heads, "dim": dim}
        row = {**what, "sequences": sequences, "context": context, "bytes": case.bytes}
        yield row | case.measure(options.rounds)


if __name__ == "__main__":
    sys.exit(main())
