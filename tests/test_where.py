"""bench/where.py without a GPU: its rows and tables, of a tiny model on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import where  # noqa: E402


def test_every_model_and_load_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    assert where.main(["--dry-run", "--tokens", "20", "--sequences", "3", "--json", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    weights = [(0.0, "unstructured"), (0.7, "unstructured"), (0.5, "2:4")]
    loads = [("prompt", 20), ("step", 3)]
    assert [(r["sparsity"], r["pattern"], r["load"], r["sequences"]) for r in rows] == [
        (*kept, *load) for kept in weights for load in loads
    ]
    for row in rows:
        taken = [seconds for _, _, seconds in row["kernels"]]
        assert taken == sorted(taken, reverse=True) and min(taken) > 0
        assert len({name for name, *_ in row["kernels"]}) == len(taken)
        assert row["seconds"] > 0 and row["idle"] == pytest.approx(row["seconds"] - sum(taken))
    products = sum(calls for name, calls, _ in rows[0]["kernels"] if name in ("mm", "addmm"))
    assert products == 7 * 2  # in two blocks; the head has one row, which is another call


def test_the_table_shows_the_longest(capsys: pytest.CaptureFixture) -> None:
    assert where.main(["--dry-run", "--tokens", "20", "--load", "prompt", "--sparsity", "0.7", "--most", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 4 and lines[0].startswith("tiny, dense, prompt of 20: ")
    assert lines[4].startswith("tiny, 70%, prompt of 20: ") and lines[7].endswith("no kernel")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void alphaprune::cuda::nm_wgmma<alphaprune::cuda::Bfloat16, 256, 2>(P, T)", "nm_wgmma<Bfloat16, 256, 2>"),
        ("norm_kernel", "norm_kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD"),
        ("x" * 100, "x" * 59 + "…"),
    ],
)
def test_names_are_short(name: str, short: str) -> None:
    assert where.plain(name) == short


def test_what_it_cannot_do_is_said(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        where.main(["--dry-run", "--load", "prompts"])
    assert "--load prompts: there are prompt, step" in capsys.readouterr().err
    assert where.main(["--dry-run", "--model", "other"]) == 2
    assert capsys.readouterr().err.startswith("where.py: no shapes of a model 'other'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert where.main([]) == 2
    assert capsys.readouterr().err == "where.py: torch sees no GPU; --dry-run goes through it on the CPU\n"
