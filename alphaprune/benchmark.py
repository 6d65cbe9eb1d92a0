"""`alphaprune bench`: linear layers by shape, or the layers and the decoding of a model, dense always beside."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alphaprune import decoding, formats, hf, throughput, timing
from alphaprune import model as models
from alphaprune.families import text_config
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
GENERATION = [
    *("weights", "decoder", "prefill tokens/s", "p50", "p90", "p99"),
    *("tokens/s", "step p50", "p90", "p99", "MB per step", "GB/s"),
]
LAYERS = ["layer", "shape", "stored as", "sparsity", "kernel", "seconds", "of the step", "dense seconds", "speed-up"]
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
    activations: str | None = None,
) -> dict[str, Any]:
    """Rows for every shape × tokens × sparsity with random weights read from memory (see timing.time_linear).

    bar: (total, description, unit) → context that yields what to call after each step. values: int8, or as `dtype`.
    decode: time whole models in the shapes of `shape` afterwards, on the CPU. device: "cpu", "cuda" or "cuda:N".
    activations: int8 beside int8 values, where kernels can.

    ValueError if an argument is no list of what it should be, or kernel or device cannot run here.
    """
    kinds = values and torch.int8, activations and torch.int8
    timing.check_activations(*kinds)
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
        base.on(kernel, clock.device)  # what will not do is told before the memory is measured
    bandwidth, kind, rows = clock.bandwidth(), getattr(torch, dtype), []
    with bar(len(problems), "bench", "row") as tick:
        for one, count, share in problems:
            found = timing.time_linear(
                *(one, share, count, kind, kernel),
                **{"bandwidth": bandwidth, "pattern": chosen, "device": device},
                **{"values": kinds[0], "activations": kinds[1]},
            )
            rows.append(asdict(found) | {name: getattr(found, name) for name in DERIVED})
            tick("×".join(map(str, one)))
    found = {"machine": str(clock.machine), "threads": clock.threads, "bandwidth": bandwidth, "rows": rows}
    if decode:
        found["decoding"] = decoding.time_models(shape, sparsities, kind, kinds[0], bar, kinds[1])
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
    prompt: int | None = None,
    new: int | None = None,
    batch: int = 1,
    seconds: float = 5.0,
    warmup: float = 1.0,
    per_layer: bool = False,
    activations: str | None = None,
) -> dict[str, Any]:
    """Reading prompts and writing tokens with a packed model beside its dense twin, see throughput.time_models.

    generation: rows of weights and decoder; where the twin does not fit into memory, `skipped` says so. Then rows for
    the shapes of its layers at the model's own sparsity (where nothing is packed, at those asked for), or, per_layer,
    `layers`, a row for each. device: as above. activations: int8 beside the model's int8 values, and those of the rows.

    ValueError if prompt and new tokens do not fit into the context, or the model has no int8 values for activations.
    """
    folder, where = models.resolve(model), timing.clock(device).device
    if kernel is not None:
        base.on(kernel, where)
    loaded = hf.load(folder, device=str(where), tokens=batch, activations=activations)
    load = _load(loaded, prompt, new, batch, seconds, warmup)
    packed = {n: m for n, m in loaded.named_modules() if isinstance(m, SparseLinear)}
    prefix = models.family_of(loaded.config, str(folder))
    shapes = {(m.out_features, m.in_features) for n, m in loaded.named_modules() if n.startswith(prefix) and _linear(m)}
    dense, skipped = _dense_twin(loaded, folder, str(where)) if packed else (loaded, None)
    competitors = {}
    if packed:
        competitors["packed", throughput.decoders(loaded)[0]] = loaded
    if dense is not None:
        competitors |= {("dense", decoder): dense for decoder in throughput.decoders(dense)}
    found = throughput.time_models({key: (one, key[1]) for key, one in competitors.items()}, load, bar)
    result: dict[str, Any] = {"model": str(Path(folder)), "packed_layers": len(packed), "load": asdict(load)}
    allowed = {"packed": activations}
    result["generation"] = [
        {"weights": key[0], "activations": allowed.get(key[0]), "decoder": key[1]} | row for key, row in found.items()
    ]
    if skipped:
        result["generation"].append({"weights": "dense", "decoder": "", "skipped": skipped})
    if per_layer:
        step = next(iter(found.values()))["step_seconds"]["p50"]
        result["layers"] = throughput.time_layers(loaded, dense if packed else None, load, step, bar)
        clock = timing.clock(device)
        return result | {"machine": str(clock.machine), "threads": clock.threads}
    if packed:
        kept = sum(formats.get("sbt").kept(m.packed) for m in packed.values())
        sparsity = f"{1 - kept / sum(m.out_features * m.in_features for m in packed.values()):.4f}"
    del loaded, dense, competitors  # the rows below need the memory
    named = ",".join(f"{n}x{k}" for n, k in sorted(shapes))
    given = named, sparsity, pattern, tokens, dtype, kernel, bar, values or activations
    return result | bench_shapes(*given, device=device, activations=activations)


def _load(
    model: torch.nn.Module, prompt: int | None, new: int | None, batch: int, seconds: float, warmup: float
) -> throughput.Load:
    """What is asked for; by default a prompt of 128 tokens and 32 new ones, fewer where the context is short."""
    context = getattr(text_config(model.config), "max_position_embeddings", None) or 1 << 30
    new = new or min(32, context // 4)
    prompt = prompt or min(128, context // 2)
    if prompt + new > context:
        raise ValueError(
            f"--prompt {prompt} and --new {new} do not fit into {context} positions of this model; give smaller numbers"
        )
    return throughput.Load(prompt, new, batch, seconds, warmup)


def _dense_twin(model: torch.nn.Module, folder: Any, device: str) -> tuple[torch.nn.Module | None, str | None]:
    """The same model with dense layers, or None and why there is none."""
    plain = model.get_input_embeddings().weight.dtype.itemsize
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    needed, free = plain * sum(m.out_features * m.in_features for m in layers), decoding.memory()
    if free is not None and device == "cpu" and needed > free:
        return None, f"dense it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return hf.load(folder, device=device, tokens=None).dequantize(), None


def _linear(module: torch.nn.Module) -> bool:
    return isinstance(module, SparseLinear | torch.nn.Linear)


def tables(result: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Heading, columns and cells of what `bench` prints."""
    if "model" in result:
        load = result["load"]
        heading = (
            f"{result['model']}: {load['prompt']} prompt tokens, {load['new']} greedy steps, batch {load['batch']}"
        )
        yield heading, GENERATION, [_generation_cells(row) for row in result["generation"]]
    if "layers" in result:
        yield f"{result['machine']}; medians of one call", LAYERS, [_layer_cells(row) for row in result["layers"]]
        return
    does = f"{result['threads']} threads, reads" if result["threads"] else "copies"
    heading = f"{result['machine']}, {does} {result['bandwidth'] / 1e9:.1f} GB/s; medians"
    rows = [
        [
            f"{row['shape'][0]}×{row['shape'][1]}",
            str(row["tokens"]),
            f"{row['sparsity']:.2f}",
            values_cell(row),
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


def values_cell(row: dict[str, Any]) -> str:
    """What a row was measured with: dtype of the values, and of x where kernels might round it."""
    return row["values"] + _beside(row)


def _beside(row: dict[str, Any]) -> str:
    return f", x in {row['activations']}" if row.get("activations") else ""


def _generation_cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [row["weights"], row["skipped"], *[""] * (len(GENERATION) - 2)]
    latencies = (f"{row[name][p]:.2e}" for name in ("prefill_seconds", "step_seconds") for p in ("p50", "p90", "p99"))
    prefill = [f"{row['prefill_tokens_per_second']:.1f}", *itertools.islice(latencies, 3)]
    decode = [f"{row['decode_tokens_per_second']:.1f}", *latencies]
    read = [f"{row['bytes_per_step'] / 1e6:.1f}", f"{row['bytes_per_second'] / 1e9:.1f}"]
    return [row["weights"] + _beside(row), row["decoder"], *prefill, *decode, *read]


def _layer_cells(row: dict[str, Any]) -> list[str]:
    times = [f"{row['seconds']:.2e}", f"{row['share']:.1%}"]
    if "shape" not in row:
        return [row["name"], "", "", "", "", *times, "", ""]
    shape = f"{row['shape'][0]}×{row['shape'][1]}"
    dense = ["", ""] if row["ratio"] is None else [f"{row['dense_seconds']:.2e}", f"{row['ratio']:.2f}×"]
    return [row["name"], shape, row["stored"] + _beside(row), f"{row['sparsity']:.2f}", row["kernel"], *times, *dense]


def _decoding_cells(row: dict[str, Any]) -> list[str]:
    weights = "dense" if row["sparsity"] is None else f"packed, {row['sparsity']:.2f}"
    cells = [weights, values_cell(row), row["decoder"]]
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
