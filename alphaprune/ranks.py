"""Several processes that do one command together, as `torchrun` starts them: who does what, and how results meet.

Nothing here acts unless `joined` was entered. Results never depend on how many processes there are: work is cut into
the same pieces whatever their number, and pieces are added in one order. Floating-point libraries give the same bits
for the same number of threads, so that has to be the same, too.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alphaprune
from alphaprune import console

TIMEOUT = timedelta(hours=2)  # of a process that lives and does not answer; one that is gone is noticed at once
STRIP = 1 << 24  # bytes of each summand that are exchanged at a time


@dataclass(frozen=True)
class World:
    """One of `size` processes, number `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0


ALONE = World()
_world = ALONE


def world() -> World:
    """The processes that work together now: one, unless `joined` was entered by several."""
    return _world


@contextmanager
def joined(command: str, arguments: Mapping[str, Any]) -> Iterator[World]:
    """Joins the processes that torchrun has started, if it has; they part at the end.

    Raises ValueError if they differ in version, code or arguments, or when one of them is gone.
    """
    global _world
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or _world.size > 1:
        yield _world
        return
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", size)):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    with _explained():
        dist.init_process_group(backend, timeout=TIMEOUT)
    _world = World(dist.get_rank(), size)
    shown, console.SHOWN = console.SHOWN, _world.leads
    try:
        agree({"version": alphaprune.__version__, "torch": torch.__version__, "code": code(), "command": command})
        agree({f"--{name.replace('_', '-')}": value for name, value in arguments.items()})
        agree({"threads of torch": torch.get_num_threads()})
        yield _world
    finally:
        _world, console.SHOWN = ALONE, shown
        dist.destroy_process_group()


def device(asked: str | None) -> str | None:
    """The device of this process for what was asked for: of several GPUs each process has its own."""
    if _world.size == 1 or asked not in (None, "auto", "cuda") or not torch.cuda.is_available():
        return asked
    if asked is None:
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def agree(facts: Mapping[str, Any]) -> None:
    """ValueError, on every process, naming the first of these that is not the same on all."""
    found = gather({name: repr(value) for name, value in facts.items()})
    for name in found[0]:
        for rank, other in enumerate(found):
            if other.get(name) != found[0][name]:
                raise ValueError(
                    f"rank {rank} has another {name} than rank 0: {_short(other.get(name))}, not "
                    f"{_short(found[0][name])}; start all of them with the same"
                )


def gather(value: Any) -> list[Any]:
    """What every process gives, by rank; value: anything that can be pickled."""
    if _world.size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * _world.size
    with _explained():
        dist.all_gather_object(found, value)
    return found


def share(value: Any, owner: int = 0) -> Any:
    """What the process `owner` gives; value: anything that can be pickled, ignored on the others."""
    if _world.size == 1:
        return value
    import torch.distributed as dist

    box = [value if _world.rank == owner else None]
    with _explained():
        dist.broadcast_object_list(box, src=owner)
    return box[0]


def share_tensor(tensor: Tensor, owner: int = 0) -> Tensor:
    """The tensor of the process `owner`; of `tensor`, those of the others, only shape, dtype and device count."""
    if _world.size == 1:
        return tensor
    import torch.distributed as dist

    moved = (tensor if _direct(tensor) else tensor.to("cpu")).contiguous()
    if _world.rank != owner:
        moved = torch.zeros_like(moved)  # the tensor may be mapped from a file
    with _explained():
        dist.broadcast(moved.reshape(-1).view(torch.uint8), src=owner)
    return moved.to(tensor.device)


def mine(costs: Mapping[str, float]) -> dict[str, int]:
    """Which rank does which of these: the dearest first, each to the one that has least to do so far."""
    loads, owners = [0.0] * _world.size, {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable: the same on every process
        rank = min(range(_world.size), key=loads.__getitem__)
        owners[name] = rank
        loads[rank] += costs[name]
    return owners


def strands(pieces: int, most: int) -> tuple[list[range], int]:
    """The pieces of a sum of so many as they are added: in strands, whatever the number of processes.

    Returns the strands of this process, and how many there are, `most` at most. Those of one process follow on each
    other, and process 0 has the first.
    """
    count = min(pieces, most)
    first, last = (-(-rank * count // _world.size) for rank in (_world.rank, _world.rank + 1))
    return [range(s * pieces // count, (s + 1) * pieces // count) for s in range(first, last)], count


def fold(parts: Sequence[Tensor], like: Tensor, count: int) -> Tensor:
    """The sum over the `count` strands of all processes, added in order, the same bits on each.

    parts: of this process's strands, each as `like`, which gives shape and dtype where there is none.
    """
    if _world.size == 1:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    import torch.distributed as dist

    have = [-(-(r + 1) * count // _world.size) - -(-r * count // _world.size) for r in range(_world.size)]
    total = torch.zeros_like(like).reshape(-1)
    step = max(1, STRIP // like.element_size())
    for start in range(0, total.numel(), step):
        strip = total[start : start + step]
        own = strip.new_zeros(max(have), strip.numel())
        for place, part in enumerate(parts):
            own[place] = part.reshape(-1)[start : start + step]
        own = own if _direct(own) else own.to("cpu")
        found = [torch.zeros_like(own) for _ in have]
        with _explained():
            dist.all_gather(found, own)
        rows = [rows[place] for rows, number in zip(found, have, strict=True) for place in range(number)]
        summed = rows[0]
        for row in rows[1:]:
            summed = summed + row
        strip.copy_(summed)
    return total.reshape(like.shape)


def code() -> str:
    """sha256 over the sources of the package."""
    digest, folder = hashlib.sha256(), Path(alphaprune.__file__).parent
    for file in sorted((*folder.rglob("*.py"), *(folder / "kernels").glob("*.py"))):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def _direct(tensor: Tensor) -> bool:
    """Whether a tensor can be exchanged from where it is."""
    import torch.distributed as dist

    return tensor.device.type == "cpu" or "nccl" in str(dist.get_backend_config())


@contextmanager
def _explained() -> Iterator[None]:
    """Turns the loss of another process into one sentence."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed has types of its own only for some of what can happen
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"another process of this run is gone or does not answer ({_short(reason)}); its own message says why. "
            f"Start all again: what is finished is kept"
        ) from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
