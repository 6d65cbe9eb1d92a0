"""What README.md tells people to type works."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT
from guides import DOCS, blocks, write_task
from tables import curve, linear, made

sys.path.insert(0, str(ROOT / "bench"))
import served
import speed_figures

README, QUALITY, SERVING = ROOT / "README.md", DOCS / "quality.md", DOCS / "serving.md"


def test_figures_are_those_of_the_committed_rows() -> None:
    found = subprocess.run([sys.executable, ROOT / "bench" / "readme.py", "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr or "README.md is stale: run python bench/readme.py"
    assert len(README.read_text().splitlines()) < 200


@pytest.mark.parametrize("figure", ["attention", "decode", "load", "peers", "serve"])
def test_a_table_whose_text_names_one_machine_has_its_rows_alone(figure: str, monkeypatch) -> None:
    rows, wanted = speed_figures.rows, getattr(speed_figures, figure)()

    def others_before(name: str) -> list[dict]:
        return [{**row, "machine": "another"} for row in rows(name)] + rows(name)

    monkeypatch.setattr(speed_figures, "rows", others_before)
    assert getattr(speed_figures, figure)() == wanted


def shell(commands: list[str], folder: Path) -> str:
    """What a shell prints for these lines; it stops at the first that fails."""
    script = "\n".join(["set -e", f'alphaprune() {{ {sys.executable} -m alphaprune "$@"; }}', *commands])
    found = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def python(code: str, folder: Path) -> str:
    """What a new process prints for this."""
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_shell_and_python_as_written(directory: Path, text_file: Path, tmp_path: Path) -> None:
    lines = blocks(README, "bash")[1].splitlines()
    assert lines[0].startswith("pip install") and len(lines) == 5
    (tmp_path / "MODEL").symlink_to(directory)
    for name in ("text.txt", "held-out.txt"):
        (tmp_path / name).write_bytes(text_file.read_bytes())
    commands = [line.replace("--calibration", "--samples 4 --calibration") for line in lines[1:]]
    commands = [line.replace("--prompt", "--max-new 8 --prompt") for line in commands]
    assert "perplexity" in shell(commands, tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", blocks(README, "python")[0]], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0 and "tensor([[" in found.stdout, found.stderr


@pytest.mark.slow
def test_the_guide_as_written(directory: Path, text_file: Path, use_table, monkeypatch, tmp_path: Path) -> None:
    """Comparing, pruning by the recommended plan, and plans from error curves and times, on made-up times."""
    use_table(made(*linear("scalar", 1.3, 0.1), curve("dense", 0, [1] * 4)))
    (tmp_path / "MODEL").symlink_to(directory)
    words = text_file.read_text().split(" ")
    for place, name in enumerate(("text.txt", "held-out.txt", "test.txt")):
        (tmp_path / name).write_text(" ".join(words[place * 400 : (place + 1) * 400]))
    compared, pruned = blocks(QUALITY, "bash")[0].splitlines()
    compared += " --samples 4 --windows 4 --allocators measured --methods wanda"
    assert "recommended" in shell([compared, pruned + " --samples 4"], tmp_path)
    assert (tmp_path / "pruned" / "config.json").exists()
    budget, *timed = blocks(QUALITY, "bash")[1].splitlines()
    assert "predicted loss" in shell([budget], tmp_path)
    for line in timed:
        number = line.split()[-1]
        assert "predicted" in shell([line.removesuffix(number) + "1000"], tmp_path)
    if importlib.util.find_spec("peft"):
        recover = blocks(QUALITY, "bash")[2].strip() + " --steps 2 --batch 2 --rank 2"
        assert "won back" in shell([recover], tmp_path) and (tmp_path / "recovered" / "config.json").exists()


@pytest.mark.slow
def test_the_serving_guide_as_written(directory: Path, text_file: Path, tmp_path: Path) -> None:
    """Packing on loading, perplexity and tasks, conversions and a plan's recipe."""
    prune = f"alphaprune prune {directory} --sparsity 0.6 --allocator uniform --method magnitude"
    plan = f"alphaprune analyze {directory}; alphaprune plan analysis.json --sparsity 0.6"
    shell([f"{prune} -o pruned; {prune} -o zeros --format dense; {plan}"], tmp_path)
    python(blocks(SERVING, "python")[0], tmp_path)
    assert (tmp_path / "packed-zeros" / "config.json").exists()
    for name in ("held-out.txt", "wiki.test.raw"):
        (tmp_path / name).write_bytes(text_file.read_bytes())
    write_task(tmp_path)
    *perplexity, tasks = blocks(SERVING, "bash")[1].splitlines()
    assert shell(perplexity, tmp_path).count("perplexity") == 2
    if importlib.util.find_spec("lm_eval"):
        assert "acc" in shell([tasks], tmp_path)
    shell(blocks(SERVING, "bash")[2].splitlines(), tmp_path)
    assert "sparsity" in (tmp_path / "recipe.yaml").read_text()
    assert not json.loads((tmp_path / "dense-again" / "config.json").read_text()).get("quantization_config")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed")
def test_the_server_as_written(run, directory: Path, tmp_path: Path) -> None:
    """On a free port in place of the one that stands there."""
    install, line = blocks(SERVING, "bash")[0].splitlines()
    assert install == 'pip install "alphaprune[serve]"'
    (tmp_path / "pruned").symlink_to(directory)
    program, command, model, *options = shlex.split(line.replace("--port 8000", "--port 0"))
    assert (program, command) == ("alphaprune", "serve")
    with served.serve(Path(model), tmp_path / "log", *options) as server:
        for key, wanted in (("SECRET", 200), ("another", 401)):
            request = Request(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"})
            try:
                status = urlopen(request, timeout=60).status
            except HTTPError as error:
                status = error.code
            assert status == wanted
