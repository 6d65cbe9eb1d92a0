"""What is in a checkpoint, and what runs on this machine: the answers of `alphaprune info`."""

import itertools
import platform
from pathlib import Path
from typing import Any

import torch

from alphaprune import __version__, formats, timing
from alphaprune import model as models
from alphaprune.formats import Packed
from alphaprune.kernels import base, spmm, table
from alphaprune.kernels.table import DENSE
from alphaprune.layer import PACKED_SUFFIXES
from alphaprune.shards import Shards
from alphaprune.tuning import percent

NO_KERNEL = "torch"  # a dense layer runs as it always did
TYPICAL = ((4096, 4096), (11008, 4096), (4096, 11008))
COLUMNS = ["layer", "shape", "stored as", "sparsity", "bytes", "seconds", "dense seconds", "kernel", "why"]


def describe_model(model: "str | Path", tokens: int = 1) -> dict[str, Any]:
    """Per prunable layer: shape, how it is stored, sparsity, bytes, kernel for so many tokens and why; and totals.

    seconds: of one call with the kernel, dense_seconds: of the dense layer, as the time table predicts them; None
    without one.

    Raises ValueError in one sentence if the folder holds no usable model or its packed tensors disagree.
    """
    folder = models.resolve(model)
    config, shards = models.read_config(folder), Shards(folder)
    prefix = models.family_of(config, str(folder))
    names, layers = set(shards.names()), []
    plain = getattr(config, "dtype", None) or torch.float32  # of int8 layers when they were dense
    for name, linear in models.prunable(models.make_skeleton(config), prefix).items():
        packed = f"{name}.weight_mask" in names
        one = _packed_layer(name, shards, linear, plain, tokens) if packed else _dense_layer(name, shards, tokens)
        layers.append(one)
    inside = sum(row["weights"] for row in layers)
    outside = sum(torch.Size(shards.shape(n)).numel() for n in names if not n.startswith(prefix + "."))
    zeros = sum(row["zeros"] for row in layers)
    return {
        "model": str(folder),
        "model_type": config.model_type,
        "tokens": tokens,
        "times": _source(),
        "layers": layers,
        "prunable_weights": inside,
        "sparsity": zeros / inside,
        "whole_model_sparsity": zeros / (inside + outside),
        "linears_bytes": sum(row["bytes"] for row in layers),
        "linears_dense_bytes": sum(row["dense_bytes"] for row in layers),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def _packed_layer(
    layer: str, shards: Shards, linear: torch.nn.Linear, plain: torch.dtype, tokens: int
) -> dict[str, Any]:
    values, mask, offsets = (shards.tensor(f"{layer}.{suffix}") for suffix in PACKED_SUFFIXES[:3])
    scale = shards.tensor(f"{layer}.{PACKED_SUFFIXES[3]}") if values.dtype == torch.int8 else None
    n, k = linear.out_features, linear.in_features
    packed = Packed(values, mask, offsets, (n, k), scale)
    dense = values.dtype if scale is None else plain
    sbt = formats.get("sbt")
    sbt.validate(packed, layer)
    kernel, passed = base.choose((n, k), tokens, values.dtype, dense, density=packed.density)
    seconds = base.gain((n, k), tokens, values.dtype, dense, density=packed.density)
    return {
        "name": layer,
        "shape": [n, k],
        "stored": f"sbt {str(values.dtype).removeprefix('torch.')}",
        "weights": n * k,
        "zeros": n * k - sbt.kept(packed),
        "bytes": packed.nbytes,
        "dense_bytes": n * k * dense.itemsize,
        "kernel": kernel.name,
        "why": passed or "first choice",
        "seconds": seconds and seconds[0],
        "dense_seconds": seconds and seconds[1],
    }


def _dense_layer(layer: str, shards: Shards, tokens: int) -> dict[str, Any]:
    weight = shards.tensor(f"{layer}.weight")
    times = table.current()
    seconds = times and times.dense(tuple(weight.shape), tokens, weight.dtype, weight.dtype)
    return {
        "name": layer,
        "shape": list(weight.shape),
        "stored": f"dense {shards.dtype(f'{layer}.weight')}",
        "weights": weight.numel(),
        "zeros": int((weight == 0).sum()),
        "bytes": weight.nbytes,
        "dense_bytes": weight.nbytes,
        "kernel": NO_KERNEL,
        "why": "stored dense: packed it would not be smaller" if (weight == 0).any() else "no zeros",
        "seconds": seconds,
        "dense_seconds": seconds,
    }


def _source() -> str:
    """Where the predicted times come from."""
    times = table.current()
    if times is None:
        return "none for this machine; `alphaprune bench --tune` measures them"
    return f"{times.path} ({times.threads} threads, alphaprune {times.versions.get('alphaprune')})"


def model_rows(found: dict[str, Any]) -> list[list[str]]:
    """Cells of the table, as COLUMNS has them."""
    return [
        [
            row["name"],
            f"{row['shape'][0]}×{row['shape'][1]}",
            row["stored"],
            f"{row['zeros'] / row['weights']:.4f}",
            f"{row['bytes']:,}",
            _time(row["seconds"]),
            _time(row["dense_seconds"]),
            row["kernel"],
            row["why"],
        ]
        for row in found["layers"]
    ]


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.1e}"


def model_summary(found: dict[str, Any]) -> str:
    """Totals in words, and what the predicted seconds are from."""
    summed = [sum(row[name] or 0 for row in found["layers"]) for name in ("seconds", "dense_seconds")]
    predicted = f", predicted {summed[0]:.1e} s in all, {summed[1]:.1e} s dense" if summed[0] else ""
    return (
        f"{found['model']}: {found['model_type']}, {found['prunable_weights']:,} prunable weights, "
        f"sparsity {found['sparsity']:.4f} ({found['whole_model_sparsity']:.4f} of the whole model), "
        f"linears {found['linears_bytes']:,} of {found['linears_dense_bytes']:,} bytes, "
        f"files {found['file_bytes']:,} bytes\n{found['tokens']} tokens{predicted}; times: {found['times']}"
    )


def describe_machine() -> dict[str, Any]:
    """Which kernels work here and why the others do not; processor, threads and versions."""
    import transformers

    return {
        "alphaprune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": timing.machine(),
        "threads": torch.get_num_threads(),
        "native": spmm.native_status(),
        "kernels": {name: reason or "works" for name, reason in spmm.back_ends()},
        "times": _source(),
        "break_even": _break_even(),
        "cuda": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "no CUDA device; this version has CPU kernels",
    }


def _break_even() -> dict[str, dict[str, float]]:
    """By values and shape, by tokens: the sparsity from which on packed is faster than dense; empty without a table."""
    times, found = table.current(), {}
    if times is None:
        return {}
    for values, shape in itertools.product(dict.fromkeys(c.weight for c in times.curves if c.kernel != DENSE), TYPICAL):
        x = next(c.x for c in times.curves if c.weight == values)
        kinds = getattr(torch, values), getattr(torch, x)
        known = {str(t): times.break_even(shape, t, *kinds) for t in times.tokens}
        found[f"{values} {shape[0]}×{shape[1]}"] = {t: value for t, value in known.items() if value is not None}
    return found


def machine_rows(found: dict[str, Any]) -> list[list[str]]:
    """Two columns; of the break-even sparsities one line per shape."""
    rows = [[key, str(value)] for key, value in found.items() if not isinstance(value, dict)]
    rows += [[f"kernel {name}", state] for name, state in found["kernels"].items()]
    for what, known in found["break_even"].items():
        text = ", ".join(f"{t}: {percent(value)}" for t, value in known.items())
        rows.append([f"break-even {what}", f"sparsity by tokens: {text}"])
    return rows
