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
FEW = 84 << 10  # too few for more than four stages
# rows, columns, tokens, density; groups, slices, splits; multiprocessors, bytes of shared memory: parts of a tile, of a
# stage and of a round; rounds; a ring that goes round; several products' worth of tokens
CASES = [
    (1, 1, 1, 1, (0, 0, 0), 132, SHARED),
    (40, 200, 20, 0.5, (0, 0, 0), 132, SHARED),
    (20, 1100, 9, 0.5, (1, 1, 1), 1, FEW),
    (200, 700, 5, 0.5, (1, 2, 1), 1, FEW),
    (136, 264, 33, 0.4, (2, 1, 2), 132, SHARED),
    (300, 330, 12, 0.5, (1, 3, 1), 2, SHARED),
    (17, 128, 130, 1, (0, 0, 0), 132, SHARED),
]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return cuda_face.build("wgmma", tmp_path_factory.mktemp("wgmma")).sbt_wgmma_emulated


def multiply(kernel, members: Packed | list[Packed], x: Tensor, ways=(0, 0, 0), sms=132, shared=SHARED, **options):
    """As the bindings call it: rows of x are padded to eight elements. What went wrong, and y of each member."""
    members = [members] if isinstance(members, Packed) else members
    padded = functional.pad(x, (0, -x.shape[1] % 8))
    rows = [packed.shape[0] for packed in members]
    units = max(cuda.stage_units(packed, 2) for packed in members)
    counts = [len(rows), *rows, *[0] * (3 - len(rows)), x.shape[1], units, *ways, sms, shared, padded.shape[1]]
    weight = [tensor for packed in members for tensor in (packed.weight, packed.mask, packed.offsets)]
    text, y = cuda_face.run(kernel, weight, counts, padded, sum(rows), **options)
    parts = y.flatten().split([len(x) * n for n in rows])
    found = [part.view(len(x), n) for part, n in zip(parts, rows, strict=True)]
    return text, found[0] if len(found) == 1 else found


def check(kernel, n, k, tokens, density, ways=(0, 0, 0), sms=132, shared=SHARED, dtype=torch.bfloat16, **options):
    dense, packed, x = problem(n, k, tokens, density, dtype, dtype)
    text, y = multiply(kernel, packed, x, ways, sms, shared, **options)
    assert not text
    assert_outputs(y, x, dense, options.get("bias"), options.get("residual"))


@pytest.mark.parametrize("order", cuda_face.ORDERS)
def test_product_is_within_the_bound(kernel, order: int) -> None:
    for i, (n, k, tokens, density, *where) in enumerate(CASES):
        dtype = HALVES[(i + order) % 2]
        bias = (None, torch.randn(n).to(dtype), torch.randn(n))[(i + order) % 3]
        check(kernel, n, k, tokens, density, *where, dtype, bias=bias, order=order)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [32, 64, 128, 250, 256])
def test_every_size_of_a_product(kernel, dtype: torch.dtype, tokens: int) -> None:
    check(kernel, 140, 712, tokens, 0.5, (2, 1, 2), dtype=dtype, bias=torch.randn(140))
    check(kernel, 200, 330, tokens, 0.5, (1, 1, 1), 1, dtype=dtype)  # several rounds


def test_bias_and_residual(kernel) -> None:
    for n in (36, 37):  # four outputs at a time, and one
        residual = torch.randn(6, n).half()
        options = {"bias": torch.randn(n).half(), "residual": residual}
        check(kernel, n, 256, 6, 0.5, (1, 1, 2), dtype=torch.float16, **options)


def members(kernel, rows, k, tokens, ways, sms, order=0) -> None:
    found = [problem(n, k, tokens, 0.3 + 0.2 * i, torch.bfloat16, torch.bfloat16, i) for i, n in enumerate(rows)]
    x = found[0][2]
    text, every = multiply(kernel, [packed for _, packed, _ in found], x, ways, sms, order=order)
    assert not text
    for (dense, _, _), y in zip(found, every, strict=True):
        assert_product(y, x, dense)


def test_weights_that_share_a_launch(kernel) -> None:
    """Rounds that end with a member, and that have parts of two; rows that are no multiple of a tile, or of four."""
    for rows, k, ways, sms in (
        ((40, 17, 64), 330, (1, 2, 1), 1),
        ((64, 64), 200, (2, 1, 1), 2),
        ((100, 3, 20), 264, (3, 1, 2), 132),
    ):
        members(kernel, rows, k, 5, ways, sms)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 260),
    k=st.integers(1, 700),
    tokens=st.integers(1, 40),
    density=st.floats(0, 1),
    ways=st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from([0, 1, 2, 4, 8])),
    sms=st.sampled_from([1, 2, 3, 132]),
    dtype=st.sampled_from(HALVES),
    order=st.sampled_from(cuda_face.ORDERS),
)
def test_any_shape(kernel, n, k, tokens, density, ways, sms, dtype, order) -> None:
    if ways[2] > -(-k // 128):
        ways = (*ways[:2], 0)
    check(kernel, n, k, tokens, density, ways, sms, dtype=dtype, order=order)


def test_a_launch_that_does_not_fit_is_refused(kernel) -> None:
    _, packed, x = problem(16, 64, 2, 0.5, torch.bfloat16, torch.bfloat16)
    assert multiply(kernel, packed, x, (5, 2, 1))[0] == "it does not fit"
    assert multiply(kernel, packed, x, shared=2048)[0] == "it does not fit"


def test_the_sum_is_the_same_every_time(kernel) -> None:
    _, packed, x = problem(20, 640, 12, 0.5, torch.bfloat16, torch.bfloat16)
    first, *others = [multiply(kernel, packed, x, (1, 2, 2), order=order)[1] for order in cuda_face.ORDERS]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_and_nan_meet_the_zeros(kernel, dtype: torch.dtype) -> None:
    dense, packed, x = problem(33, 200, 4, 0.5, dtype, dtype)
    x[1, 70], x[2, 5], x[3, 199] = float("inf"), float("nan"), float("-inf")
    text, y = multiply(kernel, packed, x, (1, 1, 2))
    assert not text
    assert_product(y, x, dense)


def test_x_must_start_on_16_bytes(kernel) -> None:
    _, packed, x = problem(16, 64, 2, 0.5, torch.bfloat16, torch.bfloat16)
    text, _ = multiply(kernel, packed, x, shift=8)
    assert "16 bytes" in text


def dense_tiles_beside_empty_ones(kernel) -> None:
    mask = torch.rand(48, 700) < torch.rand(3).repeat_interleave(16)[:, None]
    mask[:, 64:192] = True
    mask[16:32, 256:] = False
    dense = torch.randn(48, 700).bfloat16() * mask
    x = torch.randn(5, 700).bfloat16()
    text, y = multiply(kernel, sbt.pack(dense, mask), x, (1, 1, 1), 1)
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


WAIT = "mbarrier_wait(barrier, stage.parity);"
GIVE_BACK = "if (lane == 0) mbarrier_arrive(barrier + kMbarrierBytes);"
# What a mistake in the source does: (text, replacement, what is seen).
PLANTED = {
    "no wait for the copies": (WAIT, "", "a wait is missing"),
    "a wait for the other phase": (WAIT, WAIT.replace("parity)", "parity ^ 1)"), "wait is missing|deadlock"),
    "one lane waits for all": (WAIT, f"if (lane == 0) {WAIT}", "a wait is missing"),
    "copies over what is read": ("if (before >= p.stages) mbarrier_wait", "if (false) mbarrier_wait", "missing|arriv"),
    "a stage given back before its products end": ("wgmma_wait<0>();", "wgmma_wait<1>();", "races|under way"),
    "a stage never given back": (GIVE_BACK, GIVE_BACK.replace("0)", "99)"), "deadlock"),
    "every lane gives it back": (GIVE_BACK, GIVE_BACK.replace("if (lane == 0) ", ""), "races|missing|deadlock"),
    "fewer bytes expected": ("there ? masks + bytes : 0", "there ? bytes : 0", "bytes more"),
    "more bytes expected": ("expect(full, shared.x_bytes)", "expect(full, shared.x_bytes + 16)", "bytes more"),
    "barriers used at once": (
        "mbarrier_fence_init();\n  }\n  sync_block();",
        "mbarrier_fence_init();\n  }",
        "may not be there",
    ),
    "barriers that copies do not know": ("mbarrier_fence_init();\n  }", "}", "fence is missing"),
    "words read before they are there": (
        "sync_warp();  // the words are there",
        "",
        "barrier is missing|nobody wrote",
    ),
    "words written over while they are read": ("sync_warp();  // every lane has read", "", "races"),
    "no fence before a product": (
        "        wgmma_fence();\n        ALPHAPRUNE_UNROLL",
        "        ALPHAPRUNE_UNROLL",
        "fence is missing",
    ),
    "a fence before the operand": (
        "mine.decode(meta, first, next, set);\n        wgmma_fence();",
        "wgmma_fence();\n        mine.decode(meta, first, next, set);",
        "fence is missing",
    ),
    "an operand written too early": ("a[first / kWideAtOnce % kWideSets]", "a[0]", "operand|error is"),
    "a wait for too few products": ("wgmma_wait<kWideSets - 1>();", "wgmma_wait<kWideSets>();", "under way"),
    "products never waited for": (
        "wgmma_commit();\n        // Those",
        "// Those",
        "under way|NaN",
    ),
    "an operand without a swizzle": ("1ull << 62", "2ull << 62", "error is"),
    "another distance between eight tokens": (
        "kSwizzleAlign >> 4) << 32",
        "kSwizzleAlign >> 5) << 32",
        "error is|nobody",
    ),
    "a box too few": ("box < kBoxes; ++box", "box < kBoxes - 1; ++box", "bytes more"),
    "the first box twice": (
        "chunk * kChunkCols + box * static_cast<int>(kBoxCols), 0",
        "chunk * kChunkCols, 0",
        "error is",
    ),
    "the ring not done with": ("if (!more) sync_block();", "", "barrier|deadlock"),
    "sums of others read too early": (
        "if (p.splits > 1) {\n        sync_cluster();",
        "if (p.splits > 1) {",
        "missing|barrier of the cluster|deadlock",
    ),
    "a block gone while its sums are read": (
        "if (p.splits > 1) sync_cluster();  // nobody leaves while others read its sums",
        "",
        "barrier of the cluster|has ended|deadlock",
    ),
    "sums of a round read too early": (
        "leave(shared.sums, first, kRoom);\n        sync_warps(1, p.warps() * kWarp);",
        "leave(shared.sums, first, kRoom);",
        "barrier|races|nobody",
    ),
    "sums of a round written over": (
        "sync_warps(1, p.warps() * kWarp);  // nobody writes over sums that are read",
        "",
        "barrier|races",
    ),
    "a macro tile past the last": (
        "mine.store_meta(number < limit,",
        "mine.store_meta(number < limit + 9,",
        "nobody wrote|error is|wait is missing|signal",
    ),
    "the word of the other half": ("const bool low = mask[i % 2]", "const bool low = mask[i / 2]", "error is|nobody"),
    "a bit too far": (
        "bits[2 * i] = shuffle(1u << bit, lane);",
        "bits[2 * i] = shuffle(2u << bit, lane);",
        "error is|nobody",
    ),
    "the second macro tile where the first is": ("first * second + (values", "(values", "error is|nobody"),
    "values that do not start on 16 bytes": ("+ 15) & ~15u;", ");", "error is|nobody"),
    "a row tile too many": (
        "place < share.round_at(round + 1) - first;",
        "place <= share.round_at(round + 1) - first;",
        "signal|outside|error is|read|twice",
    ),
    "the tile of another member": (
        "const int in_member = tile - p.out.of[member].first",
        "const int in_member = tile - 0 * p.out.of[member].first",
        "signal|outside|error is",
    ),
    "offsets of the chunk before": (
        "units = later;\n        later = carrier.find(1);",
        "units = later;\n        later = carrier.find();",
        "error is|bytes|nobody|signal|missing",
    ),
    "the stage of another slice": ("stage.pass(p.slices, p.stages);", "stage.pass(1, p.stages);", "deadlock|missing"),
    "a part of the columns forgotten": (
        "end = chunks * (rank + 1) / p.splits;",
        "end = chunks * (rank + 1) / p.splits - (rank > 0);",
        "error is",
    ),
    "the sums of other rows": ("4 * (i / 2 * 8), sum[4 * j + i]", "4 * (i / 2 * 8), sum[4 * j + i % 2]", "error is"),
    "a slice that is not added": (
        "if (++slice == p.slices) slice = 0, ++from;",
        "slice = 0, ++from;",
        "error is",
    ),
}


def battery(kernel) -> None:
    """What finds every planted error."""
    for order in cuda_face.ORDERS:
        check(kernel, 20, 1100, 9, 0.5, (1, 1, 1), 1, FEW, order=order)
        check(kernel, 130, 456, 5, 0.6, (1, 2, 2), bias=torch.randn(130), order=order)
        members(kernel, (40, 17, 64), 330, 12, (1, 2, 1), 1, order)
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
