"""kill -9 at random moments of a prune: the next run finishes it, and the result has the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_model, write_tokenizer

import alphaprune

KILLS = 6
OPTIONS = {
    "analyze": ["--samples", "4"],
    "prune": ["--samples", "4", "--sparsity", "0.6", "--allocator", "owl", "--values", "int8"],
    "convert": ["--values", "int8"],
    "compress": ["--samples", "4", "--rank-ratio", "0.6", "--allocator", "uniform"],
    "recover": ["--steps", "3", "--batch", "2", "--rank", "4", "--save-seconds", "0", "--windows", "2"],
}


def command(folder: Path, out: str) -> list[str]:
    options = ["--sparsity", "0.6", "--calibration", str(folder / "text"), "--samples", "8", "--length", "64"]
    return [sys.executable, "-m", "alphaprune", "prune", str(folder / "model"), "-o", str(folder / out), *options]


def finished_blocks(folder: Path) -> int:
    return len(list((folder / "out.part").glob("*.safetensors")))


def kill_after(blocks: int, delay: float, folder: Path) -> None:
    """Starts a run, waits until so many blocks are finished and a little longer, and kills it."""
    process = subprocess.Popen(command(folder, "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and finished_blocks(folder) < blocks:
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, text_file: Path) -> None:
    changes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 16}
    make_model(3, **changes).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    (tmp_path / "text").write_bytes(text_file.read_bytes())
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True)
    generator, left = random.Random(0), []
    for goal in sorted(generator.sample(range(1, 11), KILLS)):
        kill_after(goal, generator.uniform(0, 0.05), tmp_path)
        assert not (tmp_path / "out").exists()  # whole or not at all
        left.append(finished_blocks(tmp_path))
    assert left == sorted(left) and 0 < left[0] < left[-1] < 17, "no run was killed in the middle"
    subprocess.run(command(tmp_path, "out"), check=True, capture_output=True)
    wanted = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == wanted
    assert not (tmp_path / "out.part").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kills"), [("analyze", 14), ("prune", 36), ("convert", 10), ("compress", 10), ("recover", 8)]
)
def test_killed_at_any_call_and_without_power(what: str, kills: int, tmp_path: Path, text_file: Path) -> None:
    """50 random moments and more, each before or after a call to the file system: see kill_points.py."""
    changes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    model = make_model(3, **changes)
    if what in ("convert", "recover"):
        alphaprune.prune(
            model, alphaprune.plan(alphaprune.analyze(model, fit=None), 0.6, allocator="uniform"), "magnitude"
        )
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    goal, whole = (tmp_path / what / name for name in ("out", "whole"))
    goal.parent.mkdir()
    options = [str(tmp_path / "model"), *(["-o"] if what != "convert" else []), str(goal), *OPTIONS[what]]
    if what in ("analyze", "prune", "compress", "recover"):
        options += ["--calibration", str(text_file), "--length", "32"]
    seed = random.randrange(1 << 30)
    script = [sys.executable, str(Path(__file__).with_name("kill_points.py")), str(seed), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*script, str(goal), str(whole), what, *options], capture_output=True, text=True, env=environment
    )
    print(found.stdout)
    assert found.returncode == 0 and f"seed {seed}" in found.stdout, found.stdout + found.stderr[-2000:]
