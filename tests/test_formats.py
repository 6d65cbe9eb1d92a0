"""The packed formats: bit-exact round trips, exact sizes, and no damaged file gets past validate."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import exact_weight

from alphaprune import formats
from alphaprune.formats import Packed, native, sbt
from alphaprune.kernels import spmm

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int8)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int8}

problems = st.tuples(
    st.integers(1, 40), st.integers(1, 150), st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 2**31)
)


def random_bits(n: int, k: int, dtype: torch.dtype, density: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of any bits whatever, NaN payloads, infinities and subnormals among them, and a keep-mask."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min + (dtype == torch.int8), info.max + 1, (n, k), generator=generator).to(BITS[dtype])
    return bits.view(dtype), torch.rand(n, k, generator=generator) < density


def scale_of(weight: torch.Tensor, seed: int = 0) -> torch.Tensor | None:
    """A scale for integers: of rows or, by the seed, of groups; None for floats."""
    if weight.dtype != torch.int8:
        return None
    n, k = weight.shape
    return torch.rand(*((n,) if seed % 2 else (n, -(-k // 128))), generator=torch.Generator().manual_seed(seed)) + 0.1


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_find", lambda: (None, "switched off by the test"))


@pytest.mark.parametrize("name", formats.MEMBERS)
@settings(max_examples=60, deadline=None)
@given(problem=problems)
def test_round_trip_is_bit_exact(name: str, problem: tuple) -> None:
    weight, mask = random_bits(*problem)
    form, scale = formats.get(name), scale_of(weight, problem[-1])
    packed = form.pack(weight, mask, scale)
    form.validate(packed, "layer")
    bits, kept = form.unpack(packed)
    assert torch.equal(kept, mask)
    assert same_bits(bits, torch.where(mask, weight.view(BITS[weight.dtype]), 0).view(weight.dtype))
    dense, dense_kept = form.dense(packed)
    assert torch.equal(dense_kept, mask) and same_bits(spmm.expand(packed), dense)
    assert same_bits(dense, bits if scale is None else exact_weight(bits, scale).float())
    assert form.dense(packed, torch.float16)[0].dtype == torch.float16
    other, other_kept = sbt.unpack_torch(packed)
    assert same_bits(other, bits) and torch.equal(other_kept, kept)
    assert form.kept(packed) == int(mask.sum())
    scales = 0 if scale is None else scale[0].numel()
    assert packed.nbytes <= form.nbytes(packed.shape, int(mask.sum()), weight.dtype, scales)


@settings(max_examples=40, deadline=None)
@given(problem=problems)
def test_native_and_torch_pack_alike(problem: tuple) -> None:
    weight, mask = random_bits(*problem)
    for keep in (mask, None):
        one, other = sbt.pack(weight, keep, scale_of(weight)), sbt._pack_torch(weight, keep)
        assert same_bits(one.weight, other.weight)
        assert torch.equal(one.mask, other.mask) and torch.equal(one.offsets, other.offsets)


def test_layout_is_the_documented_one() -> None:
    weight = torch.arange(1.0, 17 * 65 + 1).view(17, 65)
    mask = torch.zeros(17, 65, dtype=torch.bool)
    for row, col in ((0, 0), (1, 0), (2, 17), (15, 63), (3, 64), (16, 64)):
        mask[row, col] = True
    packed = sbt.pack(weight, mask)
    words = packed.mask.to(torch.int64) & 0xFFFFFFFF
    assert words.shape == (2, 2, 32)
    assert words[0, 0, 0] == 1 | 1 << 16  # rows 0 and 1 share word 0
    assert words[0, 0, 8 + 1] == 1 << 1  # step 1, rows 2 and 3, column 17
    assert words[0, 0, 31] == 1 << 31
    assert words[0, 1, 1] == 1 << 16 and words[1, 1, 0] == 1
    assert packed.offsets.tolist() == [0, 1, 2, 2, 3]
    assert packed.weight[:4].tolist() == [1, 66, 2 * 65 + 18, 15 * 65 + 64]
    assert packed.weight[4:8].eq(0).all() and packed.weight[8] == 3 * 65 + 65 and packed.weight[16] == 16 * 65 + 65


def test_integers_of_a_tile_start_on_16_values() -> None:
    weight = torch.arange(-64, 64, dtype=torch.int8).view(1, 128)
    mask = torch.zeros(1, 128, dtype=torch.bool)
    mask[0, 3], mask[0, 64:81] = True, True
    packed = sbt.pack(weight, mask, torch.ones(1))
    assert packed.offsets.tolist() == [0, 2, 6]
    assert packed.weight[0] == -61 and packed.weight[16:33].tolist() == list(range(17)) and not packed.weight[33:].any()


def test_without_a_mask_zeros_of_either_sign_go_and_nan_stays() -> None:
    weight = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), 1e-45, -1.0]])
    for pack in (sbt.pack, sbt._pack_torch):
        _, kept = sbt.unpack(pack(weight, None))
        assert kept.tolist() == [[False, False, True, True, True, True]]


def test_values_end_in_a_readable_tail() -> None:
    for dtype in DTYPES:
        weight = torch.randn(16, 64).to(dtype)
        packed = sbt.pack(weight, torch.ones(16, 64, dtype=torch.bool), scale_of(weight))
        tail = packed.weight[16 * 64 :]
        assert tail.nbytes >= 64 and packed.weight.nbytes % 64 == 0 and tail.eq(0).all()


def test_nbytes_of_a_large_weight_is_near_the_formula() -> None:
    mask = torch.rand(512, 1024) < 0.3
    packed = sbt.pack(torch.randn(512, 1024).bfloat16(), mask)
    ideal = 2 * mask.float().mean().item() + 1 / 8
    assert ideal < packed.nbytes / mask.numel() < 1.02 * ideal
    weight = torch.randint(-127, 128, (512, 1024)).to(torch.int8)
    for keep, share, spare in ((mask, ideal / 2 + 1 / 16, 1.06), (torch.ones_like(mask), 9 / 8, 1.01)):
        assert share < sbt.pack(weight, keep, torch.ones(512)).nbytes / mask.numel() < spare * share


@pytest.mark.parametrize(
    ("weight", "mask", "message"),
    [
        (torch.ones(4), None, r"2-D weight.*got shape \(4,\)"),
        (torch.ones(0, 4), None, "rows and columns"),
        (torch.ones(2, 2, dtype=torch.float64), None, "got torch.float64"),
        (torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool), r"bool mask of shape \(2, 2\)"),
        (torch.ones(2, 2), torch.ones(2, 2), "bool mask"),
    ],
)
def test_pack_refuses(weight: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sbt.pack(weight, mask)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.ones(2, 300), torch.ones(2), "only int8 values have a scale, got torch.float32 with one"),
        (torch.ones(2, 300).char(), None, r"need a float32 scale \(2,\) or \(2, 3\), got none"),
        (torch.ones(2, 300).char(), torch.ones(2, 2), r"got torch.float32 \(2, 2\)"),
        (torch.ones(2, 300).char(), torch.ones(2).bfloat16(), r"got torch.bfloat16 \(2,\)"),
        (torch.full((2, 300), -128).char(), torch.ones(2), "from -127 to 127, got -128"),
    ],
)
def test_integers_and_their_scale_belong_together(weight: torch.Tensor, scale, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sbt.pack(weight, None, scale)
    if weight.dtype == torch.int8 and (weight != -128).all():
        good = sbt.pack(weight, None, torch.ones(2, 3))
        sbt.validate(good, "layer")
        with pytest.raises(ValueError, match=f"^layer: .*{message}; the file is damaged"):
            sbt.validate(replace(good, scale=scale), "layer")


def damaged(packed: Packed, **change: object) -> Packed:
    return replace(packed, **change)


@pytest.mark.parametrize("built", [True, False])
def test_validate_names_the_layer_and_the_fault(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not built:
        without_native(monkeypatch)
    good = sbt.pack(torch.randn(20, 70), torch.rand(20, 70) < 0.5)
    sbt.validate(good, "layer")
    bumped, started, outside = good.offsets.clone(), good.offsets.clone(), good.mask.clone()
    bumped[2] += 1
    started[0] = 1
    outside[1, 1, 31] |= 1
    outside[1, 1, 30] |= 1
    cases = [
        (damaged(good, offsets=bumped), "offsets and mask disagree in tile 1"),
        (damaged(good, offsets=started), "do not start at 0"),
        (damaged(good, mask=torch.zeros_like(good.mask)), "disagree in tile 0"),
        (damaged(good, weight=good.weight[:-64]), "cut short"),
        (damaged(good, weight=good.weight.double()), "float32, float16, bfloat16 or int8"),
        (damaged(good, weight=good.weight.view(1, -1)), "1-D values"),
        (damaged(good, mask=good.mask.view(-1)), "int32 mask of shape"),
        (damaged(good, mask=good.mask.to(torch.int64)), "int32 mask"),
        (damaged(good, offsets=good.offsets[:-1]), "int32 offsets of shape"),
        (damaged(good, shape=(20, 71 + 64)), "int32 mask of shape"),
        (damaged(good, shape=(20, 65)), "outside the shape|disagree"),
        (damaged(good, shape=(0, 70)), "shape"),
        (damaged(good, mask=good.mask.transpose(0, 1).contiguous().transpose(0, 1)), "contiguous"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=rf"^model\.layer: .*({message})"):
            sbt.validate(bad, "model.layer")
    with pytest.raises(ValueError, match=r"outside the shape|disagree"):
        sbt.validate(damaged(good, mask=outside), "layer")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_passes_validate_is_safe_to_read(data: st.DataObject) -> None:
    """Any bit flips and any truncation: refused, or every value that the mask asks for exists inside the tensor."""
    n, k, dtype, density, seed = data.draw(problems)
    weight, mask = random_bits(n, k, dtype, density, seed)
    packed = sbt.pack(weight, mask, scale_of(weight, seed))
    words, offsets = packed.mask.clone().flatten(), packed.offsets.clone()
    for _ in range(data.draw(st.integers(0, 3))):
        target = data.draw(st.sampled_from((words, offsets)))
        at, bit = data.draw(st.integers(0, target.numel() - 1)), data.draw(st.integers(0, 31))
        target[at] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    length = packed.weight.numel() - data.draw(st.sampled_from((0, 0, 1, 16, 64, 200)))
    values = packed.weight[: max(length, 0)].clone()
    bad = replace(packed, weight=values, mask=words.view(packed.mask.shape), offsets=offsets)
    try:
        sbt.validate(bad, "layer")
    except ValueError as error:
        assert str(error).startswith("layer: ")
        return
    start = (offsets.to(torch.int64) & 0xFFFFFFFF) * 8
    count = sbt.popcount(bad.mask).sum(-1).flatten()
    padding = 16 if dtype == torch.int8 else 8
    assert start[0] == 0 and (start.diff() >= count).all() and (start.diff() < count + padding).all()
    assert (bad.weight.numel() - start[-1]) * dtype.itemsize >= 64
    assert sbt.unpack(bad)[1].shape == (n, k)


@settings(max_examples=100, deadline=None)
@given(problem=problems, at=st.integers(0, 2**20), bit=st.integers(0, 31), in_mask=st.booleans())
def test_native_and_torch_find_the_same_fault(problem: tuple, at: int, bit: int, in_mask: bool) -> None:
    weight, mask = random_bits(*problem)
    packed = sbt.pack(weight, mask, scale_of(weight))
    target = packed.mask.view(-1) if in_mask else packed.offsets
    target[at % target.numel()] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        found = sbt._fault(packed)
        without_native(patch)
        assert sbt._fault(packed) == found


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="no format is called 'csr'; there are: sbt"):
        formats.get("csr")
