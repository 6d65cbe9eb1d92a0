"""Attention of a decode step on a CPU: one native call against float64, for both ways that a cache lies in memory."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaprune.formats import native
from alphaprune.kernels import attention, cpu, cpu_attention, neighbours

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"the native module is {native.status()}")

CHUNK = 256  # kChunkKeys of csrc/cpu/attention.h
NAN = float("nan")
ISAS = [] if native.load() is None else [isa for isa in cpu.ISAS if cpu.missing(isa) is None]


HALF_UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # what one rounding is off by, relatively


@dataclasses.dataclass
class Case:
    """Sequences of some lengths, each with a new token, and what of the cache they see; the rest of it is NaN."""

    positions: list[int]
    key_heads: int = 2
    shared: int = 1
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    page: int = 16
    window: int | None = None
    by_heads: bool = False  # whether each head has its own stretch, as in decoder.State; else each position
    normed: bool = False
    seed: int = 0
    size: float = 1.0
    isa: str | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).mul(self.size).to(self.dtype)

        count, kv = len(self.positions), self.key_heads * self.dim
        pages = [position // self.page + 1 for position in self.positions]
        order = torch.randperm(sum(pages), generator=generator) + 1
        self.table = torch.zeros(count + 1, max(pages) + 1, dtype=torch.int64)
        self.slots = torch.randperm(count, generator=generator)
        for slot, mine in zip(self.slots.tolist(), order.split(pages), strict=True):
            self.table[slot, : len(mine)] = mine
        shape = (2, sum(pages) + 1, self.page, self.key_heads, self.dim)
        if self.by_heads:
            self.cache = torch.full([*shape[:2], self.key_heads, self.page, self.dim], NAN, dtype=self.dtype)
            self.cache = self.cache.transpose(2, 3)
        else:
            self.cache = torch.full(shape, NAN, dtype=self.dtype)
        for place, position in enumerate(self.positions):
            for p in range(self.first(position), position):
                self.at(self.cache, place, p).copy_(draw(2, self.key_heads, self.dim))
        self.q, self.k, self.v = draw(count, kv * self.shared), draw(count, kv), draw(count, kv)
        angles = torch.rand(count, self.dim // 2, generator=generator) * 6.3
        self.turns = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        self.norms = None
        if self.normed:
            self.norms = tuple((draw(self.dim).abs() + 0.5, epsilon) for epsilon in (1e-6, 1e-5))

    def first(self, position: int) -> int:
        """The first position that a token at this one sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def at(self, cache: torch.Tensor, place: int, position: int) -> torch.Tensor:
        """[2, key heads, dim], key and value of a sequence at a position."""
        page = self.table[self.slots[place], position // self.page]
        return cache[:, page, position % self.page]

    def run(self, cache: torch.Tensor | None = None) -> torch.Tensor:
        """[M, heads · dim]."""
        where = self.slots, torch.tensor(self.positions), self.table
        cache = self.cache if cache is None else cache
        assert cpu_attention.takes(self.q, cache)
        how = self.turns, self.window, self.norms, self.isa
        return cpu_attention.attend_new(self.q, self.k, self.v, cache, *where, *how)

    def check(self) -> None:
        cache = self.cache.clone()  # keeps its strides
        assert cache.stride() == self.cache.stride()
        out = self.run(cache).view(len(self.positions), self.key_heads * self.shared, self.dim)
        q, k = neighbours.norm_heads(self.q, self.k, self.norms)
        q, k = (part.view(len(part), -1, self.dim) for part in (q, k))
        q, k = (neighbours._rotate(part, *self.turns) for part in (q, k))
        step = 2.0**-23 if self.dtype == torch.float32 else HALF_UNITS[self.dtype]
        # A product that the compiler fuses with a sum is rounded once less, and a norm's sum has another order.
        off = 0 if self.dtype in HALF_UNITS and not self.normed else 4 * step
        for place, position in enumerate(self.positions):
            key, value = self.at(cache, place, position)
            size = k[place].abs().amax(-1, keepdim=True) if off else torch.zeros(1)
            assert ((key.double() - k[place].double()).abs() <= off * size.double()).all()
            assert torch.equal(value, self.v[place].view(self.key_heads, self.dim))
            self.check_sequence(cache, place, position, q[place].double(), out[place].double(), off)
            self.at(cache, place, position).copy_(self.at(self.cache, place, position))
        assert torch.equal(cache.isnan(), self.cache.isnan()), "nothing else of the cache is written"
        assert torch.equal(cache.nan_to_num(), self.cache.nan_to_num())

    def check_sequence(
        self, cache: torch.Tensor, place: int, position: int, q: torch.Tensor, out: torch.Tensor, off: float
    ) -> None:
        """q, out: [heads, dim] in float64."""
        places = range(self.first(position), position + 1)
        seen = torch.stack([self.at(cache, place, p) for p in places], 1)  # [2, keys, heads, dim]
        keys, values = seen.double().repeat_interleave(self.shared, 2).transpose(1, 2)  # [heads, keys, dim]
        scores = (keys @ q[:, :, None])[:, :, 0] / math.sqrt(self.dim)  # [heads, keys]
        weights = scores.softmax(-1)[:, :, None]
        wanted, spread = (weights * values).sum(1), (weights * values.abs()).sum(1)  # [heads, dim]
        # Scores: sums of dim products in float32, of queries that may be off by a rounding; weights: twice the largest
        # error of a score, and of exp; sums of as many products as there are keys.
        sizes = (keys.abs() @ q.abs()[:, :, None])[:, :, 0].amax(-1) / math.sqrt(self.dim)  # [heads]
        scored = (sizes * ((self.dim + 4) * 2.0**-24 + 3 * off) + 4e-7)[:, None]
        bound = (2 * scored.expm1() + (keys.shape[1] + 8) * 2.0**-24) * spread
        if self.dtype in HALF_UNITS:
            bound += HALF_UNITS[self.dtype] * wanted.abs() + 2.0**-25  # half of the smallest float16
        assert ((out - wanted).abs() <= bound + 1e-30).all(), ((out - wanted).abs() / bound).max()


@settings(max_examples=60, deadline=None)
@given(
    positions=st.lists(st.sampled_from([0, 1, 3, 15, 31, 32, 33, 100, 255, 256, 257, 600]), min_size=1, max_size=4),
    key_heads=st.integers(1, 3),
    shared=st.sampled_from([1, 2, 3, 4, 7, 8, 9, 17]),
    dim=st.sampled_from([32, 64, 96, 128, 160]),
    dtype=st.sampled_from(cpu_attention.DTYPES),
    page=st.sampled_from([1, 7, 32, 48]),
    window=st.sampled_from([None, 1, 40, 300]),
    by_heads=st.booleans(),
    normed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(**case: object) -> None:
    Case(**case).check()


@pytest.mark.parametrize("dtype", cpu_attention.DTYPES)
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_flat_and_sharp(dtype: torch.dtype, size: float) -> None:
    Case([2 * CHUNK + 40, 17], dtype=dtype, size=size, shared=3).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cpu_attention.DTYPES)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    Case([90, 300], shared=5, dim=96, dtype=dtype, isa=isa).check()
    Case([9], dtype=dtype, by_heads=True, normed=True, isa=isa).check()


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_names_the_best_one_allowed(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([300, 90], shared=4, dim=96, dtype=torch.float32, isa=isa)
    named = case.run()
    monkeypatch.setenv("ALPHAPRUNE_ISA", isa)
    case.isa = None
    assert torch.equal(case.run(), named)


def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="avx1024 was not compiled in"):
        native.load().Attention(1, 1, 32, 0, 0, 1, 32, 32, 32, "avx1024")


@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(3, 2, 64), (2, 0, 64), (2, 2, 48), (2, 2, 1024)])
def test_shapes_that_the_call_refuses(heads: int, key_heads: int, dim: int) -> None:
    with pytest.raises(ValueError, match="attention needs heads that share keys evenly"):
        native.load().Attention(heads, key_heads, dim, 0, 0, 1, 32, 32, 32, "scalar")


def test_the_same_bits_for_any_threads_and_whatever_is_beside() -> None:
    case = Case([700, 3, 256, 40], shared=4, dim=128, page=32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = case.run()
        torch.set_num_threads(2)
        for _ in range(5):
            assert torch.equal(case.run(), alone)
    finally:
        torch.set_num_threads(threads)
    every = case.q, case.k, case.v, case.slots, case.positions, case.turns
    for place in range(len(case.positions)):
        case.q, case.k, case.v, case.slots = (part[place : place + 1] for part in every[:4])
        case.positions, case.turns = every[4][place : place + 1], tuple(part[place : place + 1] for part in every[5])
        assert torch.equal(case.run()[0], alone[place])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), NAN])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_stays_with_its_sequence(value: float, where: int) -> None:
    case = Case([40, 40], key_heads=2, shared=2)
    clean = case.run().view(2, 4, -1)
    case.at(case.cache, 0, 7)[where, 1, 5] = value  # of key head 1
    found = case.run().view(2, 4, -1)
    assert torch.equal(found[1], clean[1]) and torch.equal(found[0, :2], clean[0, :2])
    if where == 1:
        assert torch.equal(found[0, 2:].isfinite(), torch.arange(case.dim).ne(5).expand(2, -1))
    elif math.isnan(value):
        assert found[0, 2:].isnan().all()


@pytest.mark.parametrize("page", [1, 32])
@pytest.mark.parametrize("isa", ISAS)
def test_keys_of_no_weight(isa: str, page: int) -> None:
    case = Case([CHUNK + 60], page=page, dtype=torch.float32, isa=isa)
    against = -neighbours._rotate(case.q.view(1, -1, case.dim), *case.turns)[0, :, 5].sign()  # [heads]
    found = []
    for size in (1e30, float("inf")):  # scores of which exp makes zero, and -inf: blocks and a chunk have no others
        for position in range(CHUNK + 40):
            case.at(case.cache, 0, position)[0, :, 5] = size * against
        found.append(case.run())
    assert torch.equal(*found) and found[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_norms_of_another_dtype() -> None:
    case = Case([20], normed=True)
    case.norms = tuple((weight.float(), epsilon) for weight, epsilon in case.norms)
    found = case.run()
    (case.q, case.k), case.norms = neighbours.norm_heads(case.q, case.k, case.norms), None
    assert torch.equal(case.run(), found)


def test_one_position_for_all() -> None:
    case = Case([20, 20, 20], by_heads=True)
    case.turns = tuple(part[:1] for part in case.turns)
    found = case.run()
    case.turns = tuple(part.expand(3, -1).contiguous() for part in case.turns)
    assert torch.equal(case.run(), found)


def test_rows_with_gaps_and_turned() -> None:
    case = Case([20, 5])
    wanted = case.run()
    wide = torch.cat((case.q, case.k, case.v), 1)
    case.q, case.k, case.v = wide.split([case.q.shape[1], case.k.shape[1], case.v.shape[1]], 1)
    assert torch.equal(case.run(), wanted)
    case.v = case.v.T.contiguous().T
    assert torch.equal(case.run(), wanted)


def test_nothing_to_attend() -> None:
    case = Case([4])
    case.q, case.k, case.v, case.slots = (part[:0] for part in (case.q, case.k, case.v, case.slots))
    case.positions, case.turns = [], tuple(part[:0] for part in case.turns)
    assert case.run().shape == (0, case.key_heads * case.dim)


def test_where_torch_does_it() -> None:
    case = Case([4])
    assert not cpu_attention.takes(case.q.float(), case.cache)
    assert not cpu_attention.takes(case.q.double(), case.cache.half())
    assert not cpu_attention.takes(case.q, case.cache[..., :48])
    assert not cpu_attention.takes(case.q, case.cache[..., ::2])
    assert not cpu_attention.takes(case.q.float().requires_grad_(), case.cache.float())
    with torch.no_grad():
        assert cpu_attention.takes(case.q.float().requires_grad_(), case.cache.float())


@pytest.mark.parametrize("window", [None, 20])
def test_the_same_as_torch(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([70, 3, 40], dtype=torch.float32, shared=2, page=32, window=window)
    positions = torch.tensor(case.positions)
    cos, sin = (torch.zeros(71, case.dim // 2) for _ in range(2))
    cos[positions], sin[positions] = case.turns
    cache = case.cache.nan_to_num().flatten(1, 2)

    def found() -> torch.Tensor:
        known = [position + 1 for position in case.positions]
        keys = attention.Keys(case.slots, positions, case.table, case.page, 71, cos, sin, known)
        return attention.attend_new(case.q, case.k, case.v, cache, keys, None, window)

    here = found()
    monkeypatch.setattr(cpu_attention, "DTYPES", ())
    torch.testing.assert_close(here, found())
