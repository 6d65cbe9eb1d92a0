"""The guides: the architecture page is current, links lead somewhere, code of the guides runs."""

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from alphaprune import allocators, planning
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.formats import sbt

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def run_block(page: str, name: str) -> types.ModuleType:
    """The Python of a guide as a module of that name."""
    text = re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)[1]
    module = types.ModuleType(name)
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
