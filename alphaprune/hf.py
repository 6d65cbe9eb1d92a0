"""The adapter to transformers: registers our quantizer, and `load`, which is `from_pretrained`.

Imported by the hook in the package's `__init__` as soon as transformers' own registry is. Tried with transformers
5.0 to 5.23; older ones do not pass the checkpoint files that tell how many values each layer has.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from alphaprune import formats
from alphaprune.files import first_line
from alphaprune.formats import quantize
from alphaprune.layer import SparseLinear, check_tokens, expand_losers
from alphaprune.model import resolve
from alphaprune.shards import BY_CODE, Shards, read_header

VALUE_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


@register_quantization_config("alphaprune")
class AlphaPruneConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed directory: {"quant_method": "alphaprune", "format": "sbt", …}.

    values: "int8" where layers were rounded; it informs, the tensors say for themselves what they hold.
    """

    def __init__(
        self,
        format: str = "sbt",  # noqa: A002
        format_version: int = formats.VERSION,
        values: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = "alphaprune"
        self.format = format
        self.format_version = format_version
        if values is not None:
            self.values = values


@register_quantizer("alphaprune")
class AlphaPruneQuantizer(HfQuantizer):
    """Puts SparseLinear modules where the checkpoint holds packed tensors, before weights are loaded."""

    requires_calibration = True  # packed weights are made by `prune`, not on loading

    def validate_environment(self, *_: Any, **__: Any) -> None:
        settings = self.quantization_config
        if settings.format != "sbt":
            raise ValueError(
                f"packed format {settings.format!r} is not known to this version of alphaprune (it reads sbt)"
            )
        if settings.format_version != formats.VERSION:
            raise ValueError(
                f"the checkpoint has format_version {settings.format_version}, this version of alphaprune reads "
                f"{formats.VERSION}: install the alphaprune that wrote it, or a newer one"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError("a packed model can only be loaded from safetensors files")
        entries: dict[str, dict] = {}
        for file in checkpoint_files:
            entries.update(read_header(Path(file)))
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and f"{name}.weight_mask" in entries:
                check_entries(name, layer, entries)
                values, bias = entries[f"{name}.weight"], f"{name}.bias"
                rounded = values["dtype"] == "I8"
                sparse = SparseLinear.empty(
                    (layer.out_features, layer.in_features),
                    values["shape"][0],
                    layer.bias is not None,
                    dtype if dtype and not rounded else VALUE_TYPES[values["dtype"]],
                    dtype or VALUE_TYPES[entries[bias]["dtype"]] if bias in entries else torch.float32,
                    tuple(entries[f"{name}.weight_scale"]["shape"]) if rounded else None,
                )
                sparse.name = name
                model.set_submodule(name, sparse)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, SparseLinear):
                model.set_submodule(name, layer.to_linear(dtype))
        return model


def check_entries(name: str, layer: nn.Linear, entries: dict[str, dict]) -> None:
    """Whether the packed tensors of a layer fit its shape; ValueError naming the layer if not."""
    n, k = layer.out_features, layer.in_features
    values = _entry(name, "weight", entries)
    if len(values["shape"]) != 1 or values["dtype"] not in VALUE_TYPES:
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
                f"the file has {found} {entry['shape']}"
            )


def _entry(name: str, suffix: str, entries: dict[str, dict]) -> dict:
    entry = entries.get(f"{name}.{suffix}")
    if entry is None:
        raise ValueError(f"{name}: packed tensor {suffix} is missing from the checkpoint; copy it again")
    return entry


def load(
    path: "str | Path", dtype: "torch.dtype | str" = "auto", device: str = "cpu", tokens: int | None = 1
) -> nn.Module:
    """The model of a directory (ours or any of transformers) or hub id, ready to run: this is `from_pretrained`.

    dtype: "auto" keeps that of the file. tokens: rows of x to be fast at; where this machine has a time table, packed
    layers that are faster dense are expanded; None keeps all packed, as from_pretrained does.
    Raises ValueError in one sentence if the files are unreadable.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    check_tokens(tokens)
    folder = resolve(path)
    Shards(folder)  # truncated and missing files are found here, by name
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder}: cannot be loaded: {first_line(error)}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    return expand_losers(model.to(device).eval(), tokens)
