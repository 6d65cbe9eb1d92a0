"""Random models in published shapes, and the script that decodes with them by turns."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alphaprune import decoding, memory
from alphaprune.layer import SparseLinear
from alphaprune.model import prunable

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parent.parent / "bench" / "decode.py"
sys.path.insert(0, str(SCRIPT.parent))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_decode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shapes_are_those_of_the_models() -> None:
    assert decoding.shapes("llama2-7b") == [(4096, 4096), (11008, 4096), (4096, 11008)]
    assert decoding.shapes("llama3-8b") == [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    assert decoding.shapes("mistral-7b") == decoding.shapes("llama3-8b")
    with pytest.raises(ValueError, match="no shapes of a model 'other'; there are: llama2-7b"):
        decoding.config_of("other")


def test_every_block_lies_in_memory_of_its_own() -> None:
    for values in (torch.bfloat16, torch.int8):
        model = decoding.random_model("tiny", 0.75, values=values)
        layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
        assert len(layers) == 2 * 7 and {layer.weight.dtype for layer in layers} == {values}
        assert len({layer.weight.data_ptr() for layer in layers}) == 14
        kept = sum(int((layer.to_linear().weight != 0).sum()) for layer in layers)
        assert kept / sum(n * k for n, k in (layer.packed.shape for layer in layers)) == pytest.approx(0.25, abs=0.02)
    dense = decoding.random_model("tiny")
    weights = list(prunable(dense, "model.layers").values())
    assert len({layer.weight.data_ptr() for layer in weights}) == 14
    assert all(not p.is_meta and p.dtype == torch.bfloat16 for p in dense.parameters())


def test_bytes_are_about_those_of_the_model() -> None:
    config = decoding.config_of("llama2-7b")
    dense = decoding.nbytes(config, None, torch.bfloat16, None)
    assert 13.4e9 < dense < 14.4e9
    sizes = [decoding.nbytes(config, sparsity, torch.bfloat16, torch.int8) for sparsity in (0.5, 0.8)]
    assert dense > 2 * sizes[0] > 2 * sizes[1] > 0


def test_a_model_too_large_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "memory", lambda device: 10**10)
    with pytest.raises(ValueError, match=r"llama2-7b needs 1[34]\.\d GB of memory, 10\.0 GB are free"):
        decoding.random_model("llama2-7b")


def test_what_does_not_fit_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(decoding, "memory", lambda device: 10)
    rows = decoding.time_models("tiny", [0.5], torch.bfloat16, None, lambda *_: nullcontext(lambda _: None))
    assert [row["sparsity"] for row in rows] == [0.5, None] and all("GB are free" in row["skipped"] for row in rows)


@pytest.mark.parametrize("head", [None, "int8"])
def test_the_script_alternates_and_sums_up(script: ModuleType, head, tmp_path: Path, monkeypatch, capsys) -> None:
    asked = []

    def here(options, sparsity, values, head=None) -> list[dict]:
        asked.append((sparsity, values, head))
        rows = script.measure(options.model, sparsity, values, options.new, 1 << 20, head=head)
        for row in rows:
            row["tokens_per_second"] = {(0.0, "transformers"): 2.0, (0.0, "alphaprune"): 4.0}.get(
                (row["sparsity"], row["decoder"]), 5.0 + len(asked)
            )
        return rows

    monkeypatch.setattr(script, "in_process", here)
    out = tmp_path / "rows.jsonl"
    options = ["--model=tiny", "--sparsity=0.5", "--values=int8", "--pairs=3", "--new=4", f"--out={out}"]
    options += ["--head=int8"] if head else []
    assert script.main([*options, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert asked == [(None, "bfloat16", None), (0.5, "int8", head)] * 3
    assert [row["head"] for row in rows] == [None, None, head] * 3 + [head]
    assert [row["decoder"] for row in rows[:-1]] == ["transformers", "alphaprune", "alphaprune"] * 3
    assert [row["pair"] for row in rows[:-1]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert rows[-1]["ratios"] == [3.5, 4.5, 5.5] and rows[-1]["ratio"] == 4.5 and rows[-1]["ratio_of_weights"] == 2.25
    assert all(row["step_over_kernels"] > 0 for row in rows[:-1] if row["decoder"] == "alphaprune")
    assert all(row["bandwidth"] > 0 and row["step_seconds"] > 0 for row in rows[:-1])
    assert rows[0]["weight_bytes"] > rows[2]["weight_bytes"]
    assert "4.50 times transformers'" in script.line(rows[-1])
    assert ("head in int8" in script.line(rows[-1])) is (head is not None)


def test_the_script_says_what_it_cannot_measure(script: ModuleType, capsys) -> None:
    asked = {"model": "other", "sparsity": None, "values": "bfloat16", "new": 4, "bandwidth_bytes": 1 << 20}
    assert script.main(["--measure", json.dumps(asked)]) == 2
    assert capsys.readouterr().err.startswith("decode.py: no shapes of a model 'other'")


def test_the_script_for_gpus_goes_through_everything_on_the_cpu(
    script: ModuleType, tmp_path: Path, capsys, monkeypatch
):
    out = tmp_path / "rows.jsonl"
    small = ["--dry-run", "--new", "3", "--sequences", "1,3", "--prefill", "20", "--sparsity", "0.7,2:4"]
    assert script.main([*small, "--json", "--out", str(out)]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    last = rows.pop()  # which is for GPUs
    assert (last["load"], last["how"]) == ("prefill", "nm_cusparselt") and "cannot run: " in last["skipped"]
    weights = [(row["sparsity"], row["load"], row["sequences"], row["decoder"]) for row in rows]
    loads = [("decode", 1), ("prefill", 20), ("decode", 3)]
    dense = [(0.0, *load, "alphaprune") for load in loads] + [(0.0, "decode", n, "transformers") for n in (1, 3)]
    assert weights == dense + [(s, *load, "alphaprune") for s in (0.7, 0.5) for load in loads]
    assert all(row["ratio"] == 1 for row in rows[:3]) and all(row["ratio"] > 0 for row in rows)
    assert all(row["step_over_kernels"] > 0 for row in rows if row["load"] == "decode" and row["how"] == "auto")
    assert rows[0]["weight_bytes"] > rows[-1]["weight_bytes"] and rows[-1]["pattern"] == "2:4"
    assert said.err.count("for keys and values; free on cpu") == 3 and "3 of 3 models" in said.err
    assert script.main([*small, "--minutes", "0"]) == 0
    assert "0 of 3 models" in capsys.readouterr().err
    monkeypatch.setattr(decoding, "memory", lambda device: 10)
    assert script.main(small) == 0
    assert capsys.readouterr().out.count("not measured: tiny needs") == 3
    assert script.main(["--device", "cuda", "--model", "tiny"]) == 2 or torch.cuda.is_available()
    assert script.main([*small, "--model", "other"]) == 2
    assert "no shapes of a model" in capsys.readouterr().err


def test_output_layers_of_both_kinds_stand_beside_each_other_on_a_gpu(script: ModuleType, capsys) -> None:
    small = ["--dry-run", "--new", "3", "--sequences", "1", "--prefill", "20", "--sparsity", "2:4"]
    assert script.main([*small, "--decoder", "alphaprune", "--head", "none,int8", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = [(row["sparsity"], row.get("head"), row["load"]) for row in rows if "skipped" not in row]
    loads = ("decode", "prefill")
    assert kept == [(s, head, load) for s, head in ((0.0, None), (0.5, None), (0.5, "int8")) for load in loads]
    assert rows[-2]["weight_bytes"] < rows[2]["weight_bytes"]
    assert script.main([*small, "--decoder", "alphaprune", "--head", "int8"]) == 0
    assert capsys.readouterr().out.count("2:4, head in int8") == 3


def test_steps_that_look_ahead_stand_beside_those_that_do_not(script: ModuleType, capsys) -> None:
    small = ["--dry-run", "--new", "3", "--sequences", "1,3", "--prefill", "20", "--sparsity", "0.7"]
    assert script.main([*small, "--decoder", "alphaprune", "--ahead", "0,4", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(row["sparsity"], row["load"], row["sequences"], row.get("ahead")) for row in rows]
    loads = [("decode", 1), ("prefill", 20), ("decode", 3)]
    assert found == [(0.0, *load, None) for load in loads] + [
        (0.7, load, n, ahead) for load, n in loads for ahead in ((None, 4.0) if load == "decode" else (None,))
    ]
    assert script.main([*small[:3], "--sequences", "1", "--sparsity", "0.7", "--prefill", "5", "--ahead", "4"]) == 0
    assert capsys.readouterr().out.count("alphaprune +4 MB") == 1


def test_the_script_for_gpus_has_a_prompt_multiplied_by_one_kernel(script: ModuleType) -> None:
    only = sys.modules["decode_gpu"].only
    model = decoding.random_model("tiny", 0.5, torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    prepared = layers[-1].prepared()
    assert prepared.choice(4, torch.bfloat16)[0].name != "scalar"
    only(model, "scalar", 4)
    assert {layer.prepared().choice(4, torch.bfloat16)[0].name for layer in layers} == {"scalar"}
    with pytest.raises(ValueError, match="kernel sbt_expand cannot run: "):
        only(model, "sbt_expand", 4)


def test_the_script_for_gpus_says_what_memory_a_load_lacked(script: ModuleType, capsys, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free", lambda device: 10**6)
    monkeypatch.setattr(decoding, "memory", lambda device: None)
    assert script.main(["--dry-run", "--new", "2", "--sparsity", "0.5", "--prefill", "20000"]) == 0
    out = capsys.readouterr().out
    assert "not measured: cpu has too little memory" in out and "for keys and values of" in out
