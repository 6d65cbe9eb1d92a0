"""Statistics gathered once are those of calibrate, in memory or in files, shared where layers share their input."""

from pathlib import Path

import pytest
import torch
from conftest import make_model

from alphaprune import calibrate, observed
from alphaprune.model import LiveSource

TOKENS = torch.randint(0, 257, (5, 48), generator=torch.Generator().manual_seed(3))


def wanted(source: LiveSource, need: str) -> list[dict[str, calibrate.InputStat]]:
    """Of every block, behind the dense ones."""
    activations, found = calibrate.first_inputs(source, TOKENS), []
    for block in source.blocks():
        found.append(calibrate.statistics(block, activations, need))
        calibrate.run(block, activations)
    return found


@pytest.mark.parametrize("need", ["norms", "gram"])
@pytest.mark.parametrize("in_memory", [observed.IN_MEMORY, 0])
def test_statistics_are_those_of_calibrate(need: str, in_memory: int, tmp_path: Path) -> None:
    source, ticks = LiveSource(make_model(1)), []
    found = observed.gather(source, TOKENS, need, tmp_path / "s", ticks.append, in_memory)
    assert (tmp_path / "s").is_dir() == (in_memory == 0) and len(ticks) == 3
    for block, expected in zip(source.blocks(), wanted(source, need), strict=True):
        stats = found(block)
        assert found(block) is stats  # read once, so that what a Gram matrix remembers is not lost between layers
        assert stats.keys() == expected.keys()
        for name, stat in stats.items():
            assert torch.equal(stat.norms, expected[name].norms) and stat.tokens == expected[name].tokens == 240
            assert (stat.gram is None) == (need == "norms")
            if stat.gram is not None:
                assert torch.equal(stat.gram.matrix, expected[name].gram.matrix)
                assert stat.gram.tokens == 240
        attention, mlp = (f"{block.name}.{part}." for part in ("self_attn", "mlp"))
        assert stats[f"{attention}q_proj"] is stats[f"{attention}k_proj"] is stats[f"{attention}v_proj"]
        assert stats[f"{mlp}gate_proj"] is stats[f"{mlp}up_proj"] is not stats[f"{mlp}down_proj"]
    observed.delete(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = LiveSource(make_model(1)), tmp_path / "s"

    def stop(name: str) -> None:
        if name.endswith("1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observed.gather(source, TOKENS, "gram", folder, stop, 0)
    assert len(list(folder.glob("*.safetensors"))) == 2
    summed, original = [], calibrate.statistics
    monkeypatch.setattr(calibrate, "statistics", lambda block, *a: summed.append(block.index) or original(block, *a))
    found = observed.gather(source, TOKENS, "gram", folder, None, 0)
    assert summed == [2]
    monkeypatch.undo()
    for block, expected in zip(source.blocks(), wanted(source, "gram"), strict=True):
        assert all(torch.equal(found(block)[n].gram.matrix, s.gram.matrix) for n, s in expected.items())


def test_bytes_count_what_is_shared_once() -> None:
    source = LiveSource(make_model(1))
    block = next(source.blocks())
    found = calibrate.statistics(block, calibrate.first_inputs(source, TOKENS), "gram")
    inputs = (96, 96, 96, 200)  # of q, k, v; o; gate, up; down
    assert observed.nbytes(found) == 4 * sum(k + k * k for k in inputs)
