"""The environments of the other engines: pinned packages, and llama.cpp's matrix kernels built from source."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

NEEDS = {
    "openvino": ["openvino==2026.4.1", "numpy==2.4.6"],
    "deepsparse": ["deepsparse==1.8.0", "numpy==1.26.4", "onnx==1.14.1", "protobuf==7.36.2", "setuptools==65.5.0"],
    "llamacpp": ["numpy==2.4.6", "cmake==4.4.4", "ninja==1.13.2"],
}
SOURCE = "llama-cpp-python==0.3.36"  # its source archive holds llama.cpp's
OLD_PYTHONS = {"deepsparse": (3, 11)}  # the newest Python that it has wheels for
READY = "ready"  # a file that the last step of a set-up leaves
OFF = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")]


class Failed(Exception):
    """A step of a set-up failed; the sentence says which and why."""


def run(command: Sequence[str | Path], what: str, folder: Path | None = None) -> None:
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    if done.returncode:
        last = [text for text in (done.stdout + done.stderr).splitlines() if text.strip()][-1:]
        raise Failed(f"{what} failed: {' '.join(last)}")


def interpreter(name: str) -> str:
    """A Python that the engine has wheels for: this one, or an older one on the path."""
    newest = OLD_PYTHONS.get(name, sys.version_info[:2])
    if sys.version_info[:2] <= newest:
        return sys.executable
    for minor in range(newest[1], 7, -1):
        if shutil.which(f"python3.{minor}"):
            return f"python3.{minor}"
    raise Failed(f"it has no wheels for Python {sys.version_info[0]}.{sys.version_info[1]}, and no older one is here")


def build_llama(place: Path) -> None:
    """llama.cpp's ggml libraries into place/llama.cpp/bin, with its own default options."""
    source, built = place / "source", place / "llama.cpp"
    pip = [place / "bin" / "python", "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
    run([*pip, "-d", source, SOURCE], f"the download of {SOURCE}")
    archive = next(source.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(source, filter="data")
    folder = source / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    cmake = place / "bin" / "cmake"
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *OFF]
    run([cmake, "-S", folder, "-B", built, *options], "the configuration of llama.cpp")
    run([cmake, "--build", built, "--target", "ggml", "-j", str(os.cpu_count())], "the build of llama.cpp")
    shutil.rmtree(source)


def make_one(name: str, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    run([interpreter(name), "-m", "venv", place], "the virtual environment")
    run([place / "bin" / "python", "-m", "pip", "install", *NEEDS[name]], f"pip install {' '.join(NEEDS[name])}")
    if name == "llamacpp":
        build_llama(place)
    (place / READY).write_text("\n".join(NEEDS[name]) + "\n")


def make(folder: Path, names: Sequence[str], tell: Callable[[str], None]) -> int:
    """Makes the environments that are not there yet, one after another; 1 if one of them could not be made."""
    failures = 0
    for name in names:
        place = folder.absolute() / name
        ready = place / READY
        if ready.exists() and ready.read_text().split() == NEEDS[name]:
            tell(f"{name}: is there")
            continue
        tell(f"{name}: …")
        try:
            make_one(name, place)
        except (Failed, OSError) as fault:
            failures += 1
            tell(f"{name}: {fault}")
    return int(failures > 0)


def python(name: str, folder: Path | None) -> Path | str:
    """The Python that runs an engine, or a sentence why there is none."""
    if name not in NEEDS:
        return Path(sys.executable)
    if folder is None:
        return f"{name}: say --envs DIR where bench/peers.py --setup DIR made its environment"
    if not (folder / name / READY).exists():
        return f"{name}: not set up in {folder}; run bench/peers.py --setup {folder}"
    return (folder / name / "bin" / "python").absolute()
