"""Slices of packed weights: the bits of dense slices, sums and concatenations that are the whole, only own bytes."""

import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import KINDS, problem
from test_formats import DTYPES, random_bits, same_bits, scale_of
from tolerance import assert_product, bound, exact

from alphaprune import shards
from alphaprune.formats import Packed, sbt, slices
from alphaprune.kernels import spmm

weights = st.tuples(
    st.integers(1, 70), st.integers(1, 300), st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 2**31)
)


def cuts(total: int, seed: int, unit: int) -> list[int]:
    """0, some boundaries in whole units, and the total."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randint(1, total + 1, (3,), generator=generator) // unit * unit
    return sorted({0, total, *inside.tolist()})


def assert_packed(found: Packed, weight: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Fails unless it is what `pack` makes of them, what lies after the last value excepted."""
    wanted = sbt.pack(weight, mask, scale)
    sbt.validate(found, "slice")
    assert found.shape == wanted.shape and torch.equal(found.mask, wanted.mask)
    assert torch.equal(found.offsets, wanted.offsets)
    values = int(wanted.offsets[-1]) * sbt.UNIT
    assert same_bits(found.weight[:values], wanted.weight[:values]) and len(found.weight) >= values
    assert scale is None or torch.equal(found.scale, wanted.scale)


@settings(max_examples=80, deadline=None)
@given(drawn=weights, unit=st.sampled_from((1, 16)))
def test_rows_are_those_of_the_dense_weight(drawn: tuple, unit: int) -> None:
    weight, mask = random_bits(*drawn)
    scale = scale_of(weight, drawn[-1])
    packed, ends = sbt.pack(weight, mask, scale), cuts(drawn[0], drawn[-1], unit)
    parts = []
    for first, last in pairwise(ends):
        parts.append(slices.rows(packed, first, last))
        assert_packed(parts[-1], weight[first:last], mask[first:last], None if scale is None else scale[first:last])
    assert same_bits(torch.cat([sbt.dense(part)[0] for part in parts]), sbt.dense(packed)[0])


@settings(max_examples=80, deadline=None)
@given(drawn=weights, unit=st.sampled_from((1, 64)))
def test_columns_are_those_of_the_dense_weight(drawn: tuple, unit: int) -> None:
    weight, mask = random_bits(*drawn)
    scale = scale_of(weight, drawn[-1])
    grouped = scale is not None and scale.dim() == 2
    packed, ends = sbt.pack(weight, mask, scale), cuts(drawn[1], drawn[-1], 128 if grouped else unit)
    parts = []
    for first, last in pairwise(ends):
        parts.append(slices.columns(packed, first, last))
        own = scale[:, first // 128 : -(-last // 128)] if grouped else scale
        assert_packed(parts[-1], weight[:, first:last], mask[:, first:last], own)
    assert same_bits(torch.cat([sbt.dense(part)[0] for part in parts], 1), sbt.dense(packed)[0])


@settings(max_examples=80, deadline=None)
@given(drawn=weights)
def test_slices_stack_to_the_whole(drawn: tuple) -> None:
    weight, mask = random_bits(*drawn)
    scale = scale_of(weight, drawn[-1])
    packed, ends = sbt.pack(weight, mask, scale), cuts(drawn[0], drawn[-1], 16)
    found = slices.stack([slices.rows(packed, first, last) for first, last in pairwise(ends)])
    assert_packed(found, weight, mask, scale)
    assert torch.equal(
        found.weight[int(found.offsets[-1]) * sbt.UNIT :].view(torch.uint8).bool().sum(), torch.tensor(0)
    )


def test_what_does_not_stack_is_named() -> None:
    _, one, _ = problem(17, 130, 1, 0.4, torch.float32, torch.float32)
    _, wide, _ = problem(16, 131, 1, 0.4, torch.float32, torch.float32)
    _, rounded, _ = problem(16, 130, 1, 0.4, "int8", torch.float32)
    _, grouped, _ = problem(16, 130, 1, 0.4, "int8/128", torch.float32)
    for parts, message in (
        ([one, one], "17 rows have no others below them: wanted a multiple of 16"),
        ([wide, one], "the same columns, dtype"),
        ([rounded, one], "the same columns, dtype"),
        ([rounded, grouped], "groups of scales"),
        ([], "and there is one"),
    ):
        assert message in slices.unlike(parts)
        with pytest.raises(ValueError, match=message):
            slices.stack(parts)
    with pytest.raises(ValueError, match="the sbt offsets do not fit the values"):
        slices.stack([replace(grouped, weight=grouped.weight[:8]), grouped])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("n", "k", "ranks"), [(48, 256, 2), (64, 512, 4), (30, 120, 3)])
def test_products_of_slices(kind, n: int, k: int, ranks: int) -> None:
    """Rows give parts of y; columns give summands, whose sum is within the sum of their bounds."""
    if kind == "int8/128" and k % (128 * ranks):
        pytest.skip("its groups of 128 columns would be cut")
    x_type = kind if isinstance(kind, torch.dtype) else torch.float32
    dense, packed, x = problem(n, k, 5, 0.4, kind, x_type, seed=n)
    whole = spmm.spmm(x, packed, kernel="reference")
    parts = [slices.rows(packed, *slices.share(n, ranks, rank)) for rank in range(ranks)]
    joined = torch.cat([spmm.spmm(x, part, kernel="reference") for part in parts], -1)
    assert_product(joined, x, dense)
    total, allowed = torch.zeros(5, n, dtype=torch.float64), torch.zeros(5, n, dtype=torch.float64)
    for rank in range(ranks):
        first, last = slices.share(k, ranks, rank, "columns")
        own = x[:, first:last].contiguous()
        y = spmm.spmm(own, slices.columns(packed, first, last))
        assert_product(y, own, dense[:, first:last])
        total += y.double()
        allowed += bound(own, dense[:, first:last])
    assert ((total - exact(x, dense)).abs() <= allowed).all()
    assert ((whole.double() - exact(x, dense)).abs() <= allowed + bound(x, dense)).all()


@pytest.mark.parametrize(("cut", "n", "k"), [(slices.rows, 4096, 2048), (slices.columns, 128, 65536)])
def test_of_a_mapped_file_only_the_own_bytes_are_read(tmp_path: Path, cut, n: int, k: int) -> None:
    """Resident pages of the file after one rank of four made its slice and multiplied with it: a quarter, and edges."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("there is no /proc to read memory from")
    packed = sbt.pack(torch.randn(n, k), torch.rand(n, k) < 0.5)
    shards.write(tmp_path / "model.safetensors", [(f"p.{suffix}", t) for suffix, t in packed.tensors.items()])
    file = tmp_path / "model.safetensors"
    with file.open("rb") as handle:  # out of the page cache, which maps as much at once as it was written at once
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    total, stored = file.stat().st_size, shards.Shards(tmp_path)
    mapped = Packed(*(stored.tensor(f"p.{s}") for s in ("weight", "weight_mask", "weight_offsets")), (n, k))
    assert resident(file) < total / 50
    first, last = slices.share(n if cut is slices.rows else k, 4, 1)
    part = cut(mapped, first, last)
    x = torch.randn(1, part.shape[1])
    y = spmm.spmm(x, part)
    assert 0.2 * total < resident(file) < 0.33 * total
    assert_product(y, x, sbt.dense(part)[0])
    if cut is slices.rows:
        assert part.weight.untyped_storage().data_ptr() == mapped.weight.untyped_storage().data_ptr()


def resident(file: Path) -> int:
    """Bytes of a file that this process has mapped and touched."""
    found = 0
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(file) in block.splitlines()[0]:
            found += 1024 * int(re.search(r"^Rss: +(\d+) kB", block, re.M)[1])
    return found


def test_bad_ranges_and_ranks() -> None:
    packed = sbt.pack(torch.ones(30, 200))
    for first, last in ((0, 0), (5, 3), (-1, 4), (0, 31)):
        with pytest.raises(ValueError, match="of a weight that has 30: wanted a range inside"):
            slices.rows(packed, first, last)
    with pytest.raises(ValueError, match="columns 0 to 201 of a weight that has 200"):
        slices.columns(packed, 0, 201)
    with pytest.raises(ValueError, match=r"30 rows cannot be shared by 4 ranks; use 2, 3, 5, 6, 10 or 15 ranks"):
        slices.share(30, 4, 0)
    with pytest.raises(ValueError, match="7 heads cannot be shared by 2 ranks; use 7 ranks"):
        slices.share(7, 2, 1, "heads")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        slices.share(8, 2, 2)
    integers = sbt.pack(torch.ones(16, 256, dtype=torch.int8), None, torch.ones(16, 2))
    with pytest.raises(ValueError, match=r"start inside a group of 128.*fewer ranks, or pack with one scale per row"):
        slices.columns(integers, 64, 128)


def test_damaged_offsets() -> None:
    packed = sbt.pack(torch.ones(32, 128))
    for damage in (torch.tensor([0, 9, 3, 4, 5]), torch.tensor([0, 1, 2, 3, 1 << 20])):
        broken = replace(packed, offsets=damage.to(torch.int32))
        for cut in (lambda p: slices.rows(p, 0, 32), lambda p: slices.columns(p, 0, 64)):
            with pytest.raises(ValueError, match="do not fit the values; the file is damaged"):
                cut(broken)
