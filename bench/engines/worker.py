"""What every engine's runner shares: the same layers from one seed, the check against float64, the loop over commands.

A runner is a process in its engine's own environment, so this file needs numpy only. Commands and answers are JSON
lines: bench/peers.py writes to its standard input and reads a pipe of its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHECKED_ROWS = 64
LOOSE = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2, "q8_0": 5e-2, "q4_0": 0.2}  # largest error by stored values
SHIFT = 37  # rows by which the copies of a weight are rolled: distinct bytes and distinct patterns from one draw


@dataclass(frozen=True)
class Variant:
    """One way in which an engine offers to run a linear layer.

    values: what it stores a weight as. config: its settings in words. sparse: whether it gains from zeros.
    """

    name: str
    values: str
    config: str
    sparse: bool = False


@dataclass
class Job:
    """Some copies of one layer, ready to run.

    run: one pass over all copies. output: y [M, N] of the first copy. nbytes: of one copy as the engine stores it,
    as far as that is known. note: what only this job knows, such as the kernel that was chosen.
    """

    run: Callable[[], None]
    output: Callable[[], np.ndarray]
    layers: int
    nbytes: int
    note: str = ""


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 whose bits fit bfloat16, so that every engine is given the same numbers."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def weight(shape: tuple[int, int], sparsity: float) -> np.ndarray:
    """W [N, K] float32: normal, `sparsity` of it zero; drawn once by one runner and read by the others."""
    drawn = Path(os.environ["PEERS_DRAWN"]) / f"{shape[0]}x{shape[1]}-{sparsity}.npy"
    if not drawn.exists():
        generator = np.random.default_rng(0)
        made = rounded(generator.standard_normal(shape, dtype=np.float32))
        if sparsity:
            made[generator.random(shape, dtype=np.float32) < sparsity] = 0
        half = drawn.with_suffix(f".{os.getpid()}.npy")
        np.save(half, made)
        half.replace(drawn)  # several runners may draw it at once, and the same
    return np.load(drawn)


def copies(made: np.ndarray, count: int):
    """`count` weights with distinct contents; the first is `made`."""
    for i in range(count):
        yield np.roll(made, i * SHIFT, 0) if i else made


def inputs(tokens: int, k: int) -> np.ndarray:
    """x [M, K] float32."""
    return rounded(np.random.default_rng(1).standard_normal((tokens, k), dtype=np.float32))


def count(target: int, nbytes: int, most: int = 32) -> int:
    """How many copies of `nbytes` fill `target` bytes."""
    return min(-(-target // nbytes), most)


def error(y: np.ndarray, x: np.ndarray, made: np.ndarray) -> float:
    """Root mean square of y − x Wᵀ over that of x Wᵀ, in float64 on the first output channels."""
    if y.shape != (len(x), len(made)):
        raise ValueError(f"the output has shape {y.shape}, not {(len(x), len(made))}")
    expected = x.astype(np.float64) @ made[:CHECKED_ROWS].astype(np.float64).T  # [M, CHECKED_ROWS]
    difference = y[:, :CHECKED_ROWS].astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / (expected**2).mean()))


class Server:
    """Answers load, run and clear for one engine.

    engine: has `version`, `variants` (a list of Variant) and `load(name, made, x, target) -> Job`.
    """

    def __init__(self, engine) -> None:
        self.engine = engine
        self.jobs: dict[str, Job] = {}
        self.cached: tuple = (None, None)

    def layer(self, shape: tuple[int, int], sparsity: float) -> np.ndarray:
        if self.cached[0] != (shape, sparsity):
            self.cached = (shape, sparsity), weight(shape, sparsity)
        return self.cached[1]

    def hello(self) -> dict:
        return {"version": self.engine.version, "variants": [vars(v) for v in self.engine.variants]}

    def load(self, key: str, variant: str, shape: list, sparsity: float, tokens: int, target: int) -> dict:
        made = self.layer(tuple(shape), sparsity)
        x = inputs(tokens, shape[1])
        job = self.engine.load(variant, made, x, target)
        off = error(job.output(), x, made)
        values = next(v.values for v in self.engine.variants if v.name == variant)
        if not off <= LOOSE[values]:
            raise ValueError(f"its output is off by {off:.1e} of its size, more than {values} values allow")
        job.run()
        self.jobs[key] = job
        return {"layers": job.layers, "nbytes": job.nbytes, "error": off, "note": job.note}

    def run(self, key: str, warm: str | None) -> dict:
        """Seconds of one layer. warm: a job to run before, untimed, whose weights are not this one's."""
        if warm:
            self.jobs[warm].run()
        start = time.perf_counter()
        self.jobs[key].run()
        return {"seconds": (time.perf_counter() - start) / self.jobs[key].layers}

    def clear(self) -> dict:
        self.jobs.clear()
        self.cached = (None, None)
        return {}


def serve(make: Callable[[int], object]) -> None:
    """Runs until standard input ends. make: builds the engine for a number of threads (the first argument)."""
    answers = os.fdopen(int(os.environ["PEERS_ANSWERS"]), "w")  # not standard output: libraries print there
    server = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if server is None:
                server = Server(make(int(sys.argv[1])))
            answer = getattr(server, command.pop("do"))(**command)
        except Exception as fault:
            answer = {"fault": " ".join(f"{type(fault).__name__}: {fault}".split())[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
