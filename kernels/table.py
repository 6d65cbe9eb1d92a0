"""Time tables: measured seconds of every kernel and of dense layers, by shape, tokens and density. Data, not code.

A table belongs to a machine and a number of threads, or to a GPU. Those of the package lie in kernels/tables, the
user's own, which `alphaprune bench --tune` writes, in the cache folder; the user's go first. ALPHAPRUNE_TIMES=off rules
all out, and ALPHAPRUNE_TIMES=FILE names the only one, of the CPU or of the GPUs, as the file says.
"""

import functools
import hashlib
import itertools
import json
import logging
import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from alphaprune import __version__, affinity, hardware
from alphaprune.files import atomic_write_text
from alphaprune.formats import native

VERSION = 1
DENSE = "dense"  # a dense layer as our decoder calls it, measured beside the kernels
SHIPPED = Path(__file__).resolve().parent / "tables"
NEVER = 1.0  # the break-even of a layer that gains at no sparsity

log = logging.getLogger("alphaprune")


@dataclass(frozen=True)
class Machine:
    """What a time depends on besides the problem: the processor, the instruction sets of this build on it, cores.

    model: family, model and stepping, which tell processors apart that clouds give the same name.
    """

    cpu: str
    model: str
    isas: tuple[str, ...]
    cores: int

    @classmethod
    def here(cls) -> "Machine":
        """This machine, whatever ALPHAPRUNE_ISA allows of it."""
        name, model = hardware.processor()
        module = native.load()
        usable = () if module is None else tuple(name for name, missing in module.isas() if not missing)
        return cls(name, model, usable, len(affinity.cpus()))

    def __str__(self) -> str:
        return f"{hardware.full_name(self.cpu, self.model)}, {self.cores} cores"


@dataclass(frozen=True)
class Gpu:
    """What a time on a GPU depends on besides the problem: its name, which tells memories and slices apart, and its
    compute capability, such as "9.0"."""

    gpu: str
    capability: str

    @classmethod
    def at(cls, index: int) -> "Gpu":
        """The CUDA device of that number."""
        major, minor = torch.cuda.get_device_capability(index)
        return cls(torch.cuda.get_device_name(index), f"{major}.{minor}")

    def __str__(self) -> str:
        return f"{self.gpu}, compute capability {self.capability}"


@dataclass(frozen=True)
class Curve:
    """Median seconds of one call, for each of `tokens` (rising), of a kernel on W [N, K] = shape at one sparsity.

    weight, x: names of dtypes, such as "bfloat16"; of a dense weight both are the same and the sparsity is 0. x is
    "int8" where the kernel rounds it so. A curve that ends before the others do belongs to a kernel that had lost too
    far to be asked again.
    """

    kernel: str
    weight: str
    x: str
    shape: tuple[int, int]
    sparsity: float
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, tokens: int, last: int) -> float | None:
        """Seconds between the measured points by a power law; past the `last` of the table in proportion to tokens."""
        if tokens <= self.tokens[0]:
            return self.seconds[0]
        if tokens > self.tokens[-1]:
            return None if self.tokens[-1] < last else self.seconds[-1] * tokens / self.tokens[-1]
        i = bisect_left(self.tokens, tokens)
        return _between(tokens, self.tokens[i - 1], self.tokens[i], self.seconds[i - 1], self.seconds[i])


@dataclass(frozen=True, eq=False)
class Table:
    """All curves of one machine with one number of threads, or of one GPU; its `threads` are 0.

    bandwidth: bytes/s that its memory was read with, of a GPU read and written by copies. path: the file, empty if
    there is none.
    """

    machine: Machine | Gpu
    threads: int
    curves: tuple[Curve, ...]
    bandwidth: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    path: str = ""

    @property
    def place(self) -> str:
        """Where the times hold, for a person."""
        return str(self.machine) if isinstance(self.machine, Gpu) else f"{self.machine}, {self.threads} threads"

    @functools.cached_property
    def tokens(self) -> tuple[int, ...]:
        """Every number of tokens that was measured, rising."""
        return tuple(sorted({t for curve in self.curves for t in curve.tokens}))

    @functools.cached_property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that were measured, by name."""
        return tuple(sorted({curve.kernel for curve in self.curves} - {DENSE}))

    @functools.cached_property
    def _index(self) -> dict[tuple[str, str, str], dict[tuple[int, int], list[Curve]]]:
        found: dict[tuple[str, str, str], dict[tuple[int, int], list[Curve]]] = {}
        for curve in sorted(self.curves, key=lambda c: c.sparsity):
            shapes = found.setdefault((curve.kernel, curve.weight, curve.x), {})
            shapes.setdefault(curve.shape, []).append(curve)
        return found

    @functools.cached_property
    def borders(self) -> tuple[int, ...]:
        """Between neighbours of `tokens`, the last number that is nearer by ratio to the smaller."""
        return tuple(math.isqrt(a * b) for a, b in itertools.pairwise(self.tokens))

    def step(self, tokens: int) -> int:
        """The measured number of tokens that stands for so many."""
        return self.tokens[bisect_left(self.borders, tokens)]

    def predict(
        self, kernel: str, shape: tuple[int, int], density: float, tokens: int, weight: torch.dtype, x: torch.dtype
    ) -> float | None:
        """Seconds of one call, or None where the table cannot tell. For DENSE, density is of no matter.

        A power law in the number of weights between the measured shapes, in proportion outside them; linear in density.
        """
        shapes = self._index.get((kernel, _name(weight), _name(x)))
        if not shapes:
            return None
        size = shape[0] * shape[1]
        below = _nearest(shape, [s for s in shapes if s[0] * s[1] <= size], largest=True)
        above = _nearest(shape, [s for s in shapes if s[0] * s[1] >= size], largest=False)
        found = {s: _at_density(shapes[s], 1 - density, tokens, self.tokens[-1]) for s in (below, above) if s}
        if None in found.values():
            return None
        if below and above:
            return _between(size, math.prod(below), math.prod(above), found[below], found[above])
        only = below or above
        return found[only] * size / math.prod(only)

    def best(
        self,
        shape: tuple[int, int],
        density: float,
        tokens: int,
        weight: torch.dtype,
        x: torch.dtype,
        kernels: Iterable[str] | None = None,
    ) -> tuple[str, float] | None:
        """The fastest of the kernels (all that were measured, if not named) and its seconds; None if none is known."""
        names = self.kernels if kernels is None else kernels
        found = {name: self.predict(name, shape, density, tokens, weight, x) for name in names}
        known = [(name, seconds) for name, seconds in found.items() if seconds is not None]
        return min(known, key=lambda pair: pair[1]) if known else None

    def dense(self, shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> float | None:
        """Seconds of torch's dense layer; one of int8 values competes with the dense layer in what x comes in."""
        kind = unrounded(x) if weight == torch.int8 else weight
        return self.predict(DENSE, shape, 1.0, tokens, kind, kind)

    def break_even(
        self,
        shape: tuple[int, int],
        tokens: int,
        weight: torch.dtype,
        x: torch.dtype,
        kernels: Iterable[str] | None = None,
    ) -> float | None:
        """The least sparsity, in steps of 0.01, from which on packed is faster than dense; NEVER, or None if unknown.

        Past the sparsest measurement its time stands for all. kernels: as `best` takes them.
        """
        dense, found = self.dense(shape, tokens, weight, x), None
        for percent in range(99, -1, -1):
            best = self.best(shape, 1 - percent / 100, tokens, weight, x, kernels)
            if dense is None or best is None:
                return None
            if best[1] >= dense:
                break
            found = percent / 100
        return NEVER if found is None else found

    def save(self, path: "str | Path") -> None:
        """Writes a JSON file, a line per curve; it appears whole or not at all."""
        head = {
            "kind": "times",
            "version": VERSION,
            "machine": asdict(self.machine),
            "threads": self.threads,
            "bandwidth": self.bandwidth,
            "versions": self.versions,
        }
        curves = ",\n".join(json.dumps(asdict(c), allow_nan=False) for c in self.curves)
        text = json.dumps(head, indent=2, allow_nan=False)[:-2]
        atomic_write_text(path, f'{text},\n  "curves": [\n{curves}\n]\n}}\n')

    @classmethod
    def load(cls, path: "str | Path") -> "Table":
        """What `save` wrote; ValueError in one sentence if the file is anything else."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("kind") != "times":
                raise ValueError("it says of itself that it is something else")
            if found["version"] != VERSION:
                raise ValueError(f"it has version {found['version']}, this release reads {VERSION}")
            machine = _machine(found["machine"])
            curves = tuple(_curve(entry) for entry in found["curves"])
            if not curves:
                raise ValueError("it has no curves")
            versions = {str(k): str(v) for k, v in found["versions"].items()}
            return cls(machine, int(found["threads"]), curves, float(found["bandwidth"]), versions, str(path))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path}: is no time table: {why}; delete it, or run `alphaprune bench --tune` again"
            ) from error


def unrounded(x: torch.dtype) -> torch.dtype:
    """What x comes in where times are measured: bfloat16 where kernels round it to int8, otherwise its own dtype."""
    return torch.bfloat16 if x == torch.int8 else x


def _machine(entry: dict[str, Any]) -> Machine | Gpu:
    if "gpu" in entry:
        return Gpu(str(entry["gpu"]), str(entry["capability"]))
    return Machine(str(entry["cpu"]), str(entry["model"]), tuple(map(str, entry["isas"])), int(entry["cores"]))


def _curve(entry: dict[str, Any]) -> Curve:
    n, k = entry["shape"]
    curve = Curve(
        **{name: str(entry[name]) for name in ("kernel", "weight", "x")},
        shape=(int(n), int(k)),
        sparsity=float(entry["sparsity"]),
        tokens=tuple(map(int, entry["tokens"])),
        seconds=tuple(map(float, entry["seconds"])),
    )
    rising = list(curve.tokens) == sorted(set(curve.tokens)) and min(curve.tokens, default=0) > 0
    good = rising and len(curve.tokens) == len(curve.seconds) and min(curve.shape) > 0 and 0 <= curve.sparsity < 1
    if not good or not all(math.isfinite(s) and s > 0 for s in curve.seconds):
        raise ValueError(f"its curve of {curve.kernel} at {curve.shape}, sparsity {curve.sparsity}, is damaged")
    return curve


def _between(at: float, left: float, right: float, first: float, second: float) -> float:
    """The power law through (left, first) and (right, second)."""
    if at in (left, right):
        return first if at == left else second
    share = math.log(at / left) / math.log(right / left)
    return math.exp((1 - share) * math.log(first) + share * math.log(second))


def _at_density(curves: Sequence[Curve], sparsity: float, tokens: int, last: int) -> float | None:
    """Linear between two curves of one shape; outside them the nearest stands. curves: by rising sparsity."""
    i = bisect_left([c.sparsity for c in curves], sparsity)
    low, high = curves[max(i - 1, 0)], curves[min(i, len(curves) - 1)]
    if low is high or sparsity >= high.sparsity:
        return high.at(tokens, last)
    first, second = low.at(tokens, last), high.at(tokens, last)
    if first is None or second is None:
        return None
    share = (sparsity - low.sparsity) / (high.sparsity - low.sparsity)
    return (1 - share) * first + share * second


def _nearest(shape: tuple[int, int], shapes: list[tuple[int, int]], largest: bool) -> tuple[int, int] | None:
    """The shape next in size, of equal ones the one most like `shape` in its aspect."""

    def key(other: tuple[int, int]) -> tuple[float, float]:
        aspect = abs(math.log(other[0] / other[1] * shape[1] / shape[0]))
        return (-1 if largest else 1) * other[0] * other[1], aspect

    return min(shapes, key=key, default=None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cache_folder() -> Path:
    """Where the user's own tables lie: $XDG_CACHE_HOME/alphaprune/tables."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphaprune" / "tables"


def file_name(machine: Machine | Gpu, threads: int) -> str:
    """What a table is called: readable, and its own for every machine and number of threads, and for every GPU."""
    digest = hashlib.sha256(json.dumps(asdict(machine)).encode()).hexdigest()[:8]
    if isinstance(machine, Gpu):
        return f"{_words(machine.gpu)}-{machine.capability}-{digest}.json"
    return f"{_words(machine.cpu)}-{machine.cores}-cores-{threads}-threads-{digest}.json"


def _words(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def current(device: torch.device | str = "cpu") -> Table | None:
    """The table of this CPU with torch's threads or, for a CUDA device, of that GPU; None if there is none.

    Files are read once, until `forget`. ValueError if ALPHAPRUNE_TIMES names a file that is none.
    """
    where, setting = torch.device(device), os.environ.get("ALPHAPRUNE_TIMES")
    if where.type == "cpu":
        return _find(setting, str(cache_folder()), torch.get_num_threads(), None)
    if where.type != "cuda" or setting == "off" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if where.index is None else where.index
    return _find(setting, str(cache_folder()), 0, index)


def forget() -> None:
    """Reads the files anew at the next question."""
    _find.cache_clear()


@functools.cache
def _find(setting: str | None, cache: str, threads: int, gpu: int | None) -> Table | None:
    """gpu: the number of a CUDA device; None for the CPU."""
    if setting == "off":
        return None
    if setting:
        found = Table.load(setting)
        return found if isinstance(found.machine, Gpu) == (gpu is not None) else None
    machine = Machine.here() if gpu is None else Gpu.at(gpu)
    return nearest(machine, threads, [*_tables(Path(cache), own=True), *_tables(SHIPPED, own=False)])


def nearest(machine: Machine | Gpu, threads: int, tables: Iterable[Table]) -> Table | None:
    """The table of this very machine and number of threads; else of this processor with the most similar number.

    Of a GPU only its own. Of equally near ones the first.
    """
    if isinstance(machine, Gpu):
        return next((t for t in tables if t.machine == machine), None)
    cpus = (t for t in tables if isinstance(t.machine, Machine))
    same = [t for t in cpus if replace(t.machine, cores=machine.cores) == machine]

    def distance(found: Table) -> tuple[float, float]:
        return abs(math.log(found.threads / threads)), abs(math.log(found.machine.cores / machine.cores))

    return min(same, key=distance, default=None)


def _tables(folder: Path, own: bool) -> Iterable[Table]:
    """The readable tables of a folder. One of the user's from another release may describe other kernels: passed by."""
    for file in sorted(folder.glob("*.json")):
        try:
            found = Table.load(file)
        except ValueError as error:
            log.warning("%s; ignored", error)
            continue
        made = found.versions.get("alphaprune")
        if own and made != __version__:
            log.warning("%s: was measured with alphaprune %s; ignored: run `alphaprune bench --tune` again", file, made)
            continue
        yield found
