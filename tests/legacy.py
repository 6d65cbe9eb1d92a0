"""Writes checkpoints in the two layouts of compressed-tensors, from their description and with numpy alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaprune import shards

FORMATS = {False: "sparse-bitmask", True: "sparse-24-bitmask"}


def bits_of(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little"))


def compress(stem: str, weight: Tensor) -> dict[str, Tensor]:
    """sparse-bitmask: what is not 0."""
    mask = (weight != 0).numpy()
    counts = mask.sum(-1, dtype=np.int64)
    return {
        f"{stem}.shape": torch.tensor(weight.shape),
        f"{stem}.compressed": weight[torch.from_numpy(mask)],
        f"{stem}.bitmask": bits_of(mask),
        f"{stem}.row_offsets": torch.from_numpy(np.asarray(np.cumsum(counts, -1 if mask.ndim > 1 else None) - counts)),
    }


def compress_pairs(stem: str, weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """sparse-24-bitmask: two of four by `mask`, zeros among them or not."""
    return {
        f"{stem}.shape": torch.tensor(weight.shape).reshape(-1, 1),
        f"{stem}.compressed": weight[mask].reshape(weight.shape[0], -1),
        f"{stem}.bitmask": bits_of(mask.numpy()),
    }


def settings(pairs: bool) -> dict:
    sparsity = {
        "format": FORMATS[pairs],
        "global_sparsity": 0.5,
        "sparsity_structure": "2:4" if pairs else "unstructured",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    return {"quant_method": "compressed-tensors", "sparsity_config": sparsity, "version": "0.9.4"}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in shards.checkpoint_files(folder) for n, t in load_file(file).items()}


def write(
    dense: Path, out: Path, masks: dict[str, Tensor] | None = None, suffix: str = "", everything: bool = False
) -> Path:
    """`dense` in sparse-bitmask, or with masks, {layer: [N, K] bool}, in sparse-24-bitmask; in several files.

    suffix: "" or ".weight", what stands between a layer and the name of a part. everything: norms, embeddings and head
    too, as early releases did.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in tensors_of(dense).items():
        layer = name.removesuffix(".weight")
        linear = name.endswith("_proj.weight")
        if masks is not None and linear:
            made |= compress_pairs(layer + suffix, tensor, masks[layer])
        elif linear or (everything and name.endswith(".weight")):
            made |= compress(layer + suffix, tensor)
        else:
            made[name] = tensor
    out.mkdir()
    for file in dense.iterdir():
        if file.suffix == ".json" and file.name != shards.INDEX:
            shutil.copyfile(file, out / file.name)
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = settings(masks is not None)
    (out / "config.json").write_text(json.dumps(config))
    save(out, made)
    return out


def save(out: Path, tensors: dict[str, Tensor]) -> None:
    """Two files and their index; the tensors of one layer may be in both."""
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({n: tensors[n].contiguous() for n in inside}, out / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, inside in files.items() for n in inside}}
    (out / shards.INDEX).write_text(json.dumps(index))
