"""Builds the C++ tests for aarch64 and runs them in qemu-aarch64, plainly and under the sanitizers.

Without a cross compiler or without the emulator it says what to install and passes.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from sanitize import SANITIZERS, run

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
TARGET = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
BUILDS = {  # name → options of CMake, arguments of the test
    "plain": ((), ()),
    "sanitized": ((f"-DALPHAPRUNE_SANITIZE={SANITIZERS}",), ("neon",)),
}


def missing() -> str:
    """Why nothing can be run for aarch64 here, or an empty string."""
    if platform.machine() in ("aarch64", "arm64"):
        return "this machine is one itself, and sanitize.py has run its tests"
    if shutil.which(COMPILER) is None:
        return f"there is no {COMPILER}; on Debian: apt-get install g++-aarch64-linux-gnu"
    if not any(map(shutil.which, EMULATORS)):
        return f"there is no {' or '.join(EMULATORS)}; on Debian: apt-get install qemu-user"
    return ""


def sysroot(compiler: str) -> Path:
    """The folder that holds lib/libc.so.6 for aarch64, where the emulated program's loader looks for libraries."""
    library = subprocess.check_output([compiler, "-print-file-name=libc.so.6"], text=True).strip()
    return Path(library).resolve().parent.parent


def main(names: list[str]) -> None:
    if reason := missing():
        print(f"aarch64 is not tested: {reason}")
        return
    compiler = shutil.which(COMPILER)
    emulator = next(filter(None, map(shutil.which, EMULATORS)))
    before = [emulator, "-L", str(sysroot(compiler))]
    for name in names or BUILDS:
        options, arguments = BUILDS[name]
        run([*TARGET, f"-DCMAKE_CXX_COMPILER={compiler}", *options], [[*before, "test_sbt", *arguments]])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # enough to have threads, few enough for an emulator
    main(sys.argv[1:])
