"""The runners as processes, and the rounds in which they are timed by turns."""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import setups

from alphaprune import hardware

HERE = Path(__file__).parent
PASSING = 5 << 28  # bytes of weights that one round reads in all: no cache keeps a weight until the next round
PER_JOB = 192 << 20  # and that each job reads, so that the start of a pass does not weigh
FEW_TOKENS = 16  # above it the arithmetic bounds, and fewer copies are enough:
MANY_TOKENS_PER_JOB = 64 << 20
WARM_SECONDS = 0.05  # a pass that takes longer needs no warm-up
SLOW_TO_LOAD = ("deepsparse",)  # at many tokens; then only at the sparsity nearest to
TYPICAL = 0.7
MOST_ROUNDS = 31
DISTURBED = 0.1  # share of the cores that others may take in a round that counts
TICKS = os.sysconf("SC_CLK_TCK")
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
QUIET = {"NM_DISABLE_ANALYTICS": "True"}

Tell = Callable[[str], None]


class Fault(Exception):
    """A runner could not do what it was asked to; the sentence is its own."""


def cores() -> int:
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """The CPU's name and what of its vector units the engines ask for."""
    name = hardware.full_name(*hardware.processor())
    there = hardware.instruction_sets()
    units = [unit for unit in ("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if unit in there]
    return f"{name}, {cores()} cores, {' '.join(units) or 'no AVX-512'}"


class Worker:
    """One runner: a process in its engine's environment, stopped whenever it is not asked anything.

    drawn: a folder where the runners share the weights that they draw.
    """

    def __init__(self, engine: str, python: Path, threads: int, drawn: Path) -> None:
        self.engine = engine
        settings = {"OMP_NUM_THREADS": str(threads), "PEERS_DRAWN": str(drawn), **QUIET}
        if engine in ("torch", "alphaprune"):
            settings["PYTHONPATH"] = str(HERE.parent.parent)
        reading, writing = os.pipe()
        self.answers = os.fdopen(reading)
        self.process = subprocess.Popen(
            [str(python), str(HERE / f"run_{engine}.py"), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | settings | {"PEERS_ANSWERS": str(writing)},
            pass_fds=(writing,),
            preexec_fn=_die_with_parent,
        )
        os.close(writing)
        hello = self.ask(do="hello")
        self.version, self.variants = hello["version"], hello["variants"]

    def ask(self, **command) -> dict:
        """The answer; Fault with the runner's sentence."""
        try:
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            text = self.answers.readline()
        except OSError:
            text = ""
        if not text:
            raise Fault(f"its process ended with {self.process.wait()}")
        answer = json.loads(text)
        if "fault" in answer:
            raise Fault(answer["fault"])
        return answer

    def pause(self) -> None:
        """Stops all its threads, so that none of them spins while another engine is timed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGSTOP)

    def ticks(self) -> int:
        """CPU time so far, in clock ticks."""
        return _ticks(self.process.pid) if self.process.poll() is None else 0

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        with contextlib.suppress(BrokenPipeError):  # what could not be written to a dead process
            self.process.stdin.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def _ticks(pid: int | str) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _busy() -> int:
    """Ticks in which some core of this machine did anything, stolen ones included."""
    values = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(values) - values[3] - values[4]


def start(names: Iterable[str], folder: Path | None, threads: int, drawn: Path, tell: Tell) -> dict[str, Worker]:
    """The runners that work here; a sentence for each of the others."""
    workers = {}
    for name in names:
        python = setups.python(name, folder)
        if isinstance(python, str):
            tell(python)
            continue
        try:
            workers[name] = Worker(name, python, threads, drawn)
        except (Fault, OSError) as fault:
            tell(f"{name}: {fault}")
    return workers


@dataclass
class Measured:
    """One engine's variant at one shape, sparsity and number of tokens."""

    engine: str
    version: str
    variant: str
    values: str
    config: str
    shape: tuple[int, int]
    sparsity: float | None
    tokens: int
    layers: int
    nbytes: int
    error: float
    times: list[float] = field(default_factory=list)
    foreign: float = 0.0

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)

    def row(self) -> dict:
        first, _, third = statistics.quantiles(self.times, n=4, method="inclusive")
        kept = {k: v for k, v in vars(self).items() if k != "times"}
        return kept | {
            "rounds": len(self.times),
            "seconds": self.seconds,
            "quartiles": [first, third],
            "fastest": min(self.times),
            "weights_per_second": self.shape[0] * self.shape[1] / self.seconds,
        }


class Chunk:
    """All jobs of one shape and number of tokens, loaded."""

    def __init__(
        self,
        workers: dict[str, Worker],
        shape: tuple[int, int],
        tokens: int,
        sparsities: Sequence[float],
        everything: bool,
        tell: Tell,
    ) -> None:
        self.workers, self.shape, self.tokens, self.tell = workers, shape, tokens, tell
        wanted = {}
        for name, worker in workers.items():
            few = name in SLOW_TO_LOAD and tokens > FEW_TOKENS and not everything
            wanted[name] = _jobs(worker, [min(sparsities, key=lambda s: abs(s - TYPICAL))] if few else sparsities)
        number = sum(map(len, wanted.values()))
        self.passes: dict[tuple[str, str], float] = {}  # seconds of the last pass of each job
        self.loading: dict[str, float] = {}
        self.target = max(PER_JOB, -(-PASSING // max(1, number))) if tokens <= FEW_TOKENS else MANY_TOKENS_PER_JOB
        with ThreadPoolExecutor(max(1, len(workers))) as pool:
            loaded = list(pool.map(lambda name: self.load(workers[name], wanted[name]), workers))
        by_turns = itertools.chain.from_iterable(itertools.zip_longest(*loaded))
        self.jobs: dict[tuple[str, str], Measured] = {key: job for key, job in filter(None, by_turns)}
        passing = sum(job.layers * job.nbytes for job in self.jobs.values())
        if tokens <= FEW_TOKENS and passing < 1 << 30:
            tell(f"a round reads only {passing / 1e6:.0f} MB of weights: part of them may stay in a cache")

    def load(self, worker: Worker, wanted: list[tuple[dict, float | None]]) -> list[tuple[tuple[str, str], Measured]]:
        """The jobs of one runner, without those that it cannot do."""
        done, begun = [], time.perf_counter()
        for variant, sparsity in wanted:
            key = f"{variant['name']} {sparsity}"
            command = {"key": key, "variant": variant["name"], "shape": self.shape, "tokens": self.tokens}
            try:
                if not done:
                    worker.ask(do="clear")
                found = worker.ask(do="load", sparsity=sparsity or 0, target=self.target, **command)
            except Fault as fault:
                self.tell(f"{worker.engine}, {variant['name']}, {self.tokens} tokens: {fault}")
                continue
            note = found.pop("note")
            made = Measured(
                engine=worker.engine,
                version=worker.version,
                variant=variant["name"],
                values=variant["values"],
                config="; ".join(filter(None, (variant["config"], note))),
                shape=self.shape,
                sparsity=sparsity,
                tokens=self.tokens,
                **found,
            )
            done.append(((worker.engine, key), made))
        worker.pause()
        self.loading[worker.engine] = time.perf_counter() - begun
        return done

    def measure(self, rounds: int, seconds: float) -> list[Measured]:
        """At least `rounds` rounds, more while `seconds` last; rounds that others disturbed are taken again.

        If there are too few undisturbed ones among three times as many, the least disturbed count.
        """
        if not self.jobs:
            return []
        taken: list[tuple[float, list[float]]] = []
        begun = time.perf_counter()
        while len(taken) < MOST_ROUNDS:
            clean = sum(foreign <= DISTURBED for foreign, _ in taken)
            enough = clean >= rounds and time.perf_counter() - begun > seconds
            if enough or (clean < rounds and len(taken) >= 3 * rounds):
                break
            taken.append(self.round())
        taken.sort(key=lambda one: one[0])
        clean = [one for one in taken if one[0] <= DISTURBED]
        kept = clean if len(clean) >= rounds else taken[:rounds]
        for i, job in enumerate(self.jobs.values()):
            job.times = [times[i] for _, times in kept]
            job.foreign = round(statistics.median(foreign for foreign, _ in kept), 3)
        return list(self.jobs.values())

    def round(self) -> tuple[float, list[float]]:
        """(share of the cores that others took, seconds of each job)."""
        begun, busy, own = time.perf_counter(), _busy(), self.own()
        times = [self.time(name, key) for name, key in self.jobs]
        others = (_busy() - busy) - (self.own() - own)
        return max(0.0, others / TICKS / (time.perf_counter() - begun) / os.cpu_count()), times

    def own(self) -> int:
        return _ticks("self") + sum(worker.ticks() for worker in self.workers.values())

    def time(self, name: str, key: str) -> float:
        """Seconds of one layer; a short pass is run after another job of the same runner, so that it starts awake."""
        same = [k for n, k in self.jobs if n == name]
        before = same[same.index(key) - 1]
        warm = before if before != key and self.passes.get((name, before), 0) < WARM_SECONDS else None
        try:
            seconds = self.workers[name].ask(do="run", key=key, warm=warm)["seconds"]
        except Fault as fault:
            raise Fault(f"{name}, {key}: {fault}") from None
        finally:
            self.workers[name].pause()
        self.passes[name, key] = seconds * self.jobs[name, key].layers
        return seconds


def _jobs(worker: Worker, sparsities: Sequence[float]) -> list[tuple[dict, float | None]]:
    """(variant, sparsity) of all that a runner is to be loaded with; one entry for a dense variant."""
    dense = [(variant, None) for variant in worker.variants if not variant["sparse"]]
    return dense + [(v, sparsity) for sparsity in sparsities for v in worker.variants if v["sparse"]]


if __name__ == "__main__":
    sys.exit("this is a part of bench/peers.py")
