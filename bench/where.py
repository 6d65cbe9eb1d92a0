"""Where a prompt or a step of a whole model spends its time on a GPU: its kernels, and the gaps between them.

python bench/where.py --sparsity 2:4                         a prompt of 2048 tokens and a step, dense and packed
python bench/where.py --load step --sequences 32 --json      of 32 sequences; a row for each model
python bench/where.py --dry-run                              a tiny model on the CPU, to try the script itself

Weights are random, and every model is made anew. Rows, one JSON object each, seconds throughout:

machine, torch, cuda       where it ran
model, sparsity, pattern   the shapes, and what is kept; sparsity 0 for dense weights
load, sequences            prompt or step, and how many tokens or sequences
seconds                    of one without the profiler, median
idle                       of these, when no kernel ran; less than 0 where kernels run beside each other
kernels                    [name, calls, seconds] by torch's profiler, the longest first
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_gpu import Case, cases
from rows import append, kept

from alphaprune import decoding, stepping, timing
from alphaprune.decoder import Decoder
from alphaprune.pattern import parse

REPEATS = 5
START = 16  # tokens of a sequence before its steps
LONGEST = 60  # letters of a name


def step(decoder: Decoder, sequences: int) -> Callable[[], object]:
    """A greedy step of so many sequences, in a graph where there are any."""
    steps, slots = stepping.started(decoder, sequences, START, stepping.WARM_UPS + REPEATS + 1)
    return lambda: steps(slots)


LOADS: dict[str, Callable[[Decoder, int], Callable[[], object]]] = {"prompt": stepping.reading, "step": step}


def plain(name: str) -> str:
    """A kernel's name without its types, what it returns and its parameters, cut where it is long."""
    name = re.sub(r"^(void|static|__global__)\s+", "", name).split("(")[0].strip() or name
    name = re.sub(r"\b(\w+::)+", "", name)
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


@torch.inference_mode()
def measure(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """seconds, idle and kernels of what `run` does."""
    for _ in range(stepping.WARM_UPS):
        run()
    watch = stepping.Watch(device)
    watch.mark()
    for _ in range(REPEATS):
        run()
        watch.mark()
    seconds = statistics.median(watch.seconds())
    on_gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    found: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        taken = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if taken > 0:
            sums = found.setdefault(plain(event.key), [0, 0.0])
            sums[0] += event.count
            sums[1] += taken
    kernels = sorted(([name, *sums] for name, sums in found.items()), key=lambda one: -one[2])
    return {"seconds": seconds, "idle": seconds - sum(one[2] for one in kernels), "kernels": kernels}


def rows(case: Case, loads: dict[str, int], device: str) -> list[dict[str, Any]]:
    """Of one model."""
    model = decoding.random_model(case.model, case.sparsity, torch.bfloat16, pattern=parse(case.pattern), device=device)
    decoder = Decoder(model)
    name = torch.cuda.get_device_name(device) if decoder.device.type == "cuda" else timing.machine()
    common = {"machine": name, "torch": torch.__version__, "cuda": torch.version.cuda, "model": case.model}
    common |= {"sparsity": case.sparsity or 0.0, "pattern": case.pattern}
    return [
        common | {"load": load, "sequences": count} | measure(LOADS[load](decoder, count), decoder.device)
        for load, count in loads.items()
    ]


def text(row: dict[str, Any], most: int) -> str:
    """A row as a table of its longest kernels."""
    head = f"{row['model']}, {kept(row)}, {row['load']} of {row['sequences']}: {1e3 * row['seconds']:.3f} ms"
    parts = [*row["kernels"][:most], ["no kernel", "", row["idle"]]]
    lines = [f"{1e3 * s:10.3f} ms {s / row['seconds']:6.1%} {calls!s:>6}  {name}" for name, calls, s in parts]
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="default llama2-7b, or tiny with --dry-run")
    parser.add_argument("--sparsity", default="0.7,2:4", help="with commas, after dense (default %(default)s)")
    parser.add_argument("--load", default="prompt,step", help="prompt, step or both (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--sequences", type=int, default=1, help="of the step")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--most", type=int, default=20, help="kernels of a table")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the tables")
    parser.add_argument("--out", type=Path, help="rows are appended to this file too")
    options = parser.parse_args(arguments)
    counts = {"prompt": options.tokens, "step": options.sequences}
    if unknown := [load for load in options.load.split(",") if load not in LOADS]:
        parser.error(f"--load {unknown[0]}: there are {', '.join(LOADS)}")
    if not options.dry_run and not torch.cuda.is_available():
        print("where.py: torch sees no GPU; --dry-run goes through it on the CPU", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else options.device
    try:
        for case in cases(options.model or ("tiny" if options.dry_run else "llama2-7b"), options.sparsity):
            for row in rows(case, {load: counts[load] for load in options.load.split(",")}, device):
                print(json.dumps(row) if options.json else text(row, options.most), flush=True)
                if options.out:
                    append(options.out, row)
    except ValueError as error:  # no such model, or no memory for it
        print(f"where.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
