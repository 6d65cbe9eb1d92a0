"""The direction of the data: a module imports only from its left, and rooms stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOW = """
    files console hardware devices memory pages ranks journal states registry affinity pattern shards bitmask
    formats stored families experts shapes model data scores mask gram calibrate trees timm_models
    tridiagonal_triton tridiagonal cusolver two_stage spectrum alpha metrics farms sketches activity weight_stats
    analysis curves counts knapsack allocators plan_file nm_planning speed_planning planning llm_compressor refit
    pruners permute pruning kernels layer peft_adapter masked_lora head unfinished checkpoint hf_parallel hf_config
    hf compressions convert blocks decoder sampling ragged graphs rollout generate detokenize text_request textgen
    chat evaluate recovery_masks recovery tasks observed curves_measure candidates compare picture bandwidth timing
    stepping decoding tuning layer_times inspection throughput benchmark report serving demo commands cli
    vllm_plugin
""".split()  # noqa: SIM905
SOURCES = sorted((ROOT / "alphaprune").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))
SOURCES = [s for s in SOURCES if not s.is_relative_to(ROOT / "alphaprune/kernels")]


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        rooms = {n.split(".")[1] for n in names if n.startswith("alphaprune.") and len(n.split(".")) > 1}
        found |= rooms & set(FLOW)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_only_from_the_left(path: Path) -> None:
    own = room(path)
    if own in ("__init__", "__main__"):
        return
    assert own in FLOW, f"{own} has no place in the flow"
    late = {r for r in imported_rooms(path) if FLOW.index(r) > FLOW.index(own)}
    assert not late, f"{path.name} imports from its right: {late}"


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from alphaprune import layer\n    import alphaprune.formats.sbt\n")
    assert imported_rooms(file) == {"layer", "formats"}


PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").glob("*.py")), ROOT / "setup.py"]
DEVICE = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".h", ".cpp", ".cu", ".cuh")]


@pytest.mark.parametrize("path", PYTHON + DEVICE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= (400 if path.suffix == ".py" else 900)
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_no_paths_of_one_machine_and_no_unfinished_marks() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    for path in PYTHON + DEVICE:
        text = path.read_text()
        assert "/ro" + "ot/" not in text and "/wo" + "rk/" not in text, path
        if path != Path(__file__):
            assert not [m for m in marks if m in text and "tests" not in path.parts], path
