"""A packed directory of 250 MB is mapped, not read, until its first token; every process shares its pages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import write_packed

from alphaprune import checkpoint, decoding

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc to read memory from")
LOAD = """
import json, sys
import alphaprune, torch
from transformers import AutoModelForCausalLM

def resident():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(status["VmRSS"].split()[0])

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # what Python itself needs
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
loaded = resident() - before
with torch.no_grad():
    model(torch.tensor([[1]]))
print(json.dumps({"loaded": loaded, "ran": resident() - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("values", [None, torch.int8])
def test_loading_maps_the_file(tmp_path: Path, values: torch.dtype | None) -> None:
    sparsity, size = (0.5, 245e6) if values is None else (0.0, 145e6)
    model = decoding.random_model("small", sparsity, torch.float32, values)
    checkpoint.save(model, tmp_path / "large")
    stored = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert stored > size
    small = write_packed(tmp_path / "small")
    command = [sys.executable, "-c", LOAD, str(small), str(tmp_path / "large")]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["loaded"] < 40e6, found
    assert stored * 0.8 < found["ran"] < stored * 1.2, found


@pytest.mark.slow
def test_the_benchmark_of_loading(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "bench" / "load.py"
    options = ["--model", "tiny", "--blocks", "3", "--rounds", "1", "--folder", str(tmp_path), "--out", "rows.jsonl"]
    for _ in range(2):  # the rows of a machine are replaced, not added to
        subprocess.run([sys.executable, script, *options], cwd=tmp_path, capture_output=True, check=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    ways = [(row["cache"], row["by"]) for row in rows]
    assert ways == [(cache, by) for cache in ("cold", "warm") for by in ("from_pretrained", "load")]
    for row in rows:
        assert row["model"] == "tiny" and row["blocks"] == 3 and row["bytes"] > 10_000
        assert all(row[f"{name}_seconds"] > 0 for name in ("read", "load", "first", "next", "import", "help"))
        beyond = row["load_seconds"] + row["first_seconds"] - row["read_seconds"]
        assert row["beyond_seconds"] == pytest.approx(beyond) and row["resident_first"] >= row["resident_loaded"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]  # the model is gone
