"""What bounds the CPU kernels: instructions, µops and cycles of their main loops, from the disassembly and llvm-mca.

python bench/cpu_loops.py            the hottest loop of each kernel, dtype and number of tokens
python bench/cpu_loops.py --all      every loop that expands or multiplies

Compiles csrc anew, for this architecture and, where a cross compiler is installed, for aarch64. Counts are static and
for data in L1: what the memory takes comes on top.
"""

import argparse
import functools
import itertools
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rows import append

ROOT = Path(__file__).resolve().parent.parent
UNIT = 1024  # weights of a macro tile; where a loop only multiplies, products
MCA = "llvm-mca"

# Weights that one instruction puts in their places; through a table, those of a mask byte.
EXPAND = {"vpexpandb": 64, "vpexpandw": 32, "vpexpandd": 16}
COUNTS = {"vpmulld": 256}  # one multiplication counts what is kept before each of so many weights
TABLES = {"vpshufb": 8, "vpermd": 8, "vpermps": 8, "vpcompressd": 16}
EXPANSIONS = {
    "amx": EXPAND,
    "avx512bf16": EXPAND,
    "avx512": EXPAND,
    "avx512vnni": COUNTS,
    "avx512bw": TABLES,
    "avxvnni": TABLES,
    "avx2": TABLES,
    "neondot": {"tbl": 8, "tbx": 8},
    "neon": {"tbl": 4},
    "scalar": {"bsf": 1, "tzcnt": 1},
}
# Products of one instruction by opcode, for the widest registers.
PRODUCTS = (
    (r"vfn?m(add|sub)\w+ps", 16),
    (r"vdpbf16ps", 32),
    (r"vpdpbusds?|vpdpwssds?", 64),
    (r"tdpbf16ps", 16 * 16 * 32),
    (r"tdpb..d", 16 * 16 * 64),
    (r"fmla|fmls", 4),
    (r"[su]dot", 16),
    (r"mulps", 4),
)
WIDTHS = {"%zmm": 1.0, "%ymm": 0.5, "%xmm": 0.25}
TARGETS = {
    "amx": ("sapphirerapids",),
    "avx512bf16": ("znver4",),
    "avx512": ("icelake-server", "sapphirerapids", "znver4"),
    "avx512vnni": ("cascadelake",),
    "avx512bw": ("skylake-avx512",),
    "avxvnni": ("alderlake", "gracemont", "znver4"),
    "avx2": ("haswell", "skylake", "znver3"),
    "neondot": ("neoverse-n1", "neoverse-v2", "apple-m1"),
    "neon": ("neoverse-n1", "neoverse-v2", "apple-m1"),
    "scalar": ("skylake", "znver3"),
}
JUMP = re.compile(r"^(j[a-z]+|loop|b(?:\.\w+)?|cbn?z|tbn?z)\s+(?:[^<]*,\s*)?([0-9a-f]+)(?:\s|$)")


@dataclass(frozen=True)
class Loop:
    """An innermost loop: the function that it stands in and its instructions, operands included."""

    isa: str
    function: str
    instructions: tuple[str, ...]

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(line.split()[0] for line in self.instructions)

    @cached_property
    def weights(self) -> int:
        """Weights that one pass expands."""
        per = EXPANSIONS[self.isa]
        halves = 2 if self.isa == "neon" and "fcvtl" in self.opcodes else 1  # eight 16-bit values, widened afterwards
        return sum(count * per.get(opcode, 0) * halves for opcode, count in self.opcodes.items())

    @cached_property
    def products(self) -> int:
        """Products of weights and activations, integer products of each byte apart."""
        return round(sum(_products(line) for line in self.instructions))

    @property
    def part(self) -> str:
        """fused: expands and multiplies; expand: for a panel or list; multiply: from one; empty: neither."""
        return {(1, 1): "fused", (1, 0): "expand", (0, 1): "multiply"}.get((self.weights > 0, self.products > 0), "")

    @property
    def tokens(self) -> int | None:
        """M of a fused loop. Activations rounded to integers are one byte or two, each with a product of its own."""
        if self.part != "fused":
            return None
        return round(self.products / self.weights / (self.integers or 1))

    @property
    def integers(self) -> int:
        """Bytes of activations that are integers, too; 0 where they are floats."""
        if not any(opcode.startswith(("vpdp", "sdot")) for opcode in self.opcodes):
            return 0
        return 1 if re.search(r"\b(Integer<.*, 1>|(Bytes|Dot)<1>)", self.function) else 2

    @property
    def dtype(self) -> str | None:
        """Of the weights, as far as the instructions tell."""
        for name, arithmetic, expansion in (
            ("int8", r"vpdpbus|tdpb..d|[su]dot", r"vpexpandb|vcvtdq2ps|scvtf"),
            ("float16", r"$^", r"vcvtph2ps|fcvtl2?$"),
            ("bfloat16", r"vdpbf16|tdpbf16", r"vpexpandw|vpslld|vpshufb"),
            ("float32", r"$^", r"vpexpandd|vpermd|vpcompressd"),
        ):
            telling = f"{arithmetic}|{expansion}" if self.weights else arithmetic
            if any(re.match(telling, opcode) for opcode in self.opcodes):
                return name
        if self.isa == "neon" and self.part == "fused":
            return "float32" if "Float32" in self.function else "bfloat16"
        return None

    @property
    def unit(self) -> float:
        """Passes for UNIT weights, or products."""
        return UNIT / (self.weights or self.products)


def _products(line: str) -> float:
    opcode, _, operands = line.partition(" ")
    for pattern, lanes in PRODUCTS:
        if re.fullmatch(pattern, opcode):
            registers = [share for register, share in WIDTHS.items() if register in operands]
            return lanes * (max(registers) if registers and lanes in (16, 32, 64) else 1)
    return 0


def build(folder: Path, architecture: str, compiler: str | None = None) -> list[Path]:
    """The kernels' object files, sbt_<isa>.cpp.o, compiled as the package compiles them."""
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DALPHAPRUNE_PYTHON=OFF"]
    if compiler:
        options += [
            "-DCMAKE_SYSTEM_NAME=Linux",
            f"-DCMAKE_SYSTEM_PROCESSOR={architecture}",
            f"-DCMAKE_CXX_COMPILER={compiler}",
        ]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *options],
        ["cmake", "--build", str(folder), "--parallel", "--target", "alphaprune_cpu"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command[:2])} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return sorted(folder.rglob("sbt_*.cpp.o"))


def functions(file: Path, objdump: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """(symbol, [(address, instruction)]) of an object file."""
    command = [objdump, "-d", "--no-show-raw-insn", str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for block in listing.split("\n\n"):
        lines = block.strip().splitlines()
        if lines and (head := re.match(r"^[0-9a-f]+ <(.*)>:$", lines[0])):
            found = (re.match(r"^\s*([0-9a-f]+):\s+(\S.*)$", line) for line in lines[1:])
            yield head[1], [(int(m[1], 16), " ".join(m[2].removeprefix("{vex}").split())) for m in found if m]


def innermost(listing: list[tuple[int, str]]) -> Iterator[tuple[str, ...]]:
    """Instructions between the target of a jump backwards and the jump, where no other such pair stands inside."""
    place = {address: i for i, (address, _) in enumerate(listing)}
    found = set()
    for i, (_, text) in enumerate(listing):
        jump = JUMP.match(text)
        first = place.get(int(jump[2], 16)) if jump else None
        if first is not None and first <= i:
            found.add((first, i))
    for first, last in sorted(found):
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in found):
            yield tuple(text for _, text in listing[first : last + 1])


def loops(file: Path, objdump: str = "objdump") -> list[Loop]:
    """The innermost loops of an object file that expand or multiply, functions by their C++ names."""
    isa = file.name.removeprefix("sbt_").removesuffix(".cpp.o")
    pairs = [(symbol, body) for symbol, listing in functions(file, objdump) for body in innermost(listing)]
    names = demangle(symbol for symbol, _ in pairs)
    found = [Loop(isa, name, body) for name, (_, body) in zip(names, pairs, strict=True)]
    return [loop for loop in found if loop.part]


def demangle(symbols: Iterable[str]) -> list[str]:
    """Fused<Bfloat16, 1, 8>::turn instead of _ZN…, without namespaces and parameters."""
    text = "\n".join(symbols)
    names = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.split("\n")
    short = (re.sub(r"alphaprune::|\(anonymous namespace\)::|nonzeros::|^void ", "", name) for name in names)
    return [name.partition("(")[0].strip() for name in short]


def hottest(found: list[Loop]) -> list[Loop]:
    """Of each kernel, part, dtype and number of tokens the loop that does most; of equals the longest."""
    groups: dict[tuple, Loop] = {}
    for loop in sorted(found, key=lambda loop: (loop.weights or loop.products, len(loop.instructions))):
        groups[loop.isa, loop.part, loop.dtype, loop.tokens, loop.integers] = loop
    return list(groups.values())


def mca(loop: Loop, cpu: str) -> dict[str, object]:
    """Per UNIT weights on one processor: µops, cycles, and the port that is busiest with its cycles; or why not."""
    command = [MCA, f"-mtriple={triple(loop.isa)}", f"-mcpu={cpu}", "-iterations=100", "--json"]
    done = subprocess.run(command, input=assembly(loop), capture_output=True, text=True)
    start = done.stdout.find("{")
    if done.returncode or start < 0:
        reason = done.stderr.strip().splitlines() or ["it said nothing"]
        return {"cpu": cpu, "missing": reason[0].removeprefix("error: ")}
    report = json.loads(done.stdout[start:])
    region = report["CodeRegions"][0]
    names, summary = report["TargetInfo"]["Resources"], region["SummaryView"]
    pressure: Counter[str] = Counter()
    for entry in region["ResourcePressureView"]["ResourcePressureInfo"]:
        if entry["InstructionIndex"] == len(region["Instructions"]):  # the sum of all
            pressure[names[entry["ResourceIndex"]]] = entry["ResourceUsage"]
    port, cycles = pressure.most_common(1)[0]
    return {
        "cpu": cpu,
        "model": common_start(names),  # LLVM lends one processor's ports to another that it does not know
        "uops": summary["TotaluOps"] / summary["Iterations"] * loop.unit,
        "cycles": summary["TotalCycles"] / summary["Iterations"] * loop.unit,
        "bottleneck": port,
        "bottleneck_cycles": cycles * loop.unit,
        "ports": {name: used * loop.unit for name, used in sorted(pressure.items())},
    }


def common_start(names: list[str]) -> str:
    """SKX of SKXDivider, SKXPort0, …"""
    return "".join(a[0] for a in itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))


def assembly(loop: Loop) -> str:
    """The loop as an assembler reads it."""
    lines = []
    for text in loop.instructions:
        text = re.sub(r"\s*(#|//|<).*$", "", text)
        if re.match(r"^(data16|cs |nop|xchg %ax,%ax)", text):
            continue
        jump = JUMP.match(text)
        lines.append(text[: jump.start(2)] + "again" if jump else text)
    return "again:\n" + "\n".join(lines) + "\n"


def rows(found: list[Loop]) -> Iterator[dict[str, object]]:
    """One row per loop and target CPU that llvm-mca knows; one without cycles where it is not installed."""
    for loop in found:
        row = {
            "kernel": "sbt",
            "isa": loop.isa,
            "part": loop.part,
            "dtype": loop.dtype,
            "tokens": loop.tokens,
            "function": loop.function,
            "per": f"{UNIT} {'weights' if loop.weights else 'products'}",
            "instructions": len(loop.instructions) * loop.unit,
            "expansions": sum(n for op, n in loop.opcodes.items() if op in EXPANSIONS[loop.isa]) * loop.unit,
        }
        for cpu in targets(loop.isa):
            yield row | mca(loop, cpu)
        if not targets(loop.isa):
            yield row | {"cpu": None, "missing": f"{MCA} is not installed, or knows none of {TARGETS[loop.isa]}"}


@functools.cache
def targets(isa: str) -> tuple[str, ...]:
    """The processors of TARGETS that llvm-mca knows; none where it is not installed."""
    if shutil.which(MCA) is None:
        return ()
    command = [MCA, f"-mtriple={triple(isa)}", "-mcpu=help"]
    known = subprocess.run(command, input="", capture_output=True, text=True).stderr
    return tuple(cpu for cpu in TARGETS[isa] if re.search(rf"^\s*{cpu}\s", known, re.MULTILINE))


def triple(isa: str) -> str:
    return "aarch64" if isa.startswith("neon") else "x86_64"


def collect(folder: Path) -> list[Loop]:
    """The loops of all ISAs that can be compiled here."""
    native = platform.machine()
    objects = [(file, "objdump") for file in build(folder / "native", native)]
    cross = "aarch64-linux-gnu-"
    if native == "x86_64" and shutil.which(f"{cross}g++") and shutil.which(f"{cross}objdump"):
        objects += [(file, f"{cross}objdump") for file in build(folder / "aarch64", "aarch64", f"{cross}g++")]
    neon = [(file, tool) for file, tool in objects if "aarch64" not in file.parts or "neon" in file.name]
    return list(itertools.chain.from_iterable(loops(file, tool) for file, tool in neon))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all loops, not only the hottest")
    parser.add_argument("--isa", help="of this one only")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="alphaprune-loops-") as folder:
        found = [loop for loop in collect(Path(folder)) if args.isa in (None, loop.isa)]
    order = {"fused": 0, "expand": 1, "multiply": 2}
    chosen = sorted(
        found if args.all else hottest(found),
        key=lambda loop: (loop.isa, order[loop.part], str(loop.dtype), loop.tokens or 0),
    )
    if not args.json:
        heads = ("isa", "part", "dtype", "M", "instr", "cpu", "model", "µops", "cycles", "busiest port")
        print("".join(f"{h:>{w}}" for h, w in zip(heads, COLUMNS, strict=True)), f" function; per {UNIT} weights")
    for row in rows(chosen):
        text = json.dumps(row)
        print(text if args.json else line(row), flush=True)
        if args.out:
            append(args.out, row)


COLUMNS = (10, 9, 9, 4, 7, 16, 6, 7, 8, 17)


def line(row: dict) -> str:
    """A row of the table."""
    counts = ("", "-", "-", "-")
    if "cycles" in row:
        port = f"{row['bottleneck'].removeprefix(row['model'])} {row['bottleneck_cycles']:.4g}"
        counts = row["model"], f"{row['uops']:.4g}", f"{row['cycles']:.4g}", port
    cells = (row["isa"], row["part"], row["dtype"], row["tokens"], f"{row['instructions']:.4g}", row["cpu"], *counts)
    text = "".join(f"{'' if c is None else c:>{w}}" for c, w in zip(cells, COLUMNS, strict=True))
    return f"{text}  {row['function'][:40]} {row.get('missing', '')}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
