"""What is known of the inputs of every layer of the dense model, gathered once for all that ask for it.

Small models keep it in memory, and with it whatever a Gram matrix has computed and remembered; of large ones, where
it is as big as the model itself, every block has a file, read when its turn comes.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from alphaprune import calibrate, shards
from alphaprune.calibrate import InputStat, Need
from alphaprune.gram import Gram
from alphaprune.model import Block, Source
from alphaprune.states import Room

IN_MEMORY = 2**30  # bytes of statistics of all blocks together, above which they go to files


class Observed:
    """Block → {layer: InputStat}, on the device of the block's weights; layers of one input share one object."""

    def __init__(self, kept: dict[int, dict[str, InputStat]], folder: Path | None) -> None:
        self.kept, self.folder = kept, folder
        self.last: tuple[int, dict[str, InputStat]] = -1, {}

    def __call__(self, block: Block) -> dict[str, InputStat]:
        if block.index in self.kept:
            return self.kept[block.index]
        if self.last[0] != block.index:
            device = next(block.module.parameters()).device
            self.last = block.index, read(_file(self.folder, block.index), device)
        return self.last[1]


def gather(
    source: Source,
    tokens: Tensor,
    need: Need,
    folder: Path,
    progress: Callable[[str], None] | None = None,
    in_memory: int = IN_MEMORY,
    room: Room | None = None,
) -> Observed:
    """The statistics of all blocks behind dense blocks; tokens: [samples, length] int64.

    folder: made where they are more than `in_memory` bytes. Blocks that an earlier run has left in it are not summed
    again, so it must be a folder for this model, these tokens and this need. Raises what calibrate.statistics does.
    """
    kept: dict[int, dict[str, InputStat]] = {}
    activations, on_disk = calibrate.first_inputs(source, tokens, room), folder.is_dir()
    for block in source.blocks():
        if not (on_disk and _file(folder, block.index).is_file()):
            found = calibrate.statistics(block, activations, need)
            if block.index == 0 and not on_disk and nbytes(found) * source.block_count() > in_memory:
                folder.mkdir()
                on_disk = True
            if on_disk:
                write(_file(folder, block.index), found)
            else:
                kept[block.index] = found
        if block.index + 1 < source.block_count():
            calibrate.run(block, activations)
        if progress:
            progress(block.name)
    return Observed(kept, folder if on_disk else None)


def delete(folder: Path) -> None:
    """Removes the files of `gather`, if there are any."""
    if folder.is_dir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def nbytes(found: dict[str, InputStat]) -> int:
    """Bytes of the statistics of a block, counting what layers share once."""
    different = {id(stat): stat for stat in found.values()}.values()
    return sum(s.norms.nbytes + (s.gram.matrix.nbytes if s.gram else 0) for s in different)


def write(file: Path, found: dict[str, InputStat]) -> None:
    """One safetensors file: `NAME.norms`, `NAME.gram` and `NAME.tokens` of each object, and for every layer the place
    of its object as `LAYER.of`."""
    places: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    for name, stat in found.items():
        place = places.setdefault(id(stat), len(places))
        tensors[f"{name}.of"] = torch.tensor([place])
        tensors[f"{place}.tokens"] = torch.tensor([stat.tokens])
        tensors[f"{place}.norms"] = stat.norms
        if stat.gram is not None:
            tensors[f"{place}.gram"] = stat.gram.matrix
    shards.write(file, tensors.items())


def read(file: Path, device: "torch.device | str" = "cpu") -> dict[str, InputStat]:
    """What `write` wrote, with tensors on `device`."""
    with shards.open_file(file) as stored:
        names = list(stored.keys())
        layers = {n.removesuffix(".of"): int(stored.get_tensor(n)) for n in names if n.endswith(".of")}
        stats = {}
        for place in set(layers.values()):
            tokens, norms = int(stored.get_tensor(f"{place}.tokens")), stored.get_tensor(f"{place}.norms").to(device)
            matrix = stored.get_tensor(f"{place}.gram").to(device) if f"{place}.gram" in names else None
            stats[place] = InputStat(norms, None if matrix is None else Gram(matrix, tokens), tokens)
    return {name: stats[place] for name, place in layers.items()}


def _file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"
