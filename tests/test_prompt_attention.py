"""Attention of prompts in half precision on a CPU: as exact as transformers' eager one, whatever is seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from alphaprune.decoder import Decoder
from alphaprune.kernels import cpu, cpu_attention


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """transformers' eager attention: products in the dtype, the softmax in float32 (float64 for a reference)."""
    shared = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(shared, 1) for part in (k, v))
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return functional.softmax(scores, -1, dtype=wide).to(q.dtype) @ v


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    key_heads=st.integers(1, 3),
    shared=st.integers(1, 4),
    dim=st.sampled_from([32, 64, 96, 128]),
    count=st.integers(1, 200),
    start=st.sampled_from([0, 0, 1, 37, 100]),
    window=st.sampled_from([None, None, 1, 8, 70, 1000]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    paged=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_prompt(batch, key_heads, shared, dim, count, start, window, dtype, paged, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = 0 if window is None else max(0, start - window + 1)
    keys = start + count - first
    q = torch.randn(batch, count, key_heads * shared, dim, generator=generator).to(dtype).transpose(1, 2)
    shape = (batch, keys, key_heads, dim) if paged else (batch, key_heads, keys, dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    k, v = (part.transpose(1, 2) if paged else part for part in (k, v))
    found = cpu_attention.attend_prompt(q, k, v, start, first, window)
    assert found.shape == q.shape and found.dtype == dtype and found.is_contiguous()
    at, of = torch.arange(start, start + count)[:, None], torch.arange(first, start + count)
    hidden = (of > at) | (at - of >= (window or 1 << 30))
    exact = eager(q.double(), k.double(), v.double(), hidden)
    step = torch.finfo(dtype).eps / 2
    allowed = 2 * (eager(q, k, v, hidden).double() - exact).abs().max() + step * exact.abs()
    assert ((found.double() - exact).abs() <= allowed).all()


def test_many_keys_meet_fewer_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, count, 32).bfloat16() for count in (90, 400, 400))
    wanted = cpu_attention.attend_prompt(q, k, v, 310)
    sizes, product = [], torch.bmm
    monkeypatch.setattr(cpu_attention.torch, "bmm", lambda a, b: sizes.append(a.shape[1]) or product(a, b))
    monkeypatch.setattr(cpu_attention, "SCORES", 32 * 400)
    found = cpu_attention.attend_prompt(q, k, v, 310)
    assert sizes == [32, 32, 26]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    monkeypatch.setattr(cpu_attention, "SCORES", 1)
    cpu_attention.attend_prompt(q, k, v, 310)
    assert sizes[3:] == [16] * 5 + [10]


def test_what_is_hidden_may_hold_anything() -> None:
    """Keys of later positions, NaN among them in the same tile of a product, are not seen."""
    q, k, v = (torch.randn(1, 2, 130, 32).bfloat16() for _ in range(3))
    wanted = cpu_attention.attend_prompt(q[:, :, :70], k[:, :, :70], v[:, :, :70], 0)
    k[:, :, 70:] = torch.nan
    assert torch.equal(cpu_attention.attend_prompt(q[:, :, :70], k[:, :, :70], v[:, :, :70], 0), wanted)
    longer = cpu_attention.attend_prompt(q, k, v, 0)
    assert not longer[:, :, :64].isnan().any() and longer[:, :, 70:].isnan().all()


@pytest.mark.parametrize("why", ["float32", "gradients", "no fast product", "few"])
def test_torch_where_it_does_not_pay(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "fast_in_torch", lambda dtype: why != "no fast product")
    q, size = torch.zeros(2, 4).bfloat16(), (100, 1000)
    assert cpu_attention.takes_prompts(q, *size) is (why != "no fast product")
    if why == "float32":
        assert not cpu_attention.takes_prompts(q.float(), *size)
    if why == "gradients":
        assert not cpu_attention.takes_prompts(q.requires_grad_(), *size)
    if why == "few":
        assert not cpu_attention.takes_prompts(q, 1, 100000) and not cpu_attention.takes_prompts(q, 40, 40)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("chunk", [1000, 50])
def test_a_decoder_reads_prompts_by_it(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces or whole, with a window or without; a step after it sees what it stored."""
    import family_models

    monkeypatch.setattr(cpu, "fast_in_torch", lambda dtype: True)
    monkeypatch.setattr(cpu_attention, "LEAST", 1)
    calls, ours = [], cpu_attention.attend_prompt
    monkeypatch.setattr(cpu_attention, "attend_prompt", lambda *given: calls.append(1) or ours(*given))
    exact = family_models.make(kind, max_position_embeddings=256)
    model = family_models.make(kind, max_position_embeddings=256).bfloat16()
    tokens = torch.randint(3, 257, (2, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth, theirs = exact.double()(tokens).logits[:, -2:], model(tokens).logits[:, -2:].double()
        decoder = Decoder(model)
        state = decoder.state(2, 128)
        found = [decoder.prefill(state, tokens[:, :-1], chunk), decoder.step(state, tokens[:, -1])]
    assert len(calls) == len(decoder.blocks) * -(-119 // chunk)
    allowed = 2 * (theirs - truth).abs().max()
    assert (torch.stack(found, 1).double() - truth).abs().max() <= allowed
