"""What the server counts, in Prometheus' format."""

import functools
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from alphaprune.serving.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


# Of the GPU that serves, or else of this process: its resident memory.
MEMORY = {
    "packed": "bytes of the packed layers",
    "copies": "bytes that kernels keep of packed layers in layouts of their own",
    "kv": "bytes of the KV cache",
    "scratch": "bytes taken beside weights, copies and KV cache",
    "memory_allocated": "bytes taken",
    "memory_peak": "the most bytes that were ever taken",
    "memory_limit": "bytes of weights, copies and KV cache and 1 GB: what a GPU is to stay below",
}


def _memory(engine: "Engine", name: str) -> int:
    return engine.memory()[name.removeprefix("memory_")]


class Metrics:
    """Counters of one server, in a registry of its own; names begin with alphaprune_, seconds and bytes throughout.

    The resident memory of the process is process_resident_memory_bytes, as Prometheus' clients call it everywhere.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"alphaprune_{name}", words, labels, registry=self.registry)

        self.requests = counter(
            "requests", "requests by route and HTTP status; 499: the client left", ("route", "status")
        )
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts that were accepted")
        self.generated_tokens = counter("generated_tokens", "tokens generated")
        self.first_token = Histogram(
            "alphaprune_time_to_first_token_seconds",
            "from the arrival of a request to its first token",
            registry=self.registry,
            buckets=SECONDS,
        )
        self.token = Histogram(
            "alphaprune_time_per_token_seconds",
            "from one token of a request to its next one",
            registry=self.registry,
            buckets=TOKEN_SECONDS,
        )

    def watch(self, engine: "Engine") -> None:
        """Adds what is read from the engine whenever somebody asks."""
        for name, words, read in (
            ("queued_requests", "requests that wait for their first step", engine.queued),
            ("running_requests", "requests in the batch", engine.running),
            ("kv_blocks", "blocks of the KV cache", lambda: engine.kv.blocks),
            ("kv_blocks_used", "blocks of the KV cache that hold a running request", engine.kv_used),
            ("weight_bytes", "bytes of all weights of the model", lambda: engine.weight_bytes),
            *((f"{name}_bytes", words, functools.partial(_memory, engine, name)) for name, words in MEMORY.items()),
        ):
            Gauge(f"alphaprune_{name}", words, registry=self.registry).set_function(read)

    def tell(self, kind: str, value: float) -> None:
        """Counts tokens of a kind, or observes seconds: what an engine tells."""
        counted = {"prompt_tokens": self.prompt_tokens, "generated_tokens": self.generated_tokens}
        if kind in counted:
            counted[kind].inc(value)
        else:
            {"first_token": self.first_token, "token": self.token}[kind].observe(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
