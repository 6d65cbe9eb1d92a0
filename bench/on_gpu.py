"""All checks and measurements that need a GPU, the most telling first, in the time that there is.

python bench/on_gpu.py --minutes 13 --out DIR
python bench/on_gpu.py --list
python bench/on_gpu.py --only tests,decode --out DIR

Each step is a process of its own with a limit; what fails or takes too long does not stop the next ones, and is asked
to end, so that pytest says what it has found, before it is made to. DIR has the rows of each benchmark as they come,
and log.txt: what every step printed, and a line of JSON behind each with its name, command, exit status (null: stopped
at its limit) and seconds. The status is 1 if a step failed. For a machine that is lent for a quarter of an hour: what
is not measured then is named at the end.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKER = "compute-sanitizer"
LEAST = 15  # seconds under which no step is begun
LAST_WORDS = 5  # seconds between being asked to end and being made to
TESTS = ("cuda_gpu", "triton_step", "triton_decode", "triton", "tridiagonal", "cusolver")


@dataclass(frozen=True)
class Step:
    """A command that runs for `seconds` at most; `rows`, the file in DIR that it takes as its `option`, or none."""

    name: str
    seconds: int
    command: tuple[str, ...]
    rows: str | None = None
    needs: str | None = None  # a program that the step is left out without
    option: str = "--out"

    def line(self, folder: Path) -> list[str]:
        out = [] if self.rows is None else [self.option, str(folder / self.rows)]
        return [*self.command, *out]


def bench(script: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "bench" / script), *options)


def pytest(*options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *options)


def checked(tool: str, *options: str) -> tuple[str, ...]:
    return (CHECKER, "--tool", tool, "--error-exitcode", "1", *pytest("-x", *options))


LLAMA = ["--device", "cuda", "--model", "llama2-7b"]
DECODE = [*LLAMA, "--sparsity", "0.7,0.5,0.8,2:4", "--minutes", "2"]
AHEAD = [*LLAMA, "--sparsity", "0.8,0.5", "--minutes", "1", "--decoder", "alphaprune", "--ahead", "0,4,12,24", "--json"]
HEAD = ["--device", "cuda", "--model", "llama3-8b", "--sparsity", "0.7", "--head", "none,int8", "--sequences", "1"]
HEAD += ["--decoder", "alphaprune", "--minutes", "1", "--json"]
# The references in float64 take most of the time of the tests, a processor each; who hangs is seen.
APART = ("-n", "6", "-o", "faulthandler_timeout=60") if importlib.util.find_spec("xdist") else ()
SERVE = ["--device", "cuda", "--engine", "alphaprune", "--clients", "1,8", "--rounds", "1"]
TUNE = ["-m", "alphaprune", "bench", "--tune", "--quick", "--minutes", "0.8", "--device", "cuda"]
STEPS = (
    Step("steps", 60, pytest(*APART, "tests/test_decoder_gpu.py")),
    Step("decode", 150, bench("decode.py", *DECODE), "decode_gpu.jsonl"),
    Step("ahead", 90, bench("decode.py", *AHEAD)),
    Step("head", 90, bench("decode.py", *HEAD)),
    Step("ways", 45, bench("wide.py", "--seconds", "25"), "wide.jsonl"),
    Step("prompts", 45, bench("prompts.py", "--seconds", "25", "--json")),
    Step("where", 60, bench("where.py", "--sparsity", "2:4", "--json")),
    Step("tests", 240, pytest(*APART, *(f"tests/test_{name}.py" for name in TESTS))),
    Step("variants", 80, bench("variants.py", "--seconds", "60")),
    Step("launches", 70, bench("launches.py", "--seconds", "55"), "launches.jsonl"),
    Step("layers", 160, bench("gpu.py", "--minutes", "2"), "gpu.jsonl"),
    Step("race", 45, checked("racecheck", "tests/test_triton_step.py", "-k", "several_ranges"), needs=CHECKER),
    Step("memory", 45, checked("memcheck", "tests/test_cuda_gpu.py", "-k", "share_a_launch"), needs=CHECKER),
    Step("serve", 90, bench("serve.py", *SERVE), "serve.jsonl"),
    Step("table", 60, (sys.executable, *TUNE), "table.json", option="--output"),
    Step("spectra", 60, bench("spectrum_gpu.py", "--model", "--minutes", "0.8"), "spectrum_gpu.jsonl"),
)


def run(step: Step, limit: float, folder: Path) -> dict:
    """What became of a step; what it printed stands in the log."""
    begin, line = time.monotonic(), step.line(folder)
    with (folder / "log.txt").open("a") as log:
        log.write(f"\n===== {step.name}, {limit:.0f} s: {' '.join(line)}\n")
        log.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if "pytest" in line else None
        process = subprocess.Popen(line, stdout=log, stderr=log, cwd=ROOT, start_new_session=True, env=environment)
        status = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its children, too, or they would hold the GPU
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = {"step": step.name, "status": status, "seconds": round(time.monotonic() - begin, 1), "command": line}
        log.write(json.dumps(found) + "\n")
    return found


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=13, help="in all (default %(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of steps, with commas")
    parser.add_argument("--list", action="store_true", help="the steps, their limits in seconds, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("on_gpu"), help="the folder (default %(default)s)")
    options = parser.parse_args(arguments)
    known = [step.name for step in steps]
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--only {unknown[0]}: there are {', '.join(known)}")
    chosen = [step for step in steps if options.only is None or step.name in options.only]
    if options.list:
        print("\n".join(f"{step.name:10} {step.seconds:4}  {' '.join(step.line(options.out))}" for step in chosen))
        return 0
    folder, end = options.out.absolute(), time.monotonic() + 60 * options.minutes
    folder.mkdir(parents=True, exist_ok=True)
    failed, left = False, []
    for step in chosen:
        limit = min(step.seconds, end - time.monotonic())
        if limit < LEAST or (step.needs and shutil.which(step.needs) is None):
            left.append(step.name)
            continue
        found = run(step, limit, folder)
        failed |= found["status"] != 0
        print(json.dumps(found), flush=True)
    if left:
        print(f"on_gpu.py: not run: {', '.join(left)}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
