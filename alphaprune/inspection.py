"""What is in a checkpoint, and what runs on this machine: the answers of `alphaprune info`."""

import itertools
import platform
from pathlib import Path
from typing import Any

import torch

from alphaprune import __version__, affinity, formats, hardware, timing
from alphaprune import model as models
from alphaprune.console import size
from alphaprune.experts import named_shards
from alphaprune.formats import PACKED_SUFFIXES, Packed
from alphaprune.head import name_of
from alphaprune.kernels import base, cuda, predicted, spmm, table
from alphaprune.kernels.table import DENSE
from alphaprune.layer import check_activations
from alphaprune.shards import Shards
from alphaprune.stored import Stored
from alphaprune.tuning import general, kinds_cell, percent

NO_KERNEL = "torch"  # a dense layer runs as it always did
TYPICAL = ((4096, 4096), (11008, 4096), (4096, 11008))
COLUMNS = ["layer", "shape", "stored as", "sparsity", "bytes", "seconds", "dense seconds", "kernel", "why"]


def describe_model(
    model: "str | Path", tokens: int = 1, device: str = "cpu", activations: str | None = None
) -> dict[str, Any]:
    """Per prunable layer: shape, how it is stored, sparsity, bytes, kernel for so many tokens and why; and totals.

    head: the same of the output layer, which is in no total; None where it is the matrix of embeddings.
    seconds: of one call with the kernel, dense_seconds: of the dense layer, as the time table predicts them; None
    without one. device: that the layers are to run on. activations: "int8" where kernels may round x beside int8
    values, as `round_activations` allows it.

    Raises ValueError in one sentence if the folder holds no usable model, its tensors disagree with each other or with
    config.json, there is no such device here, or x may be rounded and there are no int8 values.
    """
    from alphaprune import hf

    where = str(timing.clock(device).device)
    folder = models.resolve(model)
    config = models.read_config(folder)
    hf.check_config(config)
    family = models.find_family(config, str(folder))
    prefix, shards = family.blocks, named_shards(folder, family)
    names = set(shards.names())
    plain = getattr(config, "dtype", None) or torch.float32  # of int8 layers when they were dense
    skeleton = models.make_skeleton(config)
    stored = Stored(shards, skeleton, plain)
    models.check_shapes(stored, skeleton, prefix, str(folder))
    linears = models.prunable(skeleton, prefix)
    whole = name_of(skeleton)
    check_activations(activations, any(f"{name}.{PACKED_SUFFIXES[3]}" in names for name in (*linears, whole)))

    def describe(name: str, linear: torch.nn.Linear) -> dict[str, Any]:
        if f"{name}.weight_mask" in names:
            return _packed_layer(name, shards, linear, plain, tokens, where, activations)
        return _dense_layer(name, shards, tokens, where)

    layers = [describe(name, linear) for name, linear in linears.items()]
    own = whole is not None and f"{whole}.weight" in names
    above = describe(whole, skeleton.get_submodule(whole)) if own else None
    inside = sum(row["weights"] for row in layers)
    everything = sum(torch.Size(stored.shape(name)).numel() for name in stored.names())
    zeros = sum(row["zeros"] for row in layers)
    return {
        "model": str(folder),
        "model_type": config.model_type,
        "tokens": tokens,
        "device": where,
        "activations": activations,
        "times": _source(where),
        "layers": layers,
        "head": above,
        "prunable_weights": inside,
        "sparsity": zeros / inside,
        "whole_model_sparsity": zeros / everything,
        "linears_bytes": sum(row["bytes"] for row in layers),
        "linears_dense_bytes": sum(row["dense_bytes"] for row in layers),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def _packed_layer(
    layer: str,
    shards: Shards,
    linear: torch.nn.Linear,
    plain: torch.dtype,
    tokens: int,
    device: str,
    activations: str | None,
) -> dict[str, Any]:
    values, mask, offsets = (shards.tensor(f"{layer}.{suffix}") for suffix in PACKED_SUFFIXES[:3])
    scale = shards.tensor(f"{layer}.{PACKED_SUFFIXES[3]}") if values.dtype == torch.int8 else None
    n, k = linear.out_features, linear.in_features
    packed = Packed(values, mask, offsets, (n, k), scale, activations and getattr(torch, activations))
    dense = values.dtype if scale is None else plain
    sbt = formats.get("sbt")
    prepared = spmm.prepare(packed, layer)
    x = prepared.seen(dense) if device == "cpu" else dense  # GPUs round none
    asked = (n, k), tokens, values.dtype, x, device, packed.density, prepared.fits
    kernel, passed = base.choose(*asked)
    seconds = base.gain(*asked)
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


def _dense_layer(layer: str, shards: Shards, tokens: int, device: str) -> dict[str, Any]:
    weight = shards.tensor(f"{layer}.weight")
    times = table.current(device)
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


def _source(device: str) -> str:
    """What kernels are chosen by on a device: the file of a measured table, or the built-in default."""
    times = table.current(device)
    if times is None:
        option = "" if device == "cpu" else f" --device {device}"
        return f"built-in default (predicted, not measured); `alphaprune bench --tune{option}` measures them"
    off = predicted.verdict(times)
    measured = f"{times.path} (measured on {times.place}, alphaprune {times.versions.get('alphaprune')})"
    return measured if off is None else f"{measured}; {off}"


def devices() -> dict[str, str]:
    """The CPU and each GPU that this process sees, by what torch calls them, with their names."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": timing.machine()} | {f"cuda:{index}": str(table.Gpu.at(index)) for index in range(count)}


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
    asked, head = found.get("activations"), found.get("head")  # files of earlier releases have none
    beside = f", {head['name']} {head['stored']} {head['bytes']:,} of {head['dense_bytes']:,} bytes" if head else ""
    rounded = f", x in {asked} where kernels can" if asked else ""
    return (
        f"{found['model']}: {found['model_type']}, {found['prunable_weights']:,} prunable weights, "
        f"sparsity {found['sparsity']:.4f} ({found['whole_model_sparsity']:.4f} of the whole model), "
        f"linears {found['linears_bytes']:,} of {found['linears_dense_bytes']:,} bytes{beside}, "
        f"files {found['file_bytes']:,} bytes\n"
        f"{found['tokens']} tokens on {found['device']}{rounded}{predicted}; times: {found['times']}"
    )


def describe_machine(bandwidth: bool = False) -> dict[str, Any]:
    """Which kernels work here and why the others do not; processor, memory, GPUs, threads and versions.

    times: per device what kernels are chosen by (see _source). predicted: what int8 gains on each GPU.
    bandwidth: whether to measure the bytes/s that memory is read with, which takes some seconds and 2 GiB; otherwise
    those of the time table, None without one.
    """
    import transformers

    found = devices()
    gpus = [name for device, name in found.items() if device != "cpu"]
    return {
        "alphaprune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": timing.machine(),
        "hardware": hardware.describe(),
        "usable_cpus": len(affinity.cpus()),
        "threads": torch.get_num_threads(),
        "openmp": hardware.openmp(),
        "bandwidth": timing.read_bandwidth() if bandwidth else getattr(table.current("cpu"), "bandwidth", None),
        "native": spmm.native_status(),
        "kernels": {name: reason or "works" for name, reason in spmm.back_ends()},
        "cuda": f"{'; '.join(gpus) or 'torch sees no GPU'} (compiled kernels: {cuda.missing() or 'work'})",
        "times": {device: _source(device) for device in found},
        "predicted": {device: text for device in found if (text := _of_int8(device))},
        "break_even": {key: known for device in found for key, known in _break_even(device).items()},
    }


def _of_int8(device: str) -> str | None:
    return None if device == "cpu" else predicted.of_int8(table.Gpu.at(torch.device(device).index))


def _break_even(device: str) -> dict[str, dict[str, float]]:
    """By values and shape, by tokens: the sparsity from which on packed is faster than dense.

    Measured, where there is a table; of a GPU that the model knows what it predicts besides.
    """
    times, where = table.current(device), "" if device == "cpu" else f"{device} "
    found = {} if times is None else _break_even_of(times, where)
    if device == "cpu":
        return found
    gpu = table.Gpu.at(torch.device(device).index)
    guessed = predicted.table_of(gpu, [name for name in predicted.MOST if name != "nm_mma_sp"])
    return found if guessed is None else found | _break_even_of(guessed, f"predicted, {where}")


def _break_even_of(times: table.Table, where: str) -> dict[str, dict[str, float]]:
    names, found, pairs = general(times.kernels), {}, {}
    for c in times.curves:
        if c.kernel != DENSE:
            pairs.setdefault(kinds_cell(c.weight, c.x), (getattr(torch, c.weight), getattr(torch, c.x)))
    for (what, kinds), shape in itertools.product(pairs.items(), TYPICAL):
        known = {str(t): times.break_even(shape, t, *kinds, names) for t in times.tokens}
        found[f"{where}{what} {shape[0]}×{shape[1]}"] = {t: value for t, value in known.items() if value is not None}
    return found


def machine_rows(found: dict[str, Any]) -> list[list[str]]:
    """Two columns; of the break-even sparsities one line per shape."""
    made = {"hardware", "usable_cpus", "threads", "openmp", "bandwidth"}
    rows = [[key, str(value)] for key, value in found.items() if not isinstance(value, dict) and key not in made]
    rows[5:5] = _hardware_rows(found)
    rows += [[f"kernel {name}", state] for name, state in found["kernels"].items()]
    rows += [[f"times {device}", source] for device, source in found["times"].items()]
    rows += [[f"predicted {device}", text] for device, text in found["predicted"].items()]
    for what, known in found["break_even"].items():
        text = ", ".join(f"{t}: {percent(value)}" for t, value in known.items())
        rows.append([f"break-even {what}", f"sparsity by tokens: {text}"])
    return rows


def _hardware_rows(found: dict[str, Any]) -> list[list[str]]:
    known = {name: "?" if value is None else value for name, value in found["hardware"].items()}
    cores = "sockets {sockets}, cores {cores}, threads per core {threads_per_core}, CPUs {cpus}".format(**known)
    nodes = "; ".join(f"{node}: CPUs {cpus}" for node, cpus in known["numa_nodes"].items())
    levels = [
        f"{cache['count']} × L{cache['level']} {cache['type']} {cache['bytes'] >> 10:,} KiB for CPUs: {cache['cpus']}"
        for cache in known["caches"]
    ]
    memory = [size(known[name]) if known[name] != "?" else "?" for name in ("memory", "memory_available")]
    limit = "" if known["memory_limit"] == "?" else f"; a container may use {size(known['memory_limit'])}"
    speed = "`alphaprune info --bandwidth` measures it"
    if found["bandwidth"]:
        speed = f"{found['bandwidth'] / 1e9:.1f} GB/s"
    libraries = found["openmp"]
    pools = "" if len(libraries) < 2 else ": several pools of threads get in each other's way; load one library only"
    return [
        ["instruction sets", " ".join(known["instruction_sets"]) or "?"],
        ["cores", f"{cores}, of which this process may use {found['usable_cpus']}"],
        ["NUMA nodes", nodes or "?"],
        ["caches", "; ".join(levels) or "?"],
        ["memory", f"{memory[0]}, {memory[1]} available{limit}"],
        ["memory is read at", speed],
        ["threads", f"{found['threads']}{_advice(found)}"],
        ["OpenMP", (", ".join(libraries) or "?") + pools],
    ]


def _advice(found: dict[str, Any]) -> str:
    """What is wrong with the number of threads; empty if nothing is."""
    threads, usable, known = found["threads"], found["usable_cpus"], found["hardware"]
    granted = known["cpu_limit"]
    if granted and threads > max(granted, 1):
        return f": the container grants the time of {granted:g} CPUs; set OMP_NUM_THREADS={max(int(granted), 1)}"
    if threads > usable:
        return f": more than the CPUs of this process; set OMP_NUM_THREADS={usable}"
    if known["cores"] and threads > known["cores"]:
        return f": more than there are cores; OMP_NUM_THREADS={known['cores']} is usually faster"
    return ""
