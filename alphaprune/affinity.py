"""Which CPUs this process may use, and OpenMP's threads bound to a core each."""

import os
import sys
from pathlib import Path

_allowed: frozenset[int] | None = None  # before a binding, which narrows what the first thread may use


def cpus() -> frozenset[int]:
    """The CPUs that this process may use, whatever its threads were bound to by `pin`."""
    if _allowed is not None:
        return _allowed
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def pin() -> None:
    """Lets OpenMP bind each thread to a core of its own. It reads that once, so torch must not be imported yet.

    ValueError if it is, or the system cannot bind threads.
    """
    global _allowed
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("--pin core: this system does not bind threads to cores; leave it out")
    if "torch" in sys.modules:
        raise ValueError(
            "--pin core: torch is imported and its threads exist; start Python with OMP_PROC_BIND=close and "
            "OMP_PLACES=cores instead"
        )
    _allowed = cpus()
    os.environ.update(OMP_PROC_BIND="close", OMP_PLACES="cores")


def bound() -> list[list[int]]:
    """The places that threads of this process are bound to, each once: lists of CPUs, fewer than all of `cpus`."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            allowed = os.sched_getaffinity(int(task.name))
        except OSError:  # it has ended since
            continue
        if allowed < cpus():
            found.add(tuple(sorted(allowed)))
    return [list(place) for place in sorted(found)]
