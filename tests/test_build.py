"""Installing: with a compiler, without one, editable, and from the source archive."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_COMPILER = {"CXX": "/nonexistent/c++"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a clone holds, symlinks as symlinks, without anything built."""
    copy = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "build", "dist", "*.so", "*_reason.txt", "*.egg-info"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    return copy


def pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """pip without a network and with this environment's build tools."""
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "ALPHAPRUNE_REQUIRE_EXT")}
    clean["ALPHAPRUNE_CUDA"] = "0"  # nvcc takes a minute
    scripts = str(Path(sys.executable).parent)
    path = scripts + os.pathsep + os.environ.get("PATH", os.defpath)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | {"PATH": path} | environment)


def wheel(tree: Path, **environment: str) -> tuple[subprocess.CompletedProcess, dict[str, bytes]]:
    """pip's report and the files of the wheel it built from the tree."""
    out = tree.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    done = pip("wheel", "--no-build-isolation", "--no-deps", "-w", str(out), str(tree), **environment)
    found = list(out.glob("*.whl"))
    if not found:
        return done, {}
    with zipfile.ZipFile(found[0]) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names))
        return done, {name: archive.read(name) for name in names}


def status_of(folder: Path) -> str:
    """What the package in `folder` says of its native half."""
    # An editable install of this checkout would offer its own _native to the package under test.
    code = """import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
from alphaprune.kernels import spmm
print(spmm.__file__)
print(spmm.native_status())"""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder.parent, env=environment, check=True
    )
    file, status = done.stdout.strip().splitlines()
    assert Path(file).is_relative_to(folder)
    return status


def extract(files: dict[str, bytes], folder: Path) -> Path:
    """The wheel as an installed tree."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def test_without_a_compiler_it_installs_and_says_why(tree: Path, tmp_path: Path) -> None:
    stale = tree / "build" / f"lib.linux-x86_64-cpython-{sys.version_info[0]}{sys.version_info[1]}" / "alphaprune"
    stale.mkdir(parents=True)
    suffix = subprocess.check_output(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"], text=True
    ).strip()
    (stale / f"_native{suffix}").write_bytes(b"left by an earlier build")
    done, files = wheel(tree, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert not [name for name in files if name.endswith(".so")]
    assert b"ALPHAPRUNE_CUDA=0 was set" in files["alphaprune/_cuda_reason.txt"]
    assert status_of(extract(files, tmp_path / "installed")).startswith("not built: no C++ compiler was found; install")
    for package in ("alphaprune", "kernels"):
        sources = {path.relative_to(tree / package).as_posix() for path in (tree / package).glob("*.py")}
        prefix = "alphaprune/" if package == "alphaprune" else "alphaprune/kernels/"
        packed = {n.removeprefix(prefix) for n in files if n.startswith(prefix) and n.count("/") == prefix.count("/")}
        assert sources == {name for name in packed if name.endswith(".py")}
    assert "alphaprune/py.typed" in files and not [name for name in files if name.startswith("kernels/")]
    for path in (tree / "alphaprune" / "demo" / "model").glob("*"):
        assert files[f"alphaprune/demo/model/{path.name}"] == path.read_bytes()
    folders = {path.parent.name for path in (tree / "alphaprune").glob("*/__init__.py")}
    assert folders <= {name.split("/")[1] for name in files}, "a package is missing from pyproject.toml"


def test_required_kernels_are_not_left_out(tree: Path) -> None:
    done, files = wheel(tree, ALPHAPRUNE_REQUIRE_EXT="1", **NO_COMPILER)
    assert done.returncode != 0 and not files
    assert "CMAKE_CXX_COMPILER" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_wheel_and_the_source_archive_hold_the_kernels(tree: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    source = next((tmp_path / "source").iterdir())
    has_nvcc = shutil.which("nvcc") is not None
    done, files = wheel(source, ALPHAPRUNE_REQUIRE_EXT="1", **({"ALPHAPRUNE_CUDA": "1"} if has_nvcc else {}))
    assert done.returncode == 0, done.stderr
    for module in ("_native", "_cuda") if has_nvcc else ("_native",):
        assert len([name for name in files if name.startswith(f"alphaprune/{module}.")]) == 1
        assert f"alphaprune/{module}_reason.txt" not in files
    assert status_of(extract(files, tmp_path / "installed")).startswith("built: ")


@pytest.mark.slow
def test_the_source_archive_installs_as_pure_python_and_info_says_so(tree: Path, tmp_path: Path) -> None:
    """In an environment of its own that sees the dependencies, but no compiler and no build of this checkout."""
    made = subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    place = tmp_path / "bare"
    venv.create(place, with_pip=False)
    python, (site,) = place / "bin" / "python", place.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    archive = str(next((tree / "dist").glob("*.tar.gz")))
    done = pip("--python", str(python), "install", "--no-build-isolation", "--no-deps", "-I", archive, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert not list(site.glob("alphaprune/_native*.so")) and (site / "alphaprune" / "py.typed").exists()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def say(*words: str) -> str:
        command = [str(python), "-m", "alphaprune", *words]
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout

    assert say("--version").split() == ["alphaprune", version_of(tree)]
    found = json.loads(say("info", "--json"))
    assert found["native"].startswith("not built: no C++ compiler was found; install g++ or clang++")
    assert found["kernels"]["reference"] == "works" and found["alphaprune"] == version_of(tree)
    metadata = next(site.glob("alphaprune-*.dist-info")) / "METADATA"
    assert "License-Expression: Apache-2.0" in metadata.read_text()
    assert list(metadata.parent.rglob("LICENSE"))


def version_of(tree: Path) -> str:
    return re.search(r'^__version__ = "(.*)"$', (tree / "alphaprune" / "__init__.py").read_text(), re.M)[1]


def test_the_version_stands_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = {attr = "alphaprune.__version__"}' in project and not re.search(r"^version = \"", project, re.M)
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "Unreleased" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_an_editable_install_builds_in_place_and_forgets_failures(tree: Path, tmp_path: Path) -> None:
    def install(**environment: str) -> None:
        target = tmp_path / "site"
        done = pip("install", "--no-build-isolation", "--no-deps", "-t", str(target), "-e", str(tree), **environment)
        assert done.returncode == 0, done.stderr

    install(**NO_COMPILER)
    assert status_of(tree).startswith("not built: no C++ compiler")
    install(ALPHAPRUNE_REQUIRE_EXT="1")
    assert status_of(tree).startswith("built: ")
    install(**NO_COMPILER)
    assert status_of(tree).startswith("not built: "), "an old module outlived a failed build"


def test_every_isa_file_is_built_and_offered() -> None:
    build = (ROOT / "CMakeLists.txt").read_text()
    dispatch = (ROOT / "csrc" / "cpu" / "dispatch.cpp").read_text()
    names = {path.stem.removeprefix("sbt_") for path in (ROOT / "csrc" / "cpu").glob("sbt_*.cpp")}
    assert {"scalar", "avx2", "neon"} <= names
    for name in names - {"scalar"}:
        assert re.search(rf"add_isa\({name}[ )]", build), f"nothing builds sbt_{name}.cpp"
        assert f"defined(ALPHAPRUNE_{name.upper()})" in dispatch, f"dispatch.cpp does not know {name}"


def test_without_a_cross_compiler_the_check_says_so_and_passes(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path)}
    script = [sys.executable, str(ROOT / "tests" / "native" / "cross.py")]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.match("aarch64 is not tested: (there is no .*; on Debian: apt-get install |this machine)", done.stdout)
