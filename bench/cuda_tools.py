"""The tools of CUDA that need no GPU, wherever they are installed: source → cubin → what is in it."""

import os
import re
import shutil
import struct
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOBITS = 8  # type of an ELF section without contents


def tool(name: str) -> str:
    """Path of nvcc, nvdisasm or c++filt; ValueError says where it comes from."""
    site = [Path(sysconfig.get_path(key)) for key in ("platlib", "purelib")]
    folders = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    packaged = [folder for root in site for folder in sorted((root / "nvidia").glob("cu*/bin"), reverse=True)]
    triton = [root / "triton" / "backends" / "nvidia" / "bin" for root in site]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", ""), *map(str, packaged + triton)])
    found = shutil.which(name, path=path)
    if found is None:
        raise ValueError(f"{name} is not installed: {REMEDIES[name]}")
    return found


REMEDIES = {
    "nvcc": "pip install nvidia-cuda-nvcc, or set CUDA_HOME",
    "nvdisasm": "pip install triton, which brings it, or set CUDA_HOME",
    "c++filt": "install binutils",
    "g++": "install g++",
}


def missing() -> str | None:
    """A sentence if a tool is missing."""
    for name in REMEDIES:
        try:
            tool(name)
        except ValueError as error:
            return str(error)
    return None


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel, in bytes but for registers."""

    registers: int
    spills: int
    shared: int


def compile_cubin(source: Path, arch: str, out: Path, options: tuple[str, ...] = ()) -> dict[str, Usage]:
    """Writes a cubin with line numbers; resource usage by symbol."""
    command = [tool("nvcc"), "-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-lineinfo", "-Xptxas", "-v"]
    command += ["--Werror", "cross-execution-space-call"]  # what the host alone has is nothing on the device
    command += [f"-I{ROOT / 'csrc'}", *options, str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"nvcc cannot compile {source} for {arch}:\n{(done.stderr or done.stdout).strip()}")
    return usage(done.stdout + done.stderr)


def usage(report: str) -> dict[str, Usage]:
    """Registers, spilled bytes (stores and loads) and static shared memory from what ptxas -v says."""
    found, name, spills = {}, "", 0
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            name, spills = entry[1], 0
        elif spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(spilled[1]) + int(spilled[2])
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = Usage(int(used[1]), spills, int(shared[1]) if shared else 0)
    return found


def sections(cubin: Path) -> dict[str, bytes]:
    """Sections of a 64-bit ELF by name."""
    data = cubin.read_bytes()
    start, size, count, names = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    text = data[headers[names][4] :]
    return {text[h[0] : text.index(b"\0", h[0])].decode(): data[h[4] : h[4] + h[5]] for h in headers if h[1] != NOBITS}


def threads(info: bytes) -> int:
    """Threads per block from a .nv.info section: EIATTR_MAX_THREADS, set by __launch_bounds__; 0 without."""
    place = 0
    while place + 4 <= len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, place)
        place += 4
        if kind != 4:  # the value stands in the place of the size
            continue
        if attribute == 5:
            x, y, z = struct.unpack_from("<III", info, place)
            return x * y * z
        place += size
    return 0


def demangle(symbols: list[str]) -> list[str]:
    """sbt_mma<Bfloat16, 1> of _ZN…, without namespaces and parameters."""
    text = "\n".join(symbols)
    done = subprocess.run([tool("c++filt")], input=text, capture_output=True, text=True, check=True)
    names = (re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", name) for name in done.stdout.splitlines())
    return [re.sub(r"\([\w ]+\)(?=[-\d])", "", name).partition("(")[0].strip() for name in names]
