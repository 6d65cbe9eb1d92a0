"""Dense products of a few tokens: float64, odd shapes, biases, and torch's own where ours does not fit."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from alphaprune import blocks, pages
from alphaprune.kernels import cpu, dense

OURS = cpu.native.load() is not None and not cpu.missing("avx512bf16")
ours_only = pytest.mark.skipif(not OURS, reason="this CPU has no dense product of ours")


def calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    found, call = [], functional.linear

    def counted(x: torch.Tensor, *others: object) -> torch.Tensor:
        found.append(x.shape)
        return call(x, *others)

    monkeypatch.setattr(dense.functional, "linear", counted)
    return found


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    tokens=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(n: int, k: int, tokens: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).bfloat16()
    x = torch.randn(tokens, k, generator=generator).bfloat16()
    added = torch.randn(n, generator=generator).bfloat16() if bias else None
    y = dense.linear(weight, added)(x)
    exact, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if added is not None:
        exact, terms = exact + added.double(), terms + added.double().abs()
    bound = (k + 2) * 2.0**-24 * terms + 2.0**-8 * exact.abs() + 2.0**-133
    assert y.dtype == torch.bfloat16 and y.shape == (tokens, n)
    assert ((y.double() - exact).abs() <= bound).all()


@ours_only
def test_few_tokens_are_ours_and_more_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of_torch(monkeypatch)
    weight = torch.randn(48, 96).bfloat16()
    run = dense.linear(weight, None)
    for tokens in (1, dense.MOST_TOKENS):
        assert run(torch.randn(tokens, 96).bfloat16()).shape == (tokens, 48)
    assert run(torch.randn(2, 3, 96).bfloat16()).shape == (2, 3, 48)
    assert run(torch.randn(96).bfloat16()).shape == (48,)
    assert run(torch.randn(96, 2).bfloat16().T).shape == (2, 48), "rows that are not side by side"
    assert not called
    run(torch.randn(dense.MOST_TOKENS + 1, 96).bfloat16())
    run(torch.empty(0, 96).bfloat16())
    assert called == [(dense.MOST_TOKENS + 1, 96), (0, 96)]


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
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_the_same_bits_for_any_number_of_threads(tokens: int) -> None:
    weight, x = torch.randn(1000, 3000).bfloat16(), torch.randn(tokens, 3000).bfloat16()
    run, before = dense.linear(weight, None), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(run(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
