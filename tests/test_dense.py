"""Dense products in 16 bits: float64, odd shapes, biases, and torch's own where ours does not fit."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from alphaprune import blocks, pages
from alphaprune.kernels import cpu, dense

ours_only = pytest.mark.skipif(
    cpu.native.load() is None or bool(cpu.missing("avx512bf16")), reason="this CPU has no fast VDPBF16PS"
)
LEAST = {torch.bfloat16: (2.0**-8, 2.0**-133), torch.float16: (2.0**-11, 2.0**-24)}  # half an ulp, the least number


def calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    found, call = [], functional.linear

    def counted(x: torch.Tensor, *others: object) -> torch.Tensor:
        found.append(x.shape)
        return call(x, *others)

    monkeypatch.setattr(dense.functional, "linear", counted)
    return found


@pytest.mark.parametrize("dtype", dense.HALVES)
@pytest.mark.parametrize("isa", [None, *dense.ISAS])
def test_any_shape(isa: str | None, dtype: torch.dtype) -> None:
    """None: whatever is chosen here."""
    if isa and (cpu.native.load() is None or cpu.missing(isa)):
        pytest.skip(cpu.missing(isa) or "no native module")

    @settings(max_examples=60, deadline=None)
    @given(
        n=st.integers(1, 300),
        k=st.integers(1, 300),
        tokens=st.sampled_from([1, 2, 3, 4, 7, 9, 70]),
        bias=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def products(n: int, k: int, tokens: int, bias: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(n, k, generator=generator).to(dtype)
        x = torch.randn(tokens, k, generator=generator).to(dtype)
        added = torch.randn(n, generator=generator).to(dtype) if bias else None
        run = dense.ours(weight, added, isa, dense.MOST_TOKENS) if isa else dense.linear(weight, added)
        y = run(x)
        exact, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        if added is not None:
            exact, terms = exact + added.double(), terms + added.double().abs()
        relative, least = LEAST[dtype]
        bound = (k + 2) * 2.0**-24 * terms + relative * exact.abs() + least
        assert y.dtype == dtype and y.shape == (tokens, n)
        assert ((y.double() - exact).abs() <= bound).all()

    products()


@pytest.mark.parametrize("dtype", dense.HALVES)
def test_what_is_not_finite_stays_with_its_token(dtype: torch.dtype) -> None:
    isas = [isa for isa in dense.ISAS if cpu.native.load() is not None and not cpu.missing(isa)]
    for isa, tokens in itertools.product(isas, (2, 5)):
        weight, x = torch.randn(40, 200).to(dtype), torch.randn(tokens, 200).to(dtype)
        x[1, 199], weight[3, 150] = float("inf"), float("nan")
        y = dense.ours(weight, None, isa, dense.MOST_TOKENS)(x)
        assert y[:, 3].isnan().all() and not y[1].isfinite().any()
        assert y[0, torch.arange(40) != 3].isfinite().all()


def test_who_has_a_fast_product_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is taken for any number of tokens where torch has no fast one, else for few and of VDPBF16PS."""
    for fast in (True, False):
        monkeypatch.setattr(cpu, "fast_in_torch", lambda dtype, fast=fast: fast)
        for isa, dtype in itertools.product((*cpu.ISAS, "other"), (*dense.HALVES, torch.float32)):
            found = dense.most_tokens(isa, dtype)
            if isa not in dense.ISAS or dtype == torch.float32:
                assert found == 0
            elif fast:
                assert found == (dense.FEW if (isa, dtype) == ("avx512bf16", torch.bfloat16) else 0)
            else:
                assert found == dense.MOST_TOKENS


@ours_only
def test_few_tokens_are_ours_and_more_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of_torch(monkeypatch)
    weight = torch.randn(48, 96).bfloat16()
    run = dense.linear(weight, None)
    for tokens in (1, dense.FEW):
        assert run(torch.randn(tokens, 96).bfloat16()).shape == (tokens, 48)
    assert run(torch.randn(2, 3, 96).bfloat16()).shape == (2, 3, 48)
    assert run(torch.randn(96).bfloat16()).shape == (48,)
    assert run(torch.randn(96, 2).bfloat16().T).shape == (2, 48), "rows that are not side by side"
    assert not called
    run(torch.randn(dense.FEW + 1, 96).bfloat16())
    run(torch.empty(0, 96).bfloat16())
    assert called == [(dense.FEW + 1, 96), (0, 96)]


@pytest.mark.parametrize("reason", ["float32", "no module", "compiled for another", "strided"])
def test_torch_runs_what_ours_does_not(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of_torch(monkeypatch)
    dtype = torch.float32 if reason == "float32" else torch.bfloat16
    weight, x = torch.randn(48, 96).to(dtype), torch.randn(2, 96).to(dtype)
    if reason == "no module":
        monkeypatch.setattr(dense.native, "load", lambda: None)
    elif reason == "compiled for another":
        monkeypatch.setenv("ALPHAPRUNE_ISA", "scalar")
    elif reason == "strided":
        weight = torch.randn(96, 48).to(dtype).T
    y = dense.linear(weight, None)(x)
    assert called == [(2, 96)] and torch.equal(y, x @ weight.T)


@ours_only
def test_the_weight_may_move(tmp_path: Path) -> None:
    layer = torch.nn.Linear(512, 4096, dtype=torch.bfloat16)
    layer.requires_grad_(False)
    run, x = blocks.linear(layer), torch.randn(1, 512).bfloat16()
    before = run(x)
    layer.weight.data = copy.deepcopy(layer.weight.data)
    pages.huge_pages(layer)
    for _ in range(3):
        torch.empty(4096, 512, dtype=torch.bfloat16).fill_(7)
    assert torch.equal(run(x), before)


@ours_only
@pytest.mark.parametrize("dtype", dense.HALVES)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_the_same_bits_for_any_number_of_threads(tokens: int, dtype: torch.dtype) -> None:
    weight, x = torch.randn(1000, 3000).to(dtype), torch.randn(tokens, 3000).to(dtype)
    run, before = dense.linear(weight, None), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(run(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
