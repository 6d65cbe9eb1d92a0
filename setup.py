"""Builds alphaprune._native and alphaprune._cuda through CMake; everything else is in pyproject.toml.

Without a compiler the package installs all the same, and alphaprune/_native_reason.txt (_cuda_reason.txt) says why it
has no kernels. ALPHAPRUNE_REQUIRE_EXT=1 makes a missing _native an error instead, ALPHAPRUNE_CUDA=1 a missing _cuda;
ALPHAPRUNE_CUDA=0 does not try to build it.
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
MODULES = ("_native", "_cuda")
NO_NVCC = "nvcc was not found; install the CUDA toolkit (12 or newer) and install alphaprune again"


def run(*command: str) -> None:
    """Runs a command, its output shown; RuntimeError with the output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(done.stdout)


def reason(error: Exception) -> str:
    """One line that says why the build failed."""
    text = str(error)
    if "No CMAKE_CUDA_COMPILER" in text or "CMAKE_CUDA_COMPILER not set" in text:
        return NO_NVCC
    if "No CMAKE_CXX_COMPILER" in text or "CMAKE_CXX_COMPILER not set" in text:
        return "no C++ compiler was found; install g++ or clang++ and install alphaprune again"
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    return lines[0] if lines else text.strip().splitlines()[-1]


def note(module: str) -> str:
    """The file beside a module that says why it is missing."""
    return f"{module}_reason.txt"


def clear(folder: Path, module: str) -> None:
    """Removes what an earlier build left, so that a failed one never ships its module."""
    for stale in (*folder.glob(f"{module}.*.so"), folder / note(module)):
        stale.unlink(missing_ok=True)


def required(module: str) -> bool:
    """Whether the environment makes a missing module an error."""
    return os.environ.get("ALPHAPRUNE_REQUIRE_EXT" if module == "_native" else "ALPHAPRUNE_CUDA") == "1"


class Build(build_ext):
    """One CMake build for each module in a temporary folder, so that nothing stale is ever found."""

    def build_extension(self, extension: Extension) -> None:
        folder, module = Path(self.get_ext_fullpath(extension.name)).resolve().parent, extension.name.split(".")[-1]
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder, module)
        try:
            self.compile(folder, module)
        except Exception as error:
            if required(module):
                raise
            (folder / note(module)).write_text(reason(error) + "\n")
            print(f"alphaprune: installing without {module}: {reason(error)}", file=sys.stderr, flush=True)

    def copy_extensions_to_source(self) -> None:
        """Editable installs build elsewhere and copy: the modules, or the notes that say why there is none."""
        for module in MODULES:
            clear(HERE / "alphaprune", module)
        super().copy_extensions_to_source()
        for module in MODULES:
            for found in Path(self.build_lib).glob(f"alphaprune/{note(module)}"):
                shutil.copy(found, HERE / "alphaprune")

    def compile(self, folder: Path, module: str) -> None:
        """The extension module in `folder`; raises if any step fails."""
        import pybind11

        if module == "_cuda" and os.environ.get("ALPHAPRUNE_CUDA") == "0":
            raise RuntimeError("ALPHAPRUNE_CUDA=0 was set when alphaprune was installed")
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if module == "_cuda" and nvcc is None:
            raise RuntimeError(NO_NVCC)
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
                *(["-DALPHAPRUNE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"] if module == "_cuda" else []),
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            )
            run(cmake, "--build", build, "--parallel")
            run(cmake, "--install", build, "--prefix", str(folder))


# optional: setuptools then accepts that a module may be missing; errors that must stop the build still do.
setup(
    ext_modules=[Extension(f"alphaprune.{module}", sources=[], optional=True) for module in MODULES],
    cmdclass={"build_ext": Build},
)
