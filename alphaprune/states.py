"""Hidden states between blocks: in memory while they fit, beyond that in a file without a name.

128 windows of 2048 tokens are 4 GB in the width of a model of 70e9 weights. What does not fit into `limit` bytes goes
to a temporary file that no folder lists, so it is gone with the process, however that ends.
"""

import os
import tempfile
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alphaprune import hardware

MODEST = 4 << 30  # bytes that are taken for available where the system does not say
SHARE = 4  # of the memory that is available, by default: one part in so many


@dataclass(frozen=True)
class Room:
    """Where hidden states may lie.

    limit: bytes that stay in memory; by default a quarter of what is available.   folder: of the temporary file; by
    default the system's for such files.
    """

    limit: int | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"memory for hidden states: wanted 0 bytes or more, got {self.limit}")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: there is no such folder for the file of hidden states")


class States(MutableSequence):
    """A list of tensors [batch, length, D]; each is read from the file when it is asked for, if it is there."""

    def __init__(self, room: Room | None = None) -> None:
        self._room = room or Room()
        self._limit = available() // SHARE if self._room.limit is None else self._room.limit
        self._parts: list[Tensor | _Slot] = []
        self._inside = self._end = 0  # bytes in memory; of the file
        self._file = None

    @property
    def spilled(self) -> int:
        """Bytes in the file."""
        return self._end

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        part = self._parts[place]
        return part if isinstance(part, Tensor) else self._read(part)

    def __setitem__(self, place, tensor: Tensor) -> None:
        old = self._parts[place]
        if isinstance(old, Tensor):
            self._inside += tensor.nbytes - old.nbytes
            self._parts[place] = tensor
        else:
            slot = old if tensor.nbytes == old.nbytes else self._slot(tensor)
            self._parts[place] = self._write(tensor, slot.start)

    def __delitem__(self, place) -> None:
        """Drops some; the file keeps its size."""
        gone = self._parts[place] if isinstance(place, slice) else [self._parts[place]]
        self._inside -= sum(part.nbytes for part in gone if isinstance(part, Tensor))
        del self._parts[place]

    def insert(self, place: int, tensor: Tensor) -> None:
        if self._inside + tensor.nbytes <= self._limit:
            self._inside += tensor.nbytes
            self._parts.insert(place, tensor)
        else:
            self._parts.insert(place, self._write(tensor, self._slot(tensor).start))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[place] for place in range(len(self)))

    def copy(self) -> "States":
        """The same tensors in a list of their own, in the same kind of room."""
        made = States(self._room)
        made.extend(self)
        return made

    def _slot(self, tensor: Tensor) -> "_Slot":
        slot = _Slot(self._end, tensor.shape, tensor.dtype, tensor.device, tensor.nbytes)
        self._end += tensor.nbytes
        return slot

    def _write(self, tensor: Tensor, start: int) -> "_Slot":
        data = memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
        done = 0
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._room.folder, buffering=0)  # noqa: SIM115 - lives on
            while done < len(data):  # one call writes 2 GB at most
                done += os.pwrite(self._file.fileno(), data[done:], start + done)
        except OSError as error:
            where = self._room.folder or tempfile.gettempdir()
            raise ValueError(
                f"{where}: hidden states between blocks, {self._end / 1e9:.3g} GB by now, do not fit there: "
                f"{error.strerror or error}; give --spill DIR with more room, or keep more in --memory GB"
            ) from error
        return _Slot(start, tensor.shape, tensor.dtype, tensor.device, tensor.nbytes)

    def _read(self, slot: "_Slot") -> Tensor:
        data = torch.zeros(slot.nbytes, dtype=torch.uint8)
        view, done = memoryview(data.numpy()), 0
        while done < slot.nbytes:
            count = os.preadv(self._file.fileno(), [view[done:]], slot.start + done)
            if count == 0:
                raise OSError("the file of hidden states is shorter than what was written to it")
            done += count
        return data.view(slot.dtype).reshape(slot.shape).to(slot.device)


@dataclass(frozen=True)
class _Slot:
    """A tensor in the file."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    nbytes: int


def available() -> int:
    """Bytes of memory that this process may still take: of the machine, or of its control group where that has less."""
    found = hardware.memory_free()
    return MODEST if found is None else found
