"""The server for some minutes under clients that stream, sample, leave early and send nonsense: what goes wrong.

python bench/soak.py --minutes 10 --clients 32

The embedded model, packed at 70 %, in float32, where every greedy answer has to be that of the same prompt alone, and
every sampled one that of the same prompt and seed alone. Prints one JSON object; the exit status is 1 if an answer was
wrong, a request failed, the server's memory grew by more than `--growth` bytes per minute, or something was still
running, queued or in the cache after the last client had left. Counts are of requests, seconds and bytes throughout:

requests, tokens       answered, and generated for them
errors, differing      requests that failed; answers that are not those of the prompt alone
left, refused          clients that left early; requests that were nonsense and were told so
growth                 bytes per minute, the median slope over all pairs of samples, after the first quarter
rss                    of the server at the end
remaining              requests and blocks of the cache that the server still holds
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import urllib.request
from itertools import combinations
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from serve import PROMPTS
from served import Reply, Served, complete, pack_demo, serve

LONGEST = 96  # tokens of an answer
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 200, "frequency_penalty": 0.5}
NONSENSE = ({"temperature": -1}, {"n": 3}, {"max_tokens": 0}, {"prompt": []}, {"model": "other"}, {"stop": [""]})


class Soak:
    """The clients of one server, and what they found."""

    def __init__(self, server: Served, seconds: float) -> None:
        self.server, self.seconds, self.ends = server, seconds, 0.0
        self.alone: dict[tuple[str, bool], Reply] = {}
        self.counts = dict.fromkeys(("requests", "tokens", "errors", "differing", "left", "refused"), 0)
        self.said: set[str] = set()
        self.samples: list[tuple[float, int]] = []
        self.started = perf_counter()

    async def run(self, clients: int) -> None:
        for prompt in PROMPTS:
            for sampled in (False, True):
                self.alone[prompt, sampled] = await self._ask(prompt, sampled, LONGEST)
        self.ends = monotonic() + self.seconds  # what every prompt gives alone is known now, however long it took
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client(random.Random(number)) for number in range(clients)))
        watch.cancel()

    async def _ask(self, prompt: str, sampled: bool, new: int) -> Reply:
        settings = {**SAMPLED, "seed": len(prompt)} if sampled else {}
        return await complete(self.server.host, self.server.port, prompt, new, **settings)

    async def _client(self, dice: random.Random) -> None:
        while monotonic() < self.ends:
            prompt, sampled, kind = dice.choice(PROMPTS), dice.random() < 0.3, dice.random()
            try:
                if kind < 0.1:
                    await self._leave(prompt, dice.uniform(0, 0.4))
                elif kind < 0.15:
                    await self._talk_nonsense(dice.choice(NONSENSE))
                else:
                    await self._compare(prompt, sampled, dice.randint(1, LONGEST))
            except (OSError, RuntimeError, ValueError, LookupError) as error:
                self.counts["errors"] += 1
                self.said.add(f"{type(error).__name__}: {error}"[:300])

    async def _compare(self, prompt: str, sampled: bool, new: int) -> None:
        reply = await self._ask(prompt, sampled, new)
        self.counts["requests"] += 1
        self.counts["tokens"] += reply.tokens
        alone = self.alone[prompt, sampled]
        same = alone.text.startswith(reply.text) and reply.tokens == min(new, alone.tokens)
        self.counts["differing"] += not same

    async def _leave(self, prompt: str, after: float) -> None:
        try:
            await asyncio.wait_for(self._ask(prompt, False, LONGEST), after)
        except asyncio.TimeoutError:
            self.counts["left"] += 1

    async def _talk_nonsense(self, nonsense: dict[str, Any]) -> None:
        try:
            await complete(self.server.host, self.server.port, **{"prompt": "x", "new": 4, **nonsense})
        except RuntimeError as error:
            if not str(error).startswith(("HTTP/1.1 400", "HTTP/1.1 404")):
                raise
            self.counts["refused"] += 1

    async def _watch(self) -> None:
        while True:
            self.samples.append((perf_counter() - self.started, self.server.rss()))
            await asyncio.sleep(1)

    def growth(self) -> float:
        """Bytes per minute."""
        late = self.samples[len(self.samples) // 4 :: max(1, len(self.samples) // 200)]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(late, 2)]
        return 60 * statistics.median(slopes) if slopes else 0.0


def remaining(server: Served) -> float:
    """Requests and blocks that the server holds, a second after the last one."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        text = answer.read().decode()
    names = tuple(f"alphaprune_{name} " for name in ("running_requests", "queued_requests", "kv_blocks_used"))
    return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith(names))


def soak(folder: Path, minutes: float, clients: int) -> dict[str, Any]:
    """What happened, as a JSON-able dict."""
    with serve(pack_demo(folder / "packed"), folder / "log", "--dtype", "float32") as server:
        found = Soak(server, 60 * minutes)
        asyncio.run(found.run(clients))
        asyncio.run(asyncio.sleep(1))
        result = {"minutes": minutes, "clients": clients, **found.counts, "growth": found.growth()}
        result |= {"rss": server.rss(), "remaining": remaining(server), "said": sorted(found.said)}
    if "Traceback" in (log := (folder / "log").read_text()):
        result["said"].append(log[-2000:])
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--growth", type=float, default=8e6, help="bytes per minute that are no leak yet")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        found = soak(Path(place), options.minutes, options.clients)
    print(json.dumps(found, indent=2))
    wrong = found["errors"] or found["differing"] or found["remaining"] or found["said"] or not found["requests"]
    return int(bool(wrong) or found["growth"] > options.growth)


if __name__ == "__main__":
    sys.exit(main())
