"""The reduction to three diagonals and the bisection against LAPACK: on a GPU where there is one, and in Triton's
interpreter everywhere."""

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from alphaprune import cusolver, tridiagonal

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if os.environ.get("ALPHAPRUNE_REQUIRE_EXT") != "1":
    pytest.importorskip("triton")

# As in test_triton.py: kernels run on a GPU in this process, or in the interpreter of a process of their own.
runs = (lambda test: test) if INTERPRETED else pytest.mark.gpu
DTYPES = (torch.float32, torch.float64)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def device() -> str:
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; test_in_the_interpreter runs it on the CPU")
    return "cuda"


def symmetric(batch: int, n: int, seed: int = 0) -> Tensor:
    """Of both signs, float64 [batch, n, n]."""
    half = torch.randn(batch, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return half @ half.mT - n * torch.eye(n, dtype=torch.float64)


def assert_solved(matrices: Tensor, dtype: torch.dtype, device: str, *sizes: int) -> None:
    """Backward stable: eigenvalues of a matrix within a small multiple of n·ε of this one, by its lower triangle."""
    exact = matrices.to(dtype).double()
    lower = torch.where(torch.ones_like(exact).tril().bool(), exact, float("nan")).to(device, dtype)
    before = lower.clone()
    found = tridiagonal.solve(lower, *sizes).cpu()
    torch.testing.assert_close(lower, before, rtol=0, atol=0, equal_nan=True)
    wanted = torch.linalg.eigvalsh(exact)
    assert found.shape == wanted.shape and found.dtype == dtype and bool((found.diff() >= 0).all())
    allowed = 4 * exact.shape[-1] * torch.finfo(dtype).eps * wanted.abs().amax(1, keepdim=True)
    assert bool(((found.double() - wanted).abs() <= allowed).all()), (found.double() - wanted).abs().max() / allowed


# batch, n, columns of a panel, rows of a tile: the last panel full, short, or one column; tiles odd, even, one
SIZES = [(1, 1, 4, 4), (1, 2, 4, 4), (2, 3, 2, 4), (2, 8, 4, 4), (1, 13, 4, 8), (1, 11, 8, 64)]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "panel", "tile"), SIZES if INTERPRETED else [])
def test_small_panels_and_tiles(device: str, dtype, batch: int, n: int, panel: int, tile: int, monkeypatch) -> None:
    monkeypatch.setattr("alphaprune.tridiagonal_triton.GATHERED", 4)
    assert_solved(symmetric(batch, n, n), dtype, device, panel, tile)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n"), [(1, 34)] if INTERPRETED else [(5, 1), (3, 33), (2, 257), (7, 640), (1, 1100)])
def test_every_size(device: str, dtype: torch.dtype, batch: int, n: int) -> None:
    assert_solved(symmetric(batch, n, n), dtype, device)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_matrices(device: str, dtype: torch.dtype) -> None:
    """Nothing to turn, one direction, equal eigenvalues, entries whose squares leave the range of the dtype."""
    n, generator = 6, torch.Generator().manual_seed(0)
    column, far = torch.randn(n, dtype=torch.float64, generator=generator), torch.finfo(dtype).max ** 0.8
    special = [
        *(torch.zeros(n, n).double(), torch.eye(n).double(), torch.arange(n).flip(0).double().diag()),
        *(torch.outer(column, column), torch.ones(n, n).double() + torch.eye(n).double()),
        *(symmetric(1, n)[0] * far, symmetric(1, n)[0] / far),
    ]
    for matrix in special:
        assert_solved(matrix[None], dtype, device, 4, 8)
    bad = symmetric(4, n).to(device, dtype)
    bad[1, 3, 2], bad[2, 3, 2], bad[3, 4, 4] = float("nan"), float("inf"), -float("inf")
    found = tridiagonal.solve(bad, 4, 8).cpu()
    assert bool(found[0].isfinite().all()) and bool(found[1:].isnan().all())


@pytest.mark.gpu
def test_a_route_of_its_own(device: str) -> None:
    gram = symmetric(2, 300)
    found = cusolver.eigvalsh(gram.to(device), "tridiagonal").cpu()
    torch.testing.assert_close(found, torch.linalg.eigvalsh(gram), rtol=0, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_repeats_it(device: str, dtype: torch.dtype) -> None:
    """On other matrices, whatever was there before; of another size without it."""
    with tridiagonal.recording():
        for seed in range(4):
            assert_solved(symmetric(3, 200, seed), dtype, device)
        assert_solved(symmetric(2, 64), dtype, device)
        assert_solved(symmetric(3, 200), dtype, device)


def test_what_is_recorded_when(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """From the second batch that is like the one before on, if there is memory."""
    said, room = [], [True]

    def record(like: Tensor):
        if not room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        given = torch.zeros_like(like)
        main, beside = torch.zeros(like.shape[:2]), torch.zeros(like.shape[:2])
        said.append("record")

        def replay() -> None:
            said.append("replay")
            main.copy_(given.diagonal(dim1=1, dim2=2))

        return SimpleNamespace(replay=replay), given, main, beside

    monkeypatch.setattr(tridiagonal, "_record", record)
    monkeypatch.setattr(
        tridiagonal, "reduce", lambda matrices: said.append("reduce") or (matrices[:, 0], matrices[:, 1])
    )
    recorder, small, large = tridiagonal.Recorder(), torch.randn(2, 3, 3), torch.randn(2, 5, 5)
    for matrices in (small, small, small + 1, large, small, small, small):
        recorder(matrices)
    assert said == ["reduce", "record", "replay", "replay", "reduce", "reduce", "record", "replay", "replay"]
    first, second = recorder(small), recorder(small + 1)
    assert torch.equal(first[0], small.diagonal(dim1=1, dim2=2)), "a result is not overwritten by the next one"
    assert torch.equal(second[0], first[0] + 1)
    said.clear()
    room[0], recorder = False, tridiagonal.Recorder(since=0)
    recorder(small)
    room[0] = True
    recorder(small)
    assert said == ["reduce", "reduce"] and caplog.messages == [
        "eigenvalues without a CUDA graph, because CUDA out of memory"
    ]
    with tridiagonal.recording(recorder):
        assert tridiagonal._recorder is recorder
    assert tridiagonal._recorder is None


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = symmetric(1, 5)
    with pytest.raises(tridiagonal.Unusable, match="needs matrices on a CUDA device, and these are on cpu"):
        cusolver.eigvalsh(gram, "tridiagonal")
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(tridiagonal, "LARGEST", 4)
    assert tridiagonal.missing(gram) == "the reduction by Triton takes matrices of up to 4 rows, and these have 5"
    monkeypatch.setattr(tridiagonal, "LARGEST", 5)
    assert tridiagonal.missing(gram) is None

    def no_compiler(gram: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(tridiagonal, "solve", no_compiler)
    error: Exception = FileNotFoundError("no gcc")
    with pytest.raises(tridiagonal.Unusable, match=r"Triton cannot make or launch the kernels: no gcc"):
        tridiagonal.eigvalsh(gram)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        tridiagonal.eigvalsh(gram)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tridiagonal.missing(gram) == "Triton is not installed"


class Made:
    """A kernel that was made: `launched` gets the grid, the arguments and whether Triton was asked what to launch."""

    def __init__(self, launched: list) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*arguments: object, num_warps: int | None = None, stream: int | None = None) -> "Made":
            self.launched.append((grid, arguments, num_warps is not None))
            return self

        return run


@pytest.mark.skipif(INTERPRETED, reason="kernels are launched otherwise there")
def test_all_but_the_first_launch_go_around_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same arguments in the same order, tensors by their addresses, and on grids that become smaller."""
    kernels = importlib.import_module("alphaprune.tridiagonal_triton")
    names = {name: getattr(kernels, name).arg_names for name in ("gather_kernel", "step_kernel", "multiply_kernel")}
    launched: dict[str, list] = {name: [] for name in names}
    for name, calls in launched.items():
        monkeypatch.setattr(kernels, name, Made(calls))
    gram = symmetric(2, 10)
    v, w, *others, main, beside = tridiagonal.spaces(gram, 4, 4)
    panel = kernels.Panel(gram, v, w, *others, main, beside, 4)
    for begin, column in ((0, 0), (0, 1), (4, 0)):
        panel.step(begin, column, True)
        panel.multiply(begin, column)
    for name, calls in launched.items():
        assert [asked for *_, asked in calls] == [True, False, False]
        given = [dict(zip(names[name], arguments, strict=True)) for _, arguments, _ in calls]
        tensors = [key for key, value in given[0].items() if isinstance(value, Tensor)]
        assert [[one[key] for key in tensors] for one in given[1:]] == [
            [given[0][key].data_ptr() for key in tensors]
        ] * 2
        assert [(one["begin"], one["column"]) for one in given] == [(0, 0), (0, 1), (4, 0)]
        assert given[0]["n"] == 10 and given[0]["PANEL"] == 4 and given[0].get("TILE", 4) == 4
        assert given[0].get("a", gram) is gram and given[0]["v"] is v and given[0]["w"] is w
    assert [grid for grid, *_ in launched["gather_kernel"]] == [(1, 2, 1)] * 3
    assert [grid for grid, *_ in launched["step_kernel"]] == [(2, 1, 1)] * 3
    assert [grid for grid, *_ in launched["multiply_kernel"]] == [(4, 3, 2), (4, 3, 2), (3, 3, 2)]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it is what runs there")
def test_in_the_interpreter() -> None:
    versions = [tuple(map(int, version(package).split(".")[:2])) for package in ("triton", "numpy")]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 fails with numpy 2.4 and later")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == 2 * len(SIZES) + 6, done.stdout
