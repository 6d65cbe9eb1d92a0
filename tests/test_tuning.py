"""Measuring a time table on a tiny grid, and the commands that ask one. No test asserts a time."""

import errno
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from tables import TOKENS, curve, linear, made

from alphaprune import cli, formats, layer_times, timing, tuning
from alphaprune.formats import native
from alphaprune.kernels import base, cpu, spmm, table
from alphaprune.kernels.table import Curve, Table
from alphaprune.layer_times import Wanted

BF16, INT8 = torch.bfloat16, torch.int8


@contextmanager
def no_bar(*_):
    yield lambda step: None


TINY = tuning.Grid(((16, 64), (32, 64)), ((BF16, BF16), (INT8, BF16)), (0.0, 0.5), (1, 2), 1, 0.0)
BYTES = tuning.Grid(((16, 64), (32, 64)), ((INT8, BF16), (INT8, INT8)), (0.0, 0.5), (1, 2), 1, 0.0)


def test_tuning_measures_every_contender_and_is_found_again(native_only, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tuning.timing, "read_bandwidth", lambda: 1e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ALPHAPRUNE_TIMES")
    found = tuning.tune(TINY, no_bar, timing.CpuClock())
    names = {c.kernel for c in found.curves}
    assert names == {table.DENSE, *tuning.contenders((16, 64), BF16, BF16)} and "reference" not in names
    assert {c.kernel for c in found.curves if c.weight == "int8"} <= names - {table.DENSE}
    assert {(c.shape, c.sparsity) for c in found.curves if c.kernel == "expand"} == {
        (s, d) for s in TINY.shapes for d in TINY.sparsities
    }
    assert all(c.tokens == (1, 2) for c in found.curves if c.kernel in ("expand", table.DENSE))
    path = tuning.write(found, None)
    assert path.parent == tmp_path / "alphaprune" / "tables" and table.current().curves == found.curves
    assert len(tuning.rows(found)) == 2 * 2 * 2
    columns, cells = tuning.cells(tuning.rows(found))
    assert all(len(line) == len(columns) for line in cells)
    table.forget()


def byte_kernels() -> list[str]:
    return [isa for isa in cpu.BYTES if not cpu.missing(isa)]


def test_products_of_bytes_are_measured_where_a_kernel_does_them_and_chosen_by(
    native_only, use_table, monkeypatch
) -> None:
    monkeypatch.setattr(tuning.timing, "read_bandwidth", lambda: 1e9)
    told, weight = set(), native.weight

    def spied(packed: formats.Packed, isa: str):
        told.add((isa, packed.bytes_allowed))
        return weight(packed, isa)

    monkeypatch.setattr(native, "weight", spied)
    found = tuning.tune(BYTES, no_bar, timing.CpuClock())
    assert {isa for isa, rounded in told if rounded} == set(byte_kernels())
    rounded = [c for c in found.curves if c.x == "int8"]
    assert {(c.kernel, c.weight, c.shape, c.sparsity, c.tokens) for c in rounded} == {
        (isa, "int8", s, d, (1, 2)) for isa in byte_kernels() for s in BYTES.shapes for d in BYTES.sparsities
    }
    assert {c.x for c in found.curves if c.kernel == table.DENSE} == {"bfloat16"}  # what x is before
    rows = [row for row in tuning.rows(found) if row["x"] == "int8"]
    assert len(rows) == (2 * 2 if rounded else 0)
    assert all(row["break_even"] is not None and row["50%"]["ratio"] > 0 for row in rows)
    assert {line[1] for line in tuning.cells(rows)[1]} == ({"int8, x in int8"} if rounded else set())
    use_table(found)
    _, packed = timing.random_packed((16, 64), 0.5, BF16, INT8)
    kernel, why = spmm.prepare(replace(packed, activations=INT8)).choice(1, BF16)
    assert why.startswith("fastest by the time table") and (kernel.name in byte_kernels()) == bool(rounded)


def test_a_machine_without_products_of_bytes_measures_none(native_only, monkeypatch) -> None:
    monkeypatch.setenv("ALPHAPRUNE_ISA", "scalar")
    assert {problem.x for problem in tuning._problems(BYTES, "cpu")} == {BF16}
    for grid in (tuning.GPU_QUICK, tuning.GPU_FULL):
        assert all(x != INT8 for _, x in grid.dtypes)
    for grid in (tuning.QUICK, tuning.FULL):
        assert (INT8, INT8) in grid.dtypes


def test_break_even_of_products_of_bytes(use_table, run) -> None:
    """Against the dense layer in what x comes in; beside that of the same values and x as it is, as ever."""
    dense = curve("dense", 0, [1] * 4, dtype="bfloat16")
    whole = [replace(c, x="bfloat16") for c in linear("scalar", 1.6, 0.6, dtype="int8")]
    rounded = linear("avx512", 1.2, 0.2, dtype="int8")
    for curves in ((*whole, *rounded, dense), (*whole, dense)):
        use_table(made(*curves))
        known = json.loads(run("info", "--json")[1])["break_even"]
        assert known["int8 4096×4096"]["1"] == 0.61
        assert known.get("int8, x in int8 4096×4096", {}).get("1") == (0.21 if len(curves) > 3 else None)
        assert ("break-even int8, x in int8 4096×4096" in run("info")[1]) == (len(curves) > 3)
    found = made(*whole, *rounded, dense)
    assert found.dense((64, 64), 1, INT8, INT8) == 1
    assert made(*rounded).break_even((64, 64), 1, INT8, INT8) is None


def test_no_kernel_finds_in_a_cache_what_another_has_just_read(native_only, monkeypatch) -> None:
    """Between two calls on one copy of a weight there are about as many others as there are copies."""
    seen = []

    def rounds(_, calls: dict, seconds: float) -> dict[str, list[float]]:
        ways = [[call.func for call in copied] for name, copied in calls.items() if name != table.DENSE]
        seen.append([way.packed.weight.data_ptr() for turn in zip(*ways, strict=True) for way in turn])
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(tuning, "_rounds", rounds)
    grid = tuning.Grid(((16, 64),), ((BF16, BF16),), (0.5,), (1,), 1 << 16, 0.0)
    tuning._measure(grid, tuning.Problem((16, 64), BF16, BF16, 0.5), timing.CpuClock())
    kernels, copies = len(tuning.contenders((16, 64), BF16, BF16)), len(set(seen[0]))
    assert copies > 4 * kernels and len(seen[0]) == copies * kernels
    twice = seen[0] * 2  # the calls begin anew
    gaps = [twice.index(place, first + 1) - first for first, place in enumerate(seen[0])]
    assert min(gaps) >= copies - kernels


def test_a_kernel_far_behind_is_given_up_unless_it_is_made_for_many_tokens(native_only, monkeypatch) -> None:
    seconds = {"scalar": 9.0, "expand": 9.0, table.DENSE: 0.1}
    monkeypatch.setattr(
        tuning, "_rounds", lambda _, calls, seconds_each: {name: [seconds.get(name, 1.0)] for name in calls}
    )
    fast = [name for name in tuning.contenders((16, 64), BF16, BF16) if name not in seconds]
    if not fast:
        pytest.skip("only the scalar kernel runs here")
    times = tuning._measure(TINY, tuning.Problem((16, 64), BF16, BF16, 0.5), timing.CpuClock())
    assert list(times["scalar"]) == [1] and all(list(times[name]) == [1, 2] for name in (*fast, "expand", "dense"))
    monkeypatch.setattr(base.Kernel, "resumes", property(lambda kernel: 100))
    times = tuning._measure(TINY, tuning.Problem((16, 64), BF16, BF16, 0.5), timing.CpuClock())
    assert list(times["scalar"]) == [1, 2]


def test_the_dense_layer_is_timed_as_our_decoder_calls_it(native_only, monkeypatch) -> None:
    called = []

    def linear(weight, bias):
        return lambda x: called.append((tuple(weight.shape), bias, len(x)))

    monkeypatch.setattr(tuning, "dense_linear", linear)
    times = tuning._measure(TINY, tuning.Problem((16, 64), BF16, BF16, 0.5), timing.CpuClock())
    assert set(called) == {((16, 64), None, 1), ((16, 64), None, 2)} and list(times[table.DENSE]) == [1, 2]


def test_commands_ask_the_table(use_table, native_only, directory, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    path = use_table(made(*linear("scalar", 1.6, 0.6), curve("dense", 0, [1] * 4)))

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    info = json.loads(run("info", "--json")[1])
    assert str(path) in info["times"]["cpu"] and info["break_even"]["float32 4096×4096"]["1"] == 0.61
    assert "break-even float32 4096×4096" in run("info")[1]
    assert run("analyze", directory, "-o", "a.json")[0] == 0
    assert run("plan", "a.json", "--sparsity", 0.5, "--times", "auto", "-o", "p.json")[0] == 0
    layers = json.loads(Path("p.json").read_text())["layers"].values()
    shares = [p["zeros"] / (p["shape"][0] * p["shape"][1]) for p in layers]
    assert 0 in shares and all(share == 0 or share > 0.609 for share in shares)
    assert run("prune", directory, "-o", "o", "--plan", "p.json", "--method", "magnitude")[0] == 0
    rows = json.loads(run("info", "o", "--json", "--tokens", 4)[1])["layers"]
    sparse = [row for row in rows if row["zeros"]]
    assert {row["kernel"] for row in sparse} == {"scalar"} and all("time table" in row["why"] for row in sparse)
    assert all(row["seconds"] < row["dense_seconds"] for row in sparse)
    assert all(row["seconds"] == row["dense_seconds"] for row in rows if not row["zeros"])
    assert "predicted" in run("info", "o")[1]
    for arguments, message in (
        (("plan", "a.json", "--sparsity", 0.5, "--times", "x.json"), "x.json: cannot be read"),
        (("plan", "a.json", "--sparsity", 0.5, "--times", path, "--tokens", 0), "--tokens 0"),
        (("plan", "a.json", "--sparsity", 0.5, "--values", "int8"), "give --times FILE, or auto, too"),
        (("plan", "a.json", "--sparsity", 0.5, "--times", path, "--activations", "int8"), "give --values int8, too"),
        (("plan", "a.json", "--sparsity", 0.5, "--times", path, "--values", "int8"), "no times of int8 beside float32"),
        (("info", "--tokens", 0), "--tokens 0"),
        (("bench", "--shape", "8x8", "--tune"), "8x8: --tune measures"),
        (("bench", "--shape", "8x8", "--quick"), "belong to --tune"),
        (("bench", "--shape", "8x8", "--minutes", 1), "belong to --tune"),
        (("bench", "--tune", "--minutes", 0), "--minutes 0.0: wanted minutes, more than 0"),
        (("bench", "--tune", "-o", "nowhere/t.json"), "no folder"),
    ):
        status, _, err = run(*arguments)
        assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    monkeypatch.setenv("ALPHAPRUNE_TIMES", "off")
    assert "no time table for this machine" in run("plan", "a.json", "--sparsity", 0.5, "--times", "auto")[2]
    assert "bench --tune" in run("info")[1]


def test_bench_tune_writes_a_table(native_only, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tuning.timing, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(tuning, "QUICK", TINY)
    assert cli.main(["bench", "--tune", "--quick", "-o", str(tmp_path / "t.json")]) == 0
    assert "break-even" in capsys.readouterr().out
    assert Table.load(tmp_path / "t.json").threads == torch.get_num_threads()
    assert cli.main(["bench", "--tune", "--quick", "-o", str(tmp_path / "t.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "t.json")
    with pytest.raises(ValueError, match="has no times of float32 weights"):
        layer_times.break_evens({"layer": (64, 64)}, Wanted("float32", str(tmp_path / "t.json")))


def test_a_place_that_takes_no_table_is_told_before_anything_is_measured(run, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tuning, "tune", lambda *_: pytest.fail("measured before it was refused"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    status, _, err = run("bench", "--tune", "--quick")
    assert status == 2 and "tables: cannot be made: Not a directory; give -o FILE" in err and err.count("\n") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    status, _, err = run("bench", "--tune", "--quick")
    assert status == 2 and "tables: is not writable; give -o FILE" in err and err.count("\n") == 1


def test_a_full_disk_leaves_the_table_that_was_there(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuning.write(made(curve("a", 0, [1] * 4)), None)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"json: not written: the disk is full; free some space and repeat"):
        tuning.write(made(curve("a", 0, [2] * 4)), None)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("given", "wanted"), [(None, 4), (1, 1), (25, 2), (1000, 4)])
def test_in_the_time_that_is_given_the_most_telling_come_first(given, wanted, native_only, monkeypatch, caplog) -> None:
    """By a clock on which every weight takes ten seconds."""
    now, asked = [0.0], []

    def measure(grid, problem, clock):
        asked.append((problem.shape, problem.sparsity))
        now[0] += 10
        return {name: {1: [1.0], 2: [1.0]} for name in (table.DENSE, "expand")}

    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tuning.timing, "read_bandwidth", lambda: 1e9)
    grid = tuning.Grid(((16, 64), (32, 64)), ((BF16, BF16),), (0.0, 0.5), (1, 2))
    found = tuning.tune(grid, no_bar, timing.CpuClock(), given)
    every = [((32, 64), 0.5), ((16, 64), 0.5), ((32, 64), 0.0), ((16, 64), 0.0)]
    assert asked == (sorted(every) if given is None else every[:wanted])
    assert [c.shape for c in found.curves if c.kernel == table.DENSE] == list(dict.fromkeys(s for s, _ in asked))
    assert caplog.messages == ([] if wanted == 4 else [f"{wanted} of 4 weights were measured in {given} s"])


def test_seconds_of_a_layer_by_its_sparsity(tmp_path) -> None:
    """The kernel's from where the packed weight is smaller and the kernel faster, and dense before."""
    made(*linear("scalar", 0.9, 0.2), curve("dense", 0, [1, 1, 1, 1])).save(tmp_path / "t.json")
    wanted = Wanted("float32", str(tmp_path / "t.json"))
    found = layer_times.time_curves({"a": (64, 64), "b": (64, 64), "c": (128, 64)}, wanted)
    assert list(found) == ["a", "b", "c"] and found["a"] == found["b"]
    packed = formats.get("sbt").nbytes
    for percent, seconds in enumerate(found["a"]):
        stored = packed((64, 64), 4096 - round(percent / 100 * 4096), torch.float32) < 4096 * 4
        expected = 0.9 - 0.7 * min(percent / 100, 0.9) if stored else 1.0
        assert seconds == pytest.approx(expected), percent
    assert found["a"][0] == 1.0 > found["a"][10]
    assert found["c"] == pytest.approx([2 * seconds for seconds in found["a"]])  # in proportion to the weights
    made(*linear("scalar", 1.6, 0.6), curve("dense", 0, [1, 1, 1, 1])).save(tmp_path / "t.json")
    wanted = replace(wanted)  # another one reads the table anew
    slow = layer_times.time_curves({"a": (64, 64)}, wanted)["a"]
    assert slow[:61] == [1.0] * 61 and slow[61] < 1.0
    assert layer_times.break_evens({"a": (64, 64)}, wanted) == {"a": 0.61}
    assert layer_times.dense_seconds({"a": (64, 64), "c": (128, 64)}, wanted) == 3.0
    with pytest.raises(ValueError, match="has no times of bfloat16 weights and their dense layers"):
        layer_times.time_curves({"a": (64, 64)}, replace(wanted, dtype="bfloat16"))
    with pytest.raises(ValueError, match="--tokens 0"):
        layer_times.time_curves({"a": (64, 64)}, replace(wanted, tokens=0))


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        *(("2:4", True), ("1:4", True), ("2:8", True), ("1:2", True)),
        *(("3:4", False), ("3:8", False), ("2:3", False), ("unstructured", False), ("N:8", False)),
    ],
)
def test_plans_count_on_kernels_that_take_their_pattern(pattern: str, fits: bool, tmp_path) -> None:
    """And on no others: here nm_mma_sp is fast, what takes any weight is not."""
    nm = curve("nm_mma_sp", 0.5, [0.6] * 4, dtype="bfloat16")
    dense = curve("dense", 0, [1] * 4, dtype="bfloat16")
    made(*linear("scalar", 1.6, 1.2, dtype="bfloat16"), nm, dense).save(tmp_path / "t.json")
    asked = {"a": (64, 64)}, Wanted("bfloat16", str(tmp_path / "t.json"), 1, pattern)
    assert layer_times.break_evens(*asked) == {"a": 0 if fits else table.NEVER}
    assert layer_times.time_curves(*asked)["a"][50] == (0.6 if fits else 1)


def test_a_command_plans_by_the_kernels_of_its_pattern(directory, capsys, tmp_path) -> None:
    analysis, out, times = (str(tmp_path / name) for name in ("a.json", "p.json", "t.json"))
    assert cli.main(["analyze", str(directory), "-o", analysis]) == 0
    slow = [*linear("scalar", 1.6, 0.6), curve("dense", 0, [1] * 4)]
    for curves, status in ((slow, 2), ([*slow, curve("nm_mma_sp", 0.5, [0.6] * 4)], 0)):
        made(*curves).save(times)
        assert cli.main(["plan", analysis, "--pattern", "2:4", "--times", times, "-o", out]) == status
        assert ("2:4 would be slower than dense" in capsys.readouterr().err) == bool(status)
    assert {p["pattern"] for p in json.loads(Path(out).read_text())["layers"].values()} == {"2:4"}


def int8_table(path: Path) -> dict[str, float]:
    """A table in which integers are faster than dense, and faster still beside rounded activations."""
    kinds = {("int8", "bfloat16"): 0.8, ("int8", "int8"): 0.4}
    curves = [
        Curve("scalar", weight, x, (64, 64), sparsity, TOKENS, (seconds * (1 - sparsity / 2),) * len(TOKENS))
        for (weight, x), seconds in kinds.items()
        for sparsity in (0.0, 0.9)
    ]
    floats = linear("scalar", 1.6, 1.2, dtype="bfloat16")
    made(*curves, *floats, curve("dense", 0, [1] * 4, dtype="bfloat16")).save(path)
    return {"int8": kinds["int8", "int8"], "none": kinds["int8", "bfloat16"]}


@pytest.mark.parametrize("activations", [None, "int8"])
def test_layers_of_integers_are_timed_as_such(activations: str | None, tmp_path) -> None:
    """Packed at every sparsity, and beside a dense layer in the dtype of the checkpoint."""
    seconds = int8_table(tmp_path / "t.json")[activations or "none"]
    wanted = Wanted("bfloat16", str(tmp_path / "t.json"), 4, "unstructured", "int8", activations)
    assert layer_times.break_evens({"a": (64, 64)}, wanted) == {"a": 0}
    found = layer_times.time_curves({"a": (64, 64)}, wanted)["a"]
    assert found[0] == pytest.approx(seconds) and found[50] == pytest.approx(0.75 * seconds)
    assert layer_times.dense_seconds({"a": (64, 64)}, wanted) == 1
    if activations:  # which come in bfloat16 where they are measured, whatever the checkpoint is in
        assert layer_times.dense_seconds({"a": (64, 64)}, replace(wanted, dtype="float32")) == 1
    floats = replace(wanted, values=None, activations=None)
    assert layer_times.break_evens({"a": (64, 64)}, floats) == {"a": table.NEVER}


def test_a_command_plans_for_integers(tmp_path, capsys) -> None:
    """Where floats would all stay dense."""
    folder, analysis, out = (str(tmp_path / name) for name in ("m", "a.json", "p.json"))
    make_model(dtype=torch.bfloat16).save_pretrained(folder)
    int8_table(tmp_path / "t.json")
    assert cli.main(["analyze", folder, "-o", analysis]) == 0
    asked = ["plan", analysis, "--sparsity", "0.5", "--times", str(tmp_path / "t.json"), "-o", out]
    assert cli.main(asked) == 2 and "dense" in capsys.readouterr().err
    assert cli.main([*asked, "--values", "int8", "--activations", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(p["zeros"] for p in found["layers"].values()) > 0
    assert found["predicted_seconds"] < 0.4 * found["dense_seconds"]
