"""Several processes do what one does, bit by bit; who does not belong to them is refused, nobody waits in vain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from alphaprune import ranks

SIZES = (1, 2, 3, 5)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    """Makes this process one of several, without the others."""
    return lambda rank, size: monkeypatch.setattr(ranks, "_world", ranks.World(rank, size))


@given(pieces=st.integers(1, 40), most=st.integers(1, 12), size=st.integers(1, 20))
def test_strands_are_the_same_whatever_the_number_of_processes(pieces: int, most: int, size: int) -> None:
    before, together = ranks._world, []
    try:
        for rank in range(size):
            ranks._world = ranks.World(rank, size)
            own, count = ranks.strands(pieces, most)
            assert count == min(pieces, most) and (own or rank)  # the first process has work
            together += own
        ranks._world = ranks.ALONE
        assert together == ranks.strands(pieces, most)[0]
        assert [piece for strand in together for piece in strand] == list(range(pieces))
    finally:
        ranks._world = before


def test_work_is_split_by_cost(as_rank) -> None:
    costs = {"a": 5.0, "b": 3.0, "c": 3.0, "d": 2.0, "e": 1.0}
    as_rank(0, 2)
    owners = ranks.mine(costs)
    loads = [sum(costs[name] for name, owner in owners.items() if owner == rank) for rank in (0, 1)]
    assert owners.keys() == costs.keys() and sorted(loads) == [7, 7]


def test_alone_nothing_is_exchanged() -> None:
    x = torch.randn(3)
    assert ranks.share_tensor(x) is x and ranks.gather(1) == [1] and ranks.share("x") == "x"
    assert torch.equal(ranks.fold([x, x, -x], x, 3), x + x - x)
    ranks.agree({"anything": 1})
    with ranks.joined("analyze", {}) as world:
        assert world is ranks.ALONE and world.leads


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose calibration text makes four batches, and the text."""
    folder = tmp_path_factory.mktemp("ranks")
    changes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    make_model(3, **changes).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    (folder / "text").write_text("the heavy tail of a layer keeps what it needs. " * 30)
    return folder


def results(place: Path, runs: list[dict]) -> list[dict]:
    (place / "runs.json").write_text(json.dumps(runs))
    script = [sys.executable, str(Path(__file__).with_name("rank_runs.py")), str(place / "runs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def words(place: Path, command: str, out: str, *more: str) -> list[str]:
    text = ["--calibration", str(place / "text"), "--samples", "200", "--length", "64"]
    return [command, str(place / "model"), "-o", str(place / out), *text, *more]


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_bytes(place: Path) -> None:
    prune = ("--sparsity", "0.6", "--method", "sparsegpt", "--values", "int8", "--allocator", "owl")
    runs = []
    for size in SIZES:
        runs.append({"commands": [words(place, "analyze", f"{size}.json", "--magnitudes")] * size})
        runs.append({"commands": [words(place, "prune", f"out-{size}", *prune)] * size})
    for found in results(place, runs):
        assert set(found["codes"]) == {0}, found
    analyses = {(place / f"{size}.json").read_bytes() for size in SIZES}
    outputs = [{f.name: f.read_bytes() for f in (place / f"out-{size}").iterdir()} for size in SIZES]
    assert len(analyses) == 1 and all(output == outputs[0] for output in outputs)
    assert not list(place.glob("*.started-*")) and not list(place.glob("*.part"))


@pytest.mark.slow
def test_who_does_not_belong_is_refused_and_who_dies_takes_the_others_along(place: Path) -> None:
    same = words(place, "analyze", "x.json")
    runs = [
        {"commands": [same, words(place, "analyze", "x.json", "--seed", "1")]},
        {"commands": [same, same], "patch": {"1": "code"}},
        {"commands": [same, same, same], "patch": {"2": "exit"}},
        {"commands": [same, same], "patch": {"1": "text"}},
        {"commands": [words(place, "prune", "out", "--sparsity", "0.5")] * 2, "patch": {"1": "text"}},
    ]
    other_arguments, other_code, dead, *other_text = results(place, runs)
    for found in other_text:
        assert found["codes"] == [2, 2], found
        assert all("rank 1 has another calibration than rank 0" in text for text in found["stderr"])
    assert other_arguments["codes"] == other_code["codes"] == [2, 2]
    assert all("rank 1 has another --seed than rank 0: 1, not 0" in text for text in other_arguments["stderr"])
    assert all("rank 1 has another code than rank 0" in text for text in other_code["stderr"])
    assert dead["codes"] == [2, 2, 9]
    for text in dead["stderr"][:2]:
        assert "another process of this run is gone" in text and "Traceback" not in text, text
    assert not (place / "x.json").exists() and not list(place.glob("out*.part"))


@pytest.mark.slow
def test_torchrun_starts_them(place: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launch, "alphaprune", "analyze", str(place / "model"), "-o", str(place / "y.json"), "--json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout) == json.loads((place / "y.json").read_text())  # printed once
