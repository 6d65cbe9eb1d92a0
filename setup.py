"""Builds alphaprune._native through CMake; everything else is in pyproject.toml.

Without a compiler the package installs all the same, and alphaprune/_native_reason.txt says why it has no kernels.
ALPHAPRUNE_REQUIRE_EXT=1 makes that an error instead.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NOTE = "_native_reason.txt"


def run(*command: str) -> None:
    """Runs a command, its output shown; RuntimeError with the output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(done.stdout)


def reason(error: Exception) -> str:
    """One line that says why the build failed."""
    text = str(error)
    if "No CMAKE_CXX_COMPILER" in text or "CMAKE_CXX_COMPILER not set" in text:
        return "no C++ compiler was found; install g++ or clang++ and install alphaprune again"
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    return lines[0] if lines else text.strip().splitlines()[-1]


def clear(folder: Path) -> None:
    """Removes what an earlier build left, so that a failed one never ships its module."""
    for stale in (*folder.glob("_native.*.so"), folder / NOTE):
        stale.unlink(missing_ok=True)


class Build(build_ext):
    """One CMake build in a temporary folder, so that nothing stale is ever found."""

    def build_extension(self, extension: Extension) -> None:
        folder = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        try:
            self.compile(folder)
        except Exception as error:
            if os.environ.get("ALPHAPRUNE_REQUIRE_EXT") == "1":
                raise
            (folder / NOTE).write_text(reason(error) + "\n")
            print(f"alphaprune: installing without native kernels: {reason(error)}", file=sys.stderr, flush=True)

    def copy_extensions_to_source(self) -> None:
        """Editable installs build elsewhere and copy: the module, or the note that says why there is none."""
        clear(HERE / "alphaprune")
        super().copy_extensions_to_source()
        for note in Path(self.build_lib).glob(f"alphaprune/{NOTE}"):
            shutil.copy(note, HERE / "alphaprune")

    def compile(self, folder: Path) -> None:
        """The extension module in `folder`; raises if any step fails."""
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        with tempfile.TemporaryDirectory(prefix="alphaprune-build-") as build:
            run(
                *(cmake, "-S", str(HERE), "-B", build, *generator),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            )
            run(cmake, "--build", build, "--parallel")
            run(cmake, "--install", build, "--prefix", str(folder))


# optional: setuptools then accepts that the module may be missing; errors that must stop the build still do.
setup(ext_modules=[Extension("alphaprune._native", sources=[], optional=True)], cmdclass={"build_ext": Build})
