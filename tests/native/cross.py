"""Builds the C++ tests for aarch64 and runs them in qemu-aarch64, plainly and under the sanitizers.

The compiler is Debian's g++-aarch64-linux-gnu or else the ziglang wheel, which has neither OpenMP nor the sanitizers.
Without a compiler or without the emulator it says what to install and passes.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sanitize import ROOT, SANITIZERS, run

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
TARGET = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
BUILDS = {  # name → options of CMake, tests and their arguments
    "plain": ((), (("test_sbt",), ("test_attention",))),
    "sanitized": (
        (f"-DALPHAPRUNE_SANITIZE={SANITIZERS}",),
        (("test_sbt", "quick", "neondot", "neon"), ("test_attention", "quick", "neon")),
    ),
}
SOURCES = (
    "attention",
    "attention_neon",
    "attention_scalar",
    "bandwidth",
    "dispatch",
    "pack",
    "sbt_neon",
    "sbt_neondot",
    "sbt_scalar",
)
ONE_THREAD = """
inline int omp_get_max_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
inline int omp_in_parallel() { return 0; }
inline void omp_set_num_threads(int) {}
"""


def found(names: tuple[str, ...]) -> str | None:
    """The path of the first of these programs that is installed."""
    return next(filter(None, map(shutil.which, names)), None)


def missing() -> str:
    """Why nothing can be run for aarch64 here, or an empty string."""
    if platform.machine() in ("aarch64", "arm64"):
        return "this machine is one itself, and sanitize.py has run its tests"
    if found((COMPILER,)) is None and importlib.util.find_spec("ziglang") is None:
        return f"there is no {COMPILER}; on Debian: apt-get install g++-aarch64-linux-gnu (or: pip install ziglang)"
    if found(EMULATORS) is None:
        return f"there is no {' or '.join(EMULATORS)}; on Debian: apt-get install qemu-user"
    return ""


def sysroot(compiler: str) -> Path:
    """The folder that holds lib/libc.so.6 for aarch64, where the emulated program's loader looks for libraries."""
    library = subprocess.check_output([compiler, "-print-file-name=libc.so.6"], text=True).strip()
    return Path(library).resolve().parent.parent


def zig(emulator: str) -> None:
    """Build without CMake, on one thread, and test; SystemExit if anything fails."""
    sources = [f"csrc/cpu/{name}.cpp" for name in SOURCES]
    with tempfile.TemporaryDirectory(prefix="alphaprune-zig-") as build:
        (Path(build) / "omp.h").write_text(ONE_THREAD)
        compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-std=c++17", "-O3"]
        flags = [f"-I{build}", "-Icsrc", "-DALPHAPRUNE_NEON", "-DALPHAPRUNE_NEONDOT", "-march=armv8.2-a+dotprod"]
        flags.append("-Wno-unknown-pragmas")
        for test in ("test_sbt", "test_attention"):
            made = str(Path(build) / test)
            for command in ([*compiler, *flags, *sources, f"tests/native/{test}.cpp", "-o", made], [emulator, made]):
                print("+", " ".join(command), flush=True)
                if status := subprocess.run(command, cwd=ROOT).returncode:
                    raise SystemExit(status)


def main(names: list[str]) -> None:
    if reason := missing():
        print(f"aarch64 is not tested: {reason}")
        return
    emulator, compiler = found(EMULATORS), found((COMPILER,))
    if compiler is None:
        zig(emulator)
        return
    before = [emulator, "-L", str(sysroot(compiler))]
    for name in names or BUILDS:
        options, tests = BUILDS[name]
        run([*TARGET, f"-DCMAKE_CXX_COMPILER={compiler}", *options], [[*before, *test] for test in tests])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # enough to have threads, few enough for an emulator
    main(sys.argv[1:])
