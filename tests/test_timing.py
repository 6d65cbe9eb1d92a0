"""The clock around one linear: consistent rows, and the script in front of it. No test asserts a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphaprune import timing

ROOT = Path(__file__).parent.parent


def test_a_row_says_what_was_timed() -> None:
    row = timing.time_linear((100, 130), 0.75, 3, torch.float32, "reference", 1 << 18, 2, bandwidth=2.0)
    assert (row.shape, row.sparsity, row.tokens, row.dtype, row.kernel) == ((100, 130), 0.75, 3, "float32", "reference")
    assert row.rotated >= 1 << 18 and row.rotated % row.nbytes == 0
    assert row.calls >= 2 * row.rotated // row.nbytes
    assert row.dense_nbytes == 100 * 130 * 4 and row.nbytes < row.dense_nbytes
    assert row.seconds > 0 and row.ratio == row.dense_seconds / row.seconds
    assert row.weights_per_second == 100 * 130 / row.seconds
    assert row.of_bandwidth == row.nbytes / row.seconds / 2


def test_copies_lie_in_distinct_memory() -> None:
    from alphaprune.formats import sbt

    copies = list(timing.copies(sbt.pack(torch.randn(64, 64)), 1 << 17))
    assert len({copy.weight.data_ptr() for copy in copies}) == len({copy.mask.data_ptr() for copy in copies}) > 2


def test_a_kernel_that_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel is called 'amx'"):
        timing.time_linear((16, 64), 0.5, kernel="amx", total_bytes=1, bandwidth=1.0)


def test_the_script_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--shape=48x64", "--sparsity=0.5,0.9", "--tokens=1,2", "--gigabytes=0.0001", "--repeats=1", "--json"]
    command = [sys.executable, str(ROOT / "bench" / "linear.py"), *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert printed == [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["tokens"], row["sparsity"]) for row in printed] == [(1, 0.5), (1, 0.9), (2, 0.5), (2, 0.9)]
    assert all(row["machine"] and row["ratio"] > 0 for row in printed)
