"""Runs the tests of the adapters to transformers and PEFT on several versions of transformers, one line for each.

    python tests/compat.py [--folder DIR] [VERSION…]        default: 5.0.0 5.8.1 5.16.1 and the newest

Every version gets an environment of its own that holds transformers and what it needs in other versions, and finds all
the rest, torch first, in the environment that runs this. With --folder the environments are kept there and used again.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("5.0.0", "5.8.1", "5.16.1", "newest")
TESTS = ("hf", "hf_pack", "peft", "checkpoint", "checkpoint_int8", "package", "families", "experts", "head")
PACKAGES = ("transformers", "huggingface_hub", "tokenizers", "peft", "torch")
SHOWN = 25  # lines of a failure


def environment(folder: Path, version: str) -> Path:
    """The Python of an environment with this version of transformers; ValueError with pip's reason if not."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, symlinks=True)
        own = next(folder.glob("lib/*/site-packages"))
        (own / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after what is installed here
    (folder / "constraints.txt").write_text(f"torch=={metadata.version('torch').partition('+')[0]}\n")
    wanted = ["--upgrade", "transformers"] if version == "newest" else [f"transformers=={version}"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "-c", str(folder / "constraints.txt"), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError("not installed: " + tail(done.stderr or done.stdout))
    return python


def test(python: Path) -> tuple[bool, str]:
    """Whether the tests passed, and what pytest says in its last line, or the failures."""
    files = [f"tests/test_{name}.py" for name in TESTS]
    quiet = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=line", "--show-capture=no", "-W", "ignore"]
    command = [str(python), "-m", "pytest", *quiet, *files]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    last = done.stdout.strip().splitlines()[-1:]
    return done.returncode == 0, last[0] if last and not done.returncode else tail(done.stdout + done.stderr)


def tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-SHOWN:])


def found(python: Path) -> str:
    """The versions that an environment really imports."""
    code = f"""
import importlib
for name in {PACKAGES}:
    try:
        print(name, importlib.import_module(name).__version__)
    except ModuleNotFoundError:
        print(name, "missing")
"""
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ValueError("does not import: " + tail(done.stderr))
    return ", ".join(done.stdout.splitlines())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="such as 5.8.1; newest: what pip finds")
    parser.add_argument("--folder", type=Path, help="where environments are kept; without it they are thrown away")
    options = parser.parse_args(arguments)
    failed = []
    with tempfile.TemporaryDirectory(prefix="alphaprune-compat-") as temporary:
        for version in options.versions:
            if not re.fullmatch(r"newest|[0-9][0-9.a-z]*", version):
                parser.error(f"{version}: wanted a version of transformers, or newest")
            try:
                python = environment((options.folder or Path(temporary)).resolve() / version, version)
                (passed, said), described = test(python), found(python)
            except ValueError as error:
                passed, said, described = False, str(error), f"transformers {version}"
            print(f"{described}: {said if passed else 'FAILED'}", flush=True)
            if not passed:
                failed.append(version)
                print(said, file=sys.stderr, flush=True)
    if failed:
        print(f"failed with transformers {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
