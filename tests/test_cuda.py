"""sbt_mma, pair_mma and sbt_expand: the kernels' own source, run thread by thread on the CPU, and on a GPU if any."""

import gc
import itertools
from dataclasses import replace
from types import ModuleType
from unittest import mock

import pytest
import test_decoder
import torch
from emulated import guarded, use
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import exact_weight, problem
from tolerance import assert_outputs, assert_product
from torch import Tensor

from alphaprune import hardware
from alphaprune.decoder import Decoder
from alphaprune.formats import Packed, quantize, sbt
from alphaprune.kernels import base, cuda, cuda_layouts, group, neighbours, pair_layout, spmm

HALVES = cuda.HALVES
H100, SMALL = (90, 132, 232448), (80, 1, 166912)  # SMALL: so few multiprocessors that a block owns all row tiles
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 100)
INTEGERS = ("int8", "int8/128")  # with a scale per row, and per 128 columns of it
PAIRS = "pairs"  # of floats, by pair_mma
KINDS = (None, PAIRS, *INTEGERS)
SHAPES = [(1, 1, 1), (16, 64, 0.4), (17, 65, 0), (17, 65, 1), (5, 300, 0.4), (50, 128, 0.6), (37, 512, 0.3)]


def multiply(packed: Packed, x: Tensor, bias: Tensor | None, values: str | None = None) -> Tensor:
    """By sbt_mma; by pair_mma of PAIRS."""
    if values == PAIRS:
        pairs = pair_layout.build(packed)
        pairs = replace(pairs, packed=pairs.packed.map(guarded))
        with mock.patch.object(cuda_layouts, "_layout", lambda *_: pairs):
            return cuda_layouts.bind_pairs(packed)(guarded(x), None if bias is None else guarded(bias))
    return cuda.bind(packed.map(guarded))(guarded(x), None if bias is None else guarded(bias))


def check(
    n: int,
    k: int,
    tokens: int,
    density: float,
    dtype: torch.dtype,
    bias: Tensor | None,
    seed: int = 0,
    values: str | None = None,
) -> None:
    """One product; values: one of INTEGERS, or floats in `dtype`, with PAIRS by pairs of columns."""
    kind = values if values in INTEGERS else dtype
    dense, packed, x = problem(n, k, tokens, density, kind, dtype, seed)
    assert_product(multiply(packed, x, bias, values), x, dense, bias)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("dtype", HALVES)
def test_product_is_within_the_bound(emulator: ModuleType, poisoned: None, dtype, order: int, values) -> None:
    emulator.emulate_in_order(order)
    for (n, k, density), tokens in itertools.product(SHAPES, BUCKETS):
        bias = (None, torch.randn(n).to(dtype), torch.randn(n))[(tokens + n) % 3]
        check(n, k, tokens, density, dtype, bias, values=values)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 700),
    tokens=st.integers(0, 140),
    density=st.floats(0, 1),
    dtype=st.sampled_from(HALVES),
    values=st.sampled_from(KINDS),
    order=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_shape(module: ModuleType, n, k, tokens, density, dtype, values, order, seed) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(module, monkeypatch)
        module.emulate_in_order(order)
        check(n, k, min(tokens, 140), density, dtype, None, seed, values)
    cuda.opened.cache_clear()


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
        assert_product(cuda_layouts.bind_delta(packed)(guarded(x), bias), x, dense, bias)
        if tokens in (9, 70):
            assert_product(cuda.bind_wide(packed.map(guarded))(guarded(x), bias), x, dense, bias)
        pruned = dense * of_four(dense, 2)
        assert_product(cuda_layouts.bind_nm(sbt.pack(pruned))(guarded(x), bias), x, pruned, bias)


@pytest.mark.parametrize("tokens", [5, 20, 70])
def test_pairs_of_several_weights_are_one_launch(emulator: ModuleType, poisoned: None, tokens: int) -> None:
    rows, k = (40, 17, 64), 264
    found = [problem(n, k, tokens, 0.2 + 0.1 * i, torch.bfloat16, torch.bfloat16, i) for i, n in enumerate(rows)]
    x, biases = found[0][2], [None, torch.randn(17), None]
    together = cuda_layouts.bind_pairs_group([packed for _, packed, _ in found], False)
    for (dense, _, _), bias, y in zip(found, biases, together.run(guarded(x), biases, None), strict=True):
        assert_product(y, x, dense, bias)
    assert cuda_layouts.bind_pairs_group([packed for _, packed, _ in found[:2]], True) is None


def test_two_of_four_is_recognised() -> None:
    for keep, fits in ((0, True), (1, True), (2, True), (3, False), (4, False)):
        weight = torch.randn(40, 200).bfloat16()
        packed = sbt.pack(weight, of_four(weight, keep))
        assert (cuda_layouts.crowded(packed) is None) == fits, keep
    for at in itertools.product((0, 17, 39), (0, 63, 64, 197)):  # one four too many, anywhere
        mask = of_four(weight, 2)
        mask[at[0], at[1] // 4 * 4 : at[1] // 4 * 4 + 3] = True
        assert "2 of 4" in cuda_layouts.crowded(sbt.pack(weight, mask))


@pytest.mark.parametrize("shared", (20000, 40000, 232448))
@pytest.mark.parametrize(("capability", "multiprocessors"), ((80, 1), (90, 1), (90, 3)))
def test_any_device_shares_out_the_work(
    emulator: ModuleType, poisoned: None, capability: int, multiprocessors: int, shared: int
) -> None:
    """From all of x in shared memory to slabs of few columns, from warps that take turns to several row tiles each."""
    emulator.emulate_device(capability, multiprocessors, shared)
    for (n, k), tokens, values in itertools.product(((40, 1000), (70, 2048)), (3, 9, 40), KINDS):
        if values == PAIRS and tokens > 16 and capability == 90 and shared < 1 << 16:
            continue  # no Hopper has so little for pair_wgmma
        emulator.emulate_in_order((n + tokens) % 3)
        check(n, k, tokens, 0.5, torch.bfloat16, torch.randn(n), values=values)


@pytest.mark.parametrize("order", range(3))
def test_more_row_tiles_than_warps(emulator: ModuleType, poisoned: None, order: int) -> None:
    emulator.emulate_device(90, 1, 80000)
    emulator.emulate_in_order(order)
    for (n, k, tokens), values in itertools.product(((530, 128, 2), (700, 64, 20), (530, 512, 50)), KINDS):
        check(n, k, tokens, 0.5, HALVES[tokens % 3 == 0], None, values=values)


def test_dense_tiles_beside_empty_ones(emulator: ModuleType, poisoned: None) -> None:
    """What one warp stages differs from tile to tile, from nothing to all of it."""
    for k in (640, 700):
        mask = torch.rand(48, k) < torch.rand(3).repeat_interleave(16)[:, None]
        mask[:, 64:192] = True
        mask[16:32, 256:] = False
        dense = torch.randn(48, k).bfloat16() * mask
        x = torch.randn(5, k).bfloat16()
        for values in (None, PAIRS):
            assert_product(multiply(sbt.pack(dense, mask), x, None, values), x, dense)
        for columns in (None, 128):
            integers, scale, _ = quantize.quantize(dense, mask, columns)
            packed = sbt.pack(integers, mask, scale)
            assert_product(multiply(packed, x, None), x, exact_weight(integers, scale))


def test_inputs_that_are_not_aligned(emulator: ModuleType) -> None:
    """x two bytes off, and packed tensors that a file has put anywhere."""
    for values in (torch.bfloat16, *INTEGERS):
        dense, packed, x = problem(20, 256, 3, 0.5, values, torch.bfloat16)
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        assert shifted.data_ptr() % 4
        moved = packed.map(lambda t: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t))
        assert_product(cuda.bind(moved)(shifted, None), x, dense)
        if packed.scale is None:
            assert_product(cuda.bind_wide(moved)(shifted, None), x, dense)


@pytest.mark.parametrize("values", [None, *INTEGERS])
@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_and_nan_meet_the_zeros(emulator: ModuleType, dtype: torch.dtype, values: str | None) -> None:
    dense, packed, x = problem(33, 200, 4, 0.5, values or dtype, dtype)
    x[1, 70], x[2, 5], x[3, 199] = float("inf"), float("nan"), float("-inf")
    assert_product(multiply(packed, x, None), x, dense)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_halves_is_that_of_torch(emulator: ModuleType, dtype: torch.dtype) -> None:
    """Large, subnormal and overflowing results, through a weight that is one."""
    scale = torch.exp2(torch.linspace(-30, 20, 200))
    x, one = (torch.randn(200) * scale).to(dtype)[:, None], torch.ones(1, 1, dtype=dtype)
    bias = torch.randn(1) * 2.0**-14
    y = multiply(sbt.pack(one), x, bias)
    assert torch.equal(y, (x.float() + bias).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_integer_is_itself(emulator: ModuleType, dtype: torch.dtype) -> None:
    """In every place of a lane, beside kept neighbours and without them."""
    integers = torch.arange(-127, 128, dtype=torch.int8)[:, None].expand(255, 8).contiguous()
    alone = torch.zeros(255, 8, dtype=torch.bool)
    alone[torch.arange(255), torch.arange(255) % 8] = True
    scale = torch.exp2(torch.randint(-20, 20, (255,))) * torch.rand(255)
    for mask, sizes in itertools.product((alone, ~alone, alone | ~alone), (scale, torch.ones(255))):
        y = multiply(sbt.pack(integers, mask, sizes), torch.eye(8, dtype=dtype), None)
        assert torch.equal(y, (integers * mask * sizes[:, None]).to(dtype).T)


@pytest.mark.parametrize("values", [None, *INTEGERS])
def test_a_residual_is_added_in_place(emulator: ModuleType, values: str | None) -> None:
    """Through the module's own arguments; bits do not depend on the order of the threads."""
    for n, tokens, dtype in ((40, 3, HALVES[0]), (37, 40, HALVES[1])):
        dense, packed, x = problem(n, 400, tokens, 0.5, values or dtype, dtype)
        made, _alive = cuda.handles(packed)
        bias, residual, found = torch.randn(n), torch.randn(tokens, n).to(dtype), []
        for order in range(3):
            emulator.emulate_in_order(order)
            y = residual.clone()
            made[dtype].multiply(x.data_ptr(), tokens, [(bias.data_ptr(), 0)], y.data_ptr(), y.data_ptr(), 0)
            assert_outputs(y, x, dense, bias, residual)
            found.append(y)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_scales_that_do_not_fit_are_refused(emulator: ModuleType) -> None:
    _, packed, _ = problem(16, 300, 1, 0.5, "int8/128", torch.bfloat16)
    address = [tensor.data_ptr() for tensor in (packed.weight, packed.mask, packed.offsets)]
    for scale, groups in ((packed.scale.data_ptr(), 2), (packed.scale.data_ptr(), 0), (0, 1), (0, 3)):
        with pytest.raises(ValueError, match="one scale per row or per 128 columns"):
            emulator.Weight(*address, scale, 16, 300, groups, 2, 100, 0)
    made, _alive = cuda.handles(packed)
    with pytest.raises(ValueError, match="16-bit values, not int8"):
        made[torch.bfloat16].expand(0, 16, 0, 0)
    with pytest.raises(ValueError, match=r"float16 and bfloat16, not the dtype 0"):
        emulator.Weight(*address, packed.scale.data_ptr(), 16, 300, 3, 0, 100, 0)


@pytest.mark.parametrize("dtype", HALVES)
def test_expansion_keeps_the_bits(emulator: ModuleType, poisoned: None, dtype: torch.dtype) -> None:
    for (n, k, density), order in itertools.product([*SHAPES, (100, 700, 0.5)], range(3)):
        emulator.emulate_in_order(order)
        dense, packed, _ = problem(n, k, 1, density, dtype, dtype)
        packed = packed.map(guarded)
        made, _ = cuda.handles(packed)
        for first, last in ((0, n), (0, n // 2), (n // 32 * 16, n), (0, 0)):
            out = packed.weight.new_empty((last - first, k))
            made[dtype].expand(first, last, out.data_ptr(), 0)
            assert torch.equal(out, dense[first:last])


def test_a_failure_of_a_launch_raises(emulator: ModuleType) -> None:
    _, packed, x = problem(16, 128, 1, 0.9, torch.bfloat16, torch.bfloat16)
    address = [t.data_ptr() for t in (packed.weight, packed.mask, packed.offsets)]
    made = emulator.Weight(*address, 0, 16, 128, 0, 2, 10, 0)  # room for 10 units where there are more
    with pytest.raises(RuntimeError, match="sbt_mma: emulated: block 0,0 thread"):
        made.multiply(x.data_ptr(), 1, [], 0, x.new_empty(1, 16).data_ptr(), 0)
    for arguments, sentence in (
        ((0, 128, 0, 2, 10), "one row"),
        ((16, 128, 0, 0, 10), "dtype 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            emulator.Weight(*address, 0, *arguments, 0)


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
    monkeypatch.setattr(hardware, "cuda_driver", lambda: (12, 4))
    assert reason(Old((0, "cudaErrorInsufficientDriver: what it means"))) == (
        "the driver offers no device to this build (nvcc 13): the NVIDIA driver serves CUDA up to 12.4, and this was "
        "made for CUDA 13; update the driver or install a build for CUDA 12 (cudaErrorInsufficientDriver)"
    )
    assert "no CUDA device is visible" in reason(Old((0, "")))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "was built without CUDA; install" in reason(Old((1, "")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "7.5, wanted 8.0 (A100) or newer; take another GPU, or the CPU" in reason(Old((1, "")))
    assert reason(Old((1, ""), 90)) is None
    cuda.missing.cache_clear()


def test_a_kernel_asked_for_by_name_never_falls_back() -> None:
    if cuda.missing() is None:
        pytest.skip("the kernel runs here")
    _, packed, _ = problem(16, 64, 1, 0.5, torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match="kernel sbt_mma cannot run: "):
        spmm.prepare(packed, "layer", "sbt_mma")


@pytest.fixture
def step_kernels(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """The kernels of a decoding GPU for tensors of the host, and what was called of them and of their neighbours."""
    known, called = base.kernels(), {"delta": [], "norm": [], "swiglu": []}
    here = {name: replace(known[name], device="cpu", available=lambda: None) for name in ("delta_spmv", "sbt_mma")}
    monkeypatch.setattr(base, "kernels", lambda: here | {"reference": known["reference"]})

    class Counting(emulator.DeltaWeight):
        def multiply(self, *arguments):
            called["delta"].append(len(arguments))
            return super().multiply(*arguments)

    monkeypatch.setattr(cuda, "_find", lambda: (Module(emulator, Counting), ""))
    for name, key in (("add_norm", "norm"), ("swiglu", "swiglu")):
        original = getattr(neighbours, name)
        counting = lambda *given, of=original, key=key, **how: called[key].append(1) or of(*given, **how)  # noqa: E731
        monkeypatch.setattr(neighbours, name, counting)
    return called


class Module:
    """The emulated module with another class for nibble-delta rows."""

    def __init__(self, emulator: ModuleType, delta: type) -> None:
        self._emulator, self.DeltaWeight = emulator, delta

    def __getattr__(self, name: str):
        return getattr(self._emulator, name)


def as_on_a_gpu(decoder: Decoder) -> Decoder:
    for block in decoder.blocks:
        for part in (block.qkv, block.out, block.inside, block.down):
            part.fused = part.packed is not None
        block.inside.swiglu = block.inside.fused and block.inside.gated
    return decoder


@pytest.mark.parametrize(("kind", "dtype"), [("llama", HALVES[1]), ("biases", HALVES[0]), ("qwen2", HALVES[1])])
def test_a_decoder_puts_what_stands_around_into_the_launches(step_kernels, kind: str, dtype: torch.dtype) -> None:
    """Logits as exact as those of separate kernels; three layers of the first block are a dense one and two alone."""
    model = test_decoder.pack(test_decoder.build(kind, dtype))
    tokens = test_decoder.prompts(model, 2, 9)
    twin = test_decoder.dense_twin(model, dtype)
    dense = test_decoder.dense_logits(twin, tokens)[:, 5:]
    truth = test_decoder.dense_logits(test_decoder.dense_twin(model, torch.float64), tokens)[:, 5:]
    decoder = as_on_a_gpu(Decoder(model))
    state = decoder.state(2, 9)
    found = [decoder.prefill(state, tokens[:, :6])]
    for calls in step_kernels.values():
        calls.clear()
    found += [decoder.step(state, tokens[:, i]) for i in range(6, 9)]
    test_decoder.assert_logits(torch.stack(found, 1), dense, truth)
    blocks, steps = len(decoder.blocks), 3
    # A launch for q, k and v, out, gate and up, down; the first block has q and k alone, and its own norm before them.
    assert len(step_kernels["delta"]) == steps * (4 * blocks + 1)
    assert step_kernels["delta"].count(8) == steps * (2 * blocks - 1), "norms in the launches"
    assert len(step_kernels["norm"]) == 2 * steps and not step_kernels["swiglu"]


def test_groups_are_made_once_and_go_with_their_weights(step_kernels) -> None:
    weights = [spmm.prepare(problem(n, 96, 1, 0.3, HALVES[1], HALVES[1], n)[1]) for n in (40, 17)]
    x = torch.randn(2, 96).bfloat16()
    wanted, alone = [one(x) for one in weights], weights[0].copied()
    step_kernels["delta"].clear()
    for tokens in (1, 2, 1):
        for y, one in zip(group.spmm_group(x[:tokens], weights), wanted, strict=True):
            torch.testing.assert_close(y, one[:tokens])
    (kept,) = weights[0].made_groups.values()
    assert len(step_kernels["delta"]) == 3 and kept.nbytes == weights[0].copied() - alone > 0
    gone = weights.pop()
    del gone
    gc.collect()
    assert not weights[0].made_groups and not weights[0].groups
    weights[0].leave_out("delta_spmv", "no room")
    assert weights[0].copied() == 0
