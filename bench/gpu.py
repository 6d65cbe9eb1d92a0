"""Packed layers beside the best dense ones on a GPU: the most important rows first, as many as there is time for.

python bench/gpu.py --minutes 8 --out bench/results/gpu.jsonl        all shapes, tokens and sparsities in that order
python bench/gpu.py --shape 28672x4096 --tokens 1 --sparsity 0.5,2:4 --kernel sbt_mma
python bench/gpu.py --plan                                           which cases there are, in which order
python bench/gpu.py --dry-run                                        tiny layers on the CPU, to try the script itself

A case is one layer with so many tokens. Its contenders are torch's dense products (both orders of the operands, tokens
padded or not, by cuBLAS and cuBLASLt), each algorithm that cuBLASLt proposes, cuSPARSELt for 2:4, and every kernel of
this package at every sparsity, last of all on int8 values. Each is a CUDA graph of calls that go round copies of its
weight, together four times as large as the second-level cache, and all are replayed by turns. A figure is the median of
--repeats replays over the calls of one. A contender that fails gets a row with its error; after a fault that takes the
device away the script starts itself again without it.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import gpu_cases
import torch
from gpu_cases import Case
from gpu_contenders import Contender, Weights, contenders, copies, error
from gpu_rig import Cuda, Host, Replay, Rig
from rows import append, command

HELD = 3  # layers whose weights stay on the device: the first cases are about three
WIDTHS = (14, 6, 12, 24, 12, 8, 8, 8)
NAMES = ("shape", "tokens", "kept", "name", "us", "ratio", "copy %", "error")


class Lost(Exception):
    """The device does not answer any more; the text names the contender that did it, if it is known."""


@dataclass
class Ready:
    """A contender that was recorded, checked, and is to be timed."""

    contender: Contender
    replay: Replay
    calls: int
    error: dict[str, float]


@dataclass
class Run:
    """What all cases of a run share. write: takes a row, at once. left: seconds until the run ends."""

    rig: Rig
    dtype: torch.dtype
    repeats: int
    only: set[str]
    without: set[str]
    common: dict[str, object]
    write: Callable[[dict], None]
    left: Callable[[], float]
    values: tuple[str, ...] = ("float",)

    def __post_init__(self) -> None:
        self._held: dict[gpu_cases.Shape, Weights] = {}

    def weights(self, shape: gpu_cases.Shape) -> Weights:
        """The layer, from the few that are still there or made anew."""
        found = self._held.pop(shape, None)
        while found is None and len(self._held) >= HELD:
            del self._held[next(iter(self._held))]
        self._held[shape] = found or Weights(shape, self.dtype, self.rig.device)
        return self._held[shape]

    def case(self, case: Case) -> None:
        """Measures a case and writes its rows; what there is no time left for is not begun. Lost if the device is."""
        try:
            self.rig.release()
            weights, ready = self.weights(case.shape), []
            x = weights.x(case.tokens)
            for contender in contenders(weights, case, self.rig, self.only, self.without, self.values):
                if self.left() <= 0 and any(one.contender.kind != "dense" for one in ready):
                    break
                try:
                    ready.append(self.prepare(contender, weights, x))
                except Exception as fault:
                    self.failed(case, contender, fault)
            self.measure(case, ready)
        except Lost:
            raise
        except Exception as fault:
            self.failed(case, None, fault)

    def failed(self, case: Case, contender: Contender | None, fault: Exception) -> None:
        """Writes a row with the error; Lost if the device does not answer after it."""
        self.write(self.row(case, contender) | {"error": f"{type(fault).__name__}: {fault}"})
        if not self.rig.alive():
            raise Lost("" if contender is None else contender.name) from fault

    def prepare(self, contender: Contender, weights: Weights, x: torch.Tensor) -> Ready:
        """Recorded on copies of its weight; its result compared with float64."""
        with self.rig.library(contender.library):
            calls = contender.make(copies(contender, self.rig.rotate))
            weight = weights.pruned(contender.kept, contender.values)
            found = error(calls[0](), x, weight, contender.rounded)
            return Ready(contender, self.rig.record(calls), len(calls), found)

    def measure(self, case: Case, ready: list[Ready]) -> None:
        """Times all by turns and writes a row for each."""
        replays = [one.replay for one in ready]
        self.rig.time(replays, 3)  # wakes the clocks
        times = self.rig.time(replays, self.repeats)
        clocks = self.rig.clocks(replays, sum(map(statistics.median, times)))
        seconds = [sorted(t / one.calls for t in found) for one, found in zip(ready, times, strict=True)]
        best = fastest([(one.contender, statistics.median(s)) for one, s in zip(ready, seconds, strict=True)])
        for one, found in zip(ready, seconds, strict=True):
            self.write(self.row(case, one.contender) | timed(one, found, best, self.common["bandwidth"]) | clocks)

    def row(self, case: Case, contender: Contender | None) -> dict[str, object]:
        """What a row says before anything is measured; without a contender it is of the whole case."""
        kept = contender and contender.kept
        return self.common | {
            "shape": list(case.shape),
            "tokens": case.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "kind": contender and contender.kind,
            "name": contender and contender.name,
            "pattern": kept and kept.pattern,
            "sparsity": kept and kept.sparsity,
            "values": contender and contender.values,
        }


def fastest(found: list[tuple[Contender, float]]) -> tuple[str, float] | None:
    """Name and seconds of the fastest dense contender; None if there is none."""
    dense = [(seconds, contender.name) for contender, seconds in found if contender.kind == "dense"]
    return min(dense)[::-1] if dense else None


def timed(one: Ready, seconds: list[float], best: tuple[str, float] | None, bandwidth: float) -> dict[str, object]:
    """The figures of a row; seconds: of one call, ascending. ratio: how many times faster than the best dense one."""
    median = statistics.median(seconds)
    name, dense = best or (None, None)
    return {
        "seconds": median,
        "quartiles": [seconds[len(seconds) // 4], seconds[-1 - len(seconds) // 4]],
        "repeats": len(seconds),
        "calls": one.calls,
        "rotated": one.calls * one.contender.nbytes,
        "nbytes": one.contender.nbytes,
        "dense": name,
        "dense_seconds": dense,
        "ratio": dense and dense / median,
        "of_bandwidth": one.contender.nbytes / median / bandwidth,
        **{key: None if math.isnan(value) else value for key, value in one.error.items()},
        "correct": one.error["of_allowed"] <= 1,
    }


def line(row: dict) -> str:
    """A row of the table."""
    known = row["sparsity"] is not None
    kept = str(gpu_cases.Kept(row["sparsity"], row["pattern"])) if known else row["kind"] or "all"
    cells = ["x".join(map(str, row["shape"])), row["tokens"], kept, row["name"]]
    if "error" in row:
        return _joined(cells) + "  " + row["error"].splitlines()[0][:120]
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    correct = "ok" if row["correct"] else "WRONG"
    return _joined([*cells, f"{1e6 * row['seconds']:.2f}", ratio, f"{100 * row['of_bandwidth']:.0f}", correct])


def _joined(cells: list[object]) -> str:
    return "  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, WIDTHS, strict=False))


def again(options: argparse.Namespace, arguments: list[str], name: str, done: int, left: float) -> list[str]:
    """The command line of the same run after `done` cases, without `name` or, if none is known, without the next case,
    with `left` seconds."""
    without = [*_names(options.without), *_names(name)]
    added = [f"--without={','.join(without)}", "--skip", str(options.skip + done + (not name))]
    return [*arguments, *added, "--minutes", f"{max(left, 0) / 60:.3f}", "--append"]


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="no case or contender is begun after so many")
    parser.add_argument(
        "--shape", type=gpu_cases.shapes_from, default=(), help="NxK[,NxK...]; all of the table if none"
    )
    parser.add_argument(
        "--tokens", type=lambda text: tuple(map(int, text.split(","))), default=(*gpu_cases.TOKENS, *gpu_cases.PREFILL)
    )
    parser.add_argument("--sparsity", type=gpu_cases.kept_from, default=gpu_cases.FIRST + gpu_cases.REST)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument(
        "--values", type=gpu_cases.values_from, default=("float", "int8"), help="float,int8,int8/128: of packed weights"
    )
    parser.add_argument("--kernel", default="", help="only these of our kernels, with commas")
    parser.add_argument("--without", default="", help="names of contenders to leave out, with commas")
    parser.add_argument("--repeats", type=int, default=50, help="replays of each contender")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="write the rows to this file, one JSON object each")
    parser.add_argument("--append", action="store_true", help="behind the rows that are there")
    parser.add_argument("--plan", action="store_true", help="list the cases and measure nothing")
    parser.add_argument("--skip", type=int, default=0, help="cases at the beginning of the plan to leave out")
    parser.add_argument("--dry-run", action="store_true", help="tiny layers on the CPU, without graphs or clocks")
    return parser.parse_args(arguments)


def writer(options: argparse.Namespace) -> Callable[[dict], None]:
    """Prints each row and appends it to the file at once: what was measured outlives whatever comes next."""
    if options.out and not options.append:
        Path(options.out).write_text("")

    def write(row: dict) -> None:
        text = json.dumps(row, allow_nan=False)
        print(text if options.json else line(row), flush=True)
        if options.out:
            append(options.out, row)

    return write


def start(options: argparse.Namespace, arguments: list[str], left: Callable[[], float]) -> Run:
    """The device, and what every row says of it."""
    rig = Host() if options.dry_run else Cuda()
    common = rig.facts() | {"command": command("bench/gpu.py", arguments), "bandwidth": rig.bandwidth()}
    if not options.json:
        print(
            f"{common['gpu']}; copies {common['bandwidth'] / 1e9:.0f} GB/s; {options.dtype}; {options.repeats} replays"
        )
        print(_joined(NAMES), flush=True)
    only, without = set(_names(options.kernel)), set(_names(options.without))
    dtype = getattr(torch, options.dtype)
    return Run(rig, dtype, options.repeats, only, without, common, writer(options), left, options.values)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes
    shapes = options.shape or (gpu_cases.TINY if options.dry_run else ())
    every = gpu_cases.chosen(shapes, options.tokens, options.sparsity)
    cases = every[options.skip :]
    if options.plan:
        for case in cases:
            kept = ",".join(map(str, case.kept))
            print(f"{case.shape[0]}x{case.shape[1]}  {case.tokens} tokens  {kept}")
        return 0
    try:
        run = start(options, arguments, lambda: end - time.monotonic())
    except ValueError as fault:
        print(fault, file=sys.stderr)
        return 2
    done = 0
    with torch.inference_mode():
        for done, case in enumerate(cases):
            if run.left() <= 0:
                break
            try:
                run.case(case)
            except Lost as lost:
                print(
                    f"the device is lost; starting again without {str(lost) or 'this case'}",
                    file=sys.stderr,
                    flush=True,
                )
                words = again(options, arguments, str(lost), done, run.left())
                os.execv(sys.executable, [sys.executable, __file__, *words])
        else:
            done = len(cases)
    print(f"{options.skip + done} of {len(every)} cases", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
