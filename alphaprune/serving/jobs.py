"""What an engine asks of its batch, whichever way that works."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alphaprune.sampling import Sampling


@dataclass
class Output:
    """What a request has so far; error: one sentence if it failed."""

    generated_tokens: list[int]
    finished: bool = False
    error: str | None = None

    def is_finished(self) -> bool:
        return self.finished


@dataclass(eq=False)
class Job:
    """A request: up to `limit` tokens after a prompt, until one of `ends` comes.

    take: called in `loop` with all that there is so far, whenever there is more, as an Output or what has its members.
    """

    id: str
    prompt: list[int]
    limit: int
    ends: frozenset[int]
    sampling: Sampling
    take: Callable[[Any], None]
    loop: asyncio.AbstractEventLoop
