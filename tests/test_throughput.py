"""Prompts and steps of whole models by turns, and of each layer: consistent rows. No test asserts a time."""

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model

from alphaprune import affinity, benchmark, decoding, layer, throughput
from alphaprune.decoder import Decoder
from alphaprune.layer import SparseLinear
from alphaprune.mask import keep_mask
from alphaprune.throughput import Load

pytestmark = pytest.mark.usefixtures("one_thread")
LOAD = Load(prompt=6, new=5, batch=2, seconds=0, warmup=0)


def no_bar(total: int, description: str, unit: str):
    return contextlib.nullcontext(lambda step: None)


def packed_and_dense(**changes):
    model = make_model(**changes)
    twin = copy.deepcopy(model)
    masks = {
        name: keep_mask(module.weight.detach().float().abs(), round(0.75 * module.weight.numel()))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    return layer.sparsify(model, masks), twin


def test_models_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = packed_and_dense()
    order, original = [], Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, *rest: order.append(self) or original(self, *rest))
    entries = {"packed": (model, "alphaprune"), "dense": (dense, "alphaprune"), "theirs": (dense, "transformers")}
    found = throughput.time_models(entries, LOAD, no_bar)
    assert list(found) == [*entries]
    for row in found.values():
        assert row["prefills"] == 2 and row["steps"] == 2 * 5
        for name in ("prefill_seconds", "step_seconds"):
            assert 0 < row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"]
        assert row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
        assert row["bytes_per_second"] == row["bytes_per_step"] / row["step_seconds"]["p50"]
    first, second = order[0], order[1]
    assert order == [first, second, second, first, first, second]  # a warm-up, and two rounds that begin in turn


def test_totals_are_those_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once per look: a prompt takes one second, a step two."""
    turns = iter([(9.0, [9.0] * 5), (1.0, [2.0] * 5), (3.0, [2.0, 2.0, 2.0, 2.0, 12.0])])
    monkeypatch.setattr(throughput, "_turn", lambda *_: lambda: next(turns))
    model = make_model()
    row = throughput.time_models({"one": (model, "alphaprune")}, LOAD, no_bar)["one"]
    assert row["prefill_tokens_per_second"] == 2 * 6 * 2 / 4 and row["decode_tokens_per_second"] == 2 * 10 / 30
    assert row["prefill_seconds"]["p50"] == 2.0 and row["step_seconds"]["p50"] == 2.0
    assert row["step_seconds"]["p90"] == pytest.approx(3.0) and row["step_seconds"]["p99"] == pytest.approx(11.1)


def test_a_turn_reads_the_prompt_and_makes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = packed_and_dense()
    steps, original = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, state, new: steps.append(new.shape) or original(self, state, new))
    with torch.inference_mode():
        for decoder in ("alphaprune", "transformers"):
            first, rest = throughput._turn(model, decoder, LOAD)()
            assert first > 0 and len(rest) == 5 and min(rest) > 0
    assert steps == [torch.Size([2])] * 5


def test_bytes_of_a_step() -> None:
    model, dense = packed_and_dense(tie_word_embeddings=False, attention_bias=True)
    embeddings = dense.model.embed_tokens.weight.nbytes
    assert throughput.weight_bytes(dense) == sum(p.nbytes for p in dense.parameters()) - embeddings
    saved = sum(dense.get_submodule(n).weight.nbytes - m.packed.nbytes for n, m in sparse(model))
    biases = sum(m.bias.nbytes for _, m in sparse(model) if m.bias is not None)
    assert throughput.weight_bytes(model) == throughput.weight_bytes(dense) - saved - biases
    tied = make_model()  # its head is read although it is the table of embeddings, too
    assert throughput.weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())
    # 3 blocks, keys and values, 2 heads of 24, float32, 2 sequences of 6 + 3 positions
    assert throughput.cache_bytes(tied, LOAD) == 3 * 2 * 2 * 24 * 4 * 2 * 9


def sparse(model) -> list:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def test_layers() -> None:
    model, dense = packed_and_dense()
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, model.get_submodule(name).to_linear())
    *rows, rest = throughput.time_layers(model, dense, LOAD, 1.0, no_bar)
    linears = [n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)]
    assert [row["name"] for row in rows] == linears and len(linears) == 3 * 7 + 1
    for row in rows:
        module = dense.get_submodule(row["name"])
        assert row["shape"] == list(module.weight.shape) and row["seconds"] > 0 and row["dense_seconds"] > 0
        assert row["ratio"] == row["dense_seconds"] / row["seconds"] and row["share"] == row["seconds"]
        packed = isinstance(model.get_submodule(row["name"]), SparseLinear)
        assert (row["kernel"] == "torch") != packed and row["stored"] == ("sbt" if packed else "dense") + " float32"
        assert row["sparsity"] == pytest.approx(0 if row["name"] == "lm_head" else 0.75, abs=1e-3)
    assert rest["name"] == "rest of the step"
    assert rest["seconds"] == pytest.approx(1 - sum(row["seconds"] for row in rows)) == pytest.approx(rest["share"])
    alone = throughput.time_layers(model, None, LOAD, 1.0, no_bar)
    assert all(row["dense_seconds"] is row["ratio"] is None for row in alone[:-1])


# The command.


@pytest.fixture(scope="module")
def packed_folder(directory: Path, tmp_path_factory) -> Path:
    from alphaprune import cli

    found = tmp_path_factory.mktemp("packed") / "model"
    options = ["--sparsity", "0.6", "--method", "magnitude", "--allocator", "uniform"]
    assert cli.main(["prune", str(directory), "-o", str(found), *options]) == 0
    return found


QUICK = ("--time", 0, "--warmup", 0, "--prompt", 8, "--new", 4)


def test_bench_of_a_model(run, packed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        benchmark, "bench_shapes", lambda *_, **__: {"rows": [], "machine": "", "threads": 1, "bandwidth": 1}
    )
    before = torch.get_num_threads()
    status, out, _ = run("bench", packed_folder, *QUICK, "--batch", 3, "--threads", 1, "--json")
    found = json.loads(out)
    assert status == 0 and torch.get_num_threads() == before
    kinds = [(row["weights"], row["decoder"]) for row in found["generation"]]
    assert kinds == [("packed", "alphaprune"), ("dense", "alphaprune"), ("dense", "transformers")]
    assert found["load"] == {"prompt": 8, "new": 4, "batch": 3, "seconds": 0.0, "warmup": 0.0}
    packed, dense, _ = (row["bytes_per_step"] for row in found["generation"])
    assert packed < dense and found["packed_layers"] == 21 and "pinned" not in found
    status, out, _ = run("bench", packed_folder, *QUICK)
    assert status == 0 and "8 prompt tokens, 4 greedy steps, batch 1" in out and "step p50" in out


def test_bench_per_layer(run, packed_folder: Path, directory: Path) -> None:
    found = json.loads(run("bench", packed_folder, *QUICK, "--per-layer", "--json")[1])
    assert len(found["layers"]) == 23 and "rows" not in found and found["machine"]
    total = sum(row["share"] for row in found["layers"])
    assert total == pytest.approx(1)
    status, out, _ = run("bench", packed_folder, *QUICK, "--per-layer")
    assert status == 0 and "rest of the step" in out and "mlp.down_proj" in out and "speed-up" in out
    status, out, _ = run("bench", directory, *QUICK, "--per-layer", "--json")  # nothing is packed
    found = json.loads(out)
    assert [row["weights"] for row in found["generation"]] == ["dense", "dense"]
    assert found["layers"][0]["dense_seconds"] is None and found["layers"][0]["kernel"] == "torch"


def test_a_dense_twin_that_does_not_fit_is_a_row_with_the_reason(run, packed_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "memory", lambda: 10)
    status, out, _ = run("bench", packed_folder, *QUICK, "--per-layer", "--json")
    found = json.loads(out)["generation"]
    assert status == 0 and [row["weights"] for row in found] == ["packed", "dense"]
    assert "dense it needs 0.0 GB of memory, 0.0 GB are free" in found[1]["skipped"]
    assert "are free" in run("bench", packed_folder, *QUICK, "--per-layer")[1]


CPUS = len(affinity.cpus())
BAD = {
    "prompt": (("bench", "MODEL", "--prompt", "0"), "--prompt 0: wanted a whole number from 1"),
    "batch": (("bench", "MODEL", "--batch", "-1"), "--batch -1"),
    "time": (("bench", "MODEL", "--time", "-1"), "--time -1.0: wanted seconds"),
    "endless": (("bench", "MODEL", "--time", "inf"), "--time inf"),
    "context": (("bench", "MODEL", "--prompt", "60", "--new", "10"), "do not fit into 64 positions"),
    "shape": (("bench", "--shape", "8x8", "--per-layer"), "--per-layer belongs to MODEL"),
    "zero seconds of a shape": (("bench", "--shape", "8x8", "--warmup", "0"), "--warmup belongs to MODEL"),
    "tune": (("bench", "--tune", "--new", "3"), "--new belongs to MODEL"),
    "tune pinned": (("bench", "--tune", "--pin", "core"), "--pin core belongs to MODEL or --shape"),
    "no threads": (("bench", "--shape", "8x8", "--threads", "0"), f"this process may use {CPUS} CPUs"),
    "threads": (("bench", "--shape", "8x8", "--threads", str(CPUS + 1)), f"--threads {CPUS + 1}: this process may"),
    "pin late": (("bench", "--shape", "8x8", "--pin", "core"), "start Python with OMP_PROC_BIND=close"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(run, directory: Path, kind: str) -> None:
    arguments, message = BAD[kind]
    status, out, err = run(*(str(directory) if a == "MODEL" else a for a in arguments))
    assert (status, out) == (2, "") and len(err.strip().splitlines()) == 1 and message in err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or CPUS < 2, reason="nothing to bind")
def test_pinned_threads(packed_folder: Path) -> None:
    command = [sys.executable, "-m", "alphaprune", "bench", str(packed_folder), *map(str, QUICK), "--per-layer"]
    done = subprocess.run(
        [*command, "--pin", "core", "--threads", "2", "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert len(found["pinned"]) >= 2 and found["threads"] == 2 and f"{CPUS} cores" in found["machine"]


def test_a_turn_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In graphs the load is the same: so many steps after a prompt, as often as one asks."""
    monkeypatch.setattr(throughput, "in_graphs", lambda decoder, capacity: True)
    model, load, seen = make_model().eval(), Load(prompt=5, new=3, batch=2), []
    original = throughput.Steps.__call__
    monkeypatch.setattr(throughput.Steps, "__call__", lambda self, slots: seen.append(slots) or original(self, slots))
    turn = throughput._turn(model, "alphaprune", load)
    with torch.inference_mode():
        for _ in range(2):
            prompt, steps = turn()
            assert prompt > 0 and len(steps) == 3 and len(seen) == 3 and len(seen.pop(0)) == 2
            seen.clear()
