"""Writes docs/architecture.md from the flow and the docstrings: `python bench/architecture.py [--check]`."""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
sys.path.insert(0, str(ROOT / "tests"))

import test_flow  # noqa: E402

STAGES = (
    "model",
    "spectrum",
    "alpha",
    "analysis",
    "planning",
    "pruning",
    "formats",
    "kernels",
    "layer",
    "checkpoint",
    "hf",
)


def sources(name: str) -> list[Path]:
    return [path for path in test_flow.SOURCES if test_flow.room(path) == name]


def first_line(name: str) -> str:
    """The first sentence of a room's module, or of its package."""
    files = sources(name)
    init = next((p for p in files if p.name == "__init__.py"), None)
    base = next((p for p in files if p.name == "base.py"), None)
    text = ast.get_docstring(ast.parse((init or base or files[0]).read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def drawing() -> list[str]:
    """A Mermaid graph of the main rooms: an arrow where one imports from another."""
    lines = ["```mermaid", "flowchart LR"]
    for name in STAGES:
        found = {room for path in sources(name) for room in test_flow.imported_rooms(path)}
        lines += [f"  {other} --> {name}" for other in STAGES if other in found and other != name]
    return [*lines, "```"]


def page() -> str:
    rows = [
        f"| `{name}` | {first_line(name).replace('|', chr(92) + '|')} |" for name in test_flow.FLOW if sources(name)
    ]
    return "\n".join(
        [
            "# Architecture",
            "",
            "This page is made by `python bench/architecture.py` from the code; a test compares them.",
            "",
            "Data goes one way: a room imports only from those above it in the table; a test of every file holds that",
            "([tests/test_flow.py](../tests/test_flow.py)). Arrows: what the main rooms import from each other.",
            "",
            *drawing(),
            "",
            "C++ and CUDA lie in [csrc](../csrc), without torch or Python; [kernels](../kernels) is what Python sees.",
            "",
            "| room | what it is |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    if parser.parse_args().check:
        return int(page() != PAGE.read_text())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
