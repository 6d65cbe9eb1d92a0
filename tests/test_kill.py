"""kill -9 at random moments of a prune: the next run finishes it, and the result has the same bytes."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_model, write_tokenizer

KILLS = 6


def command(folder: Path, out: str) -> list[str]:
    options = ["--sparsity", "0.6", "--calibration", str(folder / "text"), "--samples", "8", "--length", "64"]
    return [sys.executable, "-m", "alphaprune", "prune", str(folder / "model"), "-o", str(folder / out), *options]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, text_file: Path) -> None:
    changes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}  # seconds of work
    make_model(3, **changes).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    (tmp_path / "text").write_bytes(text_file.read_bytes())
    started = time.monotonic()
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True)
    whole = time.monotonic() - started
    generator, killed, kept = random.Random(0), 0, 0
    for _ in range(KILLS):
        process = subprocess.Popen(command(tmp_path, "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * generator.uniform(0.4, 0.95))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        if (tmp_path / "out").exists():
            break  # it was faster than the kill
        kept = max(kept, len(list((tmp_path / "out.part").glob("*.safetensors"))))
    if not (tmp_path / "out").exists():
        subprocess.run(command(tmp_path, "out"), check=True, capture_output=True)
    assert killed and kept, "no run was killed in the middle: the test proved nothing"
    wanted = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == wanted
    assert not (tmp_path / "out.part").exists()
