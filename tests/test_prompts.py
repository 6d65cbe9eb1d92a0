"""bench/prompts.py without a GPU: its tiles by the emulated module, and what it says where there is none."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import prompts  # noqa: E402
from gpu_rig import Host  # noqa: E402

from alphaprune.kernels import cuda  # noqa: E402


def test_every_tile_is_measured_and_right(
    emulator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*prompts.TILES, "nm_mma_sp"]
    monkeypatch.setitem(prompts.TILES, "nm_mma_sp", 0)  # by name it would want a GPU
    monkeypatch.setattr(prompts, "OTHERS", ())
    monkeypatch.setattr(prompts, "Cuda", Host)
    monkeypatch.setattr(cuda, "missing_wide", lambda: None)
    out = tmp_path / "rows.jsonl"
    arguments = ["--shape", "48x64", "--tokens", "70", "--seconds", "60", "--out", str(out)]
    assert prompts.main(arguments) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["shape"] == [48, 64] and row["tokens"] == 70 and row["best"] in names
    assert set(row["seconds"]) == {"dense", *names} and all(taken > 0 for taken in row["seconds"].values())
    assert "dense TFLOP/s" in capsys.readouterr().out
    assert prompts.main([*arguments[:4], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 70


def test_there_are_three_tiles(emulator: ModuleType) -> None:
    made = emulator.NmWeight(0, 32, 128, 2, 0)
    for tile in (-1, 4):
        with pytest.raises(ValueError, match="there are tiles 1 to 3"):
            made.by_tile(tile)


def test_without_a_gpu_it_says_why(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "missing_wide", lambda: "there is none")
    assert prompts.main([]) == 2
    assert capsys.readouterr().err == "prompts.py: no nm_wgmma: there is none\n"
