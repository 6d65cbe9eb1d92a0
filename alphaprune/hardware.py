"""What the system says of its processor and memory: sockets, cores, caches, NUMA nodes, limits. Linux; others say less.

Functions take the root of the file system, and leave out what is not there.
"""

import ctypes
import platform
import re
from pathlib import Path
from typing import Any

ROOT = Path("/")
# What kernels for x86 and Arm ask of a processor, by the names of /proc/cpuinfo.
SETS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_vbmi2", "avx512_bf16"),
    *(
        "avx512_fp16",
        "avx_vnni",
        "amx_tile",
        "amx_bf16",
        "amx_fp16",
        "amx_int8",
        "asimd",
        "asimdhp",
        "asimddp",
        "bf16",
        "i8mm",
        "sve",
        "sve2",
    ),
)
MODEL = ("cpu family", "model", "stepping", "CPU part")  # of /proc/cpuinfo
ZEN4 = ((0x10, 0x1F), (0x60, 0x7F), (0xA0, 0xAF))  # models of family 25; the others are Zen 3
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def describe(root: Path = ROOT) -> dict[str, Any]:
    """What the functions below find, in one dict."""
    return topology(root) | {
        "instruction_sets": instruction_sets(root),
        "numa_nodes": numa_nodes(root),
        "caches": caches(root),
        "cpu_limit": cpu_limit(root),
        "memory": memory(root).get("MemTotal"),  # bytes, as the next two
        "memory_available": memory(root).get("MemAvailable"),
        "memory_limit": memory_limit(root),
    }


def topology(root: Path = ROOT) -> dict[str, int | None]:
    """How many sockets, cores and logical CPUs are online, and how many of the latter share a core."""
    places = set()
    folders = [folder for folder in _cpus(root) if (folder / "topology" / "core_id").exists()]
    for folder in folders:
        socket, core = (_text(folder / "topology" / name) for name in ("physical_package_id", "core_id"))
        places.add((socket, _text(folder / "topology" / "die_id"), core))
    sockets = len({socket for socket, _, _ in places})
    return {
        "sockets": sockets or None,
        "cores": len(places) or None,
        "cpus": len(folders) or None,
        "threads_per_core": len(folders) // len(places) if places else None,
    }


def processor(root: Path = ROOT) -> tuple[str, str]:
    """Its name, and family, model and stepping, which tell apart processors that clouds give the same name."""
    found = {}
    for line in (_text(root / "proc/cpuinfo") or "").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        found[key.strip()] = value.strip()
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, ", ".join(f"{key} {found[key]}" for key in MODEL if key in found)


def full_name(name: str, model: str) -> str:
    """The name of a processor with AMD's generation behind it where it has no number: `AMD EPYC (Zen 5)`.

    model: as `processor` gives it. Families and models as in AMD's processor programming references.
    """
    number = re.match(r"cpu family (\d+), model (\d+)", model)
    if "AMD" not in name or re.search(r"\d", name) or number is None:
        return name
    family, model_number = int(number[1]), int(number[2])
    fourth = any(first <= model_number <= last for first, last in ZEN4)
    found = {23: 2 if model_number >= 0x30 else 1, 25: 4 if fourth else 3, 26: 5}.get(family)
    return name if found is None else f"{name} (Zen {found})"


def maker(root: Path = ROOT) -> str | None:
    """Of an x86 processor, as it names itself: GenuineIntel, AuthenticAMD."""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return found and found[1]


def instruction_sets(root: Path = ROOT) -> list[str]:
    """Those of SETS that the processor has and the system knows."""
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if re.match(r"flags|Features", line)), [])
    return [name for name in SETS if name in flags]


def numa_nodes(root: Path = ROOT) -> dict[str, str]:
    """The CPUs of each node, as the system lists them: {"0": "0-31,64-95"}."""
    nodes = (root / "sys/devices/system/node").glob("node[0-9]*")
    found = {node.name.removeprefix("node"): _text(node / "cpulist") or "" for node in nodes}
    return dict(sorted(found.items(), key=lambda one: int(one[0])))


def caches(root: Path = ROOT) -> list[dict[str, Any]]:
    """Each kind of cache of data: level, type, bytes of one, the CPUs that share it, and how many there are."""
    found: dict[tuple[int, str, int], set[str]] = {}
    for cpu in _cpus(root):
        for folder in (cpu / "cache").glob("index*"):
            kind, level, size = (_text(folder / name) for name in ("type", "level", "size"))
            match = re.fullmatch(r"(\d+)([KMG]?)", size or "")
            if kind in ("Data", "Unified") and level and match:
                one = int(level), kind.lower(), int(match[1]) * UNITS.get(match[2], 1)
                found.setdefault(one, set()).add(_text(folder / "shared_cpu_list") or cpu.name)
    return [
        {"level": level, "type": kind, "bytes": size, "cpus": _count(next(iter(shared))), "count": len(shared)}
        for (level, kind, size), shared in sorted(found.items())
    ]


def cpu_limit(root: Path = ROOT) -> float | None:
    """How many CPUs' worth of time a container grants; None without a limit."""
    parts = (_text(root / "sys/fs/cgroup/cpu.max") or "").split()
    if len(parts) != 2:
        old = root / "sys/fs/cgroup/cpu"
        parts = [_text(old / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    quota, period = parts
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def memory(root: Path = ROOT) -> dict[str, int]:
    """Bytes by the names of /proc/meminfo: MemTotal, MemAvailable, …"""
    lines = (_text(root / "proc/meminfo") or "").splitlines()
    found = (re.fullmatch(r"(\w+):\s+(\d+) kB", line) for line in lines)
    return {match[1]: int(match[2]) * 1024 for match in found if match}


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that a container grants; None without a limit below the memory of the machine."""
    total = memory(root).get("MemTotal")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(root / "sys/fs/cgroup" / name) or ""
        if text.isdigit() and (total is None or int(text) < total):
            return int(text)
    return None


def memory_free(root: Path = ROOT) -> int | None:
    """Bytes that can be taken: of the machine's memory, and of what a container grants; None where nobody says.

    Of a container's own, pages of files count as free, as MemAvailable has it.
    """
    available, limit = memory(root).get("MemAvailable"), memory_limit(root)
    if limit is None:
        return available
    taken = 0
    for name, entry in (("memory.stat", "anon"), ("memory/memory.stat", "total_rss")):
        found = re.search(rf"^{entry} (\d+)$", _text(root / "sys/fs/cgroup" / name) or "", re.MULTILINE)
        taken = int(found[1]) if found else taken
    left = max(0, limit - taken)
    return left if available is None else min(left, available)


def openmp(root: Path = ROOT) -> list[str]:
    """The OpenMP libraries that this process has loaded: one, or their threads get in each other's way."""
    return loaded(r"/lib(g|i|)omp\d*[^/]*\.(so|dylib)", root / "proc/self/maps")


def cuda_driver(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """The newest version of CUDA that the NVIDIA driver serves, such as (12, 4); None where there is no driver."""
    found = ctypes.c_int(0)
    try:
        status = ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return None if status or not found.value else (found.value // 1000, found.value % 1000 // 10)


def loaded(pattern: str, maps: "str | Path" = ROOT / "proc/self/maps") -> list[str]:
    """The files that this process has mapped whose paths hold the pattern, in order."""
    lines = (_text(Path(maps)) or "").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.search(pattern, path))


def _cpus(root: Path) -> list[Path]:
    return sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))


def _count(listed: str) -> int:
    """How many numbers a list such as 0-3,8 names."""
    spans = re.findall(r"(\d+)(?:-(\d+))?", listed)
    return sum(int(last or first) - int(first) + 1 for first, last in spans)


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
