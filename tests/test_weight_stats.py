"""Columns of many layers side by side: the same as of each alone, whatever the threads, the room and the order."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alphaprune import alpha, farms, spectrum, weight_stats
from alphaprune.weight_stats import WeightStats

COLUMNS = farms.columns
ALL = WeightStats("robust", "cpu", "auto", magnitudes=True, windows=None)


def units() -> dict[str, dict[str, Tensor]]:
    """Two units of large layers and one of small ones; one weight is so steep that it needs float64."""
    generator = torch.Generator().manual_seed(3)

    def weight(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=generator)

    return {
        "square": {"q": weight(270, 270), "k": weight(270, 270) + 20.0},
        "small": {"a": weight(40, 60), "b": weight(40, 60), "c": weight(40, 60)},
        "wide": {"down": weight(270, 600)},
    }


def shapes(*blocks: dict[str, dict[str, Tensor]]) -> set[tuple[int, ...]]:
    return {tuple(weight.shape) for block in blocks for layers in block.values() for weight in layers.values()}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("room", [1, 4 << 30])
def test_side_by_side_is_as_alone(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stats, "AT_ONCE_BYTES", room)
    made, solve, seen = units(), spectrum.solve_all, set()
    torch.set_num_threads(1)
    alone = {unit: ALL.entry(layers) for unit, layers in made.items()}

    def watched(weights, *rest):
        seen.add((tuple(weights[0].shape), len(weights), torch.get_num_threads(), threading.get_ident()))
        return solve(weights, *rest)

    monkeypatch.setattr(spectrum, "solve_all", watched)
    torch.set_num_threads(2)
    (found,) = ALL.of_blocks([made], shapes(made))
    assert torch.get_num_threads() == 2
    assert list(found) == list(made) and [list(f["layers"]) for f in found.values()] == [list(u) for u in made.values()]
    assert {(shape, count) for shape, count, *_ in seen} == {((270, 270), 1), ((40, 60), 3), ((270, 600), 1)}
    assert {threads for *_, threads, _ in seen} == ({2} if room == 1 else {1})  # one after another with all, or not
    if room == 1:
        assert len({thread for *_, thread in seen}) == 1
    for unit, wanted in alone.items():
        assert found[unit]["solvers"] == wanted["solvers"]
        for name, layer in wanted["layers"].items():
            got = found[unit]["layers"][name]
            assert got["columns"] == pytest.approx(layer["columns"], rel=1e-4, abs=1e-9)
            assert got["series"].keys() == layer["series"].keys()
    assert found["square"]["solvers"] == ["gram float32", "gram float64"]


def test_the_most_costly_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(
        WeightStats, "entry", lambda _, part: order.append(list(part)) or {"layers": part, "solvers": []}
    )
    torch.set_num_threads(1)
    list(ALL.of_blocks([units()], shapes(units())))
    assert order == [["down"], ["q"], ["k"], ["a", "b", "c"]]


def test_the_layer_without_a_spectrum_is_named() -> None:
    made = units()
    made["square"]["k"] = torch.zeros(270, 270)
    with pytest.raises(ValueError, match=r"^k: "):
        list(ALL.of_blocks([made], shapes(made)))


def test_the_next_block_is_begun_with_before_one_is_done_and_no_third_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two threads and three layers a block: the thread that is free takes the first of the next block."""
    read, begun, go = [], [], threading.Event()

    def entry(_, part: dict[str, Tensor]) -> dict:
        begun.extend(part)
        if "0 c" in part:  # the last of the first block waits until one of the second is begun with
            assert go.wait(30)
        if any(name.startswith("1") for name in part):
            go.set()
        return {"layers": dict.fromkeys(part, len(read)), "solvers": []}

    def blocks():
        for block in range(3):
            read.append(block)
            yield {f"{block}": {f"{block} {name}": torch.ones(270, 270) for name in "abc"}}

    monkeypatch.setattr(WeightStats, "entry", entry)
    torch.set_num_threads(2)
    found = ALL.of_blocks(blocks(), {(270, 270)})
    first = next(found)
    assert list(first["0"]["layers"]) == ["0 a", "0 b", "0 c"] and read == [0, 1]
    assert [list(entries) for entries in found] == [["1"], ["2"]] and read == [0, 1, 2]
    assert sorted(begun) == [f"{block} {name}" for block in range(3) for name in "abc"]


def test_of_nothing_comes_nothing() -> None:
    assert list(ALL.of_blocks([], [])) == []


def test_what_fails_in_a_later_block_comes_after_what_was_found() -> None:
    made = units()
    made["square"]["k"] = torch.zeros(270, 270)
    found = ALL.of_blocks([units(), made, units()], shapes(made))
    assert list(next(found)) == list(made)
    with pytest.raises(ValueError, match=r"^k: "):
        next(found)


@pytest.mark.parametrize("windows", [None, farms.Windows(20, 2)])
def test_blocks_on_a_gpu_are_as_alone(windows, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in its place: one call for all layers of a block, and another thread for the fits."""
    torch.set_num_threads(1)  # with more, sums of float32 may come out otherwise
    solved, fitted, solve, fit = [], set(), spectrum.solve_all, alpha.fit
    work, own = WeightStats("robust", "cuda", "auto", True, windows), threading.get_ident()
    alone = {unit: replace(work, device="cpu").entry(layers) for unit, layers in units().items()}

    def on_cpu(weights, need, device, solver):
        assert threading.get_ident() == own
        solved.append((len(weights), device))
        return solve(weights, need, "cpu", solver)

    monkeypatch.setattr(spectrum, "solve_all", on_cpu)
    monkeypatch.setattr(farms, "columns", lambda weight, given, device: COLUMNS(weight, given, "cpu"))
    monkeypatch.setattr(alpha, "fit", lambda *given, **named: fitted.add(threading.get_ident()) or fit(*given, **named))
    read = []
    blocks = (read.append(number) or units() for number in range(3))
    found = work.of_blocks(blocks, shapes(units()))
    first = next(found)
    assert read == [0, 1] and [count for count, device in solved if device == "cuda"] == [6, 6]
    assert fitted - {own}
    for block in (first, *found):
        assert block == {unit: wanted for unit, wanted in alone.items()}
