"""The adapter to transformers: registers our quantizer, and `load`, which is `from_pretrained`.

Imported by the hook in the package's `__init__` as soon as transformers' own registry is. Tried with transformers
5.0 to 5.24 (tests/compat.py); older ones do not pass the checkpoint files that tell how many values each layer has.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from alphaprune import bitmask, devices, families, hf_parallel, memory, pages, shapes
from alphaprune.experts import FUSED, separate
from alphaprune.files import first_line
from alphaprune.head import round_head
from alphaprune.hf_config import AlphaPruneConfig
from alphaprune.kernels import base
from alphaprune.layer import (
    SparseLinear,
    check_activations,
    check_tokens,
    expand_losers,
    pack_weight,
    replace_each,
    round_activations,
    worth_packing,
)
from alphaprune.model import check_places, family_of, make_skeleton, prunable, read_config, resolve
from alphaprune.shards import Shards, read_header
from alphaprune.stored import check_entries, check_generation, check_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackWeight(ConversionOps):
    """What transformers calls with one dense weight after the other while it loads them."""

    def __init__(self, quantizer: "AlphaPruneQuantizer") -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *_: Any,
        **given: Any,
    ) -> dict[str, Any]:
        """The weight under its name where it stays dense; nothing where it is in the model, packed."""
        (found,) = input_dict.values()
        weight, name = found[0] if isinstance(found, list) else found, given["full_layer_name"]
        if self.quantizer.place(given["model"], name.removesuffix(".weight"), weight):
            given["missing_keys"].discard(name)
            return {}
        return {name: weight}


@register_quantizer("alphaprune")
class AlphaPruneQuantizer(HfQuantizer):
    """Puts SparseLinear where the checkpoint holds packed tensors, before weights are loaded; or packs dense ones."""

    quantization_config: AlphaPruneConfig
    requires_calibration = False  # dense directories that hold zeros are packed on loading

    def __init__(self, quantization_config: AlphaPruneConfig, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self.waiting: set[str] = set()  # layers that are packed when their weight comes
        self.refused: list[str] = []  # sentences: transformers would bury an error in its report
        self.ranks: hf_parallel.Ranks | None = None  # that share the model, and the layers that this one has a part of
        self.parts: dict[str, hf_parallel.SlicedLinear] = {}
        self.prefix = ""  # of names in a model with a head
        self.separated = False  # whether the model has experts, each of which gets its own tensors

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        settings = self.quantization_config
        check_version(settings.format, settings.format_version)
        own = shapes.read(settings)
        if not self.pre_quantized and (own or settings.format == "dense"):
            raise ValueError("format dense, kv_heads, channels and ranks are of a directory, and not to be asked for")
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "a dense model cannot be packed while it is offloaded to disk: pack it without a device_map, "
                "save it, and load the packed directory with this one"
            )

    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        entries: dict[str, dict[str, Any]] = {}
        for file in checkpoint_files or ():
            if str(file).endswith(".safetensors"):
                entries.update(read_header(Path(file)))
        if family := families.of(model.config):
            entries = {family.module_name(name): entry for name, entry in entries.items()}
            self.separated = separate(model, family)
            if self.separated:
                check_separate(entries)
        entries = as_named_in(model, entries)
        if not self.pre_quantized:
            names = prunable(model, decoder_of(model))
            skipped = self.quantization_config.modules_to_not_convert
            self.waiting = {name for name in names if should_convert_module(name, skipped)}
        elif not entries:
            raise ValueError("a packed model can only be loaded from safetensors files")
        self.ranks = hf_parallel.ranks_of(model) if self.pre_quantized else None
        self.prefix = f"{model.base_model_prefix}."
        if self.ranks is not None and self.separated:
            raise ValueError("a model with experts cannot be shared by ranks while it is packed; use one rank")
        if own := shapes.read(self.quantization_config):
            if self.ranks is not None:
                raise ValueError("a model whose blocks have sizes of their own cannot be shared by ranks; use one rank")
            prefix = family_of(model.config, type(model).__name__)
            shapes.reshape(model.get_submodule(decoder_of(model)), prefix, model.config, own)
        for name, layer in list(model.named_modules()):
            if self.pre_quantized and isinstance(layer, nn.Linear) and f"{name}.weight_mask" in entries:
                check_entries(name, layer, entries)
                sparse = empty_layer(name, layer, entries, dtype)
                if self.ranks is not None:
                    sparse = hf_parallel.empty_slice(name, sparse, self.ranks)
                    if isinstance(sparse, hf_parallel.SlicedLinear):
                        self.parts[name] = sparse
                model.set_submodule(name, sparse)
        check_shapes(model, entries)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """What transformers does to tensors on their way; it would merge those of experts."""
        kept = [c for c in weight_conversions if not (self.separated and merges_experts(c))]
        return super().update_weight_conversions(kept, *model)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **__: Any) -> bool:
        layer, _, suffix = param_name.rpartition(".")
        return suffix == "weight" and (layer in self.waiting or layer in self.parts)  # may have another shape

    def get_weight_conversions(self) -> list[Any]:
        parts = {name.removeprefix(self.prefix): part for name, part in self.parts.items()}
        return hf_parallel.converters(parts, self.ranks, self.refused) if self.ranks is not None else []

    def get_quantize_ops(self) -> PackWeight:
        return PackWeight(self)

    def place(self, model: nn.Module, name: str, weight: Tensor) -> bool:
        """Puts a weight [N, K] into the model, packed, and says so; or leaves it to transformers if it stays dense."""
        settings, layer = self.quantization_config, model.get_submodule(name)
        assert isinstance(layer, nn.Linear), "what waits is linear"
        self.waiting.discard(name)  # what stays dense is no more than any other tensor to transformers
        if weight.shape != layer.weight.shape or not worth_packing(weight, None, settings.values, settings.group):
            return False
        try:
            packed, error = pack_weight(weight, None, settings.values, settings.group)
        except ValueError as problem:
            self.refused.append(f"{name}: {problem}")
            return True
        sparse = SparseLinear(packed)
        sparse.bias = layer.bias  # on the meta device, or loaded already
        sparse.name, sparse.quantization_error = name, error
        for tensor in packed.tensors.values():
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # or the loader would fill it with what new models start from
        model.set_submodule(name, sparse)
        return True

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self.refused:
            raise ValueError(self.refused[0])
        if not self.pre_quantized and self.quantization_config.head is not None:
            round_head(model, self.quantization_config.group)
        if not self.pre_quantized and not any(isinstance(module, SparseLinear) for module in model.modules()):
            base.log.warning("no layer has enough zeros to be smaller packed: all stay dense; prune the model first")
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        if self.parts and self.ranks is not None:
            base.log.warning("each of %d ranks holds a part of the model: save it on one rank", self.ranks.count)
        return not self.parts

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top of it: packed layers are differentiable in x

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        # transformers gives the dtype of the config where the caller gave none; a model that was cast since then has
        # another one.
        dtype = model.dtype if dtype in (None, model.config.dtype) else dtype
        for kind in (SparseLinear, shapes.LowRankLinear):  # factors may be packed
            replace_each(model, kind, lambda layer: layer.to_linear(dtype))
        return model


def decoder_of(model: "PreTrainedModel") -> str:
    """Path of the decoder blocks in a model, which may be one without a head."""
    path = family_of(model.config, type(model).__name__)
    return path if model.base_model is not model else path.removeprefix(f"{model.base_model_prefix}.")


def as_named_in(model: "PreTrainedModel", entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries of a checkpoint under the names that the model has for them, with a head or without one."""
    prefix = f"{model.base_model_prefix}."
    inside = any(name.startswith(prefix) for name, _ in model.named_parameters())
    stored = any(name.startswith(prefix) for name in entries)
    if stored and not inside:
        return {name.removeprefix(prefix): entry for name, entry in entries.items()}
    if inside and not stored:
        return {prefix + name: entry for name, entry in entries.items()}
    return entries


def merges_experts(conversion: Any) -> bool:
    """Whether transformers makes one tensor of those of all experts by this."""
    return isinstance(conversion, WeightConverter) and any(t.endswith(FUSED) for t in conversion.target_patterns)


def check_separate(entries: dict[str, dict[str, Any]]) -> None:
    """ValueError if the experts of a checkpoint cannot be loaded one by one."""
    if not hasattr(HfQuantizer, "update_weight_conversions"):
        raise ValueError(
            f"packed experts are loaded by transformers 5.8 and newer, this is {transformers_version}; update it"
        )
    if fused := next((name for name in entries if name.endswith(FUSED)), None):
        raise ValueError(
            f"{fused}: holds the matrices of all experts in one tensor, which cannot be packed while it is loaded; "
            f"load the model without quantization_config and give it to alphaprune.sparsify"
        )


def empty_layer(
    name: str, layer: nn.Linear, entries: dict[str, dict[str, Any]], dtype: torch.dtype | None
) -> SparseLinear:
    """The packed layer for the tensors of a checkpoint, without values.

    Floats are in `dtype` or, as not every version of transformers passes it on, in what it made the dense layer in.
    """
    values, dtype = entries[f"{name}.weight"], dtype or layer.weight.dtype
    rounded = values["dtype"] == "I8"
    sparse = SparseLinear.empty(
        (layer.out_features, layer.in_features),
        values["shape"][0],
        layer.bias is not None,
        torch.int8 if rounded else dtype,
        dtype,
        tuple(entries[f"{name}.weight_scale"]["shape"]) if rounded else None,
    )
    sparse.name = name
    return sparse


def check_shapes(model: "PreTrainedModel", entries: dict[str, dict[str, Any]]) -> None:
    """ValueError naming the first tensor whose shape in the file is not the one that config.json describes.

    Some versions of transformers take it as it is once there is a quantizer. A head may be another one on purpose.
    """
    body, family = {id(parameter) for parameter in model.base_model.parameters()}, families.of(model.config)
    above = "" if model.base_model is not model else f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        if family is not None and not family.is_text(above + name):
            continue  # files may have it in another form
        if id(parameter) in body and name in entries and entries[name]["shape"] != list(parameter.shape):
            raise ValueError(
                f"{name}: has shape {entries[name]['shape']} in the file, config.json describes "
                f"{list(parameter.shape)}; one of them belongs to another model"
            )


def check_config(config: Any) -> None:
    """ValueError if packed weights of a transformers config are of a kind that this version does not read."""
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == "alphaprune":
        AlphaPruneQuantizer(AlphaPruneConfig(**settings)).validate_environment()


def load(
    path: "str | Path",
    dtype: "torch.dtype | str" = "auto",
    device: str = "cpu",
    tokens: int | None = 1,
    huge_pages: bool = False,
    activations: str | None = None,
) -> "PreTrainedModel":
    """The model of a directory (ours or any of transformers) or hub id, ready to run: this is `from_pretrained`.

    dtype: "auto" keeps that of the file. tokens: rows of x to be fast at; where this machine has a time table, packed
    layers that are faster dense are expanded; None keeps all packed, as from_pretrained does. huge_pages: moves weights
    on the CPU as the function of that name does; otherwise they stay in the pages of their file, which processes share
    and which are read when they are first used. activations: "int8" lets kernels round x, see `round_activations`.
    Raises ValueError in one sentence if the files are unreadable, there is no such device, or too little memory on it.
    """
    from transformers.utils import logging

    check_tokens(tokens)
    check_activations(activations)
    devices.named(device)
    folder = resolve(path)
    config = read_config(folder)
    check_generation(folder)
    stored = Shards(folder).names()  # truncated and missing files are found here, by name
    if layers := bitmask.find(stored):
        raise ValueError(
            f"{folder}: {next(iter(layers))} is stored in a layout of compressed-tensors that nothing loads any more; "
            f"`alphaprune convert {folder} NEW` makes a directory of it that runs"
        )
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what its report would say is said below, in one sentence
    try:
        made: Any = families.auto_class(config).from_pretrained(
            folder, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
        model, found = made
    except (OSError, ImportError, ArithmeticError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        make_skeleton(config)  # if its settings are the reason, that is said
        raise ValueError(f"{folder}: cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    check_loaded(folder, model, found)
    if activations is not None:
        round_activations(model, activations)
    made = expand_losers(memory.moved(model, device, str(folder)).eval(), tokens)
    return pages.huge_pages(made) if huge_pages else made


def check_loaded(folder: Path, model: "PreTrainedModel", found: dict[str, Any]) -> None:
    """ValueError naming the first tensor that the files or, inside the blocks, the model should have and do not.

    transformers fills it with random values, or leaves it out.
    """
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{folder}: {name} has shape {list(stored)} in the file, but config.json describes {list(wanted)}; "
            f"one of them belongs to another model"
        )
    for name in sorted(found["missing_keys"]):
        raise ValueError(f"{folder}: no tensor {name} in its safetensors files, though config.json needs it")
    if families.of(model.config):
        check_places(sorted(found["unexpected_keys"]), (), decoder_of(model), str(folder))
