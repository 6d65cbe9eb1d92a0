"""How sbt_wgmma shares its work: what it chooses beside what bench/wide.py measured, and the model of that choice."""

import ctypes
import shutil
import sys
from pathlib import Path

import cuda_face
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import wide_fit  # noqa: E402

CASES = wide_fit.cases(wide_fit.ROWS)


@pytest.fixture(scope="module")
def choose(tmp_path_factory: pytest.TempPathFactory):
    """The choice of csrc/cuda/launch_wide.cuh: (groups, slices, splits)."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = cuda_face.build("wgmma", tmp_path_factory.mktemp("wide"))

    def call(rows: int, cols: int, value_bytes: int, tokens: int, shared: int = wide_fit.SHARED) -> tuple[int, ...]:
        counts = (ctypes.c_int64 * 6)(rows, cols, value_bytes // 16, tokens, wide_fit.PROCESSORS, shared)
        way = (ctypes.c_int64 * 3)()
        library.sbt_wgmma_way(counts, way)
        return tuple(way)

    return call


def test_the_ways_that_are_chosen_are_nearly_the_fastest(choose) -> None:
    over = []
    for case in CASES:
        density = 1 - case.row["sparsity"]
        way = choose(*case.row["shape"], wide_fit.value_bytes(density), case.row["tokens"])
        assert way == wide_fit.chosen(case, wide_fit.constants()), "the script's model is that of the source"
        over.append(case.over(way))
    assert max(over) < 1.1 and sum(over) / len(over) < 1.01


def test_what_does_not_fit_has_no_way(choose) -> None:
    assert choose(4096, 4096, 4096, 32, shared=16384) == (0, 0, 0)
    assert wide_fit.way((4096, 4096), 0.5, 256, 2, 2, 1) is None, "four stages of 256 tokens"


def test_constants_are_found_again() -> None:
    """From rows as the model has them, other constants choose as well."""
    known = [
        wide_fit.Case(case.row, {n: (way, way.clocks(wide_fit.constants()) / 1e9) for n, (way, _) in case.ways.items()})
        for case in CASES
    ]
    assert wide_fit.over(known, wide_fit.constants()) == 1
    worse = [constant * (4 if i % 2 else 0.25) for i, constant in enumerate(wide_fit.constants())]
    assert wide_fit.over(known, worse) > 1.02


def test_it_says_how_good_they_are(capsys: pytest.CaptureFixture) -> None:
    assert wide_fit.main([]) == 0
    assert capsys.readouterr().out.startswith(f"{len(CASES)} cases; the ways that are chosen take 1.0")
