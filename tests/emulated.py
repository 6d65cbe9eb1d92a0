"""csrc/cuda compiled by g++ for csrc/emulator, as a Python module whose kernels take addresses of the host."""

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import cuda_face
import pytest
from torch import Tensor

from alphaprune.kernels import cuda

ROOT = Path(__file__).parent.parent
NAME = "_cuda_emulated"
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DALPHAPRUNE_EMULATE_CUDA", f"-DALPHAPRUNE_MODULE={NAME}"),
    *('-DALPHAPRUNE_COMPILER="g++"', '-DALPHAPRUNE_ARCHITECTURES="emulated"'),
)


def compile_file(source: Path, out: Path) -> Path:
    """The object file of a .cu or .cpp file; AssertionError with the compiler's words."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    command = ["g++", *FLAGS, *[f"-I{folder}" for folder in includes], "-x", "c++", "-c", source, "-o", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def build(folder: Path, csrc: Path = ROOT / "csrc", objects: dict[str, Path] | None = None) -> dict[str, Path]:
    """Object files of csrc/cuda by name, those of `objects` taken as they are."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((csrc / "cuda").glob("*.cu")), csrc / "cuda" / "bindings.cpp"]
    known = objects or {}
    with ThreadPoolExecutor(2) as pool:
        made = {s.stem: pool.submit(compile_file, s, folder / f"{s.stem}.o") for s in sources if s.stem not in known}
    # New ones first: of an inline function that several files have, a linker takes the first.
    return {**{stem: job.result() for stem, job in made.items()}, **known}


def link_library(objects: dict[str, Path], folder: Path) -> Path:
    """The file of the module made of these objects."""
    library = folder / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    done = subprocess.run(["g++", "-shared", "-o", library, *objects.values()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def open_module(library: Path) -> ModuleType:
    """The module in this file, ready for launches. One for each process: pybind11 knows modules by their names."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.prepare(0)
    return module


def use(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets kernels/cuda.py call this module, with tensors of the host."""
    monkeypatch.setattr(cuda, "_find", lambda: (module, ""))
    cuda.opened.cache_clear()


def guarded(tensor: Tensor) -> Tensor:
    """The same bytes, aligned to 16 and ending within 16 bytes of a page that nobody may touch."""
    return cuda_face.guard(tensor.contiguous()).tensor
