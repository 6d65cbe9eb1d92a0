"""sbt_wgmma: the kernel's own source, run thread by thread on the CPU against float64, with what sm_90a adds."""

import re
import shutil
from pathlib import Path

import cuda_face
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem
from tolerance import assert_outputs, assert_product
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import Packed, sbt
from alphaprune.kernels import cuda

HALVES = (torch.float16, torch.bfloat16)
SHARED = 232448  # bytes that a block of an H100 may have
FEW = 60 << 10  # too few for more than two stages
# rows, columns, tokens, density, blocks of a cluster, bytes of shared memory: parts of a tile, of a stage and of a
# block of rows; a ring that goes round; several products' worth of tokens
CASES = [
    (1, 1, 1, 1, 1, SHARED),
    (40, 200, 20, 0.5, 1, SHARED),
    (20, 1100, 9, 0.5, 1, FEW),
    (136, 264, 33, 0.4, 2, SHARED),
    (17, 128, 130, 1, 1, SHARED),
]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return cuda_face.build("wgmma", tmp_path_factory.mktemp("wgmma")).sbt_wgmma_emulated


def multiply(kernel, packed: Packed, x: Tensor, splits: int, shared: int, **options) -> tuple[str, Tensor]:
    """As the bindings call it: rows of x are padded to eight elements."""
    padded = functional.pad(x, (0, -x.shape[1] % 8))
    counts = [*packed.shape, cuda.stage_units(packed, 1), splits, shared, padded.shape[1]]
    weight = [packed.weight, packed.mask, packed.offsets]
    return cuda_face.run(kernel, weight, counts, padded, packed.shape[0], **options)


def check(kernel, n, k, tokens, density, splits, shared, dtype=torch.bfloat16, **options) -> None:
    dense, packed, x = problem(n, k, tokens, density, dtype, dtype)
    text, y = multiply(kernel, packed, x, splits, shared, **options)
    assert not text
    assert_outputs(y, x, dense, options.get("bias"), options.get("residual"))


@pytest.mark.parametrize("order", cuda_face.ORDERS)
def test_product_is_within_the_bound(kernel, order: int) -> None:
    for i, (n, k, tokens, density, splits, shared) in enumerate(CASES):
        dtype = HALVES[(i + order) % 2]
        bias = (None, torch.randn(n).to(dtype), torch.randn(n))[(i + order) % 3]
        check(kernel, n, k, tokens, density, splits, shared, dtype, bias=bias, order=order)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [32, 64, 128, 250, 256])
def test_every_size_of_a_product(kernel, dtype: torch.dtype, tokens: int) -> None:
    check(kernel, 140, 712, tokens, 0.5, 2, SHARED, dtype, bias=torch.randn(140))


def test_bias_and_residual(kernel) -> None:
    for n in (36, 37):  # four outputs at a time, and one
        residual = torch.randn(6, n).half()
        check(kernel, n, 256, 6, 0.5, 2, SHARED, torch.float16, bias=torch.randn(n).half(), residual=residual)


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 260),
    k=st.integers(1, 700),
    tokens=st.integers(1, 40),
    density=st.floats(0, 1),
    splits=st.sampled_from([1, 2, 4, 8]),
    dtype=st.sampled_from(HALVES),
    order=st.sampled_from(cuda_face.ORDERS),
)
def test_any_shape(kernel, n, k, tokens, density, splits, dtype, order) -> None:
    chunks = -(-k // 128)
    while splits > chunks:
        splits //= 2
    check(kernel, n, k, tokens, density, splits, SHARED, dtype, order=order)


def test_the_launch_fills_the_device(kernel) -> None:
    """How many blocks share columns is chosen, and the sums do not depend on it beyond their rounding."""
    dense, packed, x = problem(130, 1100, 4, 0.5, torch.bfloat16, torch.bfloat16)
    found = [multiply(kernel, packed, x, splits, SHARED) for splits in (0, 8)]
    assert not any(text for text, _ in found)
    assert torch.equal(found[0][1], found[1][1])  # 2 blocks of rows x 8 on 132 multiprocessors
    assert_product(found[0][1], x, dense)


def test_the_sum_is_the_same_every_time(kernel) -> None:
    _, packed, x = problem(20, 640, 12, 0.5, torch.bfloat16, torch.bfloat16)
    first, *others = [multiply(kernel, packed, x, 4, SHARED, order=order)[1] for order in cuda_face.ORDERS]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_and_nan_meet_the_zeros(kernel, dtype: torch.dtype) -> None:
    dense, packed, x = problem(33, 200, 4, 0.5, dtype, dtype)
    x[1, 70], x[2, 5], x[3, 199] = float("inf"), float("nan"), float("-inf")
    text, y = multiply(kernel, packed, x, 2, SHARED)
    assert not text
    assert_product(y, x, dense)


def test_x_must_start_on_16_bytes(kernel) -> None:
    _, packed, x = problem(16, 64, 2, 0.5, torch.bfloat16, torch.bfloat16)
    text, _ = multiply(kernel, packed, x, 1, SHARED, shift=8)
    assert "16 bytes" in text


def dense_tiles_beside_empty_ones(kernel) -> None:
    mask = torch.rand(48, 700) < torch.rand(3).repeat_interleave(16)[:, None]
    mask[:, 64:192] = True
    mask[16:32, 256:] = False
    dense = torch.randn(48, 700).bfloat16() * mask
    x = torch.randn(5, 700).bfloat16()
    text, y = multiply(kernel, sbt.pack(dense, mask), x, 1, SHARED)
    assert not text
    assert_product(y, x, dense)


def test_dense_tiles_beside_empty_ones(kernel) -> None:
    dense_tiles_beside_empty_ones(kernel)


def test_wgmma_needs_it_on_every_visible_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed:
        capabilities: tuple[int, ...] = ()

        def devices(self) -> tuple[int, str]:
            return len(self.capabilities), ""

        def device(self, index: int) -> tuple[int, int, int]:
            return self.capabilities[index], 132, 232448

    def reason(*capabilities: int) -> str | None:
        found = Mixed()
        found.capabilities = capabilities
        monkeypatch.setattr(cuda, "_find", lambda: (found, ""))
        cuda.missing.cache_clear()
        cuda.missing_wide.cache_clear()
        return cuda.missing_wide()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason(90, 90) is None
    assert reason(80) == "it needs compute capability 9.0 (H100, H200) on every visible device, and cuda:0 has 8.0"
    assert reason(90, 80).endswith("and cuda:1 has 8.0; CUDA_VISIBLE_DEVICES can hide it")
    assert "cuda:1 has 10.0" in reason(90, 100)
    assert "no CUDA device is visible" in reason()
    cuda.missing.cache_clear()
    cuda.missing_wide.cache_clear()


WAIT = "mbarrier_wait(shared.full(stage.index), stage.parity);"
# What a mistake in the source does: (text, replacement, what is seen).
PLANTED = {
    "no wait for the copies": (WAIT, "", "a wait is missing"),
    "a wait for the other phase": (WAIT, WAIT.replace("parity)", "parity ^ 1)"), "wait is missing|deadlock"),
    "one lane waits for all": (WAIT, f"if (lane == 0) {WAIT}", "a wait is missing"),
    "copies over what is read": (
        "if (chunk - begin >= p.stages) mbarrier_wait",
        "if (false) mbarrier_wait",
        "missing|arriv",
    ),
    "a stage given back while it is read": (
        "mbarrier_arrive(before)",
        "mbarrier_arrive(shared.empty(stage.index))",
        "races|deadlock",
    ),
    "a stage given back before its products end": (
        "wgmma_wait<1>();  // the step before is complete: its operand may be written again\n      if (step == 0",
        "if (step == 0",
        "races|under way",
    ),
    "a stage never given back": (" && lane == 0) mbarrier_arrive", " && lane == 99) mbarrier_arrive", "deadlock"),
    "every lane gives it back": ("&& chunk > begin && lane == 0)", "&& chunk > begin)", "races|missing|deadlock"),
    "fewer bytes expected": ("(kept ? kWideMaskBytes + bytes : 0)", "(kept ? bytes : 0)", "bytes more"),
    "more bytes expected": ("(lane == 0 ? shared.x_bytes : 0)", "(lane < 2 ? shared.x_bytes : 0)", "bytes more"),
    "barriers used at once": (
        "mbarrier_fence_init();\n  }\n  sync_block();",
        "mbarrier_fence_init();\n  }",
        "may not be there",
    ),
    "barriers that copies do not know": ("mbarrier_fence_init();\n  }", "}", "fence is missing"),
    "words read before they are there": (
        "sync_warp();  // the words are there, and every lane has decoded the stage before",
        "",
        "barrier is missing|nobody wrote",
    ),
    "no fence before a product": ("wgmma_fence();\n      const int box", "const int box", "fence is missing"),
    "a fence before the operand": (
        "mine.decode(word, a[step % 2]);\n      wgmma_fence();",
        "wgmma_fence();\n      mine.decode(word, a[step % 2]);",
        "fence is missing",
    ),
    "an operand written too early": (
        "a[step % 2]);\n      wgmma_fence",
        "a[0]);\n      wgmma_fence",
        "operand|error is",
    ),
    "a wait for too few products": ("wgmma_wait<1>();", "wgmma_wait<2>();", "under way"),
    "sums read too early": (
        "} while (++chunk < end);\n  wgmma_wait<0>();",
        "} while (++chunk < end);",
        "under way|NaN",
    ),
    "products never waited for": ("wgmma_commit();\n      wgmma_wait<1>", "wgmma_wait<1>", "under way"),
    "an operand without a swizzle": ("1ull << 62", "2ull << 62", "error is"),
    "another distance between eight tokens": (
        "kSwizzleAlign >> 4) << 32",
        "kSwizzleAlign >> 5) << 32",
        "error is|nobody",
    ),
    "a box too few": ("box < kWideChunk; ++box", "box < kWideChunk - 1; ++box", "bytes more"),
    "the first box twice": (
        "chunk * kWideCols + box * static_cast<int>(kBoxCols), 0",
        "chunk * kWideCols, 0",
        "error is",
    ),
    "the ring not done with": ("  // The ring becomes sums[token][row].\n  sync_block();", "", "barrier|deadlock"),
    "sums of others read too early": (
        "sync_cluster();\n  const int first",
        "const int first",
        "missing|barrier of the cluster",
    ),
    "a block gone while its sums are read": (
        "sync_cluster();  // nobody leaves while others read its sums",
        "",
        "barrier of the cluster|has ended|deadlock",
    ),
    "a macro tile past the last": (
        "if (left > 0) mask",
        "if (left > -9) mask",
        "nobody wrote|error is|wait is missing",
    ),
    "rows of a pair swapped": ("const int pair = i / 2 + i % 2 * 2;", "const int pair = i;", "error is"),
    "a bit too far": (
        "bits[2 * i] = shuffle(1u << bit, lane);",
        "bits[2 * i] = shuffle(2u << bit, lane);",
        "error is|nobody",
    ),
    "a row tile too many": ("first_tile + tile < p.row_tiles;", "first_tile + tile <= p.row_tiles;", "signal|outside"),
    "a part of the columns forgotten": (
        "end = chunks * (rank + 1) / p.splits;",
        "end = chunks * (rank + 1) / p.splits - (rank > 0);",
        "error is",
    ),
    "the other half's sums": ("bits_of(sum[4 * j + 2 + k])", "bits_of(sum[4 * j + k])", "error is"),
}


def battery(kernel) -> None:
    """What finds every planted error."""
    for order in cuda_face.ORDERS:
        check(kernel, 20, 1100, 9, 0.5, 1, FEW, order=order)
        check(kernel, 130, 456, 5, 0.6, 2, SHARED, bias=torch.randn(130), order=order)
    dense_tiles_beside_empty_ones(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["none", *PLANTED])
def test_a_planted_mistake_is_seen(mistake: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    changes = {} if mistake == "none" else dict([PLANTED[mistake][:2]])
    library = cuda_face.build("wgmma", tmp_path, changes, "-O0")
    said = cuda_face.complaint(lambda: battery(library.sbt_wgmma_emulated))
    if mistake == "none":
        assert said is None
    else:
        assert said is not None and re.search(PLANTED[mistake][2], said), said
