"""bench/prompts.py without a GPU: its ways by the emulated module, and what it says where there is none."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import prompts  # noqa: E402
from gpu_rig import Host  # noqa: E402

from alphaprune.formats import sbt  # noqa: E402
from alphaprune.kernels import cuda, cuda_layouts  # noqa: E402


def test_every_way_is_measured_and_right(
    emulator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["nm_mma_sp", *prompts.NAMES]
    calls_of, chosen = prompts.calls_of, "0, 0"
    given = lambda name, *others: calls_of(chosen if name == "nm_mma_sp" else name, *others)  # noqa: E731
    monkeypatch.setattr(prompts, "calls_of", given)  # by name it would want a GPU
    monkeypatch.setattr(prompts, "OTHERS", ())
    monkeypatch.setattr(prompts, "NAMES", names)
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


def test_every_way_has_a_kernel(emulator: ModuleType) -> None:
    assert len(prompts.WAYS) == len(prompts.NAMES) == 3
    mask = torch.ones(32, 8, dtype=torch.bool).tril(1).triu(0)
    packed = sbt.pack(mask.bfloat16(), mask)
    x = torch.randn(65, 8).bfloat16()
    for way in [*prompts.WAYS, (64, 2), (256, 4), (128, 3)]:
        made, panels = cuda_layouts.native_nm(packed)
        bound = cuda.joined(made.by_ways(*way), [32], 8, x.device, 1, panels)
        if way in prompts.WAYS:
            assert torch.equal(bound.run(x, None)[0], functional.linear(x, mask.bfloat16()))
        else:
            with pytest.raises(RuntimeError, match="nm_mma_sp"):
                bound.run(x, None)


def test_without_a_gpu_it_says_why(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "missing_wide", lambda: "there is none")
    assert prompts.main([]) == 2
    assert capsys.readouterr().err == "prompts.py: no nm_wgmma: there is none\n"
