"""Pairs of columns: bits stay, and what is kept is what was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaprune.formats import sbt
from alphaprune.kernels import copies, pair_layout


def made(n: int, k: int, density: float, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with zeros of both signs and NaN among what is kept, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=generator) < density
    weight = torch.randn(n, k, generator=generator).to(dtype)
    for value in (float("nan"), 0.0, -0.0):
        weight[torch.rand(n, k, generator=generator) < 0.1] = value
    return weight, mask


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 400),
    density=st.floats(0, 1),
    dtype=st.sampled_from((torch.float16, torch.bfloat16)),
    chunk=st.sampled_from((1, 1 << 12, 1 << 24)),
    seed=st.integers(0, 1000),
)
def test_round_trip(n, k, density, dtype, chunk, seed) -> None:
    weight, mask = made(n, k, density, dtype, seed)
    packed = sbt.pack(weight, mask)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pair_layout, "CHUNK", chunk)
        pairs = pair_layout.build(packed)
    sbt.validate(pairs.packed, "pairs")
    assert torch.equal(pair_layout.unpack(pairs).view(torch.int16), torch.where(mask, weight, 0).view(torch.int16))
    assert abs(copies.nbytes("pair_mma", packed) - pairs.nbytes) < 2 * sbt.TAIL


def test_a_pair_is_kept_where_one_of_its_columns_is() -> None:
    _, mask = made(48, 200, 0.3, torch.float16)
    kept = sbt.kept(pair_layout.build(sbt.pack(mask.half(), mask)).packed)
    assert kept == mask.unflatten(1, (-1, 2)).any(-1).sum() == pair_layout.counts(sbt.pack(mask.half(), mask)).sum()


def test_lanes_have_their_pairs_side_by_side() -> None:
    """Of a step the pairs t, t + 4, t + 8 and t + 12, which are two operands of mma.m16n8k16, stand at 4 t."""
    weight = torch.arange(1, 65).to(torch.float16)[None]
    dense, _ = sbt.unpack_torch(pair_layout.build(sbt.pack(weight)).packed)
    first = dense.view(torch.float16).view(2, 4, 4, 2)[..., 0]  # of each pair, [step, t, i]
    assert torch.equal(first[0, 1], torch.tensor([3, 11, 19, 27]).half())
    assert torch.equal(first[1, 3], torch.tensor([39, 47, 55, 63]).half())


def test_about_as_many_bytes_as_are_told() -> None:
    for density in (0.1, 0.3, 0.5):
        weight, mask = made(256, 2048, density, torch.bfloat16)
        told = pair_layout.bytes_per_weight(density) * weight.numel()
        assert told < pair_layout.build(sbt.pack(weight, mask)).nbytes < 1.03 * told


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer: pairs are of float16 or bfloat16, got torch\.float32; convert"):
        pair_layout.build(sbt.pack(torch.ones(2, 2)), "layer")
