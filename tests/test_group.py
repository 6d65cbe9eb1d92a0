"""spmm_group: the bits of separate calls in one, and nothing held that the caller let go."""

import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from problems import DTYPES, KINDS, Kind, problem
from torch import Tensor

from alphaprune.kernels import cpu, group, spmm

ROWS = (96, 40, 17)


@pytest.fixture
def calls(native_only: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each native group call had."""
    made, original = [], cpu.bind_group

    def counting(isa: str, weights):
        run = original(isa, weights)
        return lambda x, biases, norm: made.append(len(weights)) or run(x, biases, norm)

    monkeypatch.setattr(cpu, "bind_group", counting)
    return made


def projections(k: int, tokens: int, weight: Kind, x: torch.dtype, rows=ROWS) -> tuple[list[spmm.Prepared], Tensor]:
    """Weights [N_i, K] of different density, and x for all of them."""
    made = [problem(n, k, tokens, 0.2 + 0.3 * i, weight, x, i) for i, n in enumerate(rows)]
    return [spmm.prepare(packed, f"layer {i}") for i, (_, packed, _) in enumerate(made)], made[0][2]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("weight", "x"), list(itertools.product(KINDS, DTYPES)))
def test_one_call_has_the_bits_of_separate_calls(calls: list[int], weight: Kind, x: torch.dtype) -> None:
    for k, tokens in itertools.product((64, 333), (1, 2, 3, 9, 40)):
        prepared, activations = projections(k, tokens, weight, x)
        for biases in (None, [torch.randn(96), None, torch.randn(34)[::2].to(x)]):
            wanted = [p(activations, b) for p, b in zip(prepared, biases or [None] * 3, strict=True)]
            calls.clear()
            for leading in ((tokens,), (1, tokens)):
                found = group.spmm_group(activations.view(*leading, k), prepared, biases)
                assert [tuple(y.shape) for y in found] == [(*leading, n) for n in ROWS]
                assert same([y.view(tokens, -1) for y in found], wanted)
            assert calls == [3, 3]


def test_mixed_values_share_a_call(calls: list[int]) -> None:
    for tokens in (2, 20):  # of int8 with one scale and with several, activations lie differently from some tokens on
        made = [problem(48, 200, tokens, 0.4, kind, torch.bfloat16, 3) for kind in KINDS]
        prepared, x = [spmm.prepare(packed) for _, packed, _ in made], made[0][2]
        assert same(group.spmm_group(x, prepared), [p(x) for p in prepared])
    assert calls == [5, 5]


def test_bits_do_not_depend_on_threads(calls: list[int]) -> None:
    before = torch.get_num_threads()
    for weight, tokens in itertools.product((torch.bfloat16, "int8/128"), (1, 6)):
        prepared, x = projections(512, tokens, weight, torch.bfloat16, (1040, 300, 300))
        wanted = [p(x) for p in prepared]
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                assert same(group.spmm_group(x, prepared), wanted)
        finally:
            torch.set_num_threads(before)


def test_what_cannot_share_a_call_takes_its_own(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "fast_in_torch", lambda dtype: True)
    prepared, x = projections(130, 2, torch.float32, torch.float32)
    other = spmm.prepare(prepared[0].packed, "layer", "reference")
    assert same(group.spmm_group(x, [prepared[1], other]), [prepared[1](x), other(x)])
    assert same(group.spmm_group(x, prepared[:1]), [prepared[0](x)]) and group.spmm_group(x, []) == []
    many = torch.randn(5000, 130)  # past all limits: expansion and torch
    assert same(group.spmm_group(many, prepared), [p(many) for p in prepared])
    assert not calls
    assert same(group.spmm_group(x, prepared), [p(x) for p in prepared]) and calls == [3]


def test_gradients_flow_through_each(calls: list[int]) -> None:
    prepared, x = projections(70, 3, torch.float32, torch.float32)
    biases = [torch.randn(n, requires_grad=True) for n in ROWS]
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    sum(y.square().sum() for y in group.spmm_group(leaf, prepared, biases)).backward()
    sum(p(twin, b).square().sum() for p, b in zip(prepared, biases, strict=True)).backward()
    assert torch.equal(leaf.grad, twin.grad) and not calls
    with torch.no_grad():
        assert same(group.spmm_group(leaf, prepared), [p(x) for p in prepared]) and calls == [3]


def test_compiles_without_a_graph_break() -> None:
    prepared, x = projections(70, 3, "int8", torch.float32)
    compiled = torch.compile(lambda x: group.spmm_group(x, prepared), fullgraph=True, backend="aot_eager")
    assert same(compiled(x), [p(x) for p in prepared])


def test_misfits_are_named_as_in_separate_calls() -> None:
    prepared, x = projections(70, 3, torch.float32, torch.float32)
    wide, _ = projections(71, 3, torch.float32, torch.float32)
    cases = [
        ((x[:, :69], prepared, None), r"layer 0: .*got x \(3, 69\)"),
        ((x, [prepared[0], wide[1]], None), r"layer 1: .*got x \(3, 70\)"),
        ((x, prepared, [None, torch.ones(41), None]), r"layer 1: .*bias \(41,\)"),
        ((x, prepared, [None, None, torch.ones(17, dtype=torch.int32)]), "layer 2: bias is torch.int32"),
        ((x.double(), prepared, None), "layer 0: x is torch.float64"),
        ((x, prepared, [None]), "3 packed weights and 1 biases"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            group.spmm_group(*arguments)


def test_a_group_holds_none_of_its_weights(calls: list[int]) -> None:
    prepared, x = projections(70, 1, torch.float32, torch.float32)
    first, alive = prepared[0], [weakref.ref(p) for p in prepared[1:]]
    group.spmm_group(x, prepared)
    del prepared
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    for _ in range(50):  # others come and go beside one that stays
        others, _ = projections(70, 1, torch.float32, torch.float32, (20, 30))
        assert same(group.spmm_group(x, [first, *others]), [p(x) for p in (first, *others)])
        del others
    for tokens in range(1, 200):
        group.spmm_group(torch.randn(tokens, 70), [first, first])
    assert len(first.groups) <= group.MOST_GROUPS
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_a_copy_is_another_weight(calls: list[int]) -> None:
    prepared, x = projections(70, 2, "int8", torch.float32)
    group.spmm_group(x, prepared)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        for one in twin:
            one.packed.scale.mul_(2)
        assert same(group.spmm_group(x, twin), [2 * p(x) for p in prepared])


def test_threads_of_python_share_a_group(calls: list[int]) -> None:
    prepared, _ = projections(512, 1, torch.bfloat16, torch.bfloat16, (512, 512))
    inputs = [torch.randn(1 + i, 512).bfloat16() for i in range(4)]
    wanted = [[p(x) for p in prepared] for x in inputs]
    wrong = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(30) if not same(group.spmm_group(inputs[index], prepared), wanted[index]))

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
