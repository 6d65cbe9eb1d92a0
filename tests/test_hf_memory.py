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
