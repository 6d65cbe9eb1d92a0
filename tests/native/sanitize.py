"""Builds the C++ tests, plainly and under AddressSanitizer and UndefinedBehaviorSanitizer, and runs them."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("", "address,undefined")


def tool(name: str) -> str:
    """The path of a build tool, this environment's own first; SystemExit if there is none."""
    found = shutil.which(name, path=sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath))
    if found is None:
        raise SystemExit(f"{name} was not found; pip install {name}")
    return found


def run(sanitizers: str) -> None:
    """Build and test in a temporary folder; SystemExit with the output's status if anything fails."""
    cmake = tool("cmake")
    with tempfile.TemporaryDirectory(prefix="alphaprune-native-") as build:
        commands = (
            [
                *(cmake, "-S", str(ROOT), "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
                "-DALPHAPRUNE_PYTHON=OFF",
                "-DALPHAPRUNE_TESTS=ON",
                f"-DALPHAPRUNE_SANITIZE={sanitizers}",
            ],
            [cmake, "--build", build],
            [str(Path(build) / "test_sbt")],
        )
        for command in commands:
            print("+", " ".join(command), flush=True)
            # libgomp's pool is never freed, which the leak check would report.
            environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
            if status := subprocess.run(command, env=environment).returncode:
                raise SystemExit(status)


if __name__ == "__main__":
    for choice in sys.argv[1:] or SANITIZERS:
        run(choice)
