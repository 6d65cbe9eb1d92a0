"""Time tables of GPUs: made by a fake clock, found for a fake device, asked by choices. No test asserts a time."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tables import TOKENS, curve, linear, made
from test_tuning import no_bar

from alphaprune import benchmark, cli, inspection, layer_times, timing, tuning
from alphaprune.formats import sbt
from alphaprune.kernels import base, spmm, table
from alphaprune.kernels.base import Kernel
from alphaprune.kernels.table import Gpu, Machine, Table
from alphaprune.layer import SparseLinear, expand_losers
from alphaprune.mask import keep_mask
from alphaprune.pattern import NM

BF16, FP32 = torch.bfloat16, torch.float32
H200, A100 = Gpu("NVIDIA H200", "9.0"), Gpu("NVIDIA A100-SXM4-80GB", "8.0")


@pytest.fixture(autouse=True)
def forgotten():
    table.forget()
    yield
    table.forget()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An H200, which is the current device, and an A100; the numbers of those that were asked for their name."""
    asked = []
    names = {0: H200, 1: A100}

    def name(index: int) -> str:
        asked.append(index)
        return names[index].gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index=0: tuple(map(int, names[index].capability.split(".")))
    )
    return asked


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's tables, the only ones."""
    monkeypatch.delenv("ALPHAPRUNE_TIMES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    found = tmp_path / "alphaprune" / "tables"
    found.mkdir(parents=True)
    return found


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and nothing of torch.cuda but `is_available` may be asked."""

    def forbidden(*_):
        raise AssertionError("torch.cuda was asked on a machine without a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("device_count", "current_device", "get_device_name", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, forbidden)


def record(name: str, device: str, supports=None, most_tokens: int | None = None, fits=None) -> Kernel:
    """A kernel that runs everywhere and multiplies by nothing."""

    def bind(packed):
        return lambda x, bias: x.new_zeros(*x.shape[:-1], packed.shape[0])

    return Kernel(name, device, lambda: None, supports or (lambda *_: None), bind, most_tokens, 1.0, fits)


def few(shape, tokens: int, weight, x) -> str | None:
    return None if tokens <= 2 else "at most two tokens"


@pytest.fixture
def use_kernels(monkeypatch: pytest.MonkeyPatch):
    def take(*kernels: Kernel) -> None:
        monkeypatch.setattr(base, "MEMBERS", tuple(kernel.name for kernel in kernels))
        monkeypatch.setattr(base, "kernels", lambda: {kernel.name: kernel for kernel in kernels})

    return take


def test_a_file_of_a_gpu(tmp_path: Path) -> None:
    found = made(curve("sbt_mma", 0.5, [1] * 4), machine=H200, threads=0)
    found.save(tmp_path / "t.json")
    loaded = Table.load(tmp_path / "t.json")
    assert (loaded.machine, loaded.threads, loaded.curves) == (H200, 0, found.curves)
    assert loaded.place == "NVIDIA H200, compute capability 9.0"
    assert made(curve("a", 0, [1] * 4)).place == "a CPU, 2 cores, 2 threads"
    assert table.file_name(H200, 0).startswith("nvidia-h200-9.0-")
    names = {table.file_name(gpu, 0) for gpu in (H200, A100, Gpu("NVIDIA H200", "9.1"))}
    assert len(names) == 3
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["version"] == 1 and content["machine"] == {"gpu": "NVIDIA H200", "capability": "9.0"}
    content["machine"].pop("capability")
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'capability' is missing"):
        Table.load(tmp_path / "t.json")


def test_each_device_has_its_own_table(two_gpus, folder: Path, tmp_path: Path, monkeypatch) -> None:
    def found(device: str) -> str | None:
        table.forget()
        now = table.current(device)
        return now and Path(now.path).name

    one = curve("a", 0, [1] * 4)
    made(one, machine=Machine.here(), threads=torch.get_num_threads()).save(folder / "cpu.json")
    assert (found("cpu"), found("cuda"), found("cuda:1"), found("meta")) == ("cpu.json", None, None, None)
    made(one, machine=A100, threads=0).save(folder / "a100.json")
    made(one, machine=Gpu(H200.gpu, "8.9"), threads=0).save(folder / "another.json")
    assert (found("cpu"), found("cuda"), found("cuda:1")) == ("cpu.json", None, "a100.json")
    made(one, machine=H200, threads=0).save(folder / "h200.json")
    assert (found("cuda"), found("cuda:0"), found("cuda:1")) == ("h200.json", "h200.json", "a100.json")
    made(one, machine=H200, threads=0, version="0.0.1").save(folder / "h200.json")
    assert found("cuda") is None  # of another release
    monkeypatch.setenv("ALPHAPRUNE_TIMES", str(folder / "a100.json"))
    assert (found("cpu"), found("cuda"), found("cuda:1")) == (None, "a100.json", "a100.json")
    monkeypatch.setenv("ALPHAPRUNE_TIMES", str(folder / "cpu.json"))
    assert (found("cpu"), found("cuda")) == ("cpu.json", None)
    monkeypatch.setenv("ALPHAPRUNE_TIMES", "off")
    assert (found("cpu"), found("cuda")) == (None, None)


def test_files_and_devices_are_asked_once(two_gpus, folder: Path, monkeypatch) -> None:
    made(curve("a", 0, [1] * 4), machine=H200, threads=0).save(folder / "h200.json")
    first = table.current("cuda:0")
    monkeypatch.setattr(Table, "load", None)
    assert all(table.current(device) is first for device in ("cuda", "cuda:0") for _ in range(3))
    assert two_gpus == [0]


def test_a_machine_without_a_gpu_is_asked_nothing_more(no_gpu, folder: Path, native_only) -> None:
    assert table.current("cuda") is None and table.current("cuda:3") is None
    assert base.gain((64, 64), 1, BF16, BF16, "cuda", 0.5) is None
    base.limits((64, 64), BF16, BF16, "cuda", 0.5)
    info = inspection.describe_machine()
    assert list(info["times"]) == ["cpu"] and "predicted, not measured" in info["times"]["cpu"]
    assert "no GPU" in info["cuda"]
    with pytest.raises(ValueError, match=r"--device cuda: PyTorch .*; ") as caught:
        timing.clock("cuda")
    assert "\n" not in str(caught.value) and ("install" in str(caught.value) or "nvidia-smi" in str(caught.value))
    for device in ("tpu", "meta", ""):
        with pytest.raises(ValueError, match=f"--device {device}: wanted cpu, cuda or cuda:N"):
            timing.clock(device)


def test_a_gpu_that_is_not_there(two_gpus, monkeypatch) -> None:
    with pytest.raises(ValueError, match="--device cuda:2: PyTorch sees 2 GPUs here, the last of which is cuda:1"):
        timing.clock("cuda:2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20))
    clock = timing.clock("cuda:1")
    assert (clock.device, clock.machine, clock.threads) == (torch.device("cuda:1"), A100, 0)
    assert clock.rotated == 200 << 20 and timing.clock("cuda").device == torch.device("cuda:0")


def test_info_tells_measured_from_predicted_for_each_device(two_gpus, folder: Path) -> None:
    curves = *linear("sbt_mma", 1.6, 0.6), curve("dense", 0, [1] * 4)
    made(*curves, machine=A100, threads=0).save(folder / "a100.json")
    found = inspection.describe_machine()
    assert list(found["times"]) == ["cpu", "cuda:0", "cuda:1"]
    assert "predicted, not measured" in found["times"]["cuda:0"]
    assert "bench --tune --device cuda:0" in found["times"]["cuda:0"]
    assert "a100.json (measured on NVIDIA A100-SXM4-80GB" in found["times"]["cuda:1"]
    assert found["break_even"]["cuda:1 float32 4096×4096"]["1"] == 0.61
    rows = dict(map(tuple, inspection.machine_rows(found)))
    assert "predicted, not measured" in rows["times cuda:0"] and "H200" in rows["cuda"]


def test_choices_ask_the_table_of_the_device_where_the_weight_lies(use_kernels, monkeypatch) -> None:
    use_kernels(record("p", "cuda", most_tokens=64), record("q", "cuda"), record("c", "cpu"), record("r", "any"))
    times = {
        "cpu": made(curve("c", 0, [7] * 4), curve("dense", 0, [8] * 4)),
        "cuda:0": made(curve("p", 0, [1, 1, 1, 9]), curve("q", 0, [2, 2, 2, 2]), curve("dense", 0, [3] * 4)),
        "cuda:1": made(curve("p", 0, [5] * 4), curve("q", 0, [4] * 4), curve("dense", 0, [6] * 4)),
    }
    monkeypatch.setattr(table, "current", times.get)

    def name(device: str, tokens: int) -> str:
        return base.choose((64, 64), tokens, FP32, FP32, device, 0.5)[0].name

    assert [name(device, 1) for device in (*times, "cuda:2")] == ["c", "p", "q", "p"]
    assert name("cuda:0", 64) == "q" and name("cuda:2", 65) == "q"
    assert base.gain((64, 64), 1, FP32, FP32, "cuda:0", 0.5) == (1, 3)
    assert base.gain((64, 64), 1, FP32, FP32, "cuda:1", 0.5) == (4, 6)
    assert base.gain((64, 64), 1, FP32, FP32, "cpu", 0.5) == (7, 8)
    assert base.limits((64, 64), FP32, FP32, "cuda:0", 0.5) == (32,)
    assert base.limits((64, 64), FP32, FP32, "cuda:1", 0.5) == ()
    assert base.limits((64, 64), FP32, FP32, "cuda:2", 0.5) == (64,)  # without a table: where the default changes


def test_a_weight_asks_for_its_own_device(use_kernels, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(table, "current", lambda device: asked.append(device))
    use_kernels(record("c", "cpu"))
    _, packed = timing.random_packed((16, 64), 0.5, BF16, BF16)
    prepared = spmm.prepare(packed)
    for _ in range(5):
        prepared(torch.ones(1, 64, dtype=BF16))
    assert asked == ["cpu"] * 2  # the choice and its limits; nothing afterwards


@pytest.mark.parametrize("seconds", [*itertools.product([1.0, 2.0, 3.0], repeat=3)])
def test_a_choice_holds_between_limits_whatever_kernels_take(use_kernels, monkeypatch, seconds) -> None:
    """One kernel takes four tokens at most, by default three, one is asked about each weight, and one takes all."""

    def four(shape, tokens: int, weight, x) -> str | None:
        return None if tokens <= 4 else "at most four tokens"

    kernels = record("four", "cuda", four, 3), record("some", "cuda", fits=lambda p: None), record("all", "cuda")
    use_kernels(*kernels)
    found = made(*[curve(k.name, 0, [s] * 4) for k, s in zip(kernels, seconds, strict=True)])
    monkeypatch.setattr(table, "current", lambda device: found)
    for fits in (None, lambda kernel: None):
        limits = base.limits((64, 64), FP32, FP32, "cuda", 0.5, fits)
        names = [base.choose((64, 64), t, FP32, FP32, "cuda", 0.5, fits)[0].name for t in range(1, 100)]
        assert list(limits) == [t for t in range(1, 99) if names[t - 1] != names[t]]
        assert base.limits((64, 64), BF16, BF16, "cuda", 0.5, fits) == (3,)  # unknown to the table: the default
        assert names[98] == ("some" if fits and seconds[1] <= seconds[2] else "all")


class FakeClock:
    """A GPU's clock on the CPU: every copy is called once, and the seconds are made up."""

    device, rotated, whole, threads, machine = torch.device("cpu"), 1 << 12, True, 0, H200

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds, self.tokens = seconds or {}, {}

    def rounds(self, calls):
        for name, copied in calls.items():
            assert len(copied) > 1 and not any(torch.isnan(call()).any() for call in copied)
            self.tokens.setdefault(name, []).append(len(copied[0].args[0]))
        while True:
            yield {name: self.seconds.get(name, 1.0) for name in calls}

    def bandwidth(self) -> float:
        return 1e12


TINY = tuning.Grid(((16, 64), (32, 64)), ((BF16, BF16),), (0.0, 0.5), (1, 2, 4))


def is_regular(packed) -> str | None:
    kept = (sbt.dense(packed)[0] != 0).unflatten(1, (-1, 4)).sum(-1)
    return None if (kept == 2).all() else "it is not 2:4"


def test_tuning_measures_what_each_kernel_takes(use_kernels, two_gpus, folder: Path) -> None:
    half = lambda shape, tokens, weight, x: None if weight == x == BF16 else "not in 16 bits"  # noqa: E731
    use_kernels(
        record("mma", "cpu", half, 64),
        record("ell", "cpu", few, 2),
        record("nm", "cpu", half, 64, is_regular),
        record("never", "cpu", half, 64, lambda packed: "no weight is good enough"),
        record("other", "cuda"),
    )
    seconds = {"mma": 1.0, "ell": 0.5, "nm": 0.2, table.DENSE: 1.5}
    clock = FakeClock(seconds)
    found = tuning.tune(TINY, no_bar, clock)
    assert (found.machine, found.threads, found.bandwidth) == (H200, 0, 1e12)
    assert {c.kernel for c in found.curves} == {"mma", "ell", "nm", table.DENSE}
    assert all(set(c.seconds) == {seconds[c.kernel]} for c in found.curves)
    by = {name: [c for c in found.curves if c.kernel == name] for name in seconds}
    assert {(c.shape, c.sparsity) for c in by["mma"]} == {(s, d) for s in TINY.shapes for d in TINY.sparsities}
    assert [(c.shape, c.sparsity) for c in by["nm"]] == [(s, 0.5) for s in TINY.shapes]
    assert {c.tokens for c in by["ell"]} == {(1, 2)} and {c.tokens for c in by["mma"]} == {(1, 2, 4)}
    assert len(by[table.DENSE]) == 2 and set(clock.tokens["ell"]) == {1, 2}
    path = tuning.write(found, None)
    assert path.parent == folder and table.current("cuda:0").path == str(path) and table.current("cuda:1") is None
    # What takes only 2:4 says nothing of weights in general: they break even by the others.
    assert found.break_even((16, 64), 4, BF16, BF16) == 0
    rows = tuning.rows(found)
    assert {row["50%"]["kernel"] for row in rows} == {"ell", "mma"} and len(rows) == 2 * 3
    known = layer_times.break_evens({"layer": (16, 64)}, layer_times.Wanted("bfloat16", str(path), 4))
    assert known == {"layer": 0}
    slower = tuning.tune(TINY, no_bar, FakeClock(seconds | {"mma": 2.0, "ell": 2.0}))
    assert tuning.rows(slower)[0]["break_even"] == table.NEVER


def test_a_layer_stays_packed_for_a_kernel_that_takes_its_weight(use_kernels, monkeypatch) -> None:
    use_kernels(record("all", "cpu"), record("nm", "cpu", fits=is_regular))
    found = made(curve("all", 0, [5] * 4), curve("nm", 0, [0.5] * 4), curve("dense", 0, [1] * 4))
    monkeypatch.setattr(table, "current", lambda device: found)
    scores = torch.rand(64, 64)
    masks = keep_mask(scores, 64 * 32, NM(2, 4)), scores > 0.5
    layers = [SparseLinear.from_linear(torch.nn.Linear(64, 64), mask) for mask in masks]
    model = expand_losers(torch.nn.Sequential(*layers), 1)
    assert [type(layer) for layer in model] == [SparseLinear, torch.nn.Linear]


def test_devices_have_grids_and_kernels_of_their_own(use_kernels) -> None:
    use_kernels(record("a", "cuda"), record("b", "cpu"), record("c", "any"))
    assert tuning.contenders((16, 64), BF16, BF16, "cuda") == ["a"]
    assert tuning.contenders((16, 64), BF16, BF16) == ["b"]
    quick, full = (tuning.grid_for(torch.device("cuda", 1), quick) for quick in (True, False))
    assert quick is tuning.GPU_QUICK and full is tuning.GPU_FULL and full.tokens[-1] == 512 and full.rotated is None
    assert tuning.grid_for(torch.device("cpu"), False) is tuning.FULL
    broken = Kernel("a", "cuda", lambda: "no driver", few, None)
    use_kernels(broken, record("b", "cpu"))
    with pytest.raises(ValueError, match="no kernels to tune: a: no driver"):
        tuning.contenders((16, 64), BF16, BF16, "cuda")


def test_the_commands_on_a_gpu(use_kernels, two_gpus, folder: Path, capsys, monkeypatch) -> None:
    use_kernels(record("mma", "cpu", most_tokens=64))
    asked, seconds = [], {"": 0.5, "bfloat16": 2.0, "float32": 3.0}
    monkeypatch.setattr(timing, "clock", lambda device: asked.append(device) or FakeClock(seconds))
    monkeypatch.setattr(tuning, "QUICK", TINY)
    assert cli.main(["bench", "--tune", "--quick", "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200, compute capability 9.0, copies 1000.0 GB/s" in out and "for every GPU of this name" in out
    assert asked == ["cuda"] and Table.load(next(folder.iterdir())).machine == H200
    command = ["bench", "--device", "cuda:0", "--shape", "16x64", "--sparsity", "0.5", "--tokens", "3"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert (found["machine"], row["machine"], row["threads"], row["kernel"]) == (str(H200), str(H200), 0, "mma")
    assert (row["seconds"], row["dense_seconds"], row["dense_dtype"], row["ratio"]) == (0.5, 2.0, "bfloat16", 4)
    assert row["calls"] == timing.LEAST_CALLS * row["rotated"] // row["nbytes"] and row["rotated"] >= 1 << 12
    assert set(asked[1:]) == {"cuda:0"}
    assert cli.main(command) == 0
    heading = capsys.readouterr().out.splitlines()[0]
    assert heading == f"{H200}, copies 1000.0 GB/s; medians"


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--device", "cuda", "--shape", "8x8"),
        ("bench", "--device", "cuda", "--shape", "8x8", "--kernel", "sbt_mma"),
        ("bench", "--device", "cuda", "--tune"),
        ("bench", "MODEL", "--device", "cuda"),
        ("info", "MODEL", "--device", "cuda"),
    ],
    ids=" ".join,
)
def test_without_a_gpu_a_command_is_one_sentence(no_gpu, directory, capsys, monkeypatch, tmp_path, arguments) -> None:
    monkeypatch.setattr(benchmark.timing, "read_bandwidth", lambda: pytest.fail("measured before it was refused"))
    assert cli.main([str(directory) if a == "MODEL" else a for a in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"alphaprune {arguments[0]}: --device cuda: PyTorch")


def test_whole_models_are_timed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(timing, "clock", lambda device: clock)
    with pytest.raises(ValueError, match="leave out --device cuda"):
        benchmark.bench_shapes("tiny", "0.5", "unstructured", "1", "bfloat16", None, no_bar, None, True, "cuda")


@pytest.mark.gpu
def test_tuning_a_tiny_grid_on_a_gpu(folder: Path) -> None:
    if reason := base.kernels()["sbt_mma"].available():
        pytest.skip(f"no CUDA kernels: {reason}")
    clock = timing.clock("cuda")
    grid = tuning.Grid(((128, 256), (512, 1024)), ((BF16, BF16),), (0.0, 0.5, 0.9), (1, 4, 96), 1 << 20, 0.01)
    found = tuning.tune(grid, no_bar, clock)
    assert found.machine == Gpu.at(torch.cuda.current_device()) and found.bandwidth > 1e10
    names = tuning.contenders((128, 256), BF16, BF16, "cuda")
    assert set(found.kernels) <= set(names) and set(tuning.general(names)) <= set(found.kernels)
    path = tuning.write(found, None)
    assert table.current("cuda").path == str(path)
    for tokens in TOKENS:
        kernel, why = base.choose((256, 512), tokens, BF16, BF16, "cuda", 0.5)
        assert kernel.device == "cuda" and "time table" in why
    assert base.gain((256, 512), 1, BF16, BF16, "cuda", 0.5)
    assert str(path) in inspection.describe_machine()["times"][str(clock.device)]
    for pattern, sparsity in ((timing.UNSTRUCTURED, 0.7), (NM(2, 4), 0.5)):
        row = timing.time_linear((512, 1024), sparsity, 2, total_bytes=1 << 20, pattern=pattern, device="cuda")
        assert row.machine == str(found.machine) and row.seconds > 0 and row.dense_seconds > 0
