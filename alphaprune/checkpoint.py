"""Packed directories: a model's blocks, finished one after another, and all that lies beside them in a folder."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import formats, head, ranks, shapes, shards
from alphaprune.formats import PACKED_SUFFIXES, Packed, quantize
from alphaprune.formats.quantize import Error
from alphaprune.layer import SparseLinear, pack_weight, worth_packing
from alphaprune.model import Block, LiveSource, Source
from alphaprune.pruning import Finish, PrunedBlock, Restore
from alphaprune.unfinished import RECIPE, Writer, Written, identified, journal_beside

SETTINGS = {"quant_method": "alphaprune", "format": "sbt", "format_version": formats.VERSION}
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")


@dataclass(frozen=True)
class Storage:
    """How a directory holds its layers.

    packed: SBT where it is smaller than dense; otherwise everything dense, with its zeros.
    values, group: as SparseLinear.from_linear has them; what each layer loses is remembered in the recipe.
    rounded_head: whether the output layer gets int8 values, too, see head.py; one that has them keeps them, if packed.
    """

    packed: bool = True
    values: str | None = None
    group: int | None = None
    rounded_head: bool = False

    @property
    def of_blocks(self) -> tuple[str | None, int | None]:
        """Values and group of the layers inside the blocks."""
        return self.values, self.group if self.values else None

    def check(self) -> None:
        """ValueError if these do not go together."""
        quantize.check(self.values or ("int8" if self.rounded_head else None), self.group)
        if not self.packed and (self.values is not None or self.rounded_head):
            raise ValueError("int8 values are a way to pack weights: leave them out where everything becomes dense")

    def identity(self) -> dict[str, Any]:
        """What it makes a run be known by, and recipes say of it."""
        made = {"format": "sbt" if self.packed else "dense", "values": self.values, "group": self.group}
        return made | ({"head": "int8"} if self.rounded_head else {})


PACKED = Storage()


def write_pruned(
    source: Source,
    out: "str | Path",
    identity: dict[str, Any],
    recipe: dict[str, Any],
    prune: Callable[[Restore, Finish], Iterator[PrunedBlock]],
    storage: Storage = PACKED,
    again: bool = False,
    stored: Callable[[str], Packed | None] | None = None,
) -> Written:
    """Writes the directory OUT from the blocks that `prune` yields; continues an interrupted run of the same identity.

    prune: given `restore` and `finish` (see pruning.prune_blocks), yields finished blocks.
    again: `prune` adds to the recipe, so it is asked even where all its blocks are there and only the name is missing.
    stored: of a layer that is not changed what is written of it; where it gives None, the layer is packed.
    Of several processes (ranks.py) the first one reads and writes OUT, and the others need not see it.
    """
    blocks, identity, values = source.block_count(), identified(identity, source.stamps()), storage.values
    writer = Writer(out, identity, blocks, source.family.stored_name) if ranks.world().leads else None
    found = None if writer is None else (writer.stage, [index for index in range(blocks) if writer.has(index)])
    stage, there = ranks.share(found)
    made: dict[str, Packed] = {}  # layers of the block in hand, as they will be stored
    errors: dict[str, Error] = {}

    def restore(block: Block) -> "dict[str, Tensor] | None":
        if block.index not in there:
            return None
        if writer is None:
            return share_block(block, {})
        return share_block(block, restore_block(block, writer.work / writer.file(block.index), writer.stored_name))

    def finish(block: Block, masks: dict[str, Tensor]) -> None:
        made.clear()
        errors.clear()
        for name, mask in masks.items() if storage.packed and (writer is not None or values is not None) else ():
            layer = block.linears[name]
            if stored is not None and (as_it_is := stored(name)) is not None:
                made[name] = as_it_is
            elif worth_packing(layer.weight, mask, *storage.of_blocks):
                made[name], error = pack_weight(layer.weight.detach(), mask, *storage.of_blocks)
                if error is not None:
                    errors[name] = error
                    put_back(layer, made[name])

    if storage.rounded_head and writer is not None:  # first, as NaN in it would be found too late
        _write_outside(writer, source, storage)
    asked = stage == "blocks" or (again and stage == "finishing")
    for pruned in prune(restore, finish) if asked else ():
        if writer is not None and not pruned.restored:
            source.check_unchanged()
            writer.write(pruned.block.index, block_tensors(pruned.block, made), errors)
    if writer is None:
        return ranks.share(None)
    _write_outside(writer, source, storage)
    source.check_unchanged()
    written = _summary(writer, source)
    if stage != "finished":
        config, made_how = _config(writer, source, storage.packed), recipe | writer.losses()
        writer.finish(config, made_how, lambda folder: copy_companions(source, folder))
    return ranks.share(written)


def _write_outside(writer: Writer, source: Source, storage: Storage) -> None:
    """Stores what is outside of the blocks, unless it is there."""
    if not writer.has(source.block_count()):
        found = head.outside_tensors(source, storage.packed, storage.rounded_head, storage.group)
        writer.write(source.block_count(), *found)


def share_block(block: Block, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the weights and masks of a block that the first process has to all the others."""
    for name, layer in block.linears.items() if ranks.world().size > 1 else ():
        mask = masks.get(name, torch.zeros_like(layer.weight, dtype=torch.bool))
        layer.weight.data, masks[name] = ranks.share_tensor(layer.weight.data), ranks.share_tensor(mask)
        if layer.bias is not None:
            layer.bias.data = ranks.share_tensor(layer.bias.data)
    return masks


def block_tensors(block: Block, made: dict[str, Packed]) -> dict[str, Tensor]:
    """All tensors of a block by full name; of the layers in `made` the packed ones."""
    tensors = {f"{block.name}.{n}": t for n, t in block.module.state_dict().items()}
    for name, packed in made.items():
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in packed.tensors.items()})
    return tensors


def put_back(layer: nn.Linear, packed: Packed) -> Tensor:
    """Gives a layer the weights that it has packed, in its own dtype, and returns the mask.

    So the blocks after it see the same activations whether this run packed it or an earlier one did.
    """
    layer.weight.data, mask = formats.get("sbt").dense(packed, layer.weight.dtype)
    return mask


def restore_block(block: Block, file: Path, stored_name: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Puts the weights of a finished block back and returns its masks."""
    masks: dict[str, Tensor] = {}
    with shards.open_file(file) as stored:
        names = set(stored.keys())
        for name, layer in block.linears.items():
            own = stored_name(name)
            if layer.bias is not None:  # permuted with the channels, perhaps
                layer.bias.data = stored.get_tensor(f"{own}.bias")
            values, mask, offsets, scale = (f"{own}.{suffix}" for suffix in PACKED_SUFFIXES)
            if mask not in names:
                layer.weight.data = stored.get_tensor(values)
                masks[name] = layer.weight.data != 0
                continue
            weight, bits, places = (stored.get_tensor(tensor) for tensor in (values, mask, offsets))
            shape = layer.out_features, layer.in_features
            packed = Packed(weight, bits, places, shape, stored.get_tensor(scale) if scale in names else None)
            formats.get("sbt").validate(packed, name)
            masks[name] = put_back(layer, packed)
    return masks


def save(model: nn.Module, path: "str | Path", tokenizer: Any = None) -> Written:
    """Writes a live model, SparseLinear layers packed, as a Hugging Face directory; returns its sizes.

    So are those that `load` or `sparsify` expanded because dense is faster on this machine: files know no machine.

    The directory appears whole or not at all; it must not exist yet, or be empty.
    """
    source = LiveSource(model)
    journal_beside(Path(path)).unlink(missing_ok=True)  # of a save that was finished
    writer = Writer(path, {"saved": source.name}, source.block_count(), source.family.stored_name)
    writer.done.clear()  # nothing ties an earlier, interrupted save to this model: write all again
    writer.errors.clear()
    prefix, state = source.prefix, model.state_dict()
    expanded = {name: module for name, module in model.named_modules() if getattr(module, "packed_on_disk", False)}
    expanded = {name: module for name, module in expanded.items() if worth_packing(module.weight, None)}
    for name, module in expanded.items():
        packed, _ = pack_weight(module.weight.detach(), None)
        state |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.tensors.items()}
    for index, (child, _) in enumerate(model.get_submodule(prefix).named_children()):
        writer.write(index, {n: t for n, t in state.items() if n.startswith(f"{prefix}.{child}.")})
    writer.write(source.block_count(), dict(source.outside_tensors(packed=True)))
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    writer.errors |= {n: m.quantization_error for n, m in sparse.items() if m.quantization_error is not None}
    written = _summary(writer, source)

    def companions(folder: Path) -> None:
        if (generation := getattr(model, "generation_config", None)) is not None:
            generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        elif source.name and Path(source.name).is_dir():
            copy_companions(source, folder)

    config = _config(writer, source, bool(sparse) or bool(expanded))
    config["dtype"] = shards.dtype_name(next(model.parameters()).dtype)  # a model that was cast since it was loaded
    writer.finish(config, {"saved_from": source.name} | writer.losses(), companions)
    return written


def output_config(
    source: Source, packed: bool, values: str | None = None, own: shapes.Shapes | None = None
) -> dict[str, Any]:
    """config.json of the new directory: the source's own, with our `quantization_config` where it needs one.

    values: said in it where packed layers hold other values than the source had.   own: sizes that its config does not
    say, where they are others than those of the source.
    """
    config = json.loads(source.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    if own is None:
        own = shapes.observe(source.skeleton.get_submodule(source.prefix), source.prefix, source.config)
    settings = SETTINGS | ({} if packed else {"format": "dense"}) | ({} if values is None else {"values": values})
    return {**config, "quantization_config": settings | own.settings()} if packed or own else config


def copy_companions(source: Source, folder: Path) -> None:
    """Tokenizer, generation settings and chat template travel with the weights."""
    origin = Path(getattr(source, "folder", source.name))
    if not origin.is_dir():
        return
    for pattern in COMPANIONS:
        for file in sorted(origin.glob(pattern)):
            if file.name not in ("config.json", shards.INDEX, RECIPE) and file.is_file():
                shutil.copyfile(file, folder / file.name)


def _config(writer: Writer, source: Source, packed: bool) -> dict[str, Any]:
    """config.json of what was written."""
    *blocks, outside = [writer.done[writer.file(index)] for index in range(source.block_count() + 1)]
    rounded = any(name.endswith(f".{PACKED_SUFFIXES[3]}") for names in blocks for name in names)
    return head.described(output_config(source, packed, "int8" if rounded else None), source, outside)


def _summary(writer: Writer, source: Source) -> Written:
    shapes = {}
    sizes = {name: size for tensors in writer.done.values() for name, size in tensors.items()}
    plain = next(source.skeleton.parameters()).dtype  # of int8 layers when they were dense
    for child, block in source.skeleton.get_submodule(source.prefix).named_children():
        for inner, layer in block.named_modules():
            if isinstance(layer, nn.Linear | SparseLinear) and source.family.prunes(inner):
                dtype = layer.weight.dtype if layer.weight.is_floating_point() else plain
                name = writer.stored_name(f"{source.prefix}.{child}.{inner}")
                shapes[name] = (layer.in_features * layer.out_features, dtype)
    dense = sum(count * dtype.itemsize for count, dtype in shapes.values())
    stored = sum(sizes.get(f"{name}.{suffix}", 0) for name in shapes for suffix in PACKED_SUFFIXES)
    packed = sum(f"{name}.weight_mask" in sizes for name in shapes)
    return Written(writer.out, dense, stored, packed, len(shapes), writer.errors)
