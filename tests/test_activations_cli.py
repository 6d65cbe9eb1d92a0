"""`--activations int8` of the commands: the layers are told, rows say so, and what cannot be is one line."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from packed import sparse_layers, write_packed
from torch import nn

import alphaprune
from alphaprune import hf, timing
from alphaprune.commands import serve as serving

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--time", 0, "--warmup", 0, "--prompt", 8, "--new", 4)
SHAPE = ("bench", "--shape", "48x130", "--sparsity", "0.5", "--dtype", "float32")


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("int8") / "model", "int8")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("floats") / "model")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[set[torch.dtype | None]]:
    """What the layers of each model that was loaded allow."""
    found, original = [], hf.load

    def load(*arguments, **options):
        model = original(*arguments, **options)
        found.append({one.activations for one in sparse_layers(model).values()})
        return model

    monkeypatch.setattr(hf, "load", load)
    return found


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(timing.CpuClock, "rotated", 1 << 16)


def test_models_that_write_and_are_judged(run, integers: Path, text_file: Path, loaded: list, monkeypatch) -> None:
    commands = (
        ("generate", integers, "--prompt", "the ", "--max-new", 4),
        ("chat", integers, "--plain", "--max-new", 4),
        ("eval", integers, "--text", text_file, "--length", 32, "--windows", 2),
    )
    for command in commands:
        for options, wanted in ((("--activations", "int8"), torch.int8), ((), None)):
            monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
            loaded.clear()
            assert run(*command, *options)[0] == 0 and loaded == [{wanted}], command
    found = json.loads(run(*commands[-1], "--activations", "int8", "--json")[1])
    assert found["activations"] == "int8" and found["perplexity"] > 0
    assert "float32 with activations in int8, text" in run(*commands[-1], "--activations", "int8")[1]
    assert "activations" not in json.loads(run(*commands[-1], "--json")[1])


def test_tasks_are_judged_so(run, integers: Path, loaded: list, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphaprune import tasks

    result = tasks.TaskEvaluation({}, {}, 0, 64, None, 1, "float32", {}, "0", 0.0)
    monkeypatch.setattr(tasks, "load", lambda *_: {})
    monkeypatch.setattr(tasks, "evaluate", lambda *_: result)
    status, out, _ = run("eval", integers, "--tasks", "any", "--activations", "int8", "--json")
    assert status == 0 and loaded == [{torch.int8}] and json.loads(out)["activations"] == "int8"


def test_served_models(run, integers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn")
    found = []

    def service(model: nn.Module, *_):
        found.append({one.activations for one in sparse_layers(model).values()})
        raise ValueError("far enough")

    monkeypatch.setattr(serving, "_service", service)
    for options in (("--activations", "int8"), ()):
        status, _, err = run("serve", integers, "--port", 0, *options)
        assert status == 2 and "far enough" in err
    assert found == [{torch.int8}, {None}]


def test_batches_of_the_server_multiply_as_layers_do(integers: Path) -> None:
    from alphaprune.serving import copies

    for activations, wanted in (("int8", True), (None, False)):
        model = alphaprune.load(integers, activations=activations)
        for direct in (True, False):  # False: compiled
            assert {one.packed.bytes_allowed for one in copies.weights_of(model, direct)} == {wanted}
        assert {one.packed.bytes_allowed for call in copies.calls_of(model) for one in call.weights} == {wanted}


def test_rows_of_shapes(run, cheap: None) -> None:
    asked = ("--values", "int8", "--activations", "int8")
    rows = json.loads(run(*SHAPE, "--tokens", "1,300", *asked, "--json")[1])["rows"]
    assert [(row["values"], row["activations"]) for row in rows] == [("int8", "int8")] * 2
    assert [row["activations"] for row in json.loads(run(*SHAPE, *asked[:2], "--json")[1])["rows"]] == [None]
    out = run(*SHAPE, *asked)[1]
    assert "int8, x in int8" in out and "x in int8" not in run(*SHAPE, *asked[:2])[1]
    by_name = run(*SHAPE, *asked, "--kernel", "reference", "--json")[1]
    assert json.loads(by_name)["rows"][0]["kernel"] == "reference"


def test_the_timed_layer_may_round(native_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphaprune.kernels import cpu

    monkeypatch.setattr(cpu, "fast_in_torch", lambda dtype: True)  # so that expansion is taken for many tokens
    options = {"total_bytes": 1, "bandwidth": 1.0, "values": torch.int8}
    best = next(isa for isa in cpu.ISAS if cpu.missing(isa) is None)
    row = timing.time_linear((48, 130), 0.3, 2000, torch.bfloat16, activations=torch.int8, **options)
    assert row.activations == "int8" and row.kernel == (best if best in cpu.BYTES else "expand")
    row = timing.time_linear((48, 130), 0.3, 2000, torch.bfloat16, **options)
    assert row.activations is None and row.kernel == "expand"


def test_rows_of_models(run, integers: Path, loaded: list, cheap: None) -> None:
    status, out, _ = run("bench", integers, *QUICK, "--activations", "int8", "--json")
    found = json.loads(out)
    assert status == 0 and loaded[0] == {torch.int8}
    assert {(row["weights"], row["activations"]) for row in found["generation"]} == {
        ("packed", "int8"),
        ("dense", None),
    }
    assert {(row["values"], row["activations"]) for row in found["rows"]} == {("int8", "int8")}
    status, out, _ = run("bench", integers, *QUICK, "--activations", "int8", "--per-layer")
    assert status == 0 and "packed, x in int8" in out and "sbt int8, x in int8" in out
    rows = json.loads(run("bench", integers, *QUICK, "--activations", "int8", "--per-layer", "--json")[1])["layers"]
    assert {(row["stored"], row["activations"]) for row in rows[:-1]} == {("sbt int8", "int8"), ("dense float32", None)}
    decoded = ("bench", "--shape", "tiny", "--sparsity", "0.5", "--decode")
    out = run(*decoded, "--values", "int8", "--activations", "int8", "--json")[1]
    assert [(row["values"], row["activations"]) for row in json.loads(out)["decoding"]] == [
        ("int8", "int8"),
        *[("bfloat16", None)] * 2,
    ]


def test_random_models_may_round() -> None:
    from alphaprune import decoding

    model = decoding.random_model("tiny", 0.5, values=torch.int8, activations=torch.int8)
    assert {one.packed.bytes_allowed for one in sparse_layers(model).values()} == {True}


NO_INT8 = "no layer of this model has int8 values"
BAD = {
    "generate": (("generate", "FLOATS", "--prompt", "x", "--activations", "int8"), NO_INT8),
    "chat": (("chat", "FLOATS", "--plain", "--activations", "int8"), NO_INT8),
    "eval": (("eval", "FLOATS", "--text", "TEXT", "--length", "32", "--activations", "int8"), NO_INT8),
    "serve": (("serve", "FLOATS", "--port", "0", "--activations", "int8"), NO_INT8),
    "bench": (("bench", "FLOATS", "--activations", "int8"), NO_INT8),
    "shape": ((*SHAPE, "--activations", "int8"), "--activations int8: .* give --values int8, too"),
    "tune": (("bench", "--tune", "--activations", "int8"), "--activations belongs to MODEL or --shape"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(run, floats: Path, text_file: Path, kind: str) -> None:
    if kind == "serve":
        pytest.importorskip("uvicorn")
    arguments, message = BAD[kind]
    places = {"FLOATS": floats, "TEXT": text_file}
    status, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "eval", "bench"])
def test_one_choice_only(run, command: str) -> None:
    status, _, err = run(command, "any", "--activations", "int4")
    assert status == 2 and "argument --activations: invalid choice: 'int4'" in err


def test_the_script_writes_rows_of_their_own(tmp_path: Path) -> None:
    out, options = tmp_path / "rows.jsonl", ["--shape=48x64", "--sparsity=0.5", "--gigabytes=0.0001", "--repeats=1"]
    command = [sys.executable, str(ROOT / "bench" / "linear.py"), *options, "--values=int8", "--out", str(out)]
    for extra in ((), ("--activations=int8",)):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=True, cwd=ROOT)
        assert ("int8, x in int8" in done.stdout) == bool(extra)
    assert [json.loads(line)["activations"] for line in out.read_text().splitlines()] == [None, "int8"]


def test_whole_models_by_the_script_have_rows_of_their_own(tmp_path: Path) -> None:
    """A process each, as it runs them; bfloat16 values and dense models are as ever."""
    out, script = tmp_path / "rows.jsonl", str(ROOT / "bench" / "decode.py")
    options = ("--model=tiny", "--sparsity=0.5", "--pairs=1", "--new=2", "--gigabytes=0.0001", "--values=bfloat16,int8")
    command = [sys.executable, script, *options, "--activations=int8", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["values"], row["activations"]) for row in rows if "ratio" not in row] == [
        *[("bfloat16", None)] * 3,  # two of them dense
        ("int8", "int8"),
    ]
    assert [(row["values"], row["activations"]) for row in rows if "ratio" in row] == [
        ("bfloat16", None),
        ("int8", "int8"),
    ]
    assert done.stdout.count("int8, x in int8") == 2 and "50%, int8, x in int8: " in done.stdout


def test_what_the_script_times_may_round(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    import decode

    from alphaprune import decoding

    found = []
    original = decoding.time_kernels
    monkeypatch.setattr(timing, "read_bandwidth", lambda _: 1e9)

    def kernels(model: nn.Module, *given: int):
        found.append({one.packed.bytes_allowed for one in sparse_layers(model).values()})
        return original(model, *given)

    monkeypatch.setattr(decoding, "time_kernels", kernels)
    for activations in ("int8", None):
        decode.measure("tiny", 0.5, "int8", 2, 1, activations)
    assert found == [{True}, {False}]
    for options, wanted in (
        (["--values=bfloat16"], "x is rounded beside int8 values only; give --values int8"),
        (["--values=int8", "--device=cuda"], "kernels of GPUs keep x as it is"),
        (["--values=int8", "--dry-run"], "kernels of GPUs keep x as it is"),
    ):
        assert decode.main([*options, "--model=tiny", "--activations=int8"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("decode.py: --activations int8: ") and wanted in err and err.count("\n") == 1


def test_tables_of_docs_tell_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    import speed_figures

    row = {"tokens": 1, "sparsity": 0.5, "dtype": "bfloat16", "values": "int8", "kernel": "amx", "seconds": 1.0}
    row |= {"dense_seconds": 2.0, "of_bandwidth": 0.5, "ratio": 2.0, "machine": "m", "threads": 1, "bandwidth": 1e9}
    found = speed_figures.linear_of([row, row | {"activations": None}, row | {"activations": "int8"}])
    assert [line.split(" | ")[2] for line in found.splitlines()[2:5]] == ["int8", "int8", "int8, x in int8"]
    summary = {"machine": "m", "threads": 1, "model": "tiny", "sparsity": 0.5, "values": "int8", "ratio": 2.0}
    summary |= {"ratio_of_weights": 1.5, "ratios": [2.0], "pairs": 1}
    both = [summary, summary | {"activations": None}, summary | {"activations": "int8"}]
    monkeypatch.setattr(speed_figures, "rows", lambda _: both)
    lines = speed_figures.decode().splitlines()[2:5]
    assert [line.split(" | ")[2] for line in lines] == ["int8", "int8", "int8, x in int8"]
