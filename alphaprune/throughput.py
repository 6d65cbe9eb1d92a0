"""How long loaded models take to read a prompt and to write tokens, by turns, and each of their layers."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from alphaprune import formats, timing
from alphaprune.decoder import Decoder, why_not
from alphaprune.families import text_config
from alphaprune.generate import in_graphs
from alphaprune.graphs import Steps
from alphaprune.layer import SparseLinear
from alphaprune.ragged import Ragged

PERCENTILES = (50, 90, 99)
DENSE_KERNEL = "torch"
Bar = Callable[[int, str, str], AbstractContextManager[Callable[[str], None]]]
Turn = Callable[[], tuple[float, list[float]]]  # → seconds of the prompt, and of every step after it


@dataclass(frozen=True)
class Load:
    """What a model is given: `batch` prompts of so many random tokens, and greedy steps after them.

    seconds: of measuring each model, warmup: before it.
    """

    prompt: int
    new: int
    batch: int = 1
    seconds: float = 5.0
    warmup: float = 1.0


def decoders(model: nn.Module) -> list[str]:
    """The decoders that run a model: ours where it knows the family, and transformers'."""
    return ["transformers"] if why_not(model.config, model) else ["alphaprune", "transformers"]


def time_models(models: dict[str, tuple[nn.Module, str]], load: Load, bar: Bar) -> dict[str, dict[str, Any]]:
    """By name what each (model, decoder) does with the load, all by turns, so that noise meets all of them.

    prefill_tokens_per_second, prefill_seconds, prefills; decode_tokens_per_second, step_seconds, steps: totals, and
    percentiles {"p50": …}. bytes_per_step: weights, and keys and values halfway, that a step reads; bytes_per_second.
    """
    turns = {name: _turn(model, decoder, load) for name, (model, decoder) in models.items()}
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in turns}
    with torch.inference_mode():
        started, rounds = time.perf_counter(), 0
        while not rounds or time.perf_counter() - started < load.warmup * len(turns):
            for turn in turns.values():
                turn()
            rounds += 1
        one = (time.perf_counter() - started) / rounds
        rounds = max(2, math.ceil(load.seconds * len(turns) / one))
        with bar(rounds, "decode", "round") as tick:
            for place in range(rounds):
                for name in list(turns)[:: 1 if place % 2 else -1]:
                    found[name].append(turns[name]())
                tick("")
    return {name: _summary(rows, models[name][0], load) for name, rows in found.items()}


def _summary(rows: list[tuple[float, list[float]]], model: nn.Module, load: Load) -> dict[str, Any]:
    prefills, steps = [row[0] for row in rows], list(itertools.chain.from_iterable(row[1] for row in rows))
    nbytes = weight_bytes(model) + cache_bytes(model, load)
    return {
        "prefill_tokens_per_second": load.batch * load.prompt * len(prefills) / sum(prefills),
        "prefill_seconds": percentiles(prefills),
        "prefills": len(prefills),
        "decode_tokens_per_second": load.batch * len(steps) / sum(steps),
        "step_seconds": percentiles(steps),
        "steps": len(steps),
        "bytes_per_step": nbytes,
        "bytes_per_second": nbytes / percentiles(steps)["p50"],
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """{"p50": …, "p90": …, "p99": …}, interpolated between measurements."""
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(seconds, PERCENTILES), strict=True)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that every step reads: all but tables of which it takes single rows."""
    found = 0
    for module in model.modules():
        if isinstance(module, SparseLinear):
            found += module.packed.nbytes
        elif not isinstance(module, nn.Embedding):
            found += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return found


def cache_bytes(model: nn.Module, load: Load) -> int:
    """Bytes of keys and values that a step halfway reads; 0 for models whose caches our decoder does not know."""
    if why_not(model.config, model):
        return 0
    decoder = Decoder(model)
    position = 2 * len(decoder.blocks) * decoder.key_heads * decoder.head_dim * decoder.dtype.itemsize
    return position * load.batch * (load.prompt + (load.new + 1) // 2)


def _turn(model: nn.Module, decoder: str, load: Load) -> Turn:
    generator, vocabulary = torch.Generator().manual_seed(0), text_config(model.config).vocab_size
    tokens = torch.randint(0, vocabulary, (load.batch, load.prompt), generator=generator).to(model.device)
    return (_ours if decoder == "alphaprune" else _theirs)(model, tokens, load)


def _ours(model: nn.Module, tokens: Tensor, load: Load) -> Turn:
    decoder = Decoder(model)
    if in_graphs(decoder, load.prompt + load.new):
        return _in_graphs(decoder, tokens, load)
    state = decoder.state(load.batch, load.prompt + load.new)

    def run() -> tuple[float, list[float]]:
        state.reset()
        times = [time.perf_counter()]
        new = decoder.prefill(state, tokens).argmax(-1)
        for _ in range(load.new):
            new.tolist()  # waits for a GPU
            times.append(time.perf_counter())
            new = decoder.step(state, new).argmax(-1)
        new.tolist()
        return _differences([*times, time.perf_counter()])

    return run


def _in_graphs(decoder: Decoder, tokens: Tensor, load: Load) -> Turn:
    """The same on a GPU, as it generates there; the memory of the batch is taken once."""
    batch = Ragged(decoder, load.batch, load.prompt + load.new)
    steps, slots = Steps(batch, buckets=(load.batch,)), [batch.open() for _ in range(load.batch)]
    parts = list(zip(slots, tokens.tolist(), strict=True))

    def run() -> tuple[float, list[float]]:
        for slot in slots:
            batch.trim(slot, 0)
        times = [time.perf_counter()]
        new = batch.prefill(parts).argmax(-1)
        for slot, token in zip(slots, new, strict=True):
            batch.begin(slot, token)
        for _ in range(load.new):
            new.tolist()  # waits for the GPU
            times.append(time.perf_counter())
            new, _ = steps(slots)
        new.tolist()
        return _differences([*times, time.perf_counter()])

    return run


class _Clock(StoppingCriteria):
    """Takes the time of each token of a batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        input_ids[:, -1].tolist()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _theirs(model: nn.Module, tokens: Tensor, load: Load) -> Turn:
    lengths = {"min_new_tokens": load.new + 1, "max_new_tokens": load.new + 1}  # the first comes with the prompt
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)} | lengths

    def run() -> tuple[float, list[float]]:
        clock, started = _Clock(), time.perf_counter()
        model.generate(tokens, stopping_criteria=StoppingCriteriaList([clock]), **settings)
        return _differences([started, *clock.times])

    return run


def _differences(times: list[float]) -> tuple[float, list[float]]:
    first, *steps = (after - before for before, after in itertools.pairwise(times))
    return first, steps


def time_layers(
    model: nn.Module, dense: nn.Module | None, load: Load, step_seconds: float, bar: Bar
) -> list[dict[str, Any]]:
    """A row per layer of a step: name, shape, stored, activations, sparsity, kernel, nbytes, seconds, share,
    dense_seconds, ratio.

    Medians of calls with random x [batch, K], one layer after the other as in a step, so that each finds its weight
    where a step would; dense layers by turns with them. share: of `step_seconds`, of a whole step; the last row is its
    rest (attention, norms, choice). Where layers share x, the decoder calls them together, which is somewhat faster.
    dense: the dense twin, None where it does not fit into memory.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, SparseLinear | nn.Linear)]
    clock, dtype = timing.clock(str(model.device)), model.get_input_embeddings().weight.dtype
    calls = {("wake", ""): [_call(model.get_submodule(names[0]), load.batch, dtype)]}  # threads sleep between rounds
    calls |= {("", name): [_call(model.get_submodule(name), load.batch, dtype)] for name in names}
    if dense is not None:
        calls |= {("dense", name): [_call(dense.get_submodule(name), load.batch, dtype)] for name in names}
    with torch.inference_mode():
        rounds = clock.rounds(calls)
        next(rounds)  # binds kernels
        count = max(3, math.ceil(load.seconds / max(sum(next(rounds).values()), 1e-6)))
        found = list(_ticked(rounds, min(count, 1000), bar))
    rows = []
    for name in names:
        seconds = float(np.median([one["", name] for one in found]))
        row = _describe(name, model.get_submodule(name), load.batch, dtype) | {"seconds": seconds}
        row |= {"share": seconds / step_seconds, "dense_seconds": None, "ratio": None}
        if dense is not None:
            row["dense_seconds"] = float(np.median([one["dense", name] for one in found]))
            row["ratio"] = row["dense_seconds"] / seconds
        rows.append(row)
    rest = step_seconds - sum(row["seconds"] for row in rows)
    return [*rows, {"name": "rest of the step", "seconds": rest, "share": rest / step_seconds}]


def _ticked(rounds: Iterator[Any], count: int, bar: Bar) -> Iterator[Any]:
    with bar(count, "layers", "round") as tick:
        for found in itertools.islice(rounds, count):
            yield found
            tick("")


def _call(module: nn.Module, batch: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(module.in_features)
    x = torch.randn(batch, module.in_features, generator=generator).to(module.weight.device, dtype)
    if isinstance(module, SparseLinear):
        return functools.partial(module.prepared().run, x, module.bias)
    return functools.partial(functional.linear, x, module.weight, module.bias)


def _describe(name: str, module: nn.Module, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    shape, weights = [module.out_features, module.in_features], module.out_features * module.in_features
    if isinstance(module, SparseLinear):
        kernel, nbytes = module.prepared().choice(batch, dtype)[0].name, module.packed.nbytes
        stored, kept = str(module.packed.dtype), formats.get("sbt").kept(module.packed)
    else:
        kernel, nbytes, stored = DENSE_KERNEL, module.weight.nbytes, str(module.weight.dtype)
        kept = int(module.weight.count_nonzero())
    stored = f"{'sbt' if isinstance(module, SparseLinear) else 'dense'} {stored.removeprefix('torch.')}"
    sparsity = {"sparsity": 1 - kept / weights, "kernel": kernel, "nbytes": nbytes}
    allowed = isinstance(module, SparseLinear) and module.packed.bytes_allowed
    return {"name": name, "shape": shape, "stored": stored, "activations": "int8" if allowed else None} | sparsity
