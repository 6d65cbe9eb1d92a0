"""`alphaprune bench`: linear layers by shape, or the layers and the decoding of a model, dense always beside."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alphaprune import decoding, formats, generate, hf, timing
from alphaprune import model as models
from alphaprune.kernels import base
from alphaprune.layer import SparseLinear
from alphaprune.pattern import NM, parse

DERIVED = ("ratio", "weights_per_second", "bytes_per_second", "of_bandwidth")
Bar = Callable[[int, str, str], AbstractContextManager[Callable[[str], None]]]
COLUMNS = [
    "shape",
    "tokens",
    "sparsity",
    "values",
    "kernel",
    "seconds",
    "dense seconds",
    "speed-up",
    "GB/s",
    "% of memory",
]
DECODING = ["weights", "values", "decoder", "tokens/s", "step seconds", "step / kernels"]


def bench_shapes(
    shape: str,
    sparsity: str,
    pattern: str,
    tokens: str,
    dtype: str,
    kernel: str | None,
    bar: Bar,
    values: str | None = None,
    decode: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Rows for every shape × tokens × sparsity with random weights read from memory (see timing.time_linear).

    bar: (total, description, unit) → context that yields what to call after each step. values: int8, or as `dtype`.
    decode: time whole models in the shapes of `shape` afterwards, on the CPU. device: "cpu", "cuda" or "cuda:N".

    ValueError if an argument is no list of what it should be, or kernel or device cannot run here.
    """
    shapes, chosen, clock = parse_shapes(shape), parse(pattern), timing.clock(device)
    if decode and clock.device.type != "cpu":
        raise ValueError(f"--decode times whole models on the CPU: leave out --device {device}")
    if decode and shape not in decoding.MODELS:
        raise ValueError(f"--decode needs the shapes of a whole model: --shape with {', '.join(decoding.MODELS)}")
    if decode and isinstance(chosen, NM):
        raise ValueError("--decode times unstructured sparsity: leave out --pattern")
    sparsities = [chosen.sparsity] if isinstance(chosen, NM) else parse_sparsities(sparsity)
    counts = parse_numbers(tokens, int, "--tokens")
    if any(count < 1 for count in counts):
        raise ValueError(f"--tokens {tokens}: wanted whole numbers from 1")
    problems = list(itertools.product(shapes, counts, sparsities))
    if kernel is not None:
        base.named(kernel)  # a name or a machine that will not do is told before the memory is measured
    bandwidth, kind, rows = clock.bandwidth(), getattr(torch, dtype), []
    with bar(len(problems), "bench", "row") as tick:
        for one, count, share in problems:
            found = timing.time_linear(
                *(one, share, count, kind, kernel),
                **{"bandwidth": bandwidth, "pattern": chosen, "values": values and torch.int8, "device": device},
            )
            rows.append(asdict(found) | {name: getattr(found, name) for name in DERIVED})
            tick("×".join(map(str, one)))
    found = {"machine": str(clock.machine), "threads": clock.threads, "bandwidth": bandwidth, "rows": rows}
    if decode:
        found["decoding"] = decoding.time_models(shape, sparsities, kind, values and torch.int8, bar)
    return found


def bench_model(
    model: str,
    sparsity: str,
    pattern: str,
    tokens: str,
    dtype: str,
    kernel: str | None,
    bar: Bar,
    values: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Decoding of a packed model beside its dense twin, tokens per second, and rows for the shapes of its layers.

    The layers are timed at the model's own sparsity; where nothing is packed, at those asked for. device: as above.
    """
    folder, where = models.resolve(model), timing.clock(device).device
    loaded = hf.load(folder, device=str(where))
    packed = {n: m for n, m in loaded.named_modules() if isinstance(m, SparseLinear)}
    prefix = models.family_of(loaded.config, str(folder))
    shapes = {(m.out_features, m.in_features) for n, m in loaded.named_modules() if n.startswith(prefix) and _linear(m)}
    result: dict[str, Any] = {"model": str(Path(folder)), "packed_layers": len(packed)}
    if packed:
        kept = sum(formats.get("sbt").kept(m.packed) for m in packed.values())
        sparsity = f"{1 - kept / sum(m.out_features * m.in_features for m in packed.values()):.4f}"
        result["tokens_per_second"] = generate.decode_rate(loaded)
        loaded = loaded.dequantize()
    result["dense_tokens_per_second"] = generate.decode_rate(loaded)
    result["transformers_tokens_per_second"] = generate.decode_rate(loaded, ours=False)
    named = ",".join(f"{n}x{k}" for n, k in sorted(shapes))
    return result | bench_shapes(named, sparsity, pattern, tokens, dtype, kernel, bar, values, device=device)


def _linear(module: torch.nn.Module) -> bool:
    return isinstance(module, SparseLinear | torch.nn.Linear)


def tables(result: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Heading, columns and cells of what `bench` prints."""
    if "model" in result:
        rows = [
            ["dense", "transformers", f"{result['transformers_tokens_per_second']:.1f}"],
            ["dense", generate.OURS, f"{result['dense_tokens_per_second']:.1f}"],
        ]
        if "tokens_per_second" in result:
            packed = f"packed ({result['packed_layers']} layers)"
            rows.append([packed, generate.OURS, f"{result['tokens_per_second']:.1f}"])
        yield f"{result['model']}: greedy decoding, 1 sequence", ["weights", "decoder", "tokens/s"], rows
    does = f"{result['threads']} threads, reads" if result["threads"] else "copies"
    heading = f"{result['machine']}, {does} {result['bandwidth'] / 1e9:.1f} GB/s; medians"
    rows = [
        [
            f"{row['shape'][0]}×{row['shape'][1]}",
            str(row["tokens"]),
            f"{row['sparsity']:.2f}",
            row["values"],
            row["kernel"],
            f"{row['seconds']:.3e}",
            f"{row['dense_seconds']:.3e}",
            f"{row['ratio']:.2f}×",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{row['of_bandwidth']:.0%}",
        ]
        for row in result["rows"]
    ]
    yield heading, COLUMNS, rows
    if "decoding" in result:
        rows = [_decoding_cells(row) for row in result["decoding"]]
        yield "whole models, greedy decoding of 1 sequence", DECODING, rows


def _decoding_cells(row: dict[str, Any]) -> list[str]:
    weights = "dense" if row["sparsity"] is None else f"packed, {row['sparsity']:.2f}"
    cells = [weights, row["values"], row["decoder"]]
    if "skipped" in row:
        return [*cells, "", "", row["skipped"]]
    over = f"{row['step_over_kernels']:.3f}" if "step_over_kernels" in row else ""
    return [*cells, f"{row['tokens_per_second']:.2f}", f"{row['step_seconds']:.3e}", over]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """`11008x4096,4096x4096` or the name of a model → [(N, K), …]."""
    if text in decoding.MODELS:
        return decoding.shapes(text)
    found = []
    for part in text.lower().split(","):
        sizes = part.split("x")
        if len(sizes) != 2 or not all(s.strip().isdigit() and int(s) > 0 for s in sizes):
            raise ValueError(
                f"--shape {text}: wanted NxK[,NxK…] such as 11008x4096, or one of {', '.join(decoding.MODELS)}"
            )
        found.append((int(sizes[0]), int(sizes[1])))
    return found


def parse_sparsities(text: str) -> list[float]:
    values = parse_numbers(text, float, "--sparsity")
    if not all(0 <= value < 1 for value in values):
        raise ValueError(f"--sparsity {text}: wanted numbers in [0, 1)")
    return values


def parse_numbers(text: str, kind: type, option: str) -> list:
    """`1,4,16` → [1, 4, 16]."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} {text}: wanted {'whole numbers' if kind is int else 'numbers'} with commas"
        ) from None
