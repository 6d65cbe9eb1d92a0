"""bench/in_cache.py: rows of a kernel by itself."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


def test_rows_take_the_place_of_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", ["in_cache.py"])
    import in_cache

    out, threads = tmp_path / "rows.jsonl", torch.get_num_threads()
    out.write_text(json.dumps({"machine": "another", "nanoseconds": 1.0}) + "\n")
    options = ["--shape", "48x256", "--sparsity", "0.5,0.75", "--tokens", "1,3", "--rounds", "5", "--out", str(out)]
    try:
        for _ in range(2):
            in_cache.main(options)
    finally:
        torch.set_num_threads(threads)
    first, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert first["machine"] == "another" and len(rows) == 2 * 2 * 3
    assert {(row["values"], row["tokens"], row["sparsity"]) for row in rows} == {
        (kind, tokens, sparsity) for kind in in_cache.KINDS for tokens in (1, 3) for sparsity in (0.5, 0.75)
    }
    assert "ns per 1024 weights by tokens" in capsys.readouterr().out
