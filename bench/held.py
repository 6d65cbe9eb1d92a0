"""Benchmarks on a CPU as one that lacks some of its instructions has them: ours, and the libraries of torch."""

import os
import sys

# They ask when they are loaded.
ISAS = {
    isa: {
        "ALPHAPRUNE_ISA": isa,
        "ATEN_CPU_CAPABILITY": aten,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "ONEDNN_MAX_CPU_ISA": onednn,
    }
    for isa, aten, mkl, onednn in (
        ("avx2", "avx2", "AVX2", "AVX2"),
        ("avxvnni", "avx2", "AVX2", "AVX2_VNNI"),
        ("avx512", "avx512", "AVX512", "AVX512_CORE_VNNI"),
    )
}
NAMES = {"avx2": "AVX2", "avxvnni": "AVX-VNNI", "avx512": "AVX-512 without BF16"}
HELP = "to an instruction set, torch and ours"


def hold(isa: str | None) -> None:
    """Runs this script anew where its process is not held so yet."""
    if isa and not ISAS[isa].items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ISAS[isa])


def named(machine: str, isa: str | None) -> str:
    """What rows call the machine then."""
    return f"{machine}, held to {NAMES[isa]}" if isa else machine
