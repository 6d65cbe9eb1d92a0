"""What a GPU issues per 1024 weights: instructions by pipe, registers, spills and occupancy of the compiled kernels.

python bench/cubins.py                       every kernel of csrc/cuda, for sm_80 and sm_90a
python bench/cubins.py FILE.cu --kernel mma  another source

Needs nvcc and nvdisasm, no GPU. Counts are of the main loop and static; weights come from the code: 256 per
HMMA.16816 and tile of eight tokens, so many for each warp per HGMMA, 512 per HMMA.SP.16832 and HGMMA.SP, one non-zero
per FFMA, lane and token in an SpMV. A product whose operand a is no weight, being constant or made from what operand b
is made from, does not count.
"""

import argparse
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import wavefronts
from cuda_tools import compile_cubin, demangle, sections, threads, tool
from rates import Notes, noted_main, origins, rates, registers
from sass import Function, Instruction, Loop, disassemble, pipe

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a")
UNIT = 1024
COLUMNS = ("instr", "alu", "popc", "lsu", "hmma", "fma", "uniform", "control")
TEMPLATES = (
    "sbt_mma<",
    "sbt_mma_int8<",
    "pair_mma<",
    "nm_mma_sp<",
    "nm_mma_sp_sm90<",
    "delta_spmv<",
)  # kernels with <value type, tiles or tokens>
WIDE = ("sbt_wgmma<", "pair_wgmma<", "nm_wgmma<")  # whose first number is tokens
HOPPER = (*WIDE, "nm_mma_sp_sm90<")  # kernels of sm_90a
# Weights of the dense matrix that an instruction multiplies by eight tokens, and the registers of operands a and b.
PRODUCTS = {
    "HMMA.SP.16832": (512, 4, 4),
    "HMMA.SP.16816": (256, 2, 2),
    "HMMA.16816": (256, 4, 2),
    "HMMA.1688": (128, 2, 1),
}
HGMMA = re.compile(r"HGMMA\.(SP\.)?64x(\d+)x(?:16|32)\.")  # of a warpgroup; a in registers, b behind a descriptor
STORES = {"STG": 4, "STG.64": 8, "STG.128": 16, "STG.U16": 2, "STG.U8": 1}


@dataclass(frozen=True)
class Limits:
    """Of one SM: CUDA C++ Programming Guide, table of technical specifications per compute capability."""

    threads: int
    blocks: int
    shared: int  # bytes for all blocks
    registers: int = 65536


# Every block loses 1 KiB of shared memory to the system. Registers are given out 256 at a time per warp, shared
# memory 128 bytes at a time.
LIMITS = {
    "sm_80": Limits(2048, 32, 164 << 10),
    "sm_86": Limits(1536, 16, 100 << 10),
    "sm_89": Limits(1536, 24, 100 << 10),
    "sm_90": Limits(2048, 32, 228 << 10),
}
SYSTEM_SHARED = 1024
# Of a chunk of TILES macro tiles, whose values are 2 * kChunk / TILES bytes each.
WIDE_BYTES = (
    "[] {{ WideProblem p{{}}; p.row_tiles = p.clusters = p.slices = 1, p.stages = 2, p.groups = wide_groups({0}); "
    "p.value_bytes = half(kChunk), p.mask_bytes = TILES * kWideTileMask, "
    "p.stage_bytes = p.tiles() * p.tile_bytes(); return p.shared_bytes({0}); }}()"
)
# Dynamic shared memory as the kernel's own constexpr has it: a header and an expression in C++, where {0}, {1}, … are
# the numbers among the template's arguments and half(n) the bytes of the values of n macro tiles at 50 %: of the
# largest among very many, 4.5 standard deviations above the mean. half(n, 1) has values of one byte.
SHARED = {
    "sbt_mma": (
        "cuda/sbt_mma.cuh",
        "mma_shared_bytes<FloatLane>({{1, 14 / {1}, 1, 2, 2}}, {1}, {0}, Copies::{copies}, {0} * 8, half(kChunk))",
    ),
    "sbt_mma_int8": (
        "cuda/sbt_mma.cuh",
        "mma_shared_bytes<IntegerLane<Bfloat16>>({{1, 14 / {1}, 1, 2, 2}}, {1}, {0}, "
        "Copies::{copies}, {0} * 8, half(kChunk, 1))",
    ),
    "pair_mma": (
        "cuda/sbt_mma.cuh",
        "mma_shared_bytes<PairLane>({{1, 14 / {1}, 1, 2, 2}}, {1}, {0}, Copies::{copies}, {0} * 8, half(2))",
    ),
    "sbt_wgmma": ("cuda/sbt_wgmma.cuh", WIDE_BYTES.replace("TILES", "kChunk")),
    "pair_wgmma": ("cuda/sbt_wgmma.cuh", WIDE_BYTES.replace("TILES", "1")),
    "sbt_expand": ("cuda/sbt_expand.cuh", "expand_shared_bytes(half(kChunk))"),
    "nm_mma_sp": ("cuda/nm_mma_sp.cuh", "nm_shared_bytes({0})"),
    "nm_mma_sp_sm90": (
        "cuda/nm_mma_sp_sm90.cuh",
        "StreamProblem{{{{}}, 0, 7, {0} < 2 ? 1 : 2, 4, 1, 1, 1, true}}.shared_bytes({0})",
    ),
    "nm_wgmma": (
        "cuda/nm_wgmma.cuh",
        "[] {{ NmWideProblem p{{}}; p.stages = nm_wide_stages({0}, {1}, 227 << 10);"
        " return p.shared_bytes({0}, {1}); }}()",
    ),
    "delta_spmv": ("cuda/delta_spmv.cuh", "delta_shared_bytes({0}, 4096, 109)"),
}
HALF = """unsigned half(int tiles, unsigned size = 2) {
  const double weights = 1024.0 * tiles;
  return (static_cast<unsigned>(weights / 2 + 4.5 * std::sqrt(weights / 4)) * size / 16 + tiles) * 16;
}"""


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float | None:
    """Share of an SM's threads that are resident; None for an unknown architecture."""
    limits = LIMITS.get(arch.rstrip("a"))
    if limits is None or not threads:
        return None
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    # Registers belong to four partitions, so the warps that fit are a multiple of four.
    fit = limits.registers // 4 // max(per_warp, 1) * 4 // warps
    room = -(-shared // 128) * 128 + SYSTEM_SHARED
    blocks = min(limits.blocks, limits.threads // (warps * 32), fit, limits.shared // room)
    return blocks * warps * 32 / limits.threads


def dynamic_shared(kernels: list[str], folder: Path) -> dict[str, int]:
    """Dynamic shared memory of those kernels that SHARED knows, at 50 % density."""
    chosen = {kernel: SHARED[name] for kernel in kernels if (name := kernel.partition("<")[0]) in SHARED}
    if not chosen:
        return {}
    program, text = folder / "shared", [f'#include "{header}"' for header in sorted({h for h, _ in chosen.values()})]
    text += ["#include <cmath>", "#include <cstdio>", "using namespace alphaprune::cuda;", HALF, "int main() {"]
    for kernel, (_, expression) in chosen.items():
        numbers, copies = [a for a in arguments_of(kernel) if a.isdigit()], copies_of(kernel)
        text.append(f'  std::printf("%zu\\n", static_cast<size_t>({expression.format(*numbers, copies=copies)}));')
    done = subprocess.run(
        [tool("g++"), "-x", "c++", "-std=c++17", f"-I{ROOT / 'csrc'}", "-", "-o", str(program)],
        input="\n".join([*text, "}"]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"an expression of SHARED does not compile:\n{done.stderr.strip()}")
    sizes = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(chosen, map(int, sizes), strict=True))


def copies_of(kernel: str) -> str:
    """How sbt_mma and pair_mma copy: the name of the number for it, the last but one or last of the template's."""
    numbers = [a for a in arguments_of(kernel) if a.isdigit()]
    copies = kernel.startswith(("sbt_mma", "pair_mma")) and len(numbers) > 2
    return ("edges", "whole", "bulk")[int(numbers[2])] if copies else ""


def arguments_of(kernel: str) -> list[str]:
    """Template arguments of a demangled name."""
    inside = kernel.partition("<")[2].rstrip(">")
    return [argument.strip() for argument in inside.split(",")] if inside else []


def count_of(kernel: str) -> int:
    """Tiles of eight tokens, or tokens of an SpMV: the first number of the template; 1 for other kernels."""
    numbers = [int(a.rstrip("u")) for a in arguments_of(kernel) if re.fullmatch(r"\d+u?", a)]
    if numbers and kernel.startswith(WIDE):
        return numbers[0] // 8
    return numbers[0] if numbers and kernel.startswith(TEMPLATES) else 1


def dtype_of(kernel: str) -> str | None:
    return next((a.lower() for a in arguments_of(kernel) if a in ("Bfloat16", "Float16", "Float32", "Int8")), None)


def product(instruction: Instruction) -> tuple[int, int, int] | None:
    if wide := HGMMA.match(instruction.opcode):
        return (512 if wide[1] else 256) * int(wide[2]) // 8, 4, 1
    return next((found for prefix, found in PRODUCTS.items() if instruction.opcode.startswith(prefix + ".")), None)


def weights_of(function: Function, loop: Loop | None) -> dict[int, int]:
    """Weights that products take, by address.

    None where operand a is no weight: nothing that the loop loads, or only what operand b is made from.
    """
    found = {}
    for node in loop.blocks if loop else ():
        for place, one in enumerate(function.blocks[node].instructions):
            if shape := product(one):
                operands = [registers(one.operands[i], shape[i]) for i in (1, 2)]
                a, b = (origins(function, loop, (node, place), operand) for operand in operands)
                if not a <= b:
                    found[one.address] = shape[0]
    return found


def work(function: Function, loop: Loop | None, kernel: str, notes: Notes) -> tuple[float, int | None, str]:
    """Weights, or non-zeros, that a warp does in an iteration; M; and which of the two."""
    issued, weights = rates(function, loop, notes).issued, weights_of(function, loop)
    products = sum(rate * weights.get(i.address, 0) for rate, i in issued)
    if products:
        return products / count_of(kernel), 8 * count_of(kernel), "weights"
    nonzeros = sum(rate for rate, i in issued if is_ffma(i)) * 32
    if nonzeros:
        return nonzeros / count_of(kernel), count_of(kernel), "non-zeros"
    size = 4 if dtype_of(kernel) == "float32" else 2
    return sum(rate * stored(i) for rate, i in issued) * 32 / size, None, "weights"


def stored(instruction: Instruction) -> int:
    """Bytes per lane that a store to global memory writes."""
    if not instruction.opcode.startswith("STG"):
        return 0
    width = re.search(r"\.(64|128|U16|U8)\b", instruction.opcode)
    return STORES["STG" + (width[0] if width else "")]


def main_loop(function: Function, kernel: str, notes: Notes) -> tuple[Loop | None, list[str]]:
    """The loop that does most of the work, and what was assumed to find it.

    The outermost one, unless the source says which; None if no loop does any work.
    """
    telling = next((t for t in (product, is_ffma, stored) if any(t(i) for i in function.body(None))), None)
    working = [loop for loop in function.loops if telling and any(telling(i) for i in function.body(loop))]
    noted = noted_main(function, working, notes)
    outer = function.outermost(list(noted) or working)
    if not outer:
        return None, ["no main loop: the whole kernel is counted"]
    loop = max(outer, key=lambda one: work(function, one, kernel, notes)[0])
    return loop, [f"not the outermost loop: {noted[loop]}"] if loop in noted else []


def is_ffma(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("FFMA")


def row(function: Function, kernel: str, notes: Notes) -> dict[str, object]:
    """Counts of one kernel per UNIT weights or non-zeros."""
    loop, assumed = main_loop(function, kernel, notes)
    found = rates(function, loop, notes)
    weights, tokens, what = work(function, loop, kernel, notes)
    counts: Counter[str] = Counter()
    for rate, instruction in found.issued:
        counts[pipe(instruction.opcode)] += rate
        counts["instr"] += rate
    scale = UNIT / weights if weights else float("nan")
    return {
        "m": tokens,
        "dtype": dtype_of(kernel),
        "per": f"{UNIT} {what}",
        "weights": weights,
        **{name: round(counts[name] * scale, 2) if weights else None for name in COLUMNS},
        "assumed": assumed + found.assumed,
        "unknown": found.unknown,
    }


def ours(source: Path) -> bool:
    """Whether the names of its kernels are those of the package."""
    return source.resolve().parent == CUDA


def rows(source: Path, arch: str, pattern: str = "", options: tuple[str, ...] = ()) -> Iterator[dict[str, object]]:
    """One row per kernel of a source whose name contains the pattern."""
    with tempfile.TemporaryDirectory(prefix="alphaprune-cubins-") as name:
        folder = Path(name)
        cubin = folder / "kernels.cubin"
        used = compile_cubin(source, arch, cubin, options)
        functions, parts = disassemble(cubin, tool("nvdisasm")), sections(cubin)
        symbols = [symbol for symbol in functions if symbol in used]
        kernels = sorted(zip(demangle(symbols), symbols, strict=True))
        kernels = [(kernel, symbol) for kernel, symbol in kernels if re.search(pattern, kernel)]
        dynamic = dynamic_shared([kernel for kernel, _ in kernels], folder) if ours(source) else {}
    for kernel, symbol in kernels:
        if (kernel.startswith(HOPPER) or copies_of(kernel) == "bulk") and arch != "sm_90a":
            continue  # empty there, and never started
        use, block = used[symbol], threads(parts.get(f".nv.info.{symbol}", b""))
        shared = use.shared + dynamic.get(kernel, 0)
        yield {
            "kernel": kernel,
            "arch": arch,
            "registers": use.registers,
            "spill_bytes": use.spills,
            "shared_bytes": shared,
            "threads": block,
            "occupancy": occupancy(arch, use.registers, block, shared),
            **row(functions[symbol], kernel, Notes()),
        }


Wavefronts = Callable[[str, float, int, int], dict[str, float]]


def emulated_by(program: wavefronts.Emulated) -> Wavefronts:
    """Wavefronts per UNIT weights by kernel, density, tokens and row tiles of a warp; each launch is emulated once."""
    return functools.cache(lambda kernel, density, tokens, rows: program.per_unit(density, tokens, 4096, kernel, rows))


def with_wavefronts(found: Iterable[dict[str, object]], emulated: Wavefronts) -> Iterator[dict]:
    """Rows of sbt_mma, of both kinds of values, with simulated wavefronts per UNIT weights at 50 and 30 % density,
    others with none."""
    for one in found:
        kernel = str(one["kernel"]).partition("<")[0]
        known = kernel in wavefronts.KERNELS
        rows = int([a for a in arguments_of(str(one["kernel"])) if a.isdigit()][1]) if kernel == "sbt_mma" else 0
        half, third = (emulated(kernel, density, one["m"], rows) if known else {} for density in wavefronts.DENSITIES)
        at_half = {"wavefronts": half.get("all"), "wavefronts_paired": half.get("paired")}
        yield one | at_half | {"wavefronts_30": third.get("all")}


def line(found: dict) -> str:
    """A row of the table."""
    counts = "".join(f"{found[n]:>8.4g}" if found.get(n) is not None else f"{'-':>8}" for n in (*COLUMNS, "wavefronts"))
    full = f"{found['occupancy']:.0%}" if found["occupancy"] is not None else "-"
    usage_of = f"{found['registers']:>5}{found['spill_bytes']:>6}{found['shared_bytes']:>8}{full:>6}"
    where = f"{found['kernel'][:34]:<35}{found['arch']:<8}{found['m'] or '-':>3}{found['dtype'] or '-':>9}"
    extra = "".join(f"\n    assumed: {text}" for text in found["assumed"])
    extra += "".join(f"\n    UNKNOWN: {text}" for text in found["unknown"])
    return f"{where}{usage_of}{counts}  per {found['per']}{extra}"


def sources() -> list[Path]:
    """What csrc/cuda compiles."""
    found = sorted(CUDA.glob("*.cu"))
    if not found:
        raise ValueError(f"no .cu file in {CUDA}")
    return found


def head() -> str:
    """The names over the table."""
    heads = "".join(f"{name:>8}" for name in (*COLUMNS, "wavef."))
    return f"{'kernel':<35}{'arch':<8}{'M':>3}{'dtype':>9}{'regs':>5}{'spill':>6}{'shared':>8}{'occ.':>6}{heads}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, metavar="FILE.cu", help="instead of all of csrc/cuda")
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="comma-separated")
    parser.add_argument("--kernel", default="", metavar="REGEX", help="of these only")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    args = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="alphaprune-wavefronts-") as folder:
            emulated = emulated_by(wavefronts.Emulated(Path(folder)))
            if not args.json:
                print(head())
            for arch, source in itertools.product(args.arch.split(","), args.sources or sources()):
                found = rows(source, arch, args.kernel)
                for one in with_wavefronts(found, emulated) if ours(source) else found:
                    print(json.dumps(one) if args.json else line(one), flush=True)
    except ValueError as error:
        print(f"cubins: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
