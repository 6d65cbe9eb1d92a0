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
from conftest import ROOT
from guides import DOCS, blocks

import alphaprune
from alphaprune import allocators, planning
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.formats import sbt

PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
UNTRIED = "not tried"
# What runs every block of code in bash, Python or sh, from the top of its page: a test, or UNTRIED if the page says so.
RUNS = {
    "CONTRIBUTING.md": ["test_docs.py::test_targets_of_make"],
    "README.md": [
        "test_docs.py::test_targets_of_make",
        *["test_readme.py::test_shell_and_python_as_written"] * 2,
        UNTRIED,
        "test_docs.py::test_targets_of_make",
    ],
    "docs/allocators.md": ["test_docs.py::test_the_allocator_of_the_guide_meets_a_budget"],
    "docs/compressions.md": ["test_compress_cli.py::test_the_page_as_written"] * 3,
    "docs/kernels.md": ["test_docs.py::test_the_kernel_of_the_guide_multiplies"],
    "docs/many_machines.md": [
        UNTRIED,
        *["vllm_check.py::served_tokens"] * 2,
        *[UNTRIED] * 2,
        *["test_hf_parallel.py::test_the_guide_as_written"] * 2,
        UNTRIED,
    ],
    "docs/prune.md": [
        *["test_docs.py::test_the_commands_of_the_pruning_guide"] * 2,
        "test_docs.py::test_several_processes_as_in_the_pruning_guide",
        "test_docs.py::test_the_vision_of_the_pruning_guide",
    ],
    "docs/quality.md": ["test_readme.py::test_the_guide_as_written"] * 3,
    "docs/report.md": ["test_docs.py::test_the_commands_of_the_report_guide"],
    "docs/serving.md": [
        "test_readme.py::test_the_serving_guide_as_written",
        "test_readme.py::test_the_server_as_written",
        UNTRIED,
        *["test_readme.py::test_the_serving_guide_as_written"] * 2,
    ],
}


def run_block(page: str, name: str, **known: object) -> types.ModuleType:
    """The first Python of a guide as a module of that name, beside what it takes as known."""
    module = types.ModuleType(name)
    module.__dict__.update(known)
    exec(compile(blocks(DOCS / page, "python")[0], page, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_block_is_run_or_said_not_to_be(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = list(re.finditer(r"^```(?:bash|python|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    for block, runner in zip(found, RUNS.get(page.relative_to(ROOT).as_posix(), []), strict=True):
        if runner == UNTRIED:
            beside = text[max(0, block.start() - 350) : block.end()]  # what introduces it, and itself
            assert re.search(r"not tried|none of this (ran|has run)", beside, re.IGNORECASE), block[1]
        else:
            file, _, function = runner.partition("::")
            assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), runner


def test_targets_of_make() -> None:
    """Those that the pages name are there, and all that the Makefile has are described at its top."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    for page in PAGES:
        for words in re.findall(r"^make ([a-z ]+?)(?: +#.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert set(words.split()) <= targets, (page.name, words)
    described = set(re.findall(r"^# make (\w+)", makefile, re.MULTILINE))
    assert described == targets - {"lint", "format", "clean"}


def test_the_architecture_page_is_that_of_the_code() -> None:
    command = [sys.executable, str(ROOT / "bench" / "architecture.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "docs/architecture.md is stale: run python bench/architecture.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if ":" not in link]
    for file, _, place in (link.partition("#") for link in links):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not place or place in places(target), (file, place)


def places(page: Path) -> list[str]:
    """What links to the headings of a page are called."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_index_names_every_guide() -> None:
    index = (DOCS / "README.md").read_text()
    assert [page.name for page in DOCS.glob("[a-z]*.md") if f"({page.name})" not in index] == []


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
    commands = blocks(DOCS / "report.md", "bash")[0].splitlines()
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
    lines = blocks(DOCS / "prune.md", "bash")[number].splitlines()
    return [line.replace("--calibration", "--samples 4 --calibration") for line in lines]


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
