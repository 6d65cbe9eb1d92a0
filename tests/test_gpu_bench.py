"""bench/gpu.py on the CPU: order, rows, errors, restarts, statistics; never a time."""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alphaprune.kernels import base

ROOT = Path(__file__).parent.parent
NAMES = ("gpu", "gpu_cases", "gpu_contenders", "gpu_rig", "cublaslt")
MEASURED = {
    *("gpu", "torch", "command", "bandwidth", "shape", "tokens", "dtype", "values", "kind", "name", "pattern"),
    "sparsity",
    *("seconds", "quartiles", "repeats", "calls", "rotated", "nbytes", "dense", "dense_seconds", "ratio"),
    *("of_bandwidth", "max_error", "allowed", "of_allowed", "correct", "sm_mhz", "memory_mhz", "watts", "celsius"),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """bench/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu

    yield gpu
    for name in NAMES:
        sys.modules.pop(name, None)


def rows_of(gpu, tmp_path: Path, *arguments: str) -> list[dict]:
    out = tmp_path / "rows.jsonl"
    assert gpu.main(["--dry-run", "--repeats", "3", "--json", "--out", str(out), *arguments]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_most_important_cases_come_first(gpu) -> None:
    cases = gpu.gpu_cases
    plan = cases.chosen((), cases.TOKENS, cases.FIRST + cases.REST)
    assert [(c.shape, c.tokens) for c in plan[:3]] == [((28672, 4096), 1), ((4096, 14336), 1), ((11008, 4096), 1)]
    assert [str(k) for k in plan[0].kept] == ["50%", "70%", "80%", "90%", "2:4"]
    assert {c.shape for c in plan[: 3 * len(cases.TOKENS)]} == set(cases.KEY)
    first_16 = next(i for i, c in enumerate(plan) if c.tokens == 16)
    assert first_16 == 3, "after one token comes a batch of 16"
    found = [(c.shape, c.tokens, k) for c in plan for k in c.kept]
    every = itertools.product({*cases.FUSED, *cases.TABLE}, cases.TOKENS, cases.FIRST + cases.REST)
    assert len(found) == len(set(found)) and set(found) == set(every), "each combination once"
    assert len(set(cases.TABLE)) == 31 and len(set(cases.FUSED)) == 7
    assert set(cases.KEY) <= {*cases.FUSED, *cases.TABLE}
    every = cases.chosen((), (*cases.TOKENS, *cases.PREFILL), cases.FIRST)
    first_of_others = next(i for i, c in enumerate(every) if c.shape not in cases.KEY)
    wide = {(c.shape, c.tokens) for c in every[:first_of_others]}
    assert wide >= set(itertools.product(cases.KEY, (32, 128, 256, *cases.PREFILL))), "batches and prompts"


def contend_here(monkeypatch, *names: str) -> None:
    """Only these kernels, with the reference's products on the CPU."""
    known = base.kernels()
    found = {
        name: replace(known[name], device="cpu", available=lambda: None, bind=known["reference"].bind) for name in names
    }
    monkeypatch.setattr(base, "kernels", lambda: found)


def test_kernels_of_batches_and_prompts_are_contenders(gpu, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU that has them, with the reference's products on the CPU."""
    contend_here(monkeypatch, "sbt_wgmma", "nm_cusparselt")
    rows = rows_of(gpu, tmp_path, "--shape", "64x128", "--tokens", "32,256", "--sparsity", "0.5,2:4")
    ours = {(row["name"], row["tokens"], row["pattern"]) for row in rows if row["kind"] == "kernel"}
    assert ours == {
        *itertools.product(["sbt_wgmma"], (32, 256), ("unstructured", "2:4")),
        *itertools.product(["nm_cusparselt"], (32, 256), ("2:4",)),
    }
    assert all(row["correct"] for row in rows)


def test_int8_values_come_last_with_their_own_truth(gpu, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU, with the reference's products on the CPU; only sbt_mma takes them."""
    contend_here(monkeypatch, "sbt_mma", "sbt_wgmma")
    given = ["--shape", "64x256", "--tokens", "1,16", "--sparsity", "0.5,2:4"]
    rows = rows_of(gpu, tmp_path, *given, "--values", "float,int8,int8/128")
    assert all(row["correct"] for row in rows)
    for _, of_case in itertools.groupby(rows, lambda row: row["tokens"]):
        ours = [(row["name"], row["values"], row["pattern"]) for row in of_case if row["kind"] == "kernel"]
        integers = [(f"sbt_mma {v}", v, p) for v in ("int8", "int8/128") for p in ("unstructured", "2:4")]
        assert ours[-4:] == integers and {values for _, values, _ in ours[:-4]} == {"float"}
    sizes = {row["name"]: row["nbytes"] for row in rows if row["pattern"] == "2:4"}
    assert sizes["sbt_mma int8"] < sizes["sbt_mma int8/128"] < sizes["sbt_mma"]
    assert {row["values"] for row in rows_of(gpu, tmp_path, *given)} == {"float", "int8"}
    assert {row["values"] for row in rows_of(gpu, tmp_path, *given, "--values", "float")} == {"float"}
    module, cases = sys.modules["gpu_contenders"], gpu.gpu_cases
    weights, kept = module.Weights((64, 256), torch.bfloat16, torch.device("cpu")), cases.Kept(0.5)
    for values in ("int8", "int8/128"):
        exact, rough = weights.pruned(kept, values), weights.pruned(kept)
        assert exact.dtype == torch.float64 and 0 < (exact - rough.double()).norm() / rough.double().norm() < 0.01
    with pytest.raises(ValueError, match="values int4: wanted float, int8, int8/128"):
        cases.values_from("int4")


def test_a_part_can_be_asked_for(gpu) -> None:
    cases = gpu.gpu_cases
    asked = cases.shapes_from("64x128,4096x14336")
    plan = cases.chosen(asked, (1, 300), cases.kept_from("0.5,0.65,2:4"))
    assert [(c.shape, c.tokens) for c in plan[:2]] == [((4096, 14336), 1), ((64, 128), 1)]
    found = {(c.shape, c.tokens, str(k)) for c in plan for k in c.kept}
    assert found == set(itertools.product(asked, (1, 300), ("50%", "65%", "2:4")))
    for text in ("64", "64x", "64x0", "1x2x3"):
        with pytest.raises(ValueError):
            cases.shapes_from(text)
    for text in ("1.0", "-0.1", "3:4", ""):
        with pytest.raises(ValueError):
            cases.kept_from(text)


def test_rows_say_what_was_measured(gpu, tmp_path: Path) -> None:
    rows = rows_of(gpu, tmp_path, "--tokens", "1,3", "--sparsity", "0.5,2:4", "--kernel", "scalar,expand,cublas")
    assert all(set(row) >= MEASURED and "error" not in row for row in rows)
    assert {(*row["shape"], row["tokens"]) for row in rows} == {
        (48, 128, 1),
        (48, 128, 3),
        (100, 192, 1),
        (100, 192, 3),
    }
    for case, of_case in itertools.groupby(rows, lambda row: (*row["shape"], row["tokens"])):
        found = list(of_case)
        dense = {row["name"]: row["seconds"] for row in found if row["kind"] == "dense"}
        assert {"linear", "transposed", "padded to 8", "padded to 16"} <= set(dense)
        assert ("mv" in dense) == (case[2] == 1)
        best = min(dense, key=dense.get)
        ours = [row for row in found if row["kind"] == "kernel"]
        assert {(row["name"], row["pattern"]) for row in ours} == set(
            itertools.product(("scalar", "expand", "scalar int8", "expand int8"), ("unstructured", "2:4"))
        )
        for row in found:
            assert row["correct"] and 0 <= row["of_allowed"] <= 1 and row["max_error"] <= row["of_allowed"] + 1
            assert (row["dense"], row["dense_seconds"]) == (best, dense[best])
            assert row["ratio"] == dense[best] / row["seconds"]
            assert row["of_bandwidth"] == pytest.approx(row["nbytes"] / row["seconds"] / row["bandwidth"])
            assert row["rotated"] == row["calls"] * row["nbytes"] >= 1 << 14 and row["repeats"] == 3
            assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
            assert "bench/gpu.py --dry-run" in row["command"] and "--out" not in row["command"]
    n, k = rows[0]["shape"]
    assert rows[0]["nbytes"] == 2 * n * k
    packed = next(row for row in rows if row["kind"] == "kernel")
    assert packed["sparsity"] == 0.5 and packed["nbytes"] < 2 * n * k


def test_statistics_are_of_one_call(gpu) -> None:
    one = gpu.Ready(SimpleNamespace(nbytes=100), None, 4, {"max_error": 0.5, "allowed": 1.0, "of_allowed": 0.5})
    found = gpu.timed(one, [1.0, 2.0, 3.0, 4.0, 10.0], ("linear", 6.0), 50.0)
    assert (found["seconds"], found["quartiles"], found["ratio"]) == (3.0, [2.0, 4.0], 2.0)
    assert found["of_bandwidth"] == 100 / 3 / 50 and found["rotated"] == 400 and found["correct"]
    assert gpu.timed(replace(one, error={"of_allowed": 1.01}), [1.0], None, 1.0)["correct"] is False
    lost = gpu.timed(replace(one, error={"max_error": math.nan, "of_allowed": math.nan}), [1.0], None, 1.0)
    assert lost["correct"] is False and lost["max_error"] is None and lost["ratio"] is None
    dense, ours = SimpleNamespace(kind="dense", name="a"), SimpleNamespace(kind="kernel", name="b")
    assert gpu.fastest([(ours, 1.0), (dense, 3.0), (SimpleNamespace(kind="dense", name="c"), 2.0)]) == ("c", 2.0)
    assert gpu.fastest([(ours, 1.0)]) is None


def test_a_wrong_product_is_seen(gpu) -> None:
    """Nothing is timed without its error beside it; the check covers every row and every part of a weight."""
    module = sys.modules["gpu_contenders"]
    x, weight = torch.randn(3, 96).bfloat16(), torch.randn(2 * module.ROWS + 7, 96).bfloat16()
    y = torch.nn.functional.linear(x, weight)
    assert module.error(y, x, weight)["of_allowed"] <= 1
    for at in (0, module.ROWS, 2 * module.ROWS + 6):
        wrong = y.clone()
        wrong[2, at] += 8
        found = module.error(wrong, x, weight)
        assert found["of_allowed"] > 1 and found["max_error"] == pytest.approx(8, rel=0.05)
    y[1, 5] = math.nan
    assert all(map(math.isnan, module.error(y, x, weight).values()))


def test_weights_are_what_the_case_says(gpu) -> None:
    module, cases = sys.modules["gpu_contenders"], gpu.gpu_cases
    weights = module.Weights((128, 256), torch.bfloat16, torch.device("cpu"))
    for sparsity in (0.5, 0.9):
        mask = weights.mask(cases.Kept(sparsity))
        assert abs((~mask).float().mean() - sparsity) < 0.02
    two = cases.Kept(0.5, "2:4")
    assert (weights.mask(two).view(-1, 4).sum(1) == 2).all()
    dense, kept = module.sbt.dense(weights.packed(two))
    assert torch.equal(dense, weights.pruned(two)) and torch.equal(kept, weights.mask(two))
    assert weights.pruned(None) is weights.dense and weights.x(5).shape == (5, 256)
    calls = [c.make(3) for c in module.contenders(weights, cases.Case((128, 256), 1, (two,)), gpu.Host(), set(), set())]
    for found in calls:
        read = [one.args[0] if isinstance(one.func, types.FunctionType) else one.func.packed.weight for one in found]
        assert len({tensor.data_ptr() for tensor in read}) == 3, "each call reads memory of its own"


def test_proposals_of_cublaslt_are_contenders(gpu, monkeypatch) -> None:
    module, cases = sys.modules["gpu_contenders"], gpu.gpu_cases
    weights, linear = module.Weights((24, 64), torch.bfloat16, torch.device("cpu")), torch.nn.functional.linear
    rig = SimpleNamespace(device=torch.device("cuda"), libraries=())

    def engine():
        return SimpleNamespace(linear=lambda x, weight: [lambda w: linear(x, w), lambda w: linear(x, w)])

    monkeypatch.setattr(module, "_cublaslt", engine)
    found = {c.name: c for c in module.contenders(weights, cases.Case((24, 64), 2, ()), rig, set(), {"cublaslt 1"})}
    assert "cublaslt 0" in found and "cublaslt 1" not in found
    rig.libraries = ("cublas", "cublaslt")
    named = {c.name: c.library for c in module.dense(weights, weights.x(2), rig)}
    assert (named["linear cublas"], named["linear cublaslt"], named["cublaslt 0"]) == ("cublas", "cublaslt", None)
    assert not any("," in name for name in named), "--without has them with commas between"
    (call,) = found["cublaslt 0"].make(1)
    x = weights.x(2)
    assert torch.equal(call(), linear(x, weights.dense))

    def refused():
        raise ValueError("this process has loaded no libcublasLt")

    monkeypatch.setattr(module, "_cublaslt", refused)
    (one,) = [c for c in module.dense(weights, x, rig) if c.name.startswith("cublaslt")]
    with pytest.raises(ValueError, match="no libcublasLt"):
        one.make(1)


def test_cusparselt_is_a_contender_for_two_of_four(gpu, monkeypatch) -> None:
    module, cases = sys.modules["gpu_contenders"], gpu.gpu_cases
    monkeypatch.setattr(module, "proposals", lambda weights, x: [])
    weights, rig = module.Weights((24, 64), torch.bfloat16, torch.device("cpu")), SimpleNamespace(libraries=())
    rig.device, two = torch.device("cuda"), cases.Kept(0.5, "2:4")
    case = cases.Case((24, 64), 3, (cases.Kept(0.5), two))
    found = [c for c in module.contenders(weights, case, rig, {"none"}, set()) if c.kind == "library"]
    assert [(c.name, c.kept) for c in found] == [("cusparselt", two), ("cusparselt searched", two)]
    assert found[0].nbytes == 24 * 64 * 2 * 9 // 16
    asked: list[dict] = []

    class FakeCUSPARSELT(torch.Tensor):
        pass

    def convert(pruned, **options):
        asked.append(options)
        return pruned.as_subclass(kind)

    monkeypatch.setattr(torch, "_cslt_compress", lambda pruned: pruned)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda packed, other: 5 if other.shape == (64, 8) else -1)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    kind = FakeCUSPARSELT
    x, wanted = weights.x(3), weights.pruned(two)
    for one in found:
        assert torch.equal(torch.Tensor(one.make(2)[1]()), torch.nn.functional.linear(x, wanted))
    assert asked == [{}, {}, {"alg_id": 5}, {"alg_id": 5}]
    kind = torch.nn.Parameter
    with pytest.raises(RuntimeError, match="torch made a Parameter, not one of cuSPARSELt"):
        found[0].make(1)


def test_a_kernel_that_raises_gives_a_row_and_the_run_goes_on(gpu, tmp_path: Path, monkeypatch) -> None:
    module = sys.modules["gpu_contenders"]
    right = module.ours

    def broken(weights, x, kept, only, *values):
        def explode(count: int) -> list:
            raise RuntimeError("no kernel image\nis available")

        for one in right(weights, x, kept, only, *values):
            yield replace(one, make=explode) if one.name == "scalar" else one

    monkeypatch.setattr(module, "ours", broken)
    rows = rows_of(gpu, tmp_path, "--tokens", "1", "--sparsity", "0.5", "--kernel", "scalar,expand")
    failed = [row for row in rows if "error" in row]
    assert [row["name"] for row in failed] == ["scalar"] * len(gpu.gpu_cases.TINY)
    assert all(row["error"] == "RuntimeError: no kernel image\nis available" for row in failed)
    assert len([row for row in rows if row["name"] == "expand" and "seconds" in row]) == len(gpu.gpu_cases.TINY)
    assert "no kernel image" in gpu.line(failed[0]) and "\n" not in gpu.line(failed[0])


def test_a_case_that_cannot_be_made_gives_a_row(gpu, tmp_path: Path, monkeypatch) -> None:
    right = gpu.Weights

    def scarce(shape, *rest):
        if shape == gpu.gpu_cases.TINY[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(shape, *rest)

    monkeypatch.setattr(gpu, "Weights", scarce)
    rows = rows_of(gpu, tmp_path, "--tokens", "1", "--sparsity", "0.5", "--kernel", "expand")
    assert "out of memory" in rows[0]["error"] and rows[0]["name"] is None and gpu.line(rows[0])
    assert all("seconds" in row and row["shape"] == [100, 192] for row in rows[1:]) and len(rows) > 1


@pytest.mark.parametrize("known", [True, False])
def test_a_lost_device_starts_the_rest_again(gpu, tmp_path: Path, monkeypatch, known: bool) -> None:
    """What the second process is told, and that it goes on from there."""
    started: list[list[str]] = []

    class Exec(Exception):
        pass

    def execv(program: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise Exec

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(gpu.Host, "alive", lambda self: False)
    right = gpu.Run.prepare

    def fails(self, contender, weights, x):
        if known and weights.shape == (100, 192) and contender.name == "scalar":
            raise RuntimeError("illegal memory access")
        return right(self, contender, weights, x)

    def lost(self, case, ready):
        if case.shape == (100, 192):
            raise RuntimeError("illegal memory access")

    monkeypatch.setattr(gpu.Run, "prepare", fails)
    if not known:
        monkeypatch.setattr(gpu.Run, "measure", lost)
    out = tmp_path / "rows.jsonl"
    given = ["--dry-run", "--tokens", "1,4", "--sparsity", "0.5", "--repeats", "2", "--out", str(out), "--minutes", "1"]
    with pytest.raises(Exec):
        gpu.main(given)
    (command,) = started
    assert command[:2] == [sys.executable, gpu.__file__]
    options = gpu.parse(command[2:])
    assert (options.without, options.skip) == (("scalar", 1) if known else ("", 2)) and options.append
    assert 0 <= options.minutes <= 1
    assert gpu.parse(gpu.again(options, [], "mv", 3, 1.0)).skip == options.skip + 3
    assert [gpu.parse(gpu.again(options, [], "", 0, left)).minutes for left in (90.0, -1.0)] == [1.5, 0]
    before = out.read_text().splitlines()
    assert "illegal memory access" in json.loads(before[-1])["error"]
    monkeypatch.undo()
    assert gpu.main([*command[2:], "--minutes", "1"]) == 0
    after = out.read_text().splitlines()
    assert after[: len(before)] == before
    new = [json.loads(line) for line in after[len(before) :]]
    assert {(*row["shape"], row["tokens"]) for row in new} == {
        (48, 128, 4),
        (100, 192, 4),
        *([(100, 192, 1)] if known else []),
    }
    assert ("scalar" in {row["name"] for row in new}) != known


def test_it_stops_when_its_time_is_over(gpu, tmp_path: Path, capsys) -> None:
    assert rows_of(gpu, tmp_path, "--minutes", "0") == []
    assert "0 of 26 cases" in capsys.readouterr().err


def test_a_case_that_time_cuts_short_still_has_a_ratio(gpu, monkeypatch) -> None:
    rows: list[dict] = []
    run = gpu.Run(gpu.Host(), torch.bfloat16, 2, set(), set(), {"bandwidth": 1.0}, rows.append, lambda: 0.0)
    run.case(gpu.gpu_cases.chosen(gpu.gpu_cases.TINY, (1,), gpu.gpu_cases.FIRST)[0])
    kinds = [row["kind"] for row in rows]
    assert kinds.count("kernel") == 1 and kinds.count("dense") >= 3 and rows[-1]["ratio"] > 0


def test_rows_are_in_the_file_at_once(gpu, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("old\n")
    write = gpu.writer(gpu.parse(["--json", "--out", str(out)]))
    assert out.read_text() == ""
    for i in range(2):
        write({"row": i})
        assert [json.loads(line) for line in out.read_text().splitlines()] == [{"row": j} for j in range(i + 1)]
    gpu.writer(gpu.parse(["--json", "--append", "--out", str(out)]))
    assert len(out.read_text().splitlines()) == 2


def test_the_script_without_a_gpu_says_so(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "bench" / "gpu.py")]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(script, capture_output=True, text=True, env=hidden)
    assert found.returncode == 2 and "--dry-run" in found.stderr and "Traceback" not in found.stderr
    plan = subprocess.run([*script, "--plan"], capture_output=True, text=True, env=hidden, check=True).stdout
    assert plan.startswith("28672x4096  1 tokens  50%,70%,80%,90%,2:4\n4096x14336  1 tokens")


def test_medians_not_means(gpu, monkeypatch) -> None:
    """One slow replay out of many does not move a figure."""
    rows: list[dict] = []
    run = gpu.Run(gpu.Host(), torch.bfloat16, 5, {"scalar"}, set(), {"bandwidth": 1.0}, rows.append, lambda: 9.0)
    times = [1.0, 1.0, 1.0, 1.0, 1e6]
    monkeypatch.setattr(gpu.Host, "time", lambda self, replays, repeats: [list(times) for _ in replays])
    run.case(gpu.gpu_cases.chosen(gpu.gpu_cases.TINY, (1,), gpu.gpu_cases.FIRST)[0])
    assert rows and all(row["seconds"] == 1.0 / row["calls"] for row in rows)
    assert statistics.mean(times) > 1e5
