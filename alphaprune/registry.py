"""Name → member of a room, imported on first use.

A room (allocators, pruners, formats, kernels) is a package of one file per member. Its `MEMBERS` tuple names the
files in order of preference; each file exports one constant. Adding a member is one file and one name.
"""

import importlib
from typing import Any


def member(room: str, members: tuple[str, ...], name: str, constant: str) -> Any:
    """The object `constant` of the file `name` in the package `room`.

    Raises ValueError naming the known members if there is none of that name.
    """
    if name not in members:
        kind = room.rpartition(".")[2].removesuffix("s")
        raise ValueError(f"no {kind} is called {name!r}; there are: {', '.join(members)}")
    return getattr(importlib.import_module(f"{room}.{name}"), constant)
