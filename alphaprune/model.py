"""A model as decoder blocks, one at a time: from a live module, or lazily from the shards of a directory.

`blocks(source)` is the only way in which analysis and pruning see weights. A directory is never whole in memory:
the skeleton has no weights, and a block's weights are read when its turn comes and dropped after it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import families, shapes, stored
from alphaprune.experts import named_shards, separate
from alphaprune.families import Family, linears_of, module_lists
from alphaprune.files import first_line
from alphaprune.shards import dtype_name

WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]  # of a hub id; some tokenizers are text files
OTHER_FORMATS = ["original/*", "consolidated*"]  # the same weights once more
SAMPLED_ROWS = 3  # per matrix, for the fingerprint


@dataclass(frozen=True)
class Block:
    """One decoder block with its weights loaded; `linears` are its prunable layers by full name, in order."""

    index: int
    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]


@dataclass(frozen=True)
class Description:
    """What identifies a model: sizes, and a fingerprint over a sample of every prunable weight."""

    name: str
    fingerprint: str
    dtype: str
    shapes: dict[str, tuple[int, int]]
    block_of: dict[str, int]


class Source(ABC):
    """A causal language model whose blocks can be had one at a time. Made by `open_source`."""

    name: str
    config: Any
    device: torch.device  # that weights are had on
    skeleton: nn.Module  # the model; without weights where it is read from a directory

    def blocks(self, wanted: Container[int] | None = None) -> Iterator[Block]:
        """Decoder blocks in order, or those of these numbers, each with its weights loaded until the next is asked for.

        Raises ValueError if the files that they come from were changed meanwhile.
        """
        for index, (name, module) in enumerate(self._decoder().named_children()):
            if wanted is not None and index not in wanted:
                continue
            full = f"{self.prefix}.{name}"
            self._load(full, module)
            yield Block(index, full, module, linears_of(full, module, self.family))
            self.check_unchanged()
            self._unload(module)

    def block_count(self) -> int:
        return len(list(self._decoder().children()))

    def block_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    @abstractmethod
    def outside_tensors(self, packed: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and values of all outside the blocks: embeddings, final norm, untied head, as in files if packed."""

    def check_unchanged(self) -> None:  # noqa: B027 - a live model has no files
        """ValueError if what the blocks come from was changed since it was opened."""

    def stamps(self) -> dict[str, list[int]]:
        """What tells the files that the blocks come from, from others in their place; nothing of a live model."""
        return {}

    def _load(self, name: str, module: nn.Module) -> None:  # noqa: B027 - a live model has nothing to load
        ...

    def _unload(self, module: nn.Module) -> None:  # noqa: B027
        ...

    @abstractmethod
    def _row_sample(self, name: str, rows: list[int]) -> Tensor: ...

    @abstractmethod
    def _dtype(self, name: str) -> str: ...

    @property
    def family(self) -> Family:
        return find_family(self.config, self.name)

    @property
    def prefix(self) -> str:
        """Path of the decoder blocks inside the model."""
        return self.family.blocks

    def _decoder(self) -> nn.Module:
        return self.skeleton.get_submodule(self.prefix)

    def _layers(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Every prunable layer, perhaps without its weight, after the number of its block and its name; in order."""
        for index, (child, module) in enumerate(self._decoder().named_children()):
            for name, layer in linears_of(f"{self.prefix}.{child}", module, self.family).items():
                yield index, name, layer

    def description(self) -> Description:
        """Names, shapes and fingerprint of the prunable weights; reads three rows of each and no more.

        The fingerprint is a sha256 over name, shape and the first, middle and last row of every prunable weight
        as float32, so it does not depend on how the checkpoint is cut into files.
        """
        packed = [n for n, m in self._decoder().named_modules() if "weight_mask" in m._buffers]
        if packed:
            raise ValueError(
                f"{self.name}: layer {packed[0]} is packed already; expand the model with model.dequantize()"
            )
        shapes, block_of, digest = {}, {}, hashlib.sha256()
        dtypes: dict[str, int] = {}
        for index, name, layer in self._layers():
            n, k = layer.weight.flatten(1).shape
            shapes[name], block_of[name] = (n, k), index
            sample = self._row_sample(f"{name}.weight", sorted({0, n // 2, n - 1})[:SAMPLED_ROWS])
            digest.update(f"{name} {n} {k}\n".encode())
            digest.update(sample.to("cpu", torch.float32).contiguous().numpy().tobytes())
            dtype = self._dtype(f"{name}.weight")
            dtypes[dtype] = dtypes.get(dtype, 0) + n * k
        if not shapes:
            raise ValueError(f"{self.name}: no prunable linear layer (dense, with a weight matrix) in any block")
        return Description(self.name, digest.hexdigest(), max(dtypes, key=dtypes.__getitem__), shapes, block_of)


class LiveSource(Source):
    """A model that is already in memory; pruning it changes it in place. Its experts become separate layers."""

    def __init__(self, model: nn.Module) -> None:
        self.skeleton, self.config = model, model.config
        self.name = getattr(model.config, "name_or_path", "") or type(model).__name__
        separate(model, self.family)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.skeleton.parameters()).device

    def outside_tensors(self, packed: bool = False) -> Iterator[tuple[str, Tensor]]:
        inside = self.prefix + "."
        tied = set(getattr(self.skeleton, "all_tied_weights_keys", None) or ())
        for name, tensor in self.skeleton.state_dict().items():
            if not name.startswith(inside) and name not in tied:
                yield name, tensor

    def _row_sample(self, name: str, rows: list[int]) -> Tensor:
        return self.skeleton.get_parameter(name).detach()[rows]

    def _dtype(self, name: str) -> str:
        return dtype_name(self.skeleton.get_parameter(name).dtype)


class DirectorySource(Source):
    """A Hugging Face directory with safetensors; at most one block of it is in memory.

    Its layers may be dense, packed by this package, or in a layout of others that stored.py knows; blocks are dense.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        """dtype, device: that weights are had in and on; by default that of the files, and the CPU."""
        stored.check_settings(folder)
        self.name, self.folder, self.dtype, self.device = str(folder), folder, dtype, torch.device(device)
        self.config = read_config(folder)
        family_of(self.config, self.name)
        self.skeleton = make_skeleton(self.config)
        for name in stored.SETTINGS:
            if hasattr(self.config, name):
                delattr(self.config, name)
        plain = getattr(self.config, "dtype", None) or torch.float32  # of int8 layers when they were dense
        self.shards = stored.Stored(named_shards(folder, self.family), self.skeleton, plain)
        self.shards.check_floating(self.family.is_text)
        check_shapes(self.shards, self.skeleton, self.prefix, self.name)

    def outside_tensors(self, packed: bool = False) -> Iterator[tuple[str, Tensor]]:
        inside = self.prefix + "."
        for name in self.shards.names(packed):
            if not name.startswith(inside):
                yield name, self.shards.tensor(name, packed)

    def check_unchanged(self) -> None:
        self.shards.check_unchanged()

    def stamps(self) -> dict[str, list[int]]:
        return self.shards.stamps()

    def load_outside(self) -> None:
        """Gives the skeleton its embeddings, final norm and head, to run tokens into the first block.

        Of a multimodal model those of the text model: no picture is ever shown to it.
        """
        is_text = self.family.is_text
        tensors = {name: self._placed(tensor) for name, tensor in self.outside_tensors() if is_text(name)}
        self.skeleton.load_state_dict(tensors, strict=False, assign=True)
        self.skeleton.tie_weights()

    def unload_outside(self) -> None:
        decoder = self._decoder()
        inside = {id(p) for p in decoder.parameters()}
        for module in self.skeleton.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in inside and not parameter.is_meta:
                    setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _load(self, name: str, module: nn.Module) -> None:
        self.check_unchanged()
        state = {n: self._placed(self._tensor(f"{name}.{n}")) for n, _ in module.named_parameters()}
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)
        if self.device.type != "cpu":
            module.to(self.device)  # buffers

    def _tensor(self, name: str) -> Tensor:
        return self.shards.tensor_and_mask(name)[0]

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _unload(self, module: nn.Module) -> None:
        for inner in module.modules():
            for name, parameter in list(inner.named_parameters(recurse=False)):
                setattr(inner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _row_sample(self, name: str, rows: list[int]) -> Tensor:
        return self._placed(self.shards.rows(name, rows))

    def _dtype(self, name: str) -> str:
        return self.shards.dtype(name) if self.dtype is None else dtype_name(self.dtype)


def open_source(source: "Source | nn.Module | str | Path") -> Source:
    """`source` as a `Source`: a live model, a directory of ours or of Hugging Face, or a hub id.

    The packed weights of a directory are expanded block by block, since spectra and scores need the matrices.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, nn.Module):
        return LiveSource(source)
    return DirectorySource(resolve(source))


def blocks(source: "Source | nn.Module | str | Path") -> Iterator[Block]:
    """Decoder blocks of a live model, a directory or a hub id, in order, one in memory at a time."""
    return open_source(source).blocks()


def check_finite(block: Block, so: str) -> None:
    """ValueError naming the first layer of a block whose weights hold NaN or infinity; `so`: what that rules out."""
    for name, layer in block.linears.items():
        least, most = torch.aminmax(layer.weight.detach())  # what is NaN anywhere is NaN here, at the memory's speed
        if not bool(torch.isfinite(most - least)) and not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"{name}: the weights hold NaN or infinity, so {so}; repair the checkpoint")


def describe(source: "Source | nn.Module | str | Path") -> Description:
    """Names, shapes, dtype and fingerprint of the prunable weights of `source`."""
    return open_source(source).description()


def resolve(model: "str | Path") -> Path:
    """The local folder of a checkpoint; a hub id (`owner/name`) is fetched, as the user asked by naming it.

    Raises ValueError if it is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{model}: this folder holds no model: there is no config.json in it")
        return folder
    if folder.exists():
        raise ValueError(f"{model}: this is a file; give the folder that holds config.json and the safetensors files")
    parts = str(model).split("/")
    if len(parts) != 2 or not all(parts) or str(model).startswith((".", "~", "/")):
        raise ValueError(f"{model}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=WANTED, ignore_patterns=OTHER_FORMATS))
    except Exception as error:  # the hub client has a dozen error types, for network, rights and names
        raise ValueError(f"{model}: no such folder here, and the hub did not give it: {first_line(error)}") from error


def read_config(folder: Path) -> Any:
    """The transformers config of a folder; ValueError in one sentence if it is unreadable."""
    from transformers import AutoConfig

    try:
        families.check_written(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # wrong types in it have error types of their own, and the reason beneath them
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"{folder}: config.json cannot be used: {reason}") from error


def make_skeleton(config: Any) -> nn.Module:
    """The model that a config describes: parameters on the meta device, rotary tables real; ValueError if none.

    Blocks have the sizes of its `quantization_config`, see shapes.py.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            model = families.auto_class(config).from_config(config).eval()
            if family := families.of(config):
                separate(model, family)
            if wanted := shapes.of(config):
                prefix = family_of(config, config.model_type)
                shapes.reshape(model.get_submodule(prefix), prefix, config, wanted)
            return model
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        name = getattr(config, "name_or_path", "") or config.model_type
        raise ValueError(
            f"{name}: config.json cannot be used: no model is of these settings: {first_line(error)}"
        ) from error


def check_places(names: Iterable[str], places: Collection[str], prefix: str, model: str) -> None:
    """ValueError naming the first weight or bias inside the blocks whose name is not among `places`.

    Such are blocks past the last one of config.json: without them the model would be another, and nothing would say so.
    """
    for name in names:
        if name.startswith(f"{prefix}.") and name.endswith((".weight", ".bias")) and name not in places:
            raise ValueError(
                f"{model}: tensor {name} is in its files, but config.json has no place for it; "
                f"one of them belongs to another model"
            )


def check_shapes(found: stored.Stored, skeleton: nn.Module, prefix: str, model: str) -> None:
    """ValueError naming the first tensor of a folder that its config.json has no place for, or one of another shape.

    Of a multimodal model the text model is looked at; what is beside it may have other names in files.
    """
    names, is_text = found.names(), find_family(skeleton.config, model).is_text
    parameters = {name: parameter for name, parameter in skeleton.named_parameters() if is_text(name)}
    check_places(names, parameters, prefix, model)
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ()) - set(names)
    for name, parameter in parameters.items():
        if name not in tied and (shape := found.shape(name)) != tuple(parameter.shape):
            raise ValueError(
                f"{model}: {name} has shape {shape} in the file, but config.json describes {tuple(parameter.shape)}; "
                f"one of them belongs to another model"
            )


def prunable(skeleton: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The prunable layers of a model by full name, in order; prefix: the path of its blocks."""
    family = find_family(skeleton.config, type(skeleton).__name__)
    found: dict[str, nn.Linear] = {}
    for name, block in skeleton.get_submodule(prefix).named_children():
        found |= linears_of(f"{prefix}.{name}", block, family)
    return found


def family_of(config: Any, name: str) -> str:
    """Path of the decoder blocks for this kind of model."""
    return find_family(config, name).blocks


def find_family(config: Any, name: str) -> Family:
    """The line of a model's family; if there is none, a ValueError with what is known of its modules."""
    if family := families.of(config):
        return family
    try:
        lists = module_lists(make_skeleton(config))
    except (ValueError, OSError, ImportError):  # no causal language model, or one whose code is elsewhere
        lists = ""
    raise ValueError(
        f"{name}: model type {families.kind(config)} is not known here; known: {families.known()}. {lists}"
        f"To add it, write its line into FAMILIES in alphaprune/families.py"
    )


def is_packed(folder: Path) -> bool:
    """Whether a folder holds our packed weights; "dense" ones are of other shapes only, see shapes.py."""
    settings = stored.read_settings(folder).get("quantization_config", {})
    return settings.get("quant_method") == "alphaprune" and settings.get("format") != "dense"
