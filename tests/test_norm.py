"""Norm and SwiGLU between products on a CPU: torch's bits but for the last of a sum or quotient, or torch itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from alphaprune.formats import native
from alphaprune.kernels import cpu, neighbours

needs_native = pytest.mark.skipif(native.load() is None, reason=f"the native module is {native.status()}")


def reference(h: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> tuple:
    """The stream after the sum, rounded, and in float64 what comes before the last two roundings: norm, and weight."""
    summed = h if delta is None else h + delta
    exact = summed.double()
    return summed, exact * (exact.square().mean(-1, keepdim=True) + epsilon).rsqrt()


@needs_native
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 400),
    dtype=st.sampled_from(neighbours.NATIVE),
    added=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows: int, cols: int, dtype: torch.dtype, added: bool, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, delta = (torch.randn(rows, cols, generator=generator).mul(size).to(dtype) for _ in range(2))
    weight, given_h = torch.randn(cols, generator=generator).to(dtype), h.clone()
    x = neighbours.add_norm(h, delta if added else None, weight, 1e-5)
    summed, normed = reference(given_h, delta if added else None, weight, 1e-5)
    assert torch.equal(h, summed), "the residual stream takes the sum as torch rounds it"
    assert x.dtype == dtype and x.data_ptr() != h.data_ptr()
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    # Two roundings of the result, and of float32 those of the sum, the root and two products; of float16 none is less
    # than half of its smallest number.
    bound = (2.1 * step + (cols / 16 + 8) * 2.0**-24) * (normed * weight.double()).abs() + 1e-38
    if dtype == torch.float16:
        bound += 2.0**-25 * (1.1 + weight.double().abs())
    assert ((x.double() - normed * weight.double()).abs() <= bound).all()


@needs_native
@pytest.mark.parametrize("dtype", neighbours.NATIVE)
def test_the_environment_names_the_best_one_allowed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = torch.randn(3, 4000).to(dtype), torch.randn(4000).to(dtype)
    for isa in (isa for isa in cpu.ISAS if not cpu.missing(isa)):
        named = neighbours.add_norm(h, None, weight, 1e-5, isa=isa)
        monkeypatch.setenv("ALPHAPRUNE_ISA", isa)
        assert torch.equal(neighbours.add_norm(h, None, weight, 1e-5), named)
        monkeypatch.delenv("ALPHAPRUNE_ISA")


@needs_native
def test_a_row_has_the_same_bits_whatever_is_beside_it() -> None:
    h, weight = torch.randn(901, 777).bfloat16(), torch.randn(777).bfloat16()  # so many are shared by threads
    together = neighbours.add_norm(h.clone(), None, weight, 1e-6)
    alone = [neighbours.add_norm(row[None].clone(), None, weight, 1e-6) for row in h]
    assert torch.equal(together, torch.cat(alone))


@needs_native
def test_weights_of_a_loaded_model_want_gradients_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours.functional, "rms_norm", None)
    with torch.inference_mode():
        x = neighbours.add_norm(torch.ones(1, 8), None, torch.nn.Parameter(torch.full((8,), 2.0)), 0.0)
    assert torch.equal(x, torch.full((1, 8), 2.0))


@needs_native
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", neighbours.NATIVE)
def test_what_is_not_finite(value: float, dtype: torch.dtype) -> None:
    h, weight = torch.randn(2, 64).to(dtype), torch.ones(64, dtype=dtype)
    h[1, 5] = value
    x = neighbours.add_norm(h.clone(), None, weight, 1e-6)
    wanted = functional.rms_norm(h.float(), (64,), None, 1e-6)
    assert torch.equal(x.isnan(), wanted.isnan()) and not x[0].isnan().any()


@pytest.mark.parametrize("why", ["float64", "gradients", "dtypes", "strides", "dimensions", "order", "no module"])
def test_torch_where_it_does_not_fit(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norm = [], functional.rms_norm
    monkeypatch.setattr(neighbours.functional, "rms_norm", lambda *given: calls.append(1) or norm(*given))
    h, weight, order = torch.randn(3, 64), torch.randn(64), None
    if why == "float64":
        h, weight = h.double(), weight.double()
    elif why == "dtypes":
        h = h.bfloat16()
    elif why == "strides":
        h = torch.randn(64, 3).T
    elif why == "dimensions":
        h = h[None]
    elif why == "gradients":
        weight.requires_grad_()
    elif why == "order":
        order = torch.randperm(64)
    else:
        monkeypatch.setattr(neighbours.native, "load", lambda: None)
    x = neighbours.add_norm(h.clone(), None, weight, 1e-6, order)
    wanted = norm(h.float(), (64,), weight.float(), 1e-6)
    assert calls and torch.allclose(x.float(), wanted if order is None else wanted[..., order], rtol=2e-2, atol=1e-2)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 400)),
    dtype=st.sampled_from(neighbours.NATIVE),
    size=st.sampled_from([1e-6, 1.0, 30.0, 3000.0]),
    seed=st.integers(0, 2**31),
)
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(shape, generator=generator).mul(size).to(dtype) for _ in range(2))
    exact = gate.double() * torch.sigmoid(gate.double())
    kept = up.clone()
    y = neighbours.swiglu(gate, up)
    assert y.dtype == dtype and torch.equal(up, kept)
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    # exp is off by 2e-7, then there are a sum, a quotient and a product in float32; two roundings to the dtype. Below
    # -87.7 the exponential is 0, where silu is below 1e-36.
    wanted = exact * up.double()
    bound = (2.1 * step + 8 * 2.0**-24) * wanted.abs() + 1e-36 * (1 + up.double().abs())
    if dtype == torch.float16:
        bound += 2.0**-25 * (1.1 + up.double().abs())
    finite = wanted.abs() < 6e4 if dtype == torch.float16 else torch.ones_like(wanted, dtype=torch.bool)
    assert ((y.double() - wanted).abs() <= bound)[finite].all()


@needs_native
@pytest.mark.parametrize("dtype", neighbours.NATIVE)
def test_swiglu_of_threads_and_of_what_is_not_finite(dtype: torch.dtype) -> None:
    """The same bits as torch's nearly always, wherever a number stands; NaN, infinity and zeros are torch's."""
    generator = torch.Generator().manual_seed(2)
    gate, up = (torch.randn(301, 501, generator=generator).mul(4).to(dtype) for _ in range(2))
    wanted = functional.silu(gate) * up
    together = neighbours.swiglu(gate.clone(), up)
    apart = torch.cat([neighbours.swiglu(g[None].clone(), u[None]) for g, u in zip(gate, up, strict=True)])
    assert torch.equal(together, apart)
    torch.testing.assert_close(together, wanted, rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-9, atol=1e-30)
    if dtype != torch.float32:
        assert (together == wanted).float().mean() > 0.999
    odd = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, 88.0, -200.0]]).to(dtype)
    found, torchs = neighbours.swiglu(odd.clone(), torch.ones_like(odd)), functional.silu(odd)
    assert torch.equal(found.isnan(), torchs.isnan())
    assert torch.equal(found.nan_to_num(7), torchs.nan_to_num(7))


def test_swiglu_by_torch_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = torch.randn(3, 64), torch.randn(3, 64)
    wanted = functional.silu(gate) * up
    for g, u in ((gate.double(), up.double()), (gate.T.contiguous().T, up)):
        assert torch.allclose(neighbours.swiglu(g.clone(memory_format=torch.preserve_format), u).float(), wanted)
    monkeypatch.setattr(neighbours.native, "load", lambda: None)
    assert torch.equal(neighbours.swiglu(gate.clone(), up), wanted)
