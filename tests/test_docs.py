"""The guides: the architecture page is current, links lead somewhere, code of the guides runs."""

import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import vision

import alphaprune
from alphaprune import allocators, planning
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.formats import sbt

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def run_block(page: str, name: str, **known: object) -> types.ModuleType:
    """The Python of a guide as a module of that name, beside what it takes as known."""
    text = re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)[1]
    module = types.ModuleType(name)
    module.__dict__.update(known)
    exec(compile(text, page, "exec"), module.__dict__)
    return module


def test_the_architecture_page_is_that_of_the_code() -> None:
    command = [sys.executable, str(ROOT / "bench" / "architecture.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "docs/architecture.md is stale: run python bench/architecture.py"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if ":" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_the_index_names_every_guide() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index] == []


def test_the_allocator_of_the_guide_meets_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "alphaprune.allocators.large"
    monkeypatch.setitem(sys.modules, name, run_block("allocators.md", name))
    monkeypatch.setattr(allocators, "MEMBERS", (*allocators.MEMBERS, "large"))
    layers = {f"model.layers.{b}.up": LayerStat(b, (40, 50), {"frobenius_norm": 1.0 + b}) for b in range(3)}
    plan = planning.plan(Analysis("m", "0", "float32", None, None, layers), 0.7, "large", 0.2)
    found = [entry.sparsity for entry in plan.layers.values()]
    assert plan.realized == 0.7 and found == sorted(found) and found[0] < found[2]


def test_the_kernel_of_the_guide_multiplies() -> None:
    (kernel,) = run_block("kernels.md", "mine").KERNELS
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 72, generator=generator) * (torch.rand(40, 72, generator=generator) < 0.4)
    packed = sbt.pack(weight)
    x = torch.randn(3, weight.shape[1])
    assert kernel.supports(tuple(weight.shape), 3, torch.float32, torch.bfloat16) == "float32 only"
    torch.testing.assert_close(kernel.bind(packed)(x, None), x @ weight.T)


def test_the_commands_of_the_report_guide(run, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "MODEL").symlink_to(directory)
    commands = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "report.md").read_text(), re.S)[1].splitlines()
    assert len(commands) == 4
    for line in commands:
        words, _, target = line.partition(" > ")
        status, out, err = run(*shlex.split(words)[1:])
        assert status == 0, err
        if target:
            Path(target).write_text(out)
    assert "<svg" in Path("report.html").read_text()


def pruning_guide(number: int) -> list[str]:
    """Commands of the guide, on less text than it is usual to calibrate with."""
    text = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "prune.md").read_text(), re.S)[number]
    return [line.replace("--calibration", "--samples 4 --calibration") for line in text.splitlines()]


@pytest.fixture
def room(directory: Path, text_file: Path, tmp_path: Path) -> Path:
    """A folder with what the guide's commands read."""
    (tmp_path / "MODEL").symlink_to(directory)
    for name in ("text.txt", "held-out.txt"):
        (tmp_path / name).write_bytes(text_file.read_bytes())
    (tmp_path / "spill").mkdir()
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_pruning_guide(run, room: Path) -> None:
    first, choices = pruning_guide(0), pruning_guide(1)
    assert len(first) == len(choices) == 5
    said = []
    for line in first + choices:
        status, out, err = run(*shlex.split(line)[1:])
        assert status == 0, f"{line}: {err}"
        said.append(out)
    assert "perplexity" in said[3] and "0.6" in said[2]
    stored = {name: sum(f.stat().st_size for f in (room / name).glob("*.safetensors")) for name in ("pruned", "small")}
    assert stored["small"] < stored["pruned"]
    assert not list(room.glob("*.part")) and not list((room / "spill").iterdir())


@pytest.mark.slow
def test_several_processes_as_in_the_pruning_guide(run, room: Path) -> None:
    (line,) = pruning_guide(2)
    words = shlex.split(line)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("layers packed") == 1, done.stderr
    assert (room / "shared" / "config.json").exists()


def test_the_vision_of_the_pruning_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small transformer in the place of timm's, which wants a torchvision that fits torch."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, vision.SIZE, vision.SIZE)
    timm = types.ModuleType("timm")
    timm.create_model = lambda name, checkpoint_path: vision.ViT()
    monkeypatch.setitem(sys.modules, "timm", timm)
    found = run_block("prune.md", "pruned", images=images)
    packed = [module for module in found.model.modules() if isinstance(module, alphaprune.SparseLinear)]
    assert packed and found.model(images).isfinite().all()
    zeros = sum(int((~mask).sum()) for mask in found.masks.values())
    assert zeros == pytest.approx(0.6 * sum(mask.numel() for mask in found.masks.values()), abs=1)
