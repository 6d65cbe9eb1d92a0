"""Builds the C++ tests, plainly and under AddressSanitizer and UndefinedBehaviorSanitizer, and runs them.

Once more with AVX-VNNI, AVX-512 and AMX emulated, so that this code is executed on every machine, and where valgrind is
installed under memcheck, which sees reads of memory that was never written; it knows no AVX-512.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = "address,undefined"
VALGRIND = ["valgrind", "--quiet", "--error-exitcode=1"]
MEMCHECK = [[*VALGRIND, test, "quick", "avx2", "scalar"] for test in ("test_sbt", "test_attention")]
EMULATED = ("amx", "avx512bf16", "avx512", "avx512bw", "avxvnni", "scalar")  # avx2 is in the build, but not emulated
BUILDS = {  # name → options of CMake, commands
    "plain": ([], [["test_sbt"], ["test_attention"], *MEMCHECK]),
    "sanitized": ([f"-DALPHAPRUNE_SANITIZE={SANITIZERS}"], [["test_sbt"], ["test_attention"]]),
    "emulated": (
        [f"-DALPHAPRUNE_SANITIZE={SANITIZERS}", "-DALPHAPRUNE_EMULATE=ON"],
        [["test_emulator"], ["test_sbt", *EMULATED], ["test_attention", "quick"]],
    ),
}
PROGRAMS = ("test_attention", "test_emulator", "test_sbt")  # made by a build; a command names them without their folder


def tool(name: str) -> str:
    """The path of a build tool, this environment's own first; SystemExit if there is none."""
    found = shutil.which(name, path=sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath))
    if found is None:
        raise SystemExit(f"{name} was not found; pip install {name}")
    return found


def run(options: Sequence[str], tests: Sequence[Sequence[str]]) -> None:
    """Build in a temporary folder and run the commands; SystemExit with the output's status if anything fails."""
    cmake = tool("cmake")
    with tempfile.TemporaryDirectory(prefix="alphaprune-native-") as build:
        commands = [
            [
                *(cmake, "-S", str(ROOT), "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
                *("-DALPHAPRUNE_PYTHON=OFF", "-DALPHAPRUNE_TESTS=ON", *options),
            ],
            [cmake, "--build", build],
            *([str(Path(build) / part) if part in PROGRAMS else part for part in test] for test in tests),
        ]
        for command in commands:
            print("+", " ".join(command), flush=True)
            # libgomp's pool is never freed, which the leak check would report.
            environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
            if status := subprocess.run(command, env=environment).returncode:
                raise SystemExit(status)


if __name__ == "__main__":
    for choice in sys.argv[1:] or BUILDS:
        build_options, build_tests = BUILDS[choice]
        if MEMCHECK[0] in build_tests and shutil.which(VALGRIND[0]) is None:
            print("memcheck is left out: there is no valgrind; on Debian: apt-get install valgrind", flush=True)
            build_tests = [test for test in build_tests if test not in MEMCHECK]
        run(build_options, build_tests)
