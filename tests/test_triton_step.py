"""Attention of a decode step in one Triton launch, against float64: in any order of its programs; planted mistakes."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton import INTERPRETED, apart, device, poisoned_new_empty, runs  # noqa: F401
from test_triton_decode import DTYPES, close, module
from torch import Tensor

from alphaprune.kernels import attention, neighbours


class Case(NamedTuple):
    """A step of sequences; its rows of the cache hold NaN where no key is that the step may read."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: Tensor
    slots: Tensor
    positions: Tensor
    table: Tensor
    page: int
    reach: int
    cos: Tensor
    sin: Tensor
    window: int | None
    norms: tuple | None

    def keys(self, known: list[int] | None = None, where: str = "cpu") -> attention.Keys:
        given = (part.to(where) for part in (self.slots, self.positions, self.table))
        turns = (part.to(where) for part in (self.cos, self.sin))
        return attention.Keys(*given, self.page, self.reach, *turns, known)


def made(lengths, heads, dim, page, window, normed, dtype, seed, nobodies: int = 0) -> Case:
    """lengths: keys of each sequence with the new one. nobodies: rows of the last slot, which is at its beginning."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    reach = max(lengths) + seed % 50
    capacity, slots = reach + 70, len(lengths) + 2
    table = torch.randperm(slots * -(-capacity // page), generator=generator).view(slots, -1)
    chosen = torch.randperm(slots - 1, generator=generator)[: len(lengths)]
    cache = torch.full((2, table.numel() * page, heads[1], dim), float("nan"), dtype=dtype)
    for slot, length in zip(chosen, lengths, strict=True):
        n = torch.arange(0 if window is None else max(0, length - window), length - 1)
        cache[:, table[slot, n // page] * page + n % page] = random(2, len(n), heads[1], dim)
    rows = torch.cat((chosen, torch.full((nobodies,), slots - 1)))
    angle = torch.randn(capacity, dim // 2, generator=generator)
    norms = ((random(dim), 1e-5), (random(dim), 1e-3)) if normed else None
    q, k, v = (random(len(rows), count * dim) for count in (heads[0], heads[1], heads[1]))
    positions = torch.tensor([*(length - 1 for length in lengths), *[0] * nobodies])
    return Case(
        *(q, k, v, cache, rows, positions, table, page, reach, angle.cos().to(dtype), angle.sin().to(dtype)),
        *(window, norms),
    )


def truth(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in float64, one sequence after the other; new keys and values [2, M, key heads, dim]; their rows."""
    q, k = neighbours.norm_heads(case.q, case.k, case.norms)
    cache, keys, found = case.cache.clone(), case.keys(), []
    turned = neighbours.rotate_store(q, k, case.v, *keys.turns, torch.arange(len(q)), cache)
    new = cache[:, : len(q)].clone()
    for row, query in enumerate(turned.double()):
        position = int(case.positions[row])
        n = torch.arange(0 if case.window is None else max(0, position + 1 - case.window), position)
        old = case.cache[:, case.table[case.slots[row], n // case.page] * case.page + n % case.page]
        seen = torch.cat((old, new[:, row : row + 1]), 1).double()
        k, v = seen.repeat_interleave(len(query) // seen.shape[2], 2)
        scores = torch.einsum("hd,nhd->hn", query, k) / query.shape[-1] ** 0.5
        found.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(found), new, keys.place


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """The interpreter takes the programs of a launch in another order; a GPU has its own."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    orders: dict[tuple, list[int]] = {}

    def moved(x: int, y: int, z: int) -> None:
        _, ny, _ = grid = builder.grid_dim
        if grid not in orders:
            orders[grid] = torch.randperm(grid[0] * ny, generator=torch.Generator().manual_seed(seed)).tolist()
        builder.grid_idx = (*divmod(orders[grid][x * ny + y], ny), z)

    builder.set_grid_idx = moved
    try:
        yield
    finally:
        del builder.set_grid_idx


OUT = 16  # units of an output: the error of a score, a sum of up to 64 products, is that of an exponent


def of_new(case: Case) -> int:
    """Units in the last place between two new keys: of a turn, with or without an FMA, and of a norm before it, whose
    root, quotient and product are rounded on both sides."""
    return 2 if case.norms is None else 6


def check(case: Case, where: str, file: ModuleType | None = None, seeds: tuple[int, ...] = (0, 1)) -> None:
    """Right, the same in every order of the programs, and ready for the next step."""
    file = file or module("triton_attention")
    wanted, new, place = truth(case)
    given = [part.to(where) for part in (case.q, case.k, case.v)]
    norms = case.norms and tuple((weight.to(where), epsilon) for weight, epsilon in case.norms)
    counters, results = file.counters(given[0]), []
    alone = [row for row, at in enumerate(place.tolist()) if place.tolist().count(at) == 1]  # and not nobody's
    for seed in seeds:
        cache = case.cache.clone().to(where)
        with shuffled(seed):
            found = file.attend_new(*given, cache, case.keys(where=where), case.window, norms, counters)
        close(found, wanted, OUT)
        mine, expected = cache.cpu(), case.cache.clone()
        close(mine[:, place[alone]].flatten(-2), new[:, alone].flatten(-2).double(), of_new(case))
        assert torch.equal(mine[1, place[0]], new[1, 0]), "a value is stored as it is"
        if case.norms is None and case.q.dtype != torch.float32:
            assert torch.equal(mine[0, place[0]], new[0, 0]), "a turned key is the one that torch makes"
        expected[:, place] = mine[:, place]
        assert torch.equal(mine.nan_to_num(9), expected.nan_to_num(9)), "nothing else is written"
        assert not counters.any(), "the counters are zero afterwards"
        results.append(found.cpu())
    assert all(torch.equal(results[0], other) for other in results), "the order of the programs is in the result"


@runs
def test_step_over_pages(device: str) -> None:  # noqa: F811
    @settings(max_examples=12 if INTERPRETED else 150, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
        heads=st.sampled_from(((1, 1), (2, 2), (4, 2), (3, 1), (8, 2))),
        dim=st.sampled_from((16, 24, 64)),
        page=st.sampled_from((1, 16, 32, 64, 24)),
        window=st.sampled_from((None, None, 1, 7, 130)),
        normed=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 100),
        nobodies=st.sampled_from((0, 0, 3)),
    )
    def products(lengths, heads, dim, page, window, normed, dtype, seed, nobodies) -> None:
        case = made(lengths, heads, dim, page, window, normed, dtype, seed, nobodies)
        check(case, device)
        if nobodies == 0:  # which of them a plain store leaves in the cache is not said
            for known in (None, lengths):
                cache, (wanted, new, place) = case.cache.clone(), truth(case)
                keys = case.keys(known)
                close(attention.attend_new(*case[:3], cache, keys, None, window, case.norms), wanted, 8)
                close(cache[0, place].flatten(-2), new[0].flatten(-2).double(), of_new(case))
                assert torch.equal(cache[1, place], new[1])

    products()


CASES = (  # lengths, heads, dim, page, window, normed, seed
    ([300], (2, 2), 16, 32, None, True, 1),
    ([200, 290, 64, 65, 1], (4, 2), 24, 16, None, False, 2),
    ([260], (3, 1), 16, 32, 200, False, 3),
)


@runs
@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_ranges_in_any_order(case: tuple, device: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """With more ranges than one, and a sequence beside that has one key."""
    made_of, seeds = made(*case[:-1], torch.float32, case[-1]), tuple(range(6))
    check(made_of, device, seeds=seeds)
    monkeypatch.setattr(module("triton_attention"), "programs", lambda x: 1)  # one range, which counts nothing
    check(made_of, device, seeds=seeds[:1])


PLANTED = {
    "the new key is taken twice": ("    if part == 0:\n", "    if part <= 1:\n"),
    "the new key is read from the cache": (
        "tl.minimum(begin + span, position)",
        "tl.minimum(begin + span, position + 1)",
    ),
    "the last key before the new one is left out": (
        "tl.minimum(begin + span, position)",
        "tl.minimum(begin + span, position - 1)",
    ),
    "a counter is not reset": ("        tl.store(counter, 0)", "        tl.store(counter, 0 * all_of_them + 1)"),
    "the last but one adds": ("== all_of_them - 1", "== all_of_them - 2"),
    "one range is not added": ("mask=every < used,", "mask=every < used - 1,"),
    "a part of a range is not added": ("there[:, :, None] & (lane < HEAD)", "there[:, :, None] & (lane < HEAD - 1)"),
    "the window is one short": ("position + 1 - window", "position + 2 - window"),
    "keys before the window are seen": ("(key >= first) & (key < end)", "key < end"),
    "the sign of a turn": ("tl.where(near, -1.0, 1.0)", "tl.where(near, 1.0, -1.0)"),
    "the weight of the other half": ("two(k_norm, lane, twin, there)", "two(k_norm, lane, lane, there)"),
    "the epsilon of the queries": ("c, s, k_weight, k_twin, k_epsilon", "c, s, k_weight, k_twin, q_epsilon"),
    "the value is not stored": ("    tl.store(target + value_offset + lane, value, mask=there)\n", ""),
    "the page of another sequence": ("tl.load(slots + sequence) * pages", "sequence * pages"),
    "the second page of a tile": ("start // PAGE + i, mask", "start // PAGE + 0, mask"),
    "another sequence's new key": ("k += sequence * k_row", "k += 0 * k_row"),
    "another key head's new value": ("v += sequence * v_row + head * HEAD", "v += sequence * v_row"),
    "the fade of what was there": ("total = total * fade", "total = total"),
}


def planted(name: str, folder: Path) -> ModuleType:
    """The kernel with one mistake in it."""
    right, wrong = PLANTED[name]
    text = Path(module("triton_attention").__file__).read_text()
    assert text.count(right) == 1, right
    file = folder / f"planted_{list(PLANTED).index(name)}.py"
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    made_of = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made_of)
    return made_of


@runs
def test_planted_mistakes_are_seen(device: str, tmp_path: Path) -> None:  # noqa: F811
    if not INTERPRETED:
        pytest.skip("what a mistake in the order of programs does on a GPU is left to chance; the interpreter has it")
    cases = [made(*case[:-1], torch.float32, case[-1]) for case in CASES]
    for name in PLANTED:
        file = planted(name, tmp_path)
        for case in cases:
            try:
                check(case, device, file, (0, 1, 2))
            except AssertionError:
                break
        else:
            pytest.fail(f"nobody saw: {name}")


@apart
def test_ranges_are_no_more_than_programs_at_a_time() -> None:
    file = module("triton_attention")
    for pairs, keys, most in (
        (32, 4096, 528),
        (8, 100, 528),
        (1, 1, 432),
        (2048, 8192, 528),
        (4, 65, 32),
        (1, 9999, 528),
    ):
        count = file.ranges(pairs, keys, most)
        assert 1 <= count <= file.MOST_RANGES and (count == 1 or count * pairs <= most)
        assert count == 1 or (count - 1) * file.KEYS < keys
