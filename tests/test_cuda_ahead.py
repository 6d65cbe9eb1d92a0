"""Products that have the second-level cache fetch what the next one reads: which bytes, by the emulated module."""

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from problems import problem
from test_cuda import HALVES, of_four
from tolerance import assert_product
from torch import Tensor

from alphaprune.formats import sbt
from alphaprune.kernels import cuda, cuda_layouts

TYPE = HALVES[1]
K = 512
Call = Callable[[Tensor], Tensor]


def made(kind: str, rows: int, seed: int) -> tuple[Tensor, Call, list[Tensor]]:
    """(dense, its product by a kernel, the tensors that this reads the most of)."""
    dense, packed, _ = problem(rows, K, 1, 0.3, TYPE, TYPE, seed)
    if kind == "nm":
        dense = dense * of_four(dense, 2)
        packed = sbt.pack(dense)
    bind = {
        "delta": cuda_layouts.bind_delta,
        "mma": cuda.bind,
        "pair": cuda_layouts.bind_pairs,
        "wide": cuda.bind_wide,
        "nm": cuda_layouts.bind_nm,
    }[kind]
    bound = bind(packed)
    return dense, lambda x: bound(x, None), reads(kind, bound)


def reads(kind: str, bound: Callable) -> list[Tensor]:
    (held, *_) = bound.__defaults__[-1]  # what it keeps alive
    if kind == "delta":
        return list(held.tensors[:2])
    if kind == "nm":
        return [held.panels]
    packed = held.packed if kind == "pair" else held
    return [packed.weight, packed.mask]


def inside(fetches: list[tuple[int, int]], tensors: list[Tensor]) -> list[list[tuple[int, int]]]:
    """The fetches of each tensor as offsets and bytes; AssertionError if one is in none of them."""
    found: list[list[tuple[int, int]]] = [[] for _ in tensors]
    for address, nbytes in fetches:
        assert address % 16 == 0 and nbytes % 16 == 0 and nbytes > 0
        for place, tensor in enumerate(tensors):
            offset = address - tensor.data_ptr()
            if offset >= 0 and offset + nbytes <= tensor.nbytes:
                found[place].append((offset, nbytes))
                break
        else:
            raise AssertionError(f"{nbytes} bytes at {address:#x} are not the next weight's")
    return found


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("kind", ["delta", "mma", "pair", "wide", "nm"])
def test_each_fetches_a_part_of_each_share_of_the_next(emulator: ModuleType, kind: str, tokens: int) -> None:
    """Half of what the next one reads, by every block the beginning of its share; products are as they were."""
    emulator.emulate_device(90, 4, 232448)
    if kind == "delta":
        tokens = min(tokens, 2)
    dense, first, _ = made(kind, 200, 0)
    _, second, tensors = made("mma" if kind == "nm" else "nm", 150, 1)
    x = torch.randn(tokens, K).to(TYPE)
    plain = first(x)
    assert_product(plain, x, dense)
    emulator.fetched_ahead()
    half = sum(tensor.nbytes for tensor in tensors) // 2
    with cuda.looking_ahead(half):
        first(x)
        assert emulator.fetched_ahead() == []  # what is next is not known yet
        second(x)
        emulator.fetched_ahead()
        again = first(x)
    assert torch.equal(again, plain)
    by_tensor = inside(emulator.fetched_ahead(), tensors)
    blocks = max(map(len, by_tensor))
    assert blocks > 1 and sum(nbytes for found in by_tensor for _, nbytes in found) <= half
    for found, tensor in zip(by_tensor, tensors, strict=True):
        units = tensor.nbytes // 16
        share = [units * block // blocks for block in range(blocks + 1)]
        part = part_of(tensors, half)
        wanted = [(16 * begin, 16 * ((end - begin) * part // 256)) for begin, end in itertools.pairwise(share)]
        assert sorted(found) == [one for one in wanted if one[1]]
    first(x)
    assert emulator.fetched_ahead() == []  # outside nothing is fetched


def part_of(tensors: list[Tensor], nbytes: int) -> int:
    return min(256 * nbytes // sum(tensor.nbytes // 16 * 16 for tensor in tensors), 256)


def test_of_several_weights_the_bytes_follow_each_other(emulator: ModuleType) -> None:
    """A share that begins in one weight goes on in the next one."""
    emulator.emulate_device(90, 4, 232448)
    _, first, _ = made("delta", 100, 0)
    packed = [problem(n, K, 1, 0.3, TYPE, TYPE, n)[1] for n in (16, 100, 40)]
    together = cuda.bind_mma_group(packed, False)
    kinds = [[one.weight for one in packed], [one.mask for one in packed]]
    x = torch.randn(1, K).to(TYPE)
    with cuda.looking_ahead(1 << 40):  # all of it
        for _ in range(2):
            emulator.fetched_ahead()
            first(x)
            fetches = emulator.fetched_ahead()
            together.run(x, None, None)
    for tensors in kinds:
        mine = [one for one in fetches if any(0 <= one[0] - t.data_ptr() < t.nbytes for t in tensors)]
        by_tensor = inside(mine, tensors)
        assert all(sorted(found)[0][0] == 0 for found in by_tensor)
        for found, tensor in zip(by_tensor, tensors, strict=True):  # whole, without gaps
            assert sum(nbytes for _, nbytes in found) == tensor.nbytes // 16 * 16
            ends = {offset + nbytes for offset, nbytes in found}
            assert all(offset in ends for offset, _ in found if offset)
    assert sum(len(found) for found in inside(fetches, [t for kind in kinds for t in kind])) == len(fetches)


def test_a_weight_that_is_gone_is_not_looked_at(emulator: ModuleType) -> None:
    x, stays = torch.randn(1, K).to(TYPE), made("mma", 40, 0)[1]
    with cuda.looking_ahead(1000):
        stays(x)
        gone = made("mma", 40, 1)[1]
        gone(x)
        del gone
        emulator.fetched_ahead()
        made("mma", 40, 2)[1](x)
    with cuda.looking_ahead(1000):
        stays(x)
        assert emulator.fetched_ahead() == []  # what was learned is forgotten
    with pytest.raises(ValueError, match="products look ahead by some bytes"):
        cuda.load().ahead(-1)


def test_other_capabilities_and_none_at_all(emulator: ModuleType) -> None:
    """0 bytes ask nothing of the module, which may be missing."""
    emulator.fetched_ahead()
    with cuda.looking_ahead(0):
        pass
    emulator.emulate_device(90, 4, 232448)
    one = made("mma", 40, 0)[1]
    x = torch.randn(3, K).to(TYPE)
    with cuda.looking_ahead(16):  # less than a 256th of a share each
        one(x), made("mma", 300, 1)[1](x), one(x)
    assert emulator.fetched_ahead() == []
    emulator.emulate_device(80, 4, 166912)
    cuda.opened.cache_clear()
    older = made("mma", 40, 0)[1]
    with cuda.looking_ahead(1 << 20):
        for _ in range(2):
            older(x), made("mma", 300, 1)[1](x)
    assert emulator.fetched_ahead() == []
