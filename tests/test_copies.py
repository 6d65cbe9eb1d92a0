"""What kernels keep beside packed weights: its bytes, that it is made once, and in the memory that there is for it."""

import logging
from collections.abc import Callable

import pytest
import torch
from conftest import make_config, make_model
from test_cuda import of_four

import alphaprune
from alphaprune.formats import Packed, sbt
from alphaprune.kernels import base, copies, delta_layout, nm_layout, pair_layout, spmm
from alphaprune.kernels.base import Kernel
from alphaprune.serving import copies as served
from alphaprune.serving import kv
from alphaprune.serving.engine import Engine
from alphaprune.serving.metrics import Metrics

F32 = torch.float32
SHAPES = ((16, 16), (96, 96), (200, 1000), (33, 12300))
FEW, MANY, PLAIN = "nm_mma_sp", "nm_cusparselt", "sbt_mma"  # the last one keeps nothing
BY_TOKENS = ((FEW, 4, 0), (MANY, None, 512), (PLAIN, None, 0))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins on the CPU, for 4 tokens at most, for 512 and more, and for any number; their names as they are bound.

    What they compute is right. A fourth one takes nothing, but what is chosen might change at its number of tokens.
    """
    made: list[str] = []

    def stand_in(name: str, most: int | None, least: int) -> Kernel:
        def bind(packed: Packed) -> base.Bound:
            made.append(name)
            return base.kernels()["reference"].bind(packed)

        return Kernel(name, "cpu", lambda: None, lambda *_: None, bind, most, least_tokens=least)

    reference = base.kernels()["reference"]
    found = [stand_in(*settings) for settings in BY_TOKENS]
    nothing = Kernel("scalar", "cpu", lambda: None, lambda *_: "takes nothing", reference.bind, most_tokens=2)
    known = {kernel.name: kernel for kernel in (nothing, *found, reference)}
    monkeypatch.setattr(base, "kernels", lambda: known)
    return made


def packed(n: int, k: int, dtype: torch.dtype = F32, density: float = 0.5) -> Packed:
    weight = torch.randn(n, k).to(dtype)
    return sbt.pack(weight * (of_four(weight, 2) if density == 0.5 else torch.rand(n, k) < density))


def test_a_kernel_is_bound_once_and_can_be_left_out(bound: list[str]) -> None:
    weight = spmm.prepare(packed(32, 64))
    assert {t: k.name for t, k in weight.kernels(600, F32).items()} == {2: FEW, 4: FEW, 511: PLAIN, 600: MANY}
    assert {t: k.name for t, k in weight.kernels(3, F32).items()} == {2: FEW, 3: FEW}
    x = torch.randn(600, 64)
    outputs = [weight(x[:tokens]) for tokens in (1, 2, 3, 4, 600)]
    assert bound == [FEW, MANY]
    assert weight.copied() == sum(copies.nbytes(name, weight.packed) for name in (FEW, MANY))
    weight.leave_out(FEW, "no room")
    assert {t: k.name for t, k in weight.kernels(600, F32).items()} == {2: PLAIN, 4: PLAIN, 511: PLAIN, 600: MANY}
    assert "nm_mma_sp: no room" in weight.choice(1, F32)[1]
    torch.testing.assert_close(weight(x[:4]), outputs[3])
    assert bound == [FEW, MANY, PLAIN] and weight.copied() == copies.nbytes(MANY, weight.packed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.5])
def test_bytes_are_those_of_the_layouts(shape: tuple[int, int], density: float) -> None:
    weight = packed(*shape, torch.bfloat16, density)
    if density == 0.5:
        assert copies.nbytes("nm_mma_sp", weight) == nm_layout.build(weight).nbytes
        assert copies.nbytes("nm_cusparselt", weight) == shape[0] * shape[1] * 9 // 16 * 2
    assert copies.nbytes("pair_mma", weight) == pair_layout.build(weight).nbytes
    made = delta_layout.build(weight)
    built, line = made.nbytes, len(made.counts) * 32 * (8 * 2 + 4)
    # By chance the largest part of a small weight has a line more than is foreseen, and all are as long as that.
    assert built <= copies.nbytes("delta_spmv", weight) * 1.02 + (line if shape[1] < 1000 else 100)
    if shape[1] >= 1000:
        assert copies.nbytes("delta_spmv", weight) <= 1.5 * built
    assert copies.nbytes("sbt_mma", weight) == 0 == copies.nbytes("avx2", weight)


@pytest.mark.parametrize(
    ("share", "left"), [(1.0, (FEW, MANY)), (0.99, (FEW,)), (0.5, (FEW,)), (0.49, ()), (0.0, ()), (-1.0, ())]
)
def test_what_has_no_room_is_left_out(bound: list[str], caplog, share: float, left: tuple[str, ...]) -> None:
    """The kernel for many tokens first. Requests make nothing afterwards."""
    weights = [spmm.prepare(packed(32, 128)) for _ in range(3)]
    each = [copies.nbytes(name, weights[0].packed) for name in (FEW, MANY)]
    assert each[0] == 2304 * 2 and each[1] == 32 * 128 * 9 // 16 * 4 == 2 * each[0]
    allowed = {1.0: 3 * sum(each), 0.99: 3 * sum(each) - 1, 0.5: 3 * each[0], 0.49: 3 * each[0] - 1}.get(share, share)
    with caplog.at_level(logging.WARNING, "alphaprune"):
        nbytes = served.make([served.Call([weight]) for weight in weights], 600, F32, allowed)
    assert nbytes == sum(weight.copied() for weight in weights) <= max(0, allowed)
    assert sorted(bound) == sorted([*left] * 3)
    gone = [name for name in (MANY, FEW) if name not in left]
    assert [record.getMessage().split(" is left out")[0] for record in caplog.records] == [f"kernel {n}" for n in gone]
    x, before = torch.randn(600, 128), len(bound)
    for tokens in (1, 3, 5, 511, 600):
        for weight in weights:
            weight(x[:tokens])
    assert set(bound[before:]) <= {PLAIN} and nbytes == sum(weight.copied() for weight in weights)


def test_copies_and_the_cache_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, free = torch.device("cuda:0"), [9 * 10**9]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    config = make_config(max_position_embeddings=10**7)
    assert kv.room_for_copies(gpu, None) == 4 * 10**9
    assert kv.room_for_copies(gpu, 7 * 10**9) == 10**9 and kv.room_for_copies(gpu, 9 * 10**9) < 0
    assert kv.room_for_copies(torch.device("cpu"), None) == float("inf")
    free[0] -= 4 * 10**9  # the copies
    found = kv.plan(config, F32, 64, 16, device=gpu)
    assert found.block_bytes == kv.block_bytes(config, F32, 16) and found.blocks == 4 * 10**9 // found.block_bytes


@pytest.fixture
def model() -> torch.nn.Module:
    """A packed 2:4 model."""
    made = make_model(2)
    plan = alphaprune.plan(alphaprune.analyze(made, fit=None), 0.5, "uniform", pattern="2:4")
    return alphaprune.sparsify(made, alphaprune.prune(made, plan, "magnitude"), tokens=None)


class Tokenizer:
    _tokenizer = None


def test_the_engine_says_what_the_copies_take(bound: list[str], model: torch.nn.Module) -> None:
    weights = served.weights_of(model)
    assert len(weights) == 21 and weights == served.weights_of(model)
    calls = served.calls_of(model)
    assert sorted(len(call.weights) for call in calls) == sorted([3, 1, 2, 1] * 3)
    assert {id(weight) for call in calls for weight in call.weights} == set(map(id, weights))
    nbytes = served.make(calls, 512, F32, float("inf"))
    assert nbytes > 0
    metrics = Metrics()
    engine = Engine(model, Tokenizer(), kv.plan(model.config, F32, 2, 16, blocks=8), 2, metrics.tell)
    metrics.watch(engine)
    told = engine.memory()
    assert told["copies"] == nbytes and told["limit"] == told["weights"] + nbytes + told["kv"] + kv.SCRATCH
    assert told["scratch"] == max(0, told["allocated"] - told["weights"] - nbytes - told["kv"])
    assert metrics.registry.get_sample_value("alphaprune_copies_bytes") == nbytes


def test_compiled_steps_have_copies_of_their_own(bound: list[str], model: torch.nn.Module) -> None:
    """The op of torch.compile knows no layers; what was made for it is found by its calls."""
    served.make(served.calls_of(model, direct=False), 512, F32, float("inf"))
    made, layer = len(bound), model.model.layers[0].mlp.up_proj
    assert made == 2 * 21 and all(weight.copied() == 0 for weight in served.weights_of(model))
    tensors = (layer.weight, layer.weight_mask, layer.weight_offsets, layer.weight_scale)
    for tokens in (1, 4, 512):
        torch.ops.alphaprune.spmm(torch.randn(tokens, 96), *tensors, *layer.packed.shape, None)
    assert len(bound) == made


@pytest.mark.parametrize("given", [{}, {"kv_blocks": 8}, {"kv_memory": 1e-3}, {"copies": 0}, {"copies": 1.0}], ids=str)
def test_serve_makes_them_before_the_cache(bound, model, monkeypatch: pytest.MonkeyPatch, given: dict) -> None:
    from alphaprune.commands import serve

    order: list[str] = []

    def told(name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            order.append(name)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(served, "make", told("make", served.make))
    monkeypatch.setattr(kv, "plan", told("plan", kv.plan))
    asked = []
    monkeypatch.setattr(kv, "room_for_copies", lambda device, nbytes: asked.append(nbytes) or float("inf"))
    options = dict.fromkeys(("kv_blocks", "kv_memory", "copies")) | {"max_running": 2, "block_size": 16}
    options |= {"engine": "auto", "steps": "eager", "api_key": None, "queue": 1, "max_body": 10**6, **given}
    service = serve._service(model, Tokenizer(), "m", options)
    service.engine.stop()
    wanted = {"kv_blocks": 8 * kv.block_bytes(model.config, F32, 16), "kv_memory": 1e6}
    assert asked == [next((wanted[name] for name in given if name in wanted), None)]
    assert order == ["make", "plan"] and (service.engine.memory()["copies"] == 0) == (given.get("copies") == 0)


def test_a_kernel_that_is_taken_again_from_many_tokens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that begins where the machine says."""
    reference = base.kernels()["reference"]
    rest = (lambda: None, lambda *_: None, reference.bind)
    again = Kernel(FEW, "cpu", *rest, most_tokens=4, again_from=lambda: 100)
    never = Kernel(MANY, "cpu", *rest, most_tokens=8, least_tokens=lambda: 3, again_from=lambda: None)
    plain = Kernel(PLAIN, "cpu", *rest)
    monkeypatch.setattr(base, "kernels", lambda: {one.name: one for one in (again, never, plain)})
    assert base.limits((32, 64), F32, F32) == (2, 4, 8, 99)
    names = [base.choose((32, 64), tokens, F32, F32)[0].name for tokens in (1, 4, 5, 8, 9, 99, 100, 10**6)]
    assert names == [FEW, FEW, MANY, MANY, PLAIN, PLAIN, FEW, FEW]
    monkeypatch.setattr(base, "kernels", lambda: {one.name: one for one in (never, plain)})
    assert [base.choose((32, 64), tokens, F32, F32)[0].name for tokens in (2, 3, 9)] == [PLAIN, MANY, PLAIN]
    assert (again.many, never.many, plain.many) == (True, False, True)
