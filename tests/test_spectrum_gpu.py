"""bench/spectrum_gpu.py on the CPU: rows, errors of ways that are not there, the table; never a time."""

import json
import sys
from pathlib import Path

import pytest
import torch

from alphaprune import cusolver, tridiagonal

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """bench/spectrum_gpu.py as a module, in a process that finds no cuSOLVER."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.delitem(sys.modules, "spectrum_gpu", raising=False)
    monkeypatch.setattr(cusolver, "_library", lambda: "no libcusolver here")
    import spectrum_gpu

    yield spectrum_gpu
    sys.modules.pop("spectrum_gpu", None)


REASONS = {
    "streams": "Unusable: streams are of CUDA devices",
    **dict.fromkeys(
        ("tridiagonal", "recorded"),
        "Unusable: the reduction by Triton needs matrices on a CUDA device, and these are on cpu",
    ),
}


def test_every_way_has_a_row(bench, tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    given = ["--device", "cpu", "--sizes", "8,24", "--batch", "3", "--rounds", "2", "--out", str(out)]
    bench.main(given)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = {(n, "float32", way) for n in (8, 24) for way in bench.WAYS}
    wanted |= {(n, "float64", way) for n in (8, 24) for way in bench.WAYS if way != "svdvals"}
    assert {(row["n"], row["dtype"], row["way"]) for row in rows} == wanted and len(rows) == len(wanted)
    for row in rows:
        if row["way"] not in ("torch", "svdvals"):
            assert row["error"] == REASONS.get(row["way"], "Unusable: no libcusolver here") and "seconds" not in row
            continue
        assert row["seconds_per_matrix"] == row["seconds"] / 3 and row["batch"] == 3 and row["rounds"] == 2
        assert 0 <= row["max_error"] < {"float32": 3e-6, "float64": 1e-13}[row["dtype"]]
        assert row["cusolver"] == "no libcusolver here" and row["command"].endswith("--sizes 8,24 --batch 3 --rounds 2")
    shown = capsys.readouterr().out
    assert (
        f"FASTEST {{'float32': [({cusolver.LARGEST}, 1, 'torch')], 'float64': [({cusolver.LARGEST}, 1, 'torch')]}}"
        in shown
    )


def measured(bench, left: float = 1.0, rounds: int = 1):
    return bench.Measured(CPU, rounds, lambda: left, ("batched", "looped", "torch"))


def test_wrong_eigenvalues_are_seen(bench, monkeypatch) -> None:
    right = cusolver.eigvalsh
    monkeypatch.setattr(cusolver, "eigvalsh", lambda gram, route: right(gram * 1.01, "torch"))
    rows = list(measured(bench).rows(8, torch.float64, 2))
    assert [row["way"] for row in rows] == ["batched", "looped", "torch"]
    assert all(row["max_error"] > 5e-3 for row in rows)


def test_what_is_slow_is_not_repeated_and_nothing_begun_too_late(bench, monkeypatch) -> None:
    right, asked = cusolver.eigvalsh, []
    monkeypatch.setattr(cusolver, "eigvalsh", lambda gram, route: asked.append(route) or right(gram, "torch"))
    monkeypatch.setattr(bench, "SLOW", 0.0)
    found = measured(bench, rounds=3)
    rows = [*found.rows(8, torch.float64, 1), *found.rows(8, torch.float64, 7)]
    assert asked == ["batched", "looped", "torch"]
    assert [row.get("rounds") for row in rows] == [1, 1, 1, None, None, None]
    assert all(row["error"] == "not measured: 0.0 s with fewer matrices" for row in rows[3:])
    late = list(measured(bench, left=0).rows(8, torch.float64, 1))
    assert {row["error"] for row in late} == {"not measured: no time is left"} and len(asked) == 3


def test_the_table_joins_equal_neighbours(bench) -> None:
    def row(n: int, way: str, seconds: float, batch: int = 5, dtype: str = "float64") -> dict:
        return {"n": n, "batch": batch, "dtype": dtype, "way": way, "seconds": 9.0, "seconds_per_matrix": seconds}

    fast = {64: "batched", 128: "batched", 256: "looped", 512: "batched", 1024: "batched"}
    rows = [row(n, way, 1.0 if way == best else 2.0) for n, best in fast.items() for way in ("batched", "looped")]
    rows += [row(64, "svdvals", 0.1), {"n": 64, "dtype": "float64", "way": "torch", "error": "none"}]
    found = bench.table(rows[::-1])
    assert found == {
        "float32": [],
        "float64": [(128, 1, "batched"), (256, 1, "looped"), (cusolver.LARGEST, 1, "batched")],
    }
    for n in (2048, 4096):
        for batch in (1, 2, 3, 7):
            rows += [row(n, "looped", 2.0, batch), row(n, "tridiagonal", 3.0 if batch < 3 else 1.0, batch)]
    large = [(tridiagonal.LARGEST, 3, "tridiagonal"), (cusolver.LARGEST, 1, "looped")]
    assert bench.table(rows)["float64"] == [(128, 1, "batched"), (256, 1, "looped"), (1024, 1, "batched"), *large]


def test_a_model_counts_its_matrices(bench) -> None:
    assert bench.BLOCKS * sum(count for count, _ in bench.BLOCK) == 224
    rows = list(bench.model(CPU, "auto", lambda: 1.0, 2, ((2, (24, 20)), (1, (20, 30)))))
    assert [row["matrices"] for row in rows] == [3, 6] and "6 matrices of 2 of 2 blocks" in bench.line(rows[-1])
    assert rows[1]["seconds"] > rows[0]["seconds"] > 0 and rows[1]["solvers"] == ["gram float32"]
    assert list(bench.model(CPU, "auto", lambda: 0.0)) == []


def test_without_a_gpu_it_says_so(bench, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        bench.main([])
    assert stopped.value.code == 2 and "--device cuda: PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--dtypes", "float16"), "--dtypes: float16 is none of float32, float64"),
        (("--ways", "looped,magic"), "--ways: magic is none of tridiagonal, "),
        (("--sizes", "0"), "--sizes (0,): wanted whole numbers from 1"),
        (("--batch", "3,-1"), "--batch (3, -1): wanted whole numbers from 1"),
        (("--rounds", "0"), "--rounds 0: wanted whole numbers from 1"),
        (("--device", "abacus"), "--device abacus: wanted"),
    ],
)
def test_bad_options_are_one_sentence(bench, capsys, given: tuple[str, ...], words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cpu", *given])
    assert stopped.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
