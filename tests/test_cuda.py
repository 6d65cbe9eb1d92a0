"""sbt_mma and sbt_expand: the kernels' own source, run thread by thread on the CPU, and on a GPU where there is one."""

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cuda_face
import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem
from tolerance import assert_product
from torch import Tensor

from alphaprune.formats import Packed
from alphaprune.kernels import cuda, expansion, spmm

HALVES = cuda.HALVES
H100, SMALL = (90, 132, 232448), (80, 1, 166912)  # SMALL: so few multiprocessors that blocks own 64 rows
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = [(1, 1, 1), (16, 64, 0.4), (17, 65, 0), (17, 65, 1), (5, 300, 0.4), (50, 128, 0.6), (37, 512, 0.3)]


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The compiled files of csrc/cuda."""
    return emulated.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def module(objects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The emulated module of the source as it stands."""
    return emulated.open_module(emulated.link_library(objects, tmp_path_factory.mktemp("module")))


def use(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets kernels/cuda.py call this module, with tensors of the host."""
    monkeypatch.setattr(cuda, "_find", lambda: (module, ""))
    cuda._device.cache_clear()


@pytest.fixture
def emulator(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    use(module, monkeypatch)
    module.emulate_in_order(0)
    yield module
    module.emulate_device(*H100)
    cuda._device.cache_clear()


def guarded(tensor: Tensor) -> Tensor:
    """The same bytes, aligned to 16 and ending within 16 bytes of a page that nobody may touch."""
    return cuda_face.guard(tensor.contiguous()).tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs hold NaN before a kernel writes them, and a forbidden page follows them."""
    original = Tensor.new_empty

    def allocate(self: Tensor, *sizes, **keywords) -> Tensor:
        return guarded(original(self, *sizes, **keywords).fill_(float("nan")))

    monkeypatch.setattr(Tensor, "new_empty", allocate)


def multiply(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    return cuda.bind(packed.map(guarded))(guarded(x), None if bias is None else guarded(bias))


def check(n: int, k: int, tokens: int, density: float, dtype: torch.dtype, bias: Tensor | None, seed: int = 0) -> None:
    dense, packed, x = problem(n, k, tokens, density, dtype, dtype, seed)
    assert_product(multiply(packed, x, bias), x, dense, bias)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("dtype", HALVES)
def test_product_is_within_the_bound(emulator: ModuleType, poisoned: None, dtype: torch.dtype, order: int) -> None:
    emulator.emulate_in_order(order)
    for (n, k, density), tokens in itertools.product(SHAPES, BUCKETS):
        bias = (None, torch.randn(n).to(dtype), torch.randn(n))[(tokens + n) % 3]
        check(n, k, tokens, density, dtype, bias)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 700),
    tokens=st.integers(0, 140),
    density=st.floats(0, 1),
    dtype=st.sampled_from(HALVES),
    order=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_shape(module: ModuleType, n, k, tokens, density, dtype, order, seed) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(module, monkeypatch)
        module.emulate_in_order(order)
        check(n, k, min(tokens, 140), density, dtype, None, seed)
    cuda._device.cache_clear()


def of_four(packed_from: Tensor, keep: int) -> Tensor:
    """A mask that keeps `keep` of 4 neighbouring columns."""
    n, k = packed_from.shape
    return (torch.rand(n, -(-k // 4), 4).argsort(-1).argsort(-1) < keep).flatten(1)[:, :k]


@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_with_layouts_of_their_own(emulator: ModuleType, poisoned: None, dtype: torch.dtype) -> None:
    """Through their bindings; tests/test_cuda_delta.py and test_cuda_nm.py look closer."""
    for (n, k, density), tokens in itertools.product(SHAPES, (1, 2, 4, 9, 70)):
        bias = (None, torch.randn(n).to(dtype), torch.randn(n))[(tokens + n) % 3]
        dense, packed, x = problem(n, k, tokens, density, dtype, dtype)
        assert_product(cuda.bind_delta(packed)(guarded(x), bias), x, dense, bias)
        if tokens in (9, 70):
            assert_product(cuda.bind_wide(packed.map(guarded))(guarded(x), bias), x, dense, bias)
        pruned = dense * of_four(dense, 2)
        assert_product(cuda.bind_nm(expansion.sbt.pack(pruned))(guarded(x), bias), x, pruned, bias)


def test_two_of_four_is_recognised() -> None:
    for keep, fits in ((0, True), (1, True), (2, True), (3, False), (4, False)):
        weight = torch.randn(40, 200).bfloat16()
        packed = expansion.sbt.pack(weight, of_four(weight, keep))
        assert (cuda.crowded(packed) is None) == fits, keep
    for at in itertools.product((0, 17, 39), (0, 63, 64, 197)):  # one four too many, anywhere
        mask = of_four(weight, 2)
        mask[at[0], at[1] // 4 * 4 : at[1] // 4 * 4 + 3] = True
        assert "2 of 4" in cuda.crowded(expansion.sbt.pack(weight, mask))


@pytest.mark.parametrize("warps", range(1, 9))
def test_any_number_of_warps_shares_the_columns(emulator: ModuleType, monkeypatch, warps: int) -> None:
    monkeypatch.setattr(cuda, "warps", lambda packed, multiprocessors: warps)
    for tokens in (3, 40):
        check(40, 1000, tokens, 0.5, torch.bfloat16, None)


@pytest.mark.parametrize("order", range(3))
def test_blocks_of_64_rows(emulator: ModuleType, poisoned: None, order: int) -> None:
    """Where a device has less to do at once than there are rows: some of the last block's row tiles are not there."""
    emulator.emulate_device(*SMALL)
    emulator.emulate_in_order(order)
    for n, k, tokens, dtype in ((1, 1, 17, HALVES[0]), (70, 512, 40, HALVES[1]), (129, 300, 64, HALVES[0])):
        check(n, k, tokens, 0.5, dtype, torch.randn(n))
    check(64, 256, 33, 1, torch.bfloat16, None)


def test_dense_tiles_beside_empty_ones(emulator: ModuleType, poisoned: None) -> None:
    """What one warp stages differs from tile to tile, from nothing to all of it."""
    for k in (640, 700):
        mask = torch.rand(48, k) < torch.rand(3).repeat_interleave(16)[:, None]
        mask[:, 64:192] = True
        mask[16:32, 256:] = False
        dense = torch.randn(48, k).bfloat16() * mask
        packed = expansion.sbt.pack(dense, mask)
        x = torch.randn(5, k).bfloat16()
        assert_product(multiply(packed, x, None), x, dense)


def test_inputs_that_are_not_aligned(emulator: ModuleType) -> None:
    """x two bytes off, and packed tensors that a file has put anywhere."""
    dense, packed, x = problem(20, 256, 3, 0.5, torch.bfloat16, torch.bfloat16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 4
    moved = packed.map(lambda t: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t))
    assert_product(cuda.bind(moved)(shifted, None), x, dense)
    assert_product(cuda.bind_wide(moved)(shifted, None), x, dense)


@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_and_nan_meet_the_zeros(emulator: ModuleType, dtype: torch.dtype) -> None:
    dense, packed, x = problem(33, 200, 4, 0.5, dtype, dtype)
    x[1, 70], x[2, 5], x[3, 199] = float("inf"), float("nan"), float("-inf")
    assert_product(multiply(packed, x, None), x, dense)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_halves_is_that_of_torch(emulator: ModuleType, dtype: torch.dtype) -> None:
    """Large, subnormal and overflowing results, through a weight that is one."""
    scale = torch.exp2(torch.linspace(-30, 20, 200))
    x, one = (torch.randn(200) * scale).to(dtype)[:, None], torch.ones(1, 1, dtype=dtype)
    bias = torch.randn(1) * 2.0**-14
    y = multiply(expansion.sbt.pack(one), x, bias)
    assert torch.equal(y, (x.float() + bias).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_expansion_keeps_the_bits(emulator: ModuleType, poisoned: None, dtype: torch.dtype) -> None:
    for (n, k, density), order in itertools.product([*SHAPES, (100, 700, 0.5)], range(3)):
        emulator.emulate_in_order(order)
        dense, packed, _ = problem(n, k, 1, density, dtype, dtype)
        packed = packed.map(guarded)
        made, _ = cuda.handle(packed)
        for first, last in ((0, n), (0, n // 2), (n // 32 * 16, n), (0, 0)):
            out = packed.weight.new_empty((last - first, k))
            made.expand(first, last, out.data_ptr(), 0)
            assert torch.equal(out, dense[first:last])


def test_a_failure_of_a_launch_raises(emulator: ModuleType) -> None:
    _, packed, x = problem(16, 128, 1, 0.9, torch.bfloat16, torch.bfloat16)
    address = [t.data_ptr() for t in (packed.weight, packed.mask, packed.offsets)]
    made = emulator.Weight(*address, 16, 128, 2, 10, 1, 0)  # room for 10 units where there are more
    with pytest.raises(RuntimeError, match="sbt_mma: emulated: block 0,0 thread"):
        made.multiply(x.data_ptr(), 1, 0, 0, 0, x.new_empty(1, 16).data_ptr(), 0)
    for arguments, sentence in (
        ((0, 128, 2, 10, 1), "one row"),
        ((16, 128, 0, 10, 1), "dtype 0"),
        ((16, 1, 2, 1, 9), "8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            emulator.Weight(*address, *arguments, 0)


WRONG = "error is|nobody wrote|NaN"  # a wrong number, or bytes that were never written
# What a mistake in the source does: (file, text, replacement, what is seen).
PLANTED = {
    "no barrier before the words are read": ("sbt_mma.cuh", "sync_warp();", ";", "barrier is missing|nobody wrote"),
    "no wait for the copies": ("sbt_mma.cuh", "copy_wait<kStages - 2>();", "", "a wait is missing"),
    "a wait for too few copies": (
        "sbt_mma.cuh",
        "copy_wait<kStages - 2>",
        "copy_wait<kStages - 1>",
        "a wait is missing",
    ),
    "no barrier before the rings become sums": (
        "sbt_mma.cuh",
        "copy_wait<0>();\n  sync_block();",
        "copy_wait<0>();",
        "races",
    ),
    "no barrier before the sums are added": (
        "sbt_mma.cuh",
        "  sync_block();\n  for (int index",
        "  for (int index",
        "races|nobody wrote",
    ),
    "a copy that nobody waits for": ("sbt_mma.cuh", "copy_wait<0>();\n", "", "a wait is missing|under way"),
    "words stored outside": (
        "chunk.cuh",
        "to = lane / 4 * kStepMeta",
        "to = lane * 4 * kStepMeta",
        "outside|races|nobody",
    ),
    "a tile too far": ("chunk.cuh", "offsets = all_offsets + first;", "offsets = all_offsets + first + 1;", WRONG),
    "the second tile's start forgotten": (
        "chunk.cuh",
        "kWarp / 2 ? first_tile_bytes : 0",
        "kWarp ? first_tile_bytes : 0",
        WRONG,
    ),
    "a bit too far": ("chunk.cuh", "1u << (lane % 8 * 4 + i)", "2u << (lane % 8 * 4 + i)", WRONG),
    "too few copies": ("chunk.cuh", "kAll - kStraight>(to", "kAll - kStraight - 1>(to", "nobody wrote|error is"),
    "halves of a tile swapped": (
        "chunk.cuh",
        "uint32_t mask[2] = {words.x, words.z}",
        "uint32_t mask[2] = {words.z, words.x}",
        WRONG,
    ),
    "another row tile's values": (
        "sbt_mma.cuh",
        "one.offsets += (r < there ? r : 0) * stride;",
        "one.offsets += (r < there ? 0 : 0) * stride;",
        WRONG,
    ),
    "rows that are not there": ("sbt_mma.cuh", "if (r >= there) one.mask_left = 0;", "", WRONG + "|outside|signal"),
    "a token too many": ("sbt_mma.cuh", "8 * t + group < p.tokens", "8 * t + group <= p.tokens", "signal 11"),
    "the residual's or bias's row": (
        "output.cuh",
        "static_cast<const float*>(out.bias)[row]",
        "static_cast<const float*>(out.bias)[0]",
        "error is",
    ),
}


def run_all(library: str) -> None:
    """Some products with the module in this file: what a process of its own does, because a mistake may end it."""
    module = emulated.open_module(Path(library))
    cuda._find = lambda: (module, "")
    original = Tensor.new_empty
    Tensor.new_empty = lambda self, *sizes, **keywords: guarded(original(self, *sizes, **keywords).fill_(float("nan")))
    for order, (n, k, density) in itertools.product(range(3), [(40, 1000, 0.5), (16, 128, 1), (37, 640, 0.8)]):
        module.emulate_in_order(order)
        for tokens, device in ((1, H100), (8, H100), (40, H100), (40, SMALL)):
            module.emulate_device(*device)
            cuda._device.cache_clear()
            check(n, k, tokens, density, torch.bfloat16, torch.randn(n))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["none", *PLANTED])
def test_a_planted_mistake_is_seen(mistake: str, objects: dict[str, Path], tmp_path: Path) -> None:
    made = objects
    if mistake != "none":
        file, text, replacement, seen = PLANTED[mistake]
        csrc = shutil.copytree(emulated.ROOT / "csrc", tmp_path / "csrc")
        source = (csrc / "cuda" / file).read_text()
        assert source.count(text) == 1, f"{file} has changed: {text}"
        (csrc / "cuda" / file).write_text(source.replace(text, replacement))
        kept = {stem: path for stem, path in objects.items() if stem != "sbt_mma"}
        made = emulated.build(tmp_path / "objects", csrc, kept)
    library = emulated.link_library(made, tmp_path)
    command = [sys.executable, "-c", f"import test_cuda; test_cuda.run_all({str(library)!r})"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    said = done.stderr + (f"signal {-done.returncode}" if done.returncode < 0 else "")
    assert (done.returncode == 0) == (mistake == "none"), said
    assert mistake == "none" or re.search(seen, said), said


def test_reasons_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    class Old:
        COMPILER = "nvcc 13"

        def __init__(self, devices, capability=75):
            self.devices = lambda: devices
            self.device = lambda index: (capability, 40, 65536)

    def reason(found, why: str = "") -> str | None:
        monkeypatch.setattr(cuda, "_find", lambda: (found, why))
        cuda.missing.cache_clear()
        return cuda.missing()

    assert reason(None, "nvcc was not found") == "not built: nvcc was not found"
    assert "insufficient" in reason(Old((0, "the driver version is insufficient for the runtime")))
    assert "no CUDA device is visible" in reason(Old((0, "")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in reason(Old((1, "")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "7.5, the kernels need 8.0" in reason(Old((1, "")))
    assert reason(Old((1, ""), 90)) is None
    cuda.missing.cache_clear()


def test_a_kernel_asked_for_by_name_never_falls_back() -> None:
    if cuda.missing() is None:
        pytest.skip("the kernel runs here")
    _, packed, _ = problem(16, 64, 1, 0.5, torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match="kernel sbt_mma cannot run: "):
        spmm.prepare(packed, "layer", "sbt_mma")
