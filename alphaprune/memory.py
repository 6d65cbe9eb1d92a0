"""The memory of a device: what is free, what is taken, and one sentence when it does not suffice."""

import contextlib
import ctypes
import re
import resource
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from alphaprune import devices, hardware
from alphaprune.console import size
from alphaprune.files import first_line

Module = TypeVar("Module", bound=nn.Module)

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def free(device: torch.device | str) -> int | None:
    """Bytes that can be taken: of a GPU what the driver has and torch keeps unused, otherwise of the system's memory.

    None where nobody says.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return hardware.memory_free()


def allocated(device: torch.device | str) -> int:
    """Bytes taken now: of a GPU by torch's tensors, otherwise the resident memory of this process."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def anonymous() -> int:
    """Bytes of this process in memory that are of no file; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("RssAnon:")).split()[1])
    except (OSError, StopIteration):
        return 0


def trim() -> None:
    """Gives the system back what the C library keeps of freed memory, where that is glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak(device: torch.device | str) -> int:
    """The most bytes that were ever taken: of a GPU by torch, its unused part included, otherwise by this process."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def check(needs: Mapping[str, int], device: torch.device | str, remedy: str) -> None:
    """ValueError naming every part of `needs`, in bytes, if together they are more than is free."""
    available = free(device)
    if available is not None and sum(needs.values()) > available:
        raise ValueError(f"{_wanted(needs, device)}, {size(available)} are free; {remedy}")


def release(device: torch.device, after: BaseException | None = None) -> None:
    """Gives back to a GPU what torch keeps of it unused, for allocations of other sizes.

    after: an error that is being handled; what the calls held that it ended is free then, too.
    """
    while after is not None:
        traceback.clear_frames(after.__traceback__)
        after = after.__cause__ or after.__context__
    if device.type == "cuda":
        torch.cuda.empty_cache()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, behind what that has to do; from pinned memory, so that the host goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def explained(needs: Mapping[str, int], device: torch.device | str, remedy: str) -> Iterator[None]:
    """Turns running out of memory inside into a ValueError that names what was needed for what, in bytes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise ValueError(f"{_wanted(needs, device)}, and {_last(error)}; {remedy}") from error


def nbytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def moved(module: Module, device: str, name: str) -> Module:
    """The module, called `name` for its user, on a device; ValueError if that is not here or has too little memory."""
    where = devices.named(device)
    with explained({f"the weights of {name}": nbytes(module)}, where, "take a device with more, or the CPU"):
        return module.to(where)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of a device or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def device_fault(error: BaseException) -> str | None:
    """One sentence of an error that is the device's, or a want of memory; None for what is a mistake in a program."""
    if is_shortage(error):
        return f"out of memory: {_last(error)}; take shorter texts, smaller batches, or a device with more memory"
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or str(error).startswith("CUDA error"):
        return f"the device failed: {first_line(error)}"
    return None


def _last(error: BaseException) -> str:
    """What could not be had in the end."""
    asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
    return f"{asked[1]} more could not be had" if asked else "there was no more"


def _wanted(needs: Mapping[str, int], device: torch.device | str) -> str:
    parts = ", ".join(f"{size(nbytes)} for {name}" for name, nbytes in needs.items())
    return f"{device} has too little memory: {size(sum(needs.values()))} are needed ({parts})"
