"""What README.md tells people to type works."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tables import curve, linear, made

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "quality.md").read_text()
SERVING = (ROOT / "docs" / "serving.md").read_text()
SPEED = (ROOT / "docs" / "speed.md").read_text()


def code(language: str, number: int, page: str = README) -> str:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)[number]


def test_figures_are_those_of_the_committed_rows() -> None:
    found = subprocess.run([sys.executable, ROOT / "bench" / "readme.py", "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr or "README.md is stale: run python bench/readme.py"
    assert len(README.splitlines()) < 200


def test_every_link_leads_somewhere() -> None:
    pages = ((GUIDE, 3), (SERVING, 1), (SPEED, 2))
    for page, folder, least in ((README, ROOT, 8), *((page, ROOT / "docs", least) for page, least in pages)):
        links = re.findall(r"\]\(([^)#:]+)\)", page)
        assert len(links) > least and [link for link in links if not (folder / link).exists()] == []


def shell(commands: list[str], folder: Path) -> str:
    """What a shell prints for these lines; it stops at the first that fails."""
    script = "\n".join(["set -e", f'alphaprune() {{ {sys.executable} -m alphaprune "$@"; }}', *commands])
    found = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_shell_and_python_as_written(directory: Path, text_file: Path, tmp_path: Path) -> None:
    lines = code("bash", 1).splitlines()
    assert lines[0].startswith("pip install") and len(lines) == 5
    (tmp_path / "MODEL").symlink_to(directory)
    for name in ("text.txt", "held-out.txt"):
        (tmp_path / name).write_bytes(text_file.read_bytes())
    commands = [line.replace("--calibration", "--samples 4 --calibration") for line in lines[1:]]
    commands = [line.replace("--prompt", "--max-new 8 --prompt") for line in commands]
    assert "perplexity" in shell(commands, tmp_path)
    found = subprocess.run([sys.executable, "-c", code("python", 0)], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0 and "tensor([[" in found.stdout, found.stderr


@pytest.mark.slow
def test_the_guide_as_written(directory: Path, text_file: Path, use_table, monkeypatch, tmp_path: Path) -> None:
    """Comparing, pruning by the recommended plan, and plans from error curves and times, on made-up times."""
    use_table(made(*linear("scalar", 1.3, 0.1), curve("dense", 0, [1] * 4)))
    (tmp_path / "MODEL").symlink_to(directory)
    words = text_file.read_text().split(" ")
    for place, name in enumerate(("text.txt", "held-out.txt", "test.txt")):
        (tmp_path / name).write_text(" ".join(words[place * 400 : (place + 1) * 400]))
    compared, pruned = code("bash", 0, GUIDE).splitlines()
    compared += " --samples 4 --windows 4 --allocators measured --methods wanda"
    assert "recommended" in shell([compared, pruned + " --samples 4"], tmp_path)
    assert (tmp_path / "pruned" / "config.json").exists()
    budget, *timed = code("bash", 1, GUIDE).splitlines()
    assert "predicted loss" in shell([budget], tmp_path)
    for line in timed:
        number = line.split()[-1]
        assert "predicted" in shell([line.removesuffix(number) + "1000"], tmp_path)
    if importlib.util.find_spec("peft"):
        recover = code("bash", 2, GUIDE).strip() + " --steps 2 --batch 2 --rank 2"
        assert "won back" in shell([recover], tmp_path) and (tmp_path / "recovered" / "config.json").exists()


TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_the_serving_guide_as_written(directory: Path, text_file: Path, tmp_path: Path) -> None:
    """Packing on loading, perplexity and tasks, conversions and a plan's recipe; the server has tests of its own."""
    prune = f"alphaprune prune {directory} --sparsity 0.6 --allocator uniform --method magnitude"
    plan = f"alphaprune analyze {directory}; alphaprune plan analysis.json --sparsity 0.6"
    shell([f"{prune} -o pruned; {prune} -o zeros --format dense; {plan}"], tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", code("python", 0, SERVING)], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0 and (tmp_path / "packed-zeros" / "config.json").exists(), found.stderr
    for name in ("held-out.txt", "wiki.test.raw"):
        (tmp_path / name).write_bytes(text_file.read_bytes())
    (tmp_path / "tasks").mkdir()
    question = json.dumps({"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0})
    (tmp_path / "questions.jsonl").write_text(f"{question}\n")
    (tmp_path / "tasks" / "mine.yaml").write_text(TASK.replace("questions", f"{tmp_path}/questions"))
    *perplexity, tasks = code("bash", 1, SERVING).splitlines()
    assert shell(perplexity, tmp_path).count("perplexity") == 2
    if importlib.util.find_spec("lm_eval"):
        assert "acc" in shell([tasks], tmp_path)
    shell(code("bash", 2, SERVING).splitlines(), tmp_path)
    assert "sparsity" in (tmp_path / "recipe.yaml").read_text()
    assert not json.loads((tmp_path / "dense-again" / "config.json").read_text()).get("quantization_config")
