"""bench/soak.py and bench/serve.py in small: a minute of the former, a few tokens of the latter."""

import json
import sys
from pathlib import Path

import pytest
import serving_here  # noqa: F401
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import serve
import soak

pytestmark = pytest.mark.slow


def test_a_minute_of_32_clients(capsys: pytest.CaptureFixture) -> None:
    status = soak.main(["--minutes", "1", "--clients", "32"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0, found
    assert found["requests"] > 100 and found["left"] > 10 and found["refused"] > 10


def test_rows_of_the_load(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    assert serve.main(["--rounds", "1", "--clients", "1,2", "--new", "8", "--json", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["weights"], row["clients"]) for row in rows] == [(w, c) for c in (1, 2) for w in ("packed", "dense")]
    for row in rows:
        assert row["tokens_per_second"] > 0 and 0 < row["first_token_seconds"] <= row["first_token_seconds_p95"]
        assert (row["over_one_client"] == 1) == (row["clients"] == 1)
        assert row["memory_peak_bytes"] >= row["memory_allocated_bytes"] and row["memory_limit_bytes"] > 1e9
        assert (row["packed_bytes"] > 0) == (row["weights"] == "packed") and row["device"] == "cpu"
    assert rows[0]["weight_bytes"] < rows[1]["weight_bytes"] / 2 and rows[1]["sparsity"] == 0


def test_rows_of_a_larger_model(capsys: pytest.CaptureFixture) -> None:
    assert serve.main(["--shape", "small", "--rounds", "1", "--clients", "1", "--new", "4", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["weights"], row["sparsity"]) for row in rows] == [("packed", 0.7), ("int8", 0.7), ("dense", 0)]
    assert all(row["model"] == "small" and row["tokens_per_second"] > 0 for row in rows)
    packed, integers, dense = (row["weight_bytes"] for row in rows)
    assert integers < packed < dense and rows[1]["packed_bytes"] < rows[0]["packed_bytes"]


@pytest.mark.parametrize(("shape", "said"), [("tiny", "64 tokens are fewer than the 256"), ("huge", "no shapes of a")])
def test_shapes_that_cannot_be_served(shape: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert serve.main(["--shape", shape]) == 2
    assert capsys.readouterr().err.startswith(f"serve.py: {said}")


def test_one_of_two_folders_is_not_enough(capsys: pytest.CaptureFixture) -> None:
    assert serve.main(["--model", "packed"]) == 2
    assert capsys.readouterr().err == "serve.py: give both of --model and --dense, or none\n"
