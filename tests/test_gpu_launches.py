"""bench/launches.py on the CPU: its rows and what it would measure on a GPU; never a time."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch):
    """bench/launches.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    names = ("launches", "gpu_cases", "gpu_contenders", "gpu_rig", "cublaslt")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import launches

    yield launches
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("one_thread")
def test_ways_are_timed_by_turns(launches, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    assert launches.main(["--dry-run", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["way"] for row in rows] == ["separate", "together"] and rows[0]["over_first"] == 1
    assert all(row["seconds"] > 0 and row["shapes"] == [[48, 128], [17, 128]] for row in rows)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_without_a_gpu_it_says_so(launches, capsys: pytest.CaptureFixture) -> None:
    kinds = {(case.part, case.kernel) for case in launches.cases(False)}
    assert kinds == {("group", "sbt_mma"), ("group", "nm_mma_sp"), ("rows", "sbt_mma")}
    if torch.cuda.is_available():
        pytest.skip("here is one")
    assert launches.main([]) == 2 and "CUDA device" in capsys.readouterr().err


def test_row_tiles_are_asked_for(launches, emulator) -> None:
    """Products by both ways are the same but for their rounding."""
    (case,) = launches.cases(True)
    kept = case.kept
    weights = launches.Weights((48, 128), torch.bfloat16, torch.device("cpu"))
    x = weights.x(12)
    one, two = (launches.by_row_tiles(count, [weights.packed(kept)], x)()[0] for count in (0, 2))
    torch.testing.assert_close(one, two, rtol=0.02, atol=0.05)
    torch.testing.assert_close(two.double(), x.double() @ weights.pruned(kept).double().T, rtol=0.02, atol=0.1)
