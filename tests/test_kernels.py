"""Every kernel against float64 on every kind of problem, and what the op around them promises."""

import gc
import itertools
import os
import random
import signal
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, KINDS, Kind, check, may_round, problem
from tolerance import assert_product, exact
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import Packed, native, sbt
from alphaprune.kernels import base, cpu, expansion, spmm


@pytest.fixture(autouse=True)
def poisoned_new_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs hold NaN before a kernel writes them."""
    original = Tensor.new_empty

    def poisoned(self: Tensor, *sizes, **keywords) -> Tensor:
        return original(self, *sizes, **keywords).fill_(float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(params=[name for name, kernel in base.kernels().items() if kernel.device != "cuda"])
def kernel(request: pytest.FixtureRequest) -> str:
    """A kernel that runs here; the others skip with their reason."""
    if reason := base.kernels()[request.param].available():
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize(("weight", "x"), list(itertools.product(KINDS, DTYPES)))
def test_product_is_within_the_bound(kernel: str, weight: Kind, x: torch.dtype) -> None:
    shapes = [(1, 1, 1), (16, 64, 0.4), (17, 65, 0), (17, 65, 1), (5, 300, 0.4), (50, 130, 0.6)]
    for (n, k, density), tokens in itertools.product(shapes, (1, 2, 3, 4, 5, 16, 67)):
        bias = (None, torch.randn(n).to(x), torch.randn(n))[tokens % 3]
        check(kernel, problem(n, k, tokens, density, weight, x), bias)


@pytest.mark.parametrize("x", DTYPES)
def test_rows_and_tokens_in_several_parts(kernel: str, x: torch.dtype) -> None:
    """More columns than a panel has, more tokens than a pass, and both."""
    for (n, k), tokens in itertools.product([(40, 1100), (17, 513)], (7, 12, 64, 65, 130)):
        check(kernel, problem(n, k, tokens, 0.4, x, x), None)


@pytest.mark.parametrize("seed", range(3))
def test_random_shapes_up_to_300(kernel: str, seed: int) -> None:
    """N and K anywhere from 1 to 300, tokens, density and dtypes at random."""
    generator = random.Random(f"{kernel} {seed}")
    for _ in range(60):
        n, k, tokens = generator.randint(1, 300), generator.randint(1, 300), generator.choice((1, 1, 2, 3, 4, 7, 8, 33))
        density = generator.choice((0, 0.05, 0.2, 0.5, 0.9, 1))
        weight, x = generator.choice(KINDS), generator.choice(DTYPES)
        bias = torch.randn(n).to(generator.choice(DTYPES)) if generator.random() < 0.3 else None
        check(kernel, problem(n, k, tokens, density, weight, x, generator.randrange(1000)), bias)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 400),
    tokens=st.integers(0, 40),
    density=st.floats(0, 1),
    weight=st.sampled_from(KINDS),
    x=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape_with_the_kernel_chosen(n, k, tokens, density, weight, x, seed) -> None:
    dense, packed, activations = problem(n, k, tokens, density, weight, x, seed)
    kernel, _ = spmm.prepare(packed).choice(tokens, x)
    rounded = may_round(kernel.name, packed, x)
    assert_product(spmm.spmm(activations, packed), activations, dense, rounded=rounded)


@pytest.mark.parametrize("weight", KINDS)
def test_bits_do_not_depend_on_threads_nor_on_the_place_in_the_batch(weight: Kind) -> None:
    _, packed, x = problem(1040, 333, 70, 0.5, weight, torch.bfloat16)
    before = torch.get_num_threads()
    for name in cpu.ISAS:
        if cpu.missing(name):
            continue
        prepared = spmm.prepare(packed, "layer", name)
        wanted = {tokens: prepared(x[:tokens]) for tokens in (1, 2, 3, 4, 5, 16, 70)}
        for tokens, y in wanted.items():  # the way to sum depends on the number of tokens, not on which one it is
            assert torch.equal(prepared(x[:tokens].flip(0)).flip(0), y), (name, tokens)
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                for tokens, y in wanted.items():
                    assert torch.equal(prepared(x[:tokens]), y), (name, tokens, threads)
        finally:
            torch.set_num_threads(before)


def test_leading_dimensions_strides_and_no_tokens(kernel: str) -> None:
    dense, packed, x = problem(40, 70, 6, 0.5, torch.float32, torch.float32)
    prepared = spmm.prepare(packed, "layer", kernel)
    assert_product(prepared(x.view(2, 3, 70)).view(6, 40), x, dense)
    assert_product(prepared(x[0]), x[0], dense)
    for view in (x[::2], x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0], x[:1].expand(5, 70)):
        assert_product(prepared(view), view.contiguous(), dense)
    assert prepared(x[:0]).shape == (0, 40) and prepared(x.new_zeros(2, 0, 70)).shape == (2, 0, 40)
    bias = torch.randn(80)[::2]
    assert_product(prepared(x, bias), x, dense, bias)


def test_memory_beside_the_activations_does_not_leak_in(kernel: str) -> None:
    for weight, x in itertools.product(KINDS, DTYPES):
        dense, packed, rows = problem(33, 75, 3, 0.5, weight, x)
        around = torch.full((5 * 75,), float("nan"), dtype=x)
        around[75 : 4 * 75] = rows.flatten()
        check(kernel, (dense, packed, around[75 : 4 * 75].view(3, 75)))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_non_finite_activations_meet_zeros_as_in_the_dense_layer(kernel: str, value: float) -> None:
    for weight, x in itertools.product(KINDS, DTYPES):
        for tokens in (1, 2, 3, 6, 40):
            dense, packed, activations = problem(33, 130, tokens, 0.3, weight, x)
            activations[0, 128] = value
            y = spmm.prepare(packed, "layer", kernel)(activations)
            assert y[0].isnan().any() and (tokens == 1 or y[1:].isfinite().all())
            assert_product(y, activations, dense, rounded=may_round(kernel, packed, x))


def test_non_finite_weights_are_kept(kernel: str) -> None:
    for dtype in DTYPES:
        dense, _, x = problem(20, 70, 2, 0.5, dtype, dtype)
        dense[3, 5], dense[4, 6], dense[5, 69] = float("nan"), float("inf"), -float("inf")
        y = spmm.prepare(sbt.pack(dense, dense != 0), "layer", kernel)(x)
        assert y[:, 3].isnan().all() and y[:, 4].isinf().all() and y[:, 5].isinf().all()
        assert_product(y, x, dense)


def test_the_choice_and_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAPRUNE_ISA", "scalar")
    assert dict(spmm.back_ends())["avx2"] == (
        "ALPHAPRUNE_ISA=scalar rules it out" if native.load() else native.status()
    )
    _, packed, x = problem(16, 64, 1, 0.5, torch.float32, torch.float32)
    for name in ("amx", "avx512", "neon"):
        with pytest.raises(ValueError, match=f"kernel {name} cannot run: "):
            spmm.spmm(x, packed, kernel=name)
    with pytest.raises(ValueError, match="no kernel is called 'sse'; there are: amx, avx512"):
        spmm.spmm(x, packed, kernel="sse")
    if native.load():
        chosen, why = spmm.prepare(packed).choice(1, torch.float32)
        assert chosen.name == "scalar" and "avx512: ALPHAPRUNE_ISA=scalar rules it out" in why
        assert spmm.prepare(packed).choice(10_000, torch.float32)[0].name == "expand"
        for limit in (4, 32, 128):  # a prepared weight changes over exactly where the choice does
            prepared = spmm.prepare(packed)
            for tokens in (limit + 1, limit):
                x = torch.randn(tokens, 64)
                assert torch.equal(prepared(x), spmm.spmm(x, packed, kernel=prepared.choice(tokens, x.dtype)[0].name))
        assert spmm.prepare(packed, kernel="scalar").choice(10_000, torch.float32)[0].name == "scalar"
    monkeypatch.setenv("ALPHAPRUNE_ISA", "sse")
    if native.load():
        with pytest.raises(
            ValueError,
            match="ALPHAPRUNE_ISA=sse: wanted one of amx, avx512bf16, avx512, avx512vnni, avx512bw, avxvnni, avx2",
        ):
            spmm.back_ends()


def test_without_the_native_module_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_find", lambda: (None, "no C++ compiler was found"))
    assert spmm.native_status() == "not built: no C++ compiler was found"
    assert dict(spmm.back_ends())["scalar"] == spmm.native_status() and dict(spmm.back_ends())["reference"] is None
    for weight, x in itertools.product(KINDS, DTYPES):
        dense, packed, activations = problem(33, 275, 3, 0.5, weight, x)
        assert_product(spmm.spmm(activations, packed), activations, dense)
        assert torch.equal(spmm.expand(packed, 16, 33), dense[16:].to(packed.dense_dtype))


def test_expand_gives_rows_into_scratch() -> None:
    for dtype in DTYPES:
        dense, packed, _ = problem(50, 130, 1, 0.4, dtype, dtype)
        out = torch.full((18, 130), float("nan"), dtype=dtype)
        assert spmm.expand(packed, 32, 50, out) is out and torch.equal(out, dense[32:])
        assert spmm.expand(packed, 48, 48).shape == (0, 130)
        with pytest.raises(ValueError, match="start that 16 divides"):
            spmm.expand(packed, 8)
        with pytest.raises(ValueError, match="contiguous out"):
            spmm.expand(packed, 0, 16, out)


def test_expand_multiplies_integers_by_their_scale_in_any_float(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, dtype, built in itertools.product(("int8", "int8/128"), DTYPES, (True, False)):
        if not built:
            monkeypatch.setattr(native, "_find", lambda: (None, "switched off by the test"))
        dense, packed, _ = problem(50, 130, 1, 0.4, kind, dtype)
        out = torch.full((18, 130), float("nan"), dtype=dtype)
        assert spmm.expand(packed, 32, 50, out) is out and torch.equal(out, dense[32:].float().to(dtype))
        assert torch.equal(spmm.expand(packed), dense.float())
        with pytest.raises(ValueError, match=r"contiguous out \(16, 130\) torch.float32, got \(16, 130\) torch.int8"):
            spmm.expand(packed, 0, 16, torch.empty(16, 130, dtype=torch.int8))
        monkeypatch.undo()


@pytest.mark.parametrize("instructions", [True, False])
def test_expansion_computes_in_what_the_processor_is_fast_at(instructions: bool, monkeypatch) -> None:
    monkeypatch.setattr(expansion, "has_instructions", lambda dtype: instructions)
    for kind, dtype in itertools.product(KINDS, DTYPES):
        dense, packed, x = problem(50, 130, 9, 0.4, kind, dtype)
        bias = torch.randn(50).to(dtype)
        assert_product(expansion.multiply(x, packed, bias), x, dense, bias)


def test_misfits_are_named() -> None:
    _, packed, x = problem(16, 64, 1, 0.5, torch.float32, torch.float32)
    prepared = spmm.prepare(packed, "model.layers.3.mlp.up_proj")
    cases = [
        ((x[:, :63], None), r"^model\.layers\.3\.mlp\.up_proj: .* got x \(1, 63\)"),
        ((x, torch.ones(15)), r"got x \(1, 64\) and bias \(15,\)"),
        ((x[0, 0], None), r"got x \(\)"),
        ((x.double(), None), "x is torch.float64, wanted float32"),
        ((x, torch.ones(16, dtype=torch.int32)), "bias is torch.int32"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message), torch.no_grad():
            prepared(*arguments)
    broken = Packed(packed.weight[:-32], packed.mask, packed.offsets, packed.shape)
    with pytest.raises(ValueError, match=r"^layer: .*cut short"):
        spmm.prepare(broken, "layer")
    with pytest.raises(ValueError, match="cut short"):
        spmm.spmm(x, broken)
    with pytest.raises(ValueError, match="cut short"):
        torch.ops.alphaprune.spmm(x, broken.weight, broken.mask, broken.offsets, None, 16, 64, None)


@pytest.mark.parametrize("weight", KINDS)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_gradients_are_those_of_the_dense_layer(weight: Kind, x_dtype: torch.dtype) -> None:
    dense, packed, x = problem(50, 130, 4, 0.5, weight, x_dtype)
    bias = torch.randn(50).to(x_dtype).requires_grad_()
    x = x.view(2, 2, 130).requires_grad_()
    grad = torch.randn(2, 2, 50).to(x_dtype)
    spmm.spmm(x, packed, bias).backward(grad)
    assert_product(x.grad.view(4, 130), grad.view(4, 50), dense.t())
    assert_product(bias.grad.view(50, 1), grad.view(4, 50).t().contiguous(), torch.ones(1, 4))


@pytest.mark.parametrize("weight", [torch.float32, "int8"])
def test_the_op_is_registered_soundly(weight: Kind) -> None:
    _, packed, x = problem(32, 70, 2, 0.5, weight, torch.float32)
    tensors = packed.weight, packed.mask, packed.offsets, packed.scale, 32, 70
    for bias in (None, torch.randn(32, requires_grad=True)):
        torch.library.opcheck(torch.ops.alphaprune.spmm.default, (x.clone().requires_grad_(), *tensors, bias))
    torch.library.opcheck(torch.ops.alphaprune.spmm_grad.default, (torch.randn(2, 32), *tensors))
    if packed.scale is not None:  # the same integers under another scale are another weight
        other = (*tensors[:3], packed.scale * 2, 32, 70)
        assert torch.equal(torch.ops.alphaprune.spmm(x, *other, None), 2 * torch.ops.alphaprune.spmm(x, *tensors, None))


@pytest.mark.parametrize("weight", [torch.float32, "int8"])
def test_compiles_without_a_graph_break(weight: Kind) -> None:
    dense, packed, x = problem(32, 140, 3, 0.5, weight, torch.float32)
    prepared = spmm.prepare(packed)
    for call in (prepared, lambda x, bias: spmm.spmm(x, packed, bias)):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        bias = torch.randn(32)
        assert_product(compiled(x, bias), x, dense, bias)
        leaf = x.clone().requires_grad_()
        compiled(leaf, bias).sum().backward()
        assert_product(leaf.grad, torch.ones(3, 32), dense.t())


@pytest.mark.parametrize("weight", [torch.float32, "int8"])
def test_nothing_outlives_its_packed_weight(weight: Kind) -> None:
    _, packed, x = problem(32, 70, 1, 0.5, weight, torch.float32)
    alive, others = (weakref.ref(packed.weight), weakref.ref(packed)), len(spmm._by_weight)
    spmm.spmm(x, packed)
    spmm.spmm(x.requires_grad_(), packed)
    del packed
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert len(spmm._by_weight) == others


def test_a_prepared_weight_keeps_its_memory() -> None:
    dense, packed, x = problem(64, 256, 1, 0.5, torch.float32, torch.float32)
    prepared = spmm.prepare(packed)
    del packed
    gc.collect()
    _ = [torch.full((64 * 256,), float("nan")) for _ in range(20)]
    assert_product(prepared(x), x, dense)


def test_threads_of_python_do_not_disturb_each_other() -> None:
    problems = [problem(512, 512, 1 + i, 0.5, kind, torch.bfloat16, i) for i, kind in enumerate(KINDS)]
    wanted = [spmm.spmm(x, packed) for _, packed, x in problems]
    wrong = []

    layers = [spmm.prepare(packed) for _, packed, _ in problems]  # each used by two threads at once

    def work(index: int) -> None:
        x = problems[index][2]
        wrong.extend(index for _ in range(50) if not torch.equal(layers[index](x), wanted[index]))

    threads = [threading.Thread(target=work, args=(i % len(problems),)) for i in range(2 * len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("weight", [torch.bfloat16, "int8"])
def test_a_forked_child_computes_the_same(weight: Kind) -> None:
    _, packed, x = problem(1024, 512, 1, 0.5, weight, torch.bfloat16)
    prepared = spmm.prepare(packed)
    wanted = prepared(x).view(torch.int16).tolist()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for threads it does not have is ended, and the test fails
        try:
            os._exit(0 if prepared(x).view(torch.int16).tolist() == wanted else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert prepared(x).view(torch.int16).tolist() == wanted


def test_the_reference_is_the_dense_product() -> None:
    """Pins the reference without any of our code: what every other kernel is measured with."""
    dense, packed, x = problem(20, 70, 3, 0.5, torch.float32, torch.float32)
    y = base.named("reference").bind(packed)(x, None)
    torch.testing.assert_close(y.double(), exact(x, dense), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, functional.linear(x, dense))


def test_packed_tensors_need_only_the_alignment_of_their_elements(kernel: str) -> None:
    """A memory-mapped file promises no more."""
    for kind in KINDS:
        dense, packed, x = problem(40, 130, 3, 0.5, kind, kind if isinstance(kind, torch.dtype) else torch.bfloat16)
        moved = packed.map(lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape))
        assert all(tensor.data_ptr() % 64 for tensor in moved.tensors.values())
        check(kernel, (dense, moved, x))


@pytest.mark.parametrize("values", [torch.bfloat16, "int8"])
def test_zeros_that_meet_infinity_where_they_are_skipped(values: Kind) -> None:
    """Many tokens of a weight of which little is kept, some of them not finite: as in the dense layer."""
    kernel = base.kernels()["avx512bf16"]
    if reason := kernel.available():
        pytest.skip(f"avx512bf16: {reason}")
    for tokens, density in itertools.product((17, 40, 96, 300), (0.02, 0.2, 0.4)):
        dense, packed, x = problem(41, 333, tokens, density, values, torch.bfloat16, tokens)
        x[3, 5], x[tokens - 1, 332], x[16, 100] = float("inf"), float("nan"), float("-inf")
        assert_product(kernel.bind(packed)(x, None), x, dense)
