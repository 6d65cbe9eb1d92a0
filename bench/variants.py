"""What bounds sbt_wgmma on a GPU: its source with a part left out, or other constants, built and timed by turns.

python bench/variants.py --seconds 60 --out variants.jsonl           on a GPU with nvcc
python bench/variants.py --only "no products,no values"

A variant is csrc/cuda/sbt_wgmma.cuh with some of its text replaced. One that leaves a part out computes nonsense: what
it saves is what that part costs beside the others. Each is timed in a process of its own, as a process loads a module
once, and the source as it is before and after all others: what these two differ by is noise. Rows, a JSON object each:

machine's facts                 as in bench/gpu.py
variant, shape, sparsity        of the layer [N, K], in bfloat16
tokens, seconds, dense          of sbt_wgmma as it shares the work by itself; of torch's product beside it
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rows import append

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "sbt_wgmma"
AS_IT_IS = "as it is"
CONSTANTS = "kWideAtOnce = 2, kWideSets = 2"
PRODUCT = "wgmma<Value, kTokens>(sum, set[i], operand_further(boxes, box * kTokens * kSwizzleBytes + further));"
# What is replaced; those of NONSENSE give wrong products.
VARIANTS: dict[str, dict[str, str]] = {
    AS_IT_IS: {},
    "one step at once": {CONSTANTS: "kWideAtOnce = 1, kWideSets = 2"},
    "two steps, one set": {CONSTANTS: "kWideAtOnce = 2, kWideSets = 1"},
    "four steps, one set": {CONSTANTS: "kWideAtOnce = 4, kWideSets = 1"},
}
NONSENSE: dict[str, dict[str, str]] = {
    "no decoding": {
        "expand_pairs(mask, bits, start, one, spare, a);": "for (int i = 0; i < 4; ++i) a[i] = start[i] ^ mask[i % 2];"
    },
    "no products": {PRODUCT: "sum[i] += float_of(set[i][0] ^ set[i][1] ^ set[i][2] ^ set[i][3]) * (box + further);"},
    "no values": {
        "there ? masks + bytes : 0": "there ? masks : 0",
        "if (bytes) copy_bulk(": "if (bytes == 1) copy_bulk(",
    },
    "no x": {
        "mbarrier_arrive_expect(full, shared.x_bytes);": "mbarrier_arrive_expect(full, 0);",
        "copy_box(to + box": "if (p.tokens < 0) copy_box(to + box",
    },
}
PLAN = (((28672, 4096), 0.5, 32), ((28672, 4096), 0.8, 32), ((28672, 4096), 0.5, 64), ((4096, 4096), 0.5, 32))


def changed(variant: str) -> str:
    """The source of a variant; ValueError if what is replaced does not stand there once."""
    text = (ROOT / "csrc" / "cuda" / f"{SOURCE}.cuh").read_text()
    for old, new in (VARIANTS | NONSENSE)[variant].items():
        if text.count(old) != 1:
            raise ValueError(f"{variant}: {old!r} stands {text.count(old)} times in {SOURCE}.cuh, wanted once")
        text = text.replace(old, new)
    return text


def compile_object(csrc: Path, name: str, out: Path) -> Path:
    """The object file of csrc/cuda/NAME for the device at hand."""
    import pybind11
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    command = ["nvcc", "-O3", "-DNDEBUG", "-std=c++17", f"--generate-code=arch=compute_{arch},code=[sm_{arch}]"]
    command += ["-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "-DALPHAPRUNE_MODULE=_cuda"]
    command += ['-DALPHAPRUNE_COMPILER="nvcc"', f'-DALPHAPRUNE_ARCHITECTURES="{arch}"']
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    kind = ["-x", "cu"] if name.endswith(".cu") else []
    subprocess.run([*command, *kind, "-c", csrc / "cuda" / name, "-o", out], check=True)
    return out


def build(variants: list[str], folder: Path) -> dict[str, Path]:
    """The module of each variant."""
    names = sorted(file.name for file in (ROOT / "csrc" / "cuda").iterdir() if file.suffix in (".cu", ".cpp"))
    others = [name for name in names if name != f"{SOURCE}.cu"]
    for place, variant in enumerate(variants):
        copy = shutil.copytree(ROOT / "csrc", folder / str(place) / "csrc")
        (copy / "cuda" / f"{SOURCE}.cuh").write_text(changed(variant))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shared = [pool.submit(compile_object, ROOT / "csrc", name, folder / f"{name}.o") for name in others]
        own = [
            pool.submit(compile_object, folder / str(place) / "csrc", f"{SOURCE}.cu", folder / str(place) / "own.o")
            for place in range(len(variants))
        ]
        objects, mine = [job.result() for job in shared], [job.result() for job in own]
    found = {}
    for variant, one in zip(variants, mine, strict=True):
        found[variant] = one.parent / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run(["nvcc", "-shared", "-cudart", "static", "-o", found[variant], one, *objects], check=True)
    return found


def time_here(module: Path, check: bool) -> None:
    """In a process of its own: prints a row for each case of the plan."""
    spec = importlib.util.spec_from_file_location("alphaprune._cuda", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    import torch
    import wide
    from gpu_cases import Kept
    from gpu_contenders import Weights
    from gpu_rig import Cuda

    from alphaprune.kernels import cuda

    cuda._find = lambda: (loaded, "")
    rig = Cuda()
    for shape, sparsity, tokens in PLAN:
        weights = Weights(shape, torch.bfloat16, rig.device)
        found = wide.measure(rig, weights, Kept(sparsity), tokens, ["chosen"], check)
        row = {"shape": list(shape), "sparsity": sparsity, "tokens": tokens}
        print(json.dumps(rig.facts() | row | {"seconds": found["chosen"], "dense": found["dense"]}), flush=True)


def line(row: dict) -> str:
    shape = "x".join(map(str, row["shape"]))
    times = f"{1e6 * row['seconds']:>8.1f} us  dense {1e6 * row['dense']:.1f}"
    return f"{row['variant']:<22}{shape:>12} {row['sparsity']:.0%} {row['tokens']:>4}{times}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), help="these variants, with commas")
    parser.add_argument("--seconds", type=float, default=60, help="after which no variant is begun")
    parser.add_argument("--out", type=Path, help="rows are appended to this file too")
    parser.add_argument("--time", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--nonsense", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.time:
        time_here(options.time, not options.nonsense)
        return 0
    from alphaprune.kernels import cuda

    if unknown := [name for name in options.only or () if name not in VARIANTS | NONSENSE]:
        parser.error(f"--only {unknown[0]!r}: there are {', '.join(VARIANTS | NONSENSE)}")
    if reason := cuda.missing_wide() or (None if shutil.which("nvcc") else "nvcc is not on the path"):
        print(f"variants.py: {reason}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    others = [name for name in options.only or VARIANTS | NONSENSE if name != AS_IT_IS]
    with tempfile.TemporaryDirectory(prefix="alphaprune-variants-") as folder:
        modules = build([AS_IT_IS, *others], Path(folder))
        for place, variant in enumerate((AS_IT_IS, *others, AS_IT_IS)):
            if place and time.monotonic() - begin > options.seconds:
                print("variants.py: out of time; --seconds for more", file=sys.stderr)
                break
            asked = ["--time", modules[variant], *(["--nonsense"] if variant in NONSENSE else [])]
            done = subprocess.run([sys.executable, __file__, *asked], stdout=subprocess.PIPE, text=True, check=False)
            for text in done.stdout.splitlines():
                row = {"variant": variant} | json.loads(text)
                print(line(row), flush=True)
                if options.out:
                    append(options.out, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
