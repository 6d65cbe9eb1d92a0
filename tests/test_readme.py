"""What README.md tells people to type works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code(language: str, number: int) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)[number]


def test_figures_are_those_of_the_committed_rows() -> None:
    found = subprocess.run([sys.executable, ROOT / "bench" / "readme.py", "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr or "README.md is stale: run python bench/readme.py"
    assert len(README.splitlines()) < 200


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 8 and all((ROOT / link).exists() for link in links)


@pytest.mark.slow
def test_shell_and_python_as_written(directory: Path, text_file: Path, tmp_path: Path) -> None:
    lines = code("bash", 1).splitlines()
    assert lines[0].startswith("pip install") and len(lines) == 5
    (tmp_path / "MODEL").symlink_to(directory)
    for name in ("text.txt", "held-out.txt"):
        (tmp_path / name).write_bytes(text_file.read_bytes())
    python = f'alphaprune() {{ {sys.executable} -m alphaprune "$@"; }}'
    commands = [line.replace("--calibration", "--samples 4 --calibration") for line in lines[1:]]
    commands = [line.replace("--prompt", "--max-new 8 --prompt") for line in commands]
    script = "\n".join(["set -e", python, *commands])
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "perplexity" in found.stdout
    found = subprocess.run([sys.executable, "-c", code("python", 0)], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0 and "tensor([[" in found.stdout, found.stderr
