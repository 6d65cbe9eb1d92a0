"""How long a packed directory takes to its first token, mapped and on huge pages, beside reading its files once.

python bench/load.py --out bench/results/load.jsonl

A random model in the shapes of --model, of so many blocks that its files have about 2 GB, is written into a
temporary folder. Then processes by turns read the files once, or load them and compute tokens through transformers;
the modules are imported before the clock starts. Cold: the files are out of the page cache, warm: they are in it.
Medians of --rounds.
Rows, one JSON object each, seconds and bytes:

machine, threads, torch, transformers   where it ran
model, blocks, sparsity, values, bytes  what it loaded; bytes of all safetensors files
cache                                   cold or warm
by                                      from_pretrained, which maps the files, or load with huge_pages=True
read_seconds                            reading all files once, in order
load_seconds                            the loading itself
first_seconds, next_seconds             the first token, and the median of those after it, prompts of one token
beyond_seconds                          load + first - read; target: < 2
resident_loaded, resident_first         growth of the resident memory after loading and after the first token
import_seconds, help_seconds            `import alphaprune` in a fresh process, and all of `alphaprune --help`
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import replace

CHUNK = 16 << 20  # bytes per call when a file is read
NEXT = 9  # tokens after the first
COLUMNS = ("cache", "by", "read s", "load s", "first s", "next s", "beyond s", "loaded MB", "first MB")
IMPORT = "import time; start = time.perf_counter(); import alphaprune; print(time.perf_counter() - start)"


def write(folder: str, model: str, blocks: int, sparsity: float, values: str) -> dict[str, Any]:
    """Writes the model, and says where and what."""
    import torch
    import transformers

    from alphaprune import checkpoint, decoding, timing

    family, settings = decoding.MODELS[model]
    decoding.MODELS["some blocks"] = (family, {**settings, "num_hidden_layers": blocks})
    checkpoint.save(decoding.random_model("some blocks", sparsity, values=getattr(torch, values)), folder)
    where = {"machine": timing.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    where["transformers"] = transformers.__version__
    what = {"model": model, "blocks": blocks, "sparsity": sparsity, "values": values}
    return where | what | {"bytes": sum(file.stat().st_size for file in files(folder))}


def files(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def forget(folder: str) -> None:
    """Drops the files from the page cache."""
    for file in files(folder):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: str) -> dict[str, float]:
    """Seconds of reading every byte once."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for file in files(folder):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return {"read_seconds": time.perf_counter() - start}


def load(folder: str, by: str) -> dict[str, float]:
    """Seconds and memory of loading and of the first tokens."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    import alphaprune

    assert alphaprune.load and alphaprune.SparseLinear and LlamaForCausalLM.from_pretrained  # imports
    logging.disable_progress_bar()
    memory, clock = [resident()], [time.perf_counter()]
    model = (
        LlamaForCausalLM.from_pretrained(folder)
        if by == "from_pretrained"
        else alphaprune.load(folder, huge_pages=True)
    )
    clock.append(time.perf_counter())
    memory.append(resident())
    with torch.inference_mode():
        for _ in range(1 + NEXT):
            model(torch.tensor([[1]])).logits.argmax(-1)
            clock.append(time.perf_counter())
            memory.append(resident())
    loaded, first, *after = (end - start for start, end in itertools.pairwise(clock))
    return {
        "load_seconds": loaded,
        "first_seconds": first,
        "next_seconds": statistics.median(after),
        "resident_loaded": memory[1] - memory[0],
        "resident_first": memory[2] - memory[0],
    }


def resident() -> int:
    """Bytes of this process in memory, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_process(task: str, **arguments: Any) -> dict[str, Any]:
    """What a function of this file returns in a process of its own."""
    command = [sys.executable, __file__, "--task", json.dumps({"task": task, "arguments": arguments})]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def start_up(rounds: int) -> dict[str, float]:
    """Medians of importing the package and of asking it for help."""
    imports, helps = [], []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        imports.append(float(done.stdout))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "alphaprune", "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - start)
    return {"import_seconds": statistics.median(imports), "help_seconds": statistics.median(helps)}


def measure(folder: str, cold: bool, rounds: int) -> list[dict[str, Any]]:
    """Medians of reading and of loading both ways, by turns: a row for each way."""
    found: dict[str, dict[str, list[float]]] = {way: {} for way in ("", "from_pretrained", "load")}
    for _ in range(rounds):
        for way, values in found.items():
            if cold:
                forget(folder)
            done = in_process("load", folder=folder, by=way) if way else in_process("read", folder=folder)
            for name, value in done.items():
                values.setdefault(name, []).append(value)
    read, *loaded = ({name: statistics.median(all_) for name, all_ in values.items()} for values in found.values())
    made = []
    for way, row in zip(("from_pretrained", "load"), loaded, strict=True):
        beyond = row["load_seconds"] + row["first_seconds"] - read["read_seconds"]
        made.append({"cache": "cold" if cold else "warm", "by": way, **read, **row, "beyond_seconds": beyond})
    return made


def line(row: dict[str, Any]) -> str:
    seconds = [row[f"{name}_seconds"] for name in ("read", "load", "first", "next", "beyond")]
    cells = [row["cache"], row["by"], *(f"{value:.3f}" for value in seconds)]
    cells += [f"{row[name] / 1e6:.0f}" for name in ("resident_loaded", "resident_first")]
    return "  ".join(f"{cell:>15}" for cell in cells)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama2-7b", help="a name of alphaprune.decoding.MODELS")
    parser.add_argument("--blocks", type=int, default=7, help="decoder blocks of the model")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--values", default="bfloat16", choices=("bfloat16", "int8"), help="of the packed weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the model is written; by default the folder for temporary files")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", type=Path, help="put the rows into this file, in the place of this machine's")
    parser.add_argument("--task", metavar="JSON", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.task:
        asked = json.loads(options.task)
        print(json.dumps({"write": write, "read": read, "load": load}[asked["task"]](**asked["arguments"])))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        settings = {
            "model": options.model,
            "blocks": options.blocks,
            "sparsity": options.sparsity,
            "values": options.values,
        }
        common = in_process("write", folder=f"{temporary}/model", **settings) | start_up(options.rounds)
        if not options.json:
            print(f"{common['machine']}; {common['bytes'] / 1e9:.2f} GB; ", end="")
            print(f"import {common['import_seconds']:.3f} s, --help {common['help_seconds']:.3f} s")
            print("  ".join(f"{name:>15}" for name in COLUMNS))
        made = []
        for cold in (True, False):
            for row in measure(f"{temporary}/model", cold, options.rounds):
                made.append(common | row)
                print(json.dumps(made[-1]) if options.json else line(made[-1]), flush=True)
    if options.out:
        replace(options.out, made, "machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
