"""What is in a checkpoint, and what runs on this machine: the answers of `alphaprune info`."""

import platform
from pathlib import Path
from typing import Any

import torch

from alphaprune import __version__, formats, timing
from alphaprune import model as models
from alphaprune.formats import Packed
from alphaprune.kernels import base, spmm
from alphaprune.layer import PACKED_SUFFIXES
from alphaprune.shards import Shards

NO_KERNEL = "torch"  # a dense layer runs as it always did


def describe_model(model: "str | Path") -> dict[str, Any]:
    """Per prunable layer: shape, how it is stored, sparsity, bytes, kernel for one token and why; and totals.

    Raises ValueError in one sentence if the folder holds no usable model or its packed tensors disagree.
    """
    folder = models.resolve(model)
    config, shards = models.read_config(folder), Shards(folder)
    prefix = models.family_of(config, str(folder))
    names, layers = set(shards.names()), []
    for name, linear in models.prunable(models.make_skeleton(config), prefix).items():
        packed = f"{name}.weight_mask" in names
        layers.append(_packed_layer(name, shards, linear) if packed else _dense_layer(name, shards))
    inside = sum(row["weights"] for row in layers)
    outside = sum(torch.Size(shards.shape(n)).numel() for n in names if not n.startswith(prefix + "."))
    zeros = sum(row["zeros"] for row in layers)
    return {
        "model": str(folder),
        "model_type": config.model_type,
        "layers": layers,
        "prunable_weights": inside,
        "sparsity": zeros / inside,
        "whole_model_sparsity": zeros / (inside + outside),
        "linears_bytes": sum(row["bytes"] for row in layers),
        "linears_dense_bytes": sum(row["dense_bytes"] for row in layers),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def _packed_layer(layer: str, shards: Shards, linear: torch.nn.Linear) -> dict[str, Any]:
    values, mask, offsets = (shards.tensor(f"{layer}.{suffix}") for suffix in PACKED_SUFFIXES)
    n, k = linear.out_features, linear.in_features
    packed = Packed(values, mask, offsets, (n, k))
    sbt = formats.get("sbt")
    sbt.validate(packed, layer)
    kernel, passed = base.choose((n, k), 1, values.dtype, values.dtype)
    return {
        "name": layer,
        "shape": [n, k],
        "stored": f"sbt {str(values.dtype).removeprefix('torch.')}",
        "weights": n * k,
        "zeros": n * k - sbt.kept(packed),
        "bytes": packed.nbytes,
        "dense_bytes": n * k * values.element_size(),
        "kernel": kernel.name,
        "why": passed or "first choice",
    }


def _dense_layer(layer: str, shards: Shards) -> dict[str, Any]:
    weight = shards.tensor(f"{layer}.weight")
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
    }


def model_rows(found: dict[str, Any]) -> list[list[str]]:
    """Cells of the table: layer, shape, stored as, sparsity, bytes, kernel, why."""
    return [
        [
            row["name"],
            f"{row['shape'][0]}×{row['shape'][1]}",
            row["stored"],
            f"{row['zeros'] / row['weights']:.4f}",
            f"{row['bytes']:,}",
            row["kernel"],
            row["why"],
        ]
        for row in found["layers"]
    ]


def model_summary(found: dict[str, Any]) -> str:
    return (
        f"{found['model']}: {found['model_type']}, {found['prunable_weights']:,} prunable weights, "
        f"sparsity {found['sparsity']:.4f} ({found['whole_model_sparsity']:.4f} of the whole model), "
        f"linears {found['linears_bytes']:,} of {found['linears_dense_bytes']:,} bytes, "
        f"files {found['file_bytes']:,} bytes"
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
        "cuda": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "no CUDA device; this version has CPU kernels",
    }


def machine_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [[key, str(value)] for key, value in found.items() if key != "kernels"]
    return rows + [[f"kernel {name}", state] for name, state in found["kernels"].items()]
