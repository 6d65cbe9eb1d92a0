"""Weights on huge pages: a step of decoding reads each of them once, and a processor that looks an address up for every
4 KB waits for that, most of all in a virtual machine.

Linux backs anonymous memory by pages of 2 MB where it is asked to; those of a mapped file stay small. Elsewhere, and
where there is no room, nothing changes.
"""

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from alphaprune import memory

Module = TypeVar("Module", bound=nn.Module)

HUGE = 2 << 20  # bytes of a page
ALIGN = 64  # bytes that tensors start on
TOGETHER = 64 << 20  # tensors share a mapping of about so many bytes, which is free again when the last of them is
LEAST = 1 << 15  # bytes; smaller tensors stay where they are
SPARE = 1.1  # memory that must be free, over what is moved
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages(model: Module, kind: type[nn.Module] = nn.Module) -> Module:
    """Moves the weights of a model on the CPU to huge pages, in place; returns the model.

    One that was just mapped from its file is read by it, and shares no pages with other processes from then on.
    Parameters stay the same objects, buffers do not. kind: of the modules whose weights are moved.
    Nothing happens where the system has no such pages, or too little memory is free for the copy.
    """
    if not offered():
        return model
    waiting = [entry for module in model.modules() if isinstance(module, kind) for entry in _weights(module)]
    if not _fit(sum({entry.place: entry.tensor.nbytes for entry in waiting}.values())):
        return model
    waiting.reverse()
    moved: dict[tuple, Tensor] = {}  # by the place that it had: what was tied stays so
    while waiting:
        batch: list[_Weight] = []
        while waiting and sum(entry.tensor.nbytes for entry in batch) < TOGETHER:
            batch.append(waiting.pop())
        new = {entry.place: entry.tensor for entry in batch if entry.place not in moved}
        moved |= dict(zip(new, placed(list(new.values())), strict=True))
        for entry in batch:
            entry.put(moved[entry.place])
        del batch, new, entry
        memory.trim()  # of what they were, which makes room for the next
    return model


def _fit(total: int) -> bool:
    """Whether weights of so many bytes are worth moving, and there is memory for it.

    What this process has in memory of its own is free again as they move; what it has mapped was not taken.
    """
    free, own = memory.free("cpu"), memory.anonymous()
    return total >= HUGE and (free is None or SPARE * total - own + TOGETHER <= free)


class _Weight(NamedTuple):
    module: nn.Module
    name: str
    tensor: Tensor
    place: tuple

    def put(self, new: Tensor) -> None:
        if self.name in self.module._parameters:
            self.tensor.data = new
        else:  # another object: whoever bound a kernel to the address of the old one sees that
            self.module._buffers[self.name] = new


def placed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of contiguous tensors side by side in one mapping on huge pages, or copies as usual where there are none.

    The mapping lives as long as any of them. Each has a storage of its own, as files that hold them want it.
    """
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.nbytes // ALIGN) * ALIGN
    found = _mapping(total) if offered() and all(tensor.device.type == "cpu" for tensor in tensors) else None
    if found is None:
        return [tensor.clone() for tensor in tensors]
    block, first = found
    copies = []
    for start, tensor in zip(starts, tensors, strict=True):
        if not tensor.numel():
            copies.append(tensor.clone())
            continue
        copy = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel(), offset=first + start)
        copies.append(copy.view(tensor.shape).copy_(tensor))
    return copies


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, on huge pages on a CPU that has them: for keys and values, which a step reads, too."""
    count = math.prod(shape)
    found = _mapping(count * dtype.itemsize) if offered() and device.type == "cpu" else None
    if found is None:
        return torch.empty(shape, dtype=dtype, device=device)
    block, first = found
    return torch.frombuffer(block, dtype=dtype, count=count, offset=first).view(shape)


def offered() -> bool:
    """Whether the system gives huge pages to whoever asks for them."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SETTING.read_text()
    except OSError:
        return False


def on_huge_pages(address: int) -> int:
    """Bytes of the mapping at `address` that lie on huge pages, as Linux counts them; 0 where it does not say."""
    inside = False
    try:
        with open("/proc/self/smaps") as lines:
            for line in lines:
                if (bounds := line.split(" ", 1)[0]).count("-") == 1 and not bounds.endswith(":"):
                    first, last = (int(bound, 16) for bound in bounds.split("-"))
                    inside = first <= address < last
                elif inside and line.startswith("AnonHugePages:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _mapping(nbytes: int) -> tuple[mmap.mmap, int] | None:
    """A mapping, and where in it the first of so many bytes on huge pages lies; None if there is no room."""
    if nbytes < HUGE:
        return None
    try:
        block = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    return block, -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % HUGE


def _weights(module: nn.Module) -> "list[_Weight]":
    """What is moved of one module, those inside it left out."""
    own = (*module._parameters.items(), *module._buffers.items())
    return [_Weight(module, name, tensor, _place(tensor)) for name, tensor in own if _movable(tensor)]


def _movable(tensor: Tensor | None) -> bool:
    """Whether it is a plain tensor on the CPU, and worth it."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return False
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes >= LEAST


def _place(tensor: Tensor) -> tuple:
    """What two tensors share that are the same bytes in the same form."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape
