"""The two layouts of compressed-tensors: read bit by bit, and refused by layer where their tensors disagree."""

from pathlib import Path

import legacy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from alphaprune import bitmask
from alphaprune.shards import Shards


def integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Shards:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return Shards(folder)


def special(weight: torch.Tensor) -> torch.Tensor:
    for value in (float("nan"), float("inf"), -float("inf"), 1e-40):
        weight.view(-1)[torch.randint(weight.numel(), ())] = value
    return weight


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(n=st.integers(1, 40), k=st.integers(1, 70), density=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_values_come_back_bit_by_bit(tmp_path_factory, suffix: str, dtype, n: int, k: int, density, seed) -> None:
    torch.manual_seed(seed)
    weight = special(torch.randn(n, k)).to(dtype) * (torch.rand(n, k) < density)
    weight = torch.where(weight == 0, 0, weight)
    found = stored(tmp_path_factory.mktemp("b"), legacy.compress(f"a.b{suffix}", weight))
    assert bitmask.find(found.names()) == {"a.b": f"a.b{suffix}"}
    read = bitmask.read(found, "a.b", f"a.b{suffix}")
    assert not read.pairs and torch.equal(read.mask, weight != 0)
    assert torch.equal(integers(read.dense()), integers(weight))


def test_vectors_too(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 0, 2, 0, 0, 0, 0, 0, 0, 3])
    read = bitmask.read(stored(tmp_path, legacy.compress("norm", weight)), "norm", "norm")
    assert torch.equal(read.dense(), weight) and read.shape == (10,)


@pytest.mark.parametrize("shape", [(1, 4), (5, 12), (17, 68)])
def test_kept_zeros_of_pairs_stay_kept(tmp_path: Path, shape: tuple[int, int]) -> None:
    weight = special(torch.randn(shape)).bfloat16()
    mask = torch.zeros(shape, dtype=torch.bool).view(-1, 4)
    mask = mask.scatter(1, torch.rand(mask.shape).topk(2, 1).indices, True).view(shape)
    weight[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    read = bitmask.read(stored(tmp_path, legacy.compress_pairs("a", weight, mask)), "a", "a")
    assert read.pairs and torch.equal(read.mask, mask)
    assert torch.equal(integers(read.dense()), integers(weight.masked_fill(~mask, 0)))


def flip(tensor: torch.Tensor, row: int, bit: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[row, bit // 8] ^= 1 << bit % 8
    return tensor


DAMAGE = {  # part, change, what is said
    "no bitmask": ("bitmask", lambda t: None, r"a\.bitmask is missing"),
    "no values": ("compressed", lambda t: None, r"a\.compressed is missing"),
    "no shape": ("shape", lambda t: None, r"a\.shape is missing"),
    "no offsets": ("row_offsets", lambda t: None, r"a\.row_offsets is missing"),
    "short bitmask": (
        "bitmask",
        lambda t: t[:-1],
        r"needs a uint8 bitmask of shape \(9, 3\), .* uint8 \(8, 3",
    ),
    "narrow bitmask": ("bitmask", lambda t: t[:, :-1], r"bitmask of shape \(9, 3\)"),
    "signed bitmask": ("bitmask", lambda t: t.view(torch.int8), "int8"),
    "a bit more": ("bitmask", lambda t: flip(t, 4, 3), r"bitmask keeps \d+ weights, the file has \(\d+,\) values"),
    "bits swapped": (
        "bitmask",
        lambda t: flip(flip(t, 0, 1), 8, 1),
        "disagree with its bitmask from row 1",
    ),
    "past the end": ("bitmask", lambda t: flip(t, 2, 21), "past column 20"),
    "offsets swapped": ("row_offsets", lambda t: t.flip(0), "row_offsets disagree with its bitmask from row 0"),
    "last offset": ("row_offsets", lambda t: torch.cat([t[:-1], t[-1:] + 1]), "from row 8"),
    "short offsets": ("row_offsets", lambda t: t[:-1], "9 rows need as many int64 row_offsets"),
    "small offsets": ("row_offsets", lambda t: t.int(), "int32"),
    "fewer values": ("compressed", lambda t: t[:-1], "bitmask keeps"),
    "integers": ("compressed", lambda t: t.to(torch.int8), "its values are int8"),
    "another shape": ("shape", lambda t: t + 8, "bitmask of shape"),
    "no size": ("shape", lambda t: t * 0, r"its stored shape is \[0, 0\]"),
    "odd shape": ("shape", lambda t: t.float(), r"its stored shape is \[9\.0"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_sentence_that_names_the_layer(tmp_path: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(9, 20, generator=generator) * (torch.rand(9, 20, generator=generator) < 0.5)
    weight[0, 1], weight[8, 1], weight[4, 3] = 1, 0, 0
    part, change, message = DAMAGE[kind]
    tensors = legacy.compress("x.a", weight)
    tensors[f"x.a.{part}"] = change(tensors[f"x.a.{part}"])
    found = stored(tmp_path, {n: t for n, t in tensors.items() if t is not None})
    with pytest.raises(ValueError, match=message) as error:
        bitmask.read(found, "x.a", "x.a")
    assert str(error.value).startswith("x.a: ") and len(str(error.value).splitlines()) == 1


PAIRS_DAMAGE = {
    "three of four": ("bitmask", lambda t: t | 0x0F, r"keeps 4 of 4 in row 0 at column 0, not 2"),
    "moved": ("bitmask", lambda t: flip(flip(t, 2, 0), 2, 4), "of 4 in row 2 at column 0"),
    "values": ("compressed", lambda t: t[:, :-1], r"2:4 of \(9, 20\) keeps \(9, 10\) values, the file has \(9, 9\)"),
    "shape": ("shape", lambda t: t - 1, r"its shape is \(8, 19\)|bitmask of shape"),
    "no bitmask": ("bitmask", lambda t: None, "bitmask is missing"),
}


@pytest.mark.parametrize("kind", PAIRS_DAMAGE)
def test_damage_of_pairs(tmp_path: Path, kind: str) -> None:
    mask = torch.tensor([True, False, False, True]).repeat(9, 5)
    part, change, message = PAIRS_DAMAGE[kind]
    tensors = legacy.compress_pairs("x.a", torch.randn(9, 20), mask)
    tensors[f"x.a.{part}"] = change(tensors[f"x.a.{part}"])
    found = stored(tmp_path, {n: t for n, t in tensors.items() if t is not None})
    with pytest.raises(ValueError, match=message) as error:
        bitmask.read(found, "x.a", "x.a")
    assert str(error.value).startswith("x.a: ") and len(str(error.value).splitlines()) == 1
