"""Checkpoints of others → ours, and ours → dense: one block in memory at a time, whole or not at all.

Kept is what the files keep, or of a dense layer what is not 0; values keep their bits unless int8 is asked for.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from alphaprune import __version__, checkpoint, head, hf, stored, unfinished
from alphaprune import model as models
from alphaprune.checkpoint import Storage
from alphaprune.layer import worth_packing
from alphaprune.pruning import Finish, PrunedBlock, Restore
from alphaprune.shards import checkpoint_files, read_header

SAMPLE = 64  # bytes at three places of every tensor, for the fingerprint


@dataclass(frozen=True)
class Converted:
    """What was written, and how the prunable layers had been stored: {layout: layers}.

    negative_zeros: weights that are -0 and were kept for their sign, in layers read by this run.
    """

    written: checkpoint.Written
    layouts: dict[str, int]
    negative_zeros: int


class StoredSource(models.DirectorySource):
    """A folder whose layers may be stored in any layout that is known here, all of them checked; blocks are dense.

    masks: of the weights of the block in hand, what the files keep, by tensor name; none of those that are dense there.
    """

    def __init__(self, folder: Path, progress: Callable[[str], None] | None = None) -> None:
        check_settings(folder)
        super().__init__(folder)
        self.shards.check(progress)
        self.masks: dict[str, Tensor] = {}

    def layers(self) -> list[str]:
        """The prunable layers by full name, in order."""
        return list(models.prunable(self.skeleton, self.prefix))

    def _tensor(self, name: str) -> Tensor:
        tensor, mask = self.shards.tensor_and_mask(name)
        if mask is not None:
            self.masks[name] = mask
        return tensor

    def _unload(self, module: nn.Module) -> None:
        self.masks.clear()
        super()._unload(module)

    def fingerprint(self) -> str:
        """sha256 over the headers of the files and three samples of every tensor in them."""
        digest = hashlib.sha256()
        for file in checkpoint_files(self.folder):
            header = read_header(file)
            with file.open("rb") as handle:
                start = 8 + int.from_bytes(handle.read(8), "little")
                for name, entry in sorted(header.items()):
                    first, end = entry["data_offsets"]
                    digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
                    for place in (first, (first + end) // 2, max(first, end - SAMPLE)):
                        handle.seek(start + place)
                        digest.update(handle.read(min(SAMPLE, end - place)))
        return digest.hexdigest()


def check_settings(folder: Path) -> None:
    """ValueError naming a setting of a packed folder that is not known here."""
    for settings in stored.read_settings(folder).values():
        if settings.get("quant_method") == "alphaprune":
            try:
                hf.AlphaPruneConfig(**settings)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from error


class _Masks:
    """What is kept of a block's layers: {layer: bool [N, K]}; counts the -0 among it."""

    def __init__(self, source: StoredSource, negative_zeros: bool, values: str | None) -> None:
        self.source, self.negative_zeros, self.values = source, negative_zeros, values
        self.count = 0

    def of(self, block: models.Block) -> dict[str, Tensor]:
        if self.values is not None:
            models.check_finite(block, "they have no place among int8 values")
        return {name: self._of(name, layer.weight) for name, layer in block.linears.items()}

    def _of(self, name: str, weight: Tensor) -> Tensor:
        if (mask := self.source.masks.get(f"{name}.weight")) is not None:
            return mask
        mask = weight != 0  # NaN is unlike 0
        if self.negative_zeros and self.values is None:
            negative = weight.signbit() & ~mask
            self.count += int(negative.sum())
            mask |= negative
        return mask


def convert(
    old: "StoredSource | str | Path",
    new: "str | Path",
    packed: bool = True,
    values: str | None = None,
    group: int | None = None,
    negative_zeros: bool = True,
    progress: Callable[[str], None] | None = None,
    rounded_head: bool = False,
) -> Converted:
    """Writes NEW from the checkpoint OLD, a folder or hub id; an interrupted run goes on where it was.

    packed, values, group, rounded_head: as `checkpoint.Storage` has them. negative_zeros: -0 in a dense layer is a
    weight like any other, so that every bit comes back; otherwise, and as int8, it is dropped as +0 is.
    ValueError in one sentence if OLD cannot be read, NEW exists, nothing would change, or int8 is asked of NaN; nothing
    is left of NEW then.
    """
    storage = Storage(packed, values, group, rounded_head)
    storage.check()
    unfinished.check_free(Path(new))
    source = old if isinstance(old, StoredSource) else open_stored(old)
    layouts = Counter(source.shards.layout(name) for name in source.layers())
    _check_change(source, layouts, storage)
    if storage.packed and not storage.rounded_head:
        _check_gain(source, _Masks(source, negative_zeros, storage.values), storage)
    masks = _Masks(source, negative_zeros, storage.values)

    def run(restore: Restore, finish: Finish) -> Iterator[PrunedBlock]:
        for block in source.blocks():
            kept = restore(block)
            restored = kept is not None
            if not restored:
                kept = masks.of(block) if storage.packed else {}
                finish(block, kept)
            if progress is not None:
                progress(block.name)
            yield PrunedBlock(block, kept, restored)

    identity = {"checkpoint": source.fingerprint(), "negative_zeros": negative_zeros, **storage.identity()}
    recipe = {"alphaprune": __version__, "converted_from": source.name, "layouts": dict(layouts), **identity}
    with unfinished.nothing_left(new):
        kept = source.shards.packed_layer if values is None else None
        written = checkpoint.write_pruned(source, new, identity, recipe, run, storage, stored=kept)
    return Converted(written, dict(layouts), masks.count)


def open_stored(old: "str | Path", progress: Callable[[str], None] | None = None) -> StoredSource:
    """The blocks of a folder or hub id, dense, in whatever known layout they are stored; their masks are checked."""
    return StoredSource(models.resolve(old), progress)


def _check_change(source: StoredSource, layouts: Counter, storage: Storage) -> None:
    """ValueError if NEW would be what OLD is, or would round a second time."""
    whole = head.name_of(source.skeleton) or ""
    if storage.rounded_head and source.shards.is_rounded(whole):
        raise ValueError(f"{source.name}: the values of its output layer {whole} are int8 already")
    if not storage.packed and {*layouts, source.shards.layout(whole)} == {"dense"}:
        raise ValueError(f"{source.name}: dense already; leave out --format dense to pack it")
    if storage.packed and set(layouts) <= {"sbt", "dense"} and layouts["sbt"]:
        if storage.values is None and not storage.rounded_head:
            raise ValueError(f"{source.name}: packed already; give --format dense to expand it, or --values int8")
        if storage.values is not None and any(source.shards.is_rounded(name) for name in source.layers()):
            raise ValueError(f"{source.name}: its values are int8 already")


def _check_gain(source: StoredSource, masks: _Masks, storage: Storage) -> None:
    """ValueError unless one layer at least gets smaller; reads no further than to the first that does."""
    for block in source.blocks():
        kept = masks.of(block)
        if any(worth_packing(layer.weight, kept[name], *storage.of_blocks) for name, layer in block.linears.items()):
            return
    remedy = "give --negative-zeros drop" if masks.count else "prune it first, or ask for --values int8"
    if source.shards.bitmasks:
        remedy = "give --format dense"
    raise ValueError(f"{source.name}: no layer of it would get smaller; {remedy}")
