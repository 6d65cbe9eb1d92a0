"""The memory of a device: what is free, what is taken, and one sentence when it does not suffice."""

import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from alphaprune import hardware
from alphaprune.console import size

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def free(device: torch.device | str) -> int | None:
    """Bytes that can be taken: of a GPU what the driver has and torch keeps unused, otherwise of the system's memory.

    None where nobody says.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return hardware.memory().get("MemAvailable")


def allocated(device: torch.device | str) -> int:
    """Bytes taken now: of a GPU by torch's tensors, otherwise the resident memory of this process."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


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
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(f"{_wanted(needs, device)}, and there was no more; {remedy}") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise ValueError(f"{_wanted(needs, device)}, and there was no more; {remedy}") from error


def _wanted(needs: Mapping[str, int], device: torch.device | str) -> str:
    parts = ", ".join(f"{size(nbytes)} for {name}" for name, nbytes in needs.items())
    return f"{device} has too little memory: {size(sum(needs.values()))} are needed ({parts})"
