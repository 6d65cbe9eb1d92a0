"""The tensors of a checkpoint as a dense model has them, however they are stored.

A layer is dense, packed by this package, or in one of the two layouts of compressed-tensors that nothing else reads any
more. A mask that the files hold is kept, so a 2:4 layer stays 2:4 where a kept value is 0.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import alphaprune
from alphaprune import bitmask, formats
from alphaprune.files import first_line
from alphaprune.formats import PACKED_SUFFIXES, Packed, quantize, slices
from alphaprune.shards import BY_CODE, DTYPES, Shards

VALUE_TYPES = ("float32", "float16", "bfloat16")
PACKED_CODES = ("F32", "F16", "BF16", "I8")
SETTINGS = ("quantization_config", "compression_config", "sparsity_config")  # by which releases said how weights lie
LOST = ("transform_config", "kv_cache_scheme")  # what compressed-tensors does beside the weights
READ = ("dense", "sparse-bitmask", "sparse_bitmask", "sparse-24-bitmask")
# How the weights of other methods become floating-point ones again, by `quant_method`.
DEQUANTIZE = {
    "bitsandbytes": "load it with transformers and save what model.dequantize() returns",
    "higgs": "load it with transformers and save what model.dequantize() returns",
    "fp8": "load it with transformers' FineGrainedFP8Config(dequantize=True) and save it",
    "mxfp4": "load it with transformers' Mxfp4Config(dequantize=True) and save it",
    "compressed-tensors": "load it with transformers' CompressedTensorsConfig(run_compressed=False) and save it",
}


class Stored:
    """The tensors of a folder as a dense model has them, by name: what `Shards` is for a dense folder."""

    def __init__(self, raw: Shards, skeleton: nn.Module, plain: torch.dtype) -> None:
        """plain: the dtype of int8 layers when they were dense."""
        self.raw, self.plain = raw, plain
        self._names = set(raw.names())
        self.bitmasks = bitmask.find(self._names)
        self.floating = [n for n, p in skeleton.named_parameters() if p.is_floating_point()]
        self.linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
        self.packed = {name: layer for name, layer in self.linears.items() if f"{name}.weight_mask" in self._names}
        for name, layer in self.packed.items():
            check_entries(name, layer, self._entries(name))

    def names(self, packed: bool = False) -> list[str]:
        """Of all tensors; packed: those that packed layers consist of, and not the dense ones."""
        dense = self.bitmasks if packed else (*self.bitmasks, *self.packed)
        parts = {f"{stem}.{part}" for stem in self.bitmasks.values() for part in bitmask.PARTS}
        parts |= {f"{name}.{suffix}" for name in dense if name in self.packed for suffix in PACKED_SUFFIXES}
        plain = [name for name in self.raw.names() if name not in parts]
        return [*plain, *(f"{name}.weight" for name in dense)]

    def layout(self, layer: str) -> str:
        """How the weight of a layer is stored."""
        if layer in self.bitmasks:
            return "sparse-24-bitmask" if bitmask.is_pairs(self.raw, self.bitmasks[layer]) else "sparse-bitmask"
        return "sbt" if layer in self.packed else "dense"

    def packed_layer(self, layer: str) -> Packed | None:
        """A layer as it lies in the files, if it is packed there by this package."""
        return self._packed(layer) if layer in self.packed else None

    def is_rounded(self, layer: str) -> bool:
        """Whether a layer is packed with int8 values."""
        return layer in self.packed and self.raw.dtype(f"{layer}.weight") == "int8"

    def shape(self, name: str) -> tuple[int, ...]:
        layer = name.removesuffix(".weight")
        if layer in self.bitmasks:
            return bitmask.shape_of(self.raw, layer, self.bitmasks[layer])
        if layer in self.packed:
            return self.packed[layer].out_features, self.packed[layer].in_features
        return self.raw.shape(name)

    def tensor(self, name: str, packed: bool = False) -> Tensor:
        """The dense values; of a dense tensor mapped from the file. packed: of `names(packed)`."""
        layer = name.removesuffix(".weight")
        plain = layer not in self.bitmasks and (packed or layer not in self.packed)
        return self.raw.tensor(name) if plain else self.tensor_and_mask(name)[0]

    def tensor_and_mask(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The dense values in memory, and which of them the files keep, bool [N, K], or None where all are there."""
        layer = name.removesuffix(".weight")
        if layer in self.bitmasks:
            found = bitmask.read(self.raw, layer, self.bitmasks[layer])
            return found.dense(), found.mask
        if layer in self.packed:
            packed = self._packed(layer)
            formats.get("sbt").validate(packed, layer)
            return formats.get("sbt").dense(packed, None if packed.scale is None else self.plain)
        return self.raw.loaded(name), None

    def rows(self, name: str, rows: list[int]) -> Tensor:
        """Some rows of a matrix, dense; of a packed one only the tiles that they lie in are read."""
        layer = name.removesuffix(".weight")
        if layer in self.bitmasks:
            return self.tensor(name)[rows]
        if layer not in self.packed:
            return self.raw.rows(name, rows)
        packed, found = self._packed(layer), []
        formats.get("sbt").validate(packed, layer)
        for row in rows:
            part = slices.rows(packed, row, row + 1)
            found.append(formats.get("sbt").dense(part, None if part.scale is None else self.plain)[0][0])
        return torch.stack(found)

    def dtype(self, name: str) -> str:
        """The dtype that `tensor` comes in."""
        layer = name.removesuffix(".weight")
        if layer in self.bitmasks:
            return self.raw.dtype(f"{self.bitmasks[layer]}.compressed")
        return str(self.plain).removeprefix("torch.") if self.is_rounded(layer) else self.raw.dtype(name)

    def check_unchanged(self) -> None:
        self.raw.check_unchanged()

    def stamps(self) -> dict[str, list[int]]:
        return self.raw.stamps()

    def check_floating(self, is_text: Callable[[str], bool]) -> None:
        """ValueError naming the first layer whose dense values are no floating-point numbers that are read here.

        is_text: which tensors are looked at, by name; what multimodal models have beside them is copied as it is.
        """
        for name in self.floating:
            layer = name.removesuffix(".weight")
            if self.layout(layer) == "dense" and name in self._names and is_text(name):
                kind = self.raw.dtype(name)
                if kind not in (*VALUE_TYPES, "float64"):
                    raise ValueError(
                        f"{layer}: its weights are {kind}, quantized by another method; wanted float32, float16 or "
                        f"bfloat16: take the checkpoint from before that, or dequantize it first"
                    )

    def check(self, progress: Callable[[str], None] | None = None) -> None:
        """ValueError naming the first tensor that cannot be written, or the first layer whose tensors disagree.

        Dense values are not read for it.
        """
        for layer in dict.fromkeys((*self.linears, *self.bitmasks)):
            if layer in self.bitmasks:
                bitmask.read(self.raw, layer, self.bitmasks[layer])
            elif layer in self.packed:
                formats.get("sbt").validate(self._packed(layer), layer)
            if progress is not None:
                progress("")
            name = f"{layer}.weight"
            if self.layout(layer) == "dense" and name in self._names and self.raw.dtype(name) not in VALUE_TYPES:
                raise ValueError(f"{layer}: holds {self.raw.dtype(name)}; wanted one of {', '.join(VALUE_TYPES)}")
        for name in self.raw.names():
            if self.raw.dtype(name) not in DTYPES:
                raise ValueError(f"{name}: holds {self.raw.dtype(name)}, which is not written here")

    def _packed(self, layer: str) -> Packed:
        values, mask, offsets, scale = (
            self.raw.tensor(f"{layer}.{suffix}") if f"{layer}.{suffix}" in self._names else None
            for suffix in PACKED_SUFFIXES
        )
        return Packed(values, mask, offsets, self.shape(f"{layer}.weight"), scale)

    def _entries(self, layer: str) -> dict[str, dict]:
        names = (f"{layer}.{suffix}" for suffix in PACKED_SUFFIXES)
        found = {name: self.raw.dtype(name) for name in names if name in self._names}
        return {n: {"shape": list(self.raw.shape(n)), "dtype": DTYPES.get(d, d)} for n, d in found.items()}


def check_entries(name: str, layer: nn.Linear, entries: dict[str, dict]) -> None:
    """Whether the packed tensors of a layer fit its shape; ValueError naming the layer if not."""
    n, k = layer.out_features, layer.in_features
    values = _entry(name, "weight", entries)
    if len(values["shape"]) != 1 or values["dtype"] not in PACKED_CODES:
        found = BY_CODE.get(values["dtype"], values["dtype"])
        raise ValueError(
            f"{name}: packed values should be 1-D floating point or int8, the file has {found} {values['shape']}"
        )
    rows, columns = -(-n // 16), -(-k // 64)
    wanted = {"weight_mask": ("I32", [[rows, columns, 32]]), "weight_offsets": ("I32", [[rows * columns + 1]])}
    if values["dtype"] == "I8":
        wanted["weight_scale"] = ("F32", [[n], [n, quantize.groups(k, quantize.GROUP)]])
    for suffix, (dtype, shapes) in wanted.items():
        entry = _entry(name, suffix, entries)
        if entry["shape"] not in shapes or entry["dtype"] != dtype:
            found = BY_CODE.get(entry["dtype"], entry["dtype"])
            raise ValueError(
                f"{name}: {suffix} should be {BY_CODE[dtype]} {' or '.join(map(str, shapes))} for a layer of {n}×{k}, "
                f"the file has {found} {entry['shape']}; config.json or the file is of another model"
            )


def _entry(name: str, suffix: str, entries: dict[str, dict]) -> dict:
    entry = entries.get(f"{name}.{suffix}")
    if entry is None:
        raise ValueError(f"{name}: packed tensor {suffix} is missing from the checkpoint; copy it again")
    return entry


def check_settings(folder: Path) -> None:
    """ValueError naming how the weights of a folder were quantized, and what to do, if it was not by this package."""
    for name, settings in read_settings(folder).items():
        method = settings.get("quant_method", "compressed-tensors")
        if method == "alphaprune":
            try:
                check_version(settings.get("format", "sbt"), settings.get("format_version", formats.VERSION))
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from error
            continue
        layout = settings.get("format") or "dense"
        if method != "compressed-tensors" or layout not in READ or settings.get("config_groups"):
            kind = method if layout in READ else f"{method}, {layout}"
            other = f", or {DEQUANTIZE[method]}" if method in DEQUANTIZE else ""
            raise ValueError(
                f"{folder}: {name} says that its weights are quantized ({kind}); wanted floating-point weights: take "
                f"the checkpoint from before that{other}. int8 values are made with --values int8"
            )
        if changed := next((key for key in LOST if settings.get(key)), None):
            raise ValueError(
                f"{folder}: {name} has a {changed}, which the weights alone do not say: the model would be another "
                f"one; take the checkpoint from before that"
            )


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """What config.json says of how the weights lie, by the name of the setting; ValueError if one is no object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever reads the config says what is wrong
    found = {name: config.get(name) or {} for name in SETTINGS if name in config} if isinstance(config, dict) else {}
    for name, settings in found.items():
        if not isinstance(settings, dict):
            raise ValueError(f"{folder}: {name} in config.json should be an object, got {settings!r}")
    return {name: settings for name, settings in found.items() if settings}


def check_generation(folder: Path) -> None:
    """ValueError if a folder's settings of generation cannot be read: transformers would go on without them."""
    file = folder / "generation_config.json"
    try:
        if file.exists() and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("wanted one JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({first_line(error)}); copy it again, or delete it") from error


def check_version(layout: str, version: Any) -> None:
    """ValueError if a packed directory is of a format or version that is not read here."""
    if isinstance(version, int) and version > formats.VERSION:
        raise ValueError(
            f"the checkpoint has format_version {version}, alphaprune {alphaprune.__version__} "
            f"reads {formats.VERSION}: install a newer alphaprune, at least the one that wrote it"
        )
    if layout not in ("sbt", "dense"):
        raise ValueError(
            f"packed format {layout!r} is not known to this version of alphaprune (it reads sbt and dense)"
        )
