"""From a wheel to the demo in an environment of its own: seconds of `pip install` and of `alphaprune demo`.

`python bench/install.py` builds the wheel, makes an environment, installs the wheel with the versions of
constraints.txt from the package index, runs the demo, and writes a row. What pip has cached it does not fetch again.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from rows import replace

ROOT = Path(__file__).parent.parent


def timed(*command: str, folder: Path) -> float:
    """Seconds that a command takes; SystemExit with what it said if it fails."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", metavar="URL", help="of PyTorch's CPU wheels, where there is no NVIDIA GPU")
    options = parser.parse_args()
    more = ["--extra-index-url", options.index] if options.index else []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        built = timed(sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "-w", place, str(ROOT), folder=folder)
        wheel = next(folder.glob("alphaprune-*.whl"))
        venv.create(folder / "env", with_pip=True)
        python = str(folder / "env" / "bin" / "python")
        pip = (python, "-m", "pip", "-q", "--disable-pip-version-check", "install", "-c", str(ROOT / "constraints.txt"))
        installed = timed(*pip, *more, f"{wheel}[demo]", folder=folder)
        demo = timed(python, "-m", "alphaprune", "demo", folder=folder)
        machine = subprocess.check_output(
            [python, "-c", "from alphaprune import timing; print(timing.machine())"], text=True, cwd=place
        )
        row = {
            "case": "wheel",
            "wheel_bytes": wheel.stat().st_size,
            "build_seconds": built,
            "install_seconds": installed,
            "demo_seconds": demo,
            "seconds": installed + demo,
            "cache": "pip's own, as it was",
            "machine": machine.strip(),
        }
    print(row)
    replace(ROOT / "bench" / "results" / "install.jsonl", [row], "case")


if __name__ == "__main__":
    main()
