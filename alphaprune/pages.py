"""Weights on huge pages: a step of decoding reads each of them once, and a processor that looks an address up for every
4 KB waits for that, most of all in a virtual machine.

Linux backs anonymous memory by pages of 2 MB where it is asked to. Mapped files lie on them only where the file system
happened to keep them in pieces as large; such weights stay. Where there are no such pages, or no room, nothing changes.
"""

import math
import mmap
from bisect import bisect_right
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
ENOUGH = 0.8  # of a mapping's memory on huge pages: what lies in it stays
SPARE = 1.1  # memory that must be free, over what is moved
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ADDRESSES = "/proc/self/maps"  # of the mappings of this process, at once
PAGES = "/proc/self/smaps"  # the same with what of them is in memory, for which Linux walks every page table


def huge_pages(model: Module, kind: type[nn.Module] = nn.Module) -> Module:
    """Moves the weights of a model on the CPU to huge pages, in place; returns the model.

    What lies on them already stays. A model that was just mapped from its file is read by it, a second or so for each
    GB, and shares no pages with other processes from then on. Parameters stay the same objects, buffers do not.
    kind: of the modules whose weights are moved.
    Nothing happens where the system has no such pages, or too little memory is free for the copy.
    """
    if not offered():
        return model
    waiting = [entry for module in model.modules() if isinstance(module, kind) for entry in _weights(module)]
    waiting = _elsewhere(waiting)
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


def _elsewhere(weights: "list[_Weight]") -> "list[_Weight]":
    """Those that do not lie on huge pages yet: mapped files do where the file system keeps them in large pieces.

    Of each mapping the largest weight is read, because only what was touched has pages.
    """
    starts = [one.first for one in mappings(ADDRESSES)]
    inside: dict[int, list[_Weight]] = {}
    for entry in weights:
        inside.setdefault(bisect_right(starts, entry.tensor.data_ptr()), []).append(entry)
    for entries in inside.values():
        largest = max(entries, key=lambda entry: entry.tensor.nbytes).tensor
        largest.detach().view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
    now = mappings()
    starts, left = [one.first for one in now], []
    for entry in weights:
        place = bisect_right(starts, entry.tensor.data_ptr())
        if not place or now[place - 1].huge < ENOUGH * now[place - 1].resident or not now[place - 1].huge:
            left.append(entry)
    return left


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


class Mapped(NamedTuple):
    """One mapping of this process: its addresses, the bytes of it that are in memory, and those on huge pages.

    Of ADDRESSES the first two only, and 0.
    """

    first: int
    last: int
    resident: int
    huge: int


def mappings(told: str = PAGES) -> list[Mapped]:
    """Those of this process by rising addresses, as Linux tells them in PAGES or ADDRESSES; none where it does not."""
    found: list[list[int]] = []
    try:
        with open(told) as lines:
            for line in lines:
                name, *rest = line.split(None, 2)
                if not name.endswith(":"):
                    found.append([*(int(bound, 16) for bound in name.split("-")), 0, 0])
                elif name == "Rss:":
                    found[-1][2] = int(rest[0]) * 1024
                elif name in ("AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"):
                    found[-1][3] += int(rest[0]) * 1024
    except OSError:
        return []
    return [Mapped(*one) for one in found]


def on_huge_pages(address: int) -> int:
    """Bytes of the mapping at `address` that lie on huge pages; 0 where the system does not say."""
    return next((one.huge for one in mappings() if one.first <= address < one.last), 0)


def _mapping(nbytes: int) -> tuple[mmap.mmap, int] | None:
    """A mapping, and where in it the first of so many bytes on huge pages lies; None if there is no room."""
    if nbytes < HUGE:
        return None
    whole = -(-nbytes // HUGE) * HUGE  # the last page is a huge one, too, wherever the mapping begins
    try:
        block = mmap.mmap(-1, whole + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    return block, -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % HUGE


def _weights(module: nn.Module) -> "list[_Weight]":
    """What is moved of one module, those inside it left out."""
    own = (*module._parameters.items(), *module._buffers.items())
    return [_Weight(module, name, tensor, _place(tensor)) for name, tensor in own if _movable(tensor)]


def _movable(tensor: Tensor | None) -> bool:
    """Whether it is a plain tensor on the CPU; one that stayed would keep the file mapped that it came from."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes > 0


def _place(tensor: Tensor) -> tuple:
    """What two tensors share that are the same bytes in the same form."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape
