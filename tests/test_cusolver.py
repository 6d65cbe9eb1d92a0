"""The calls of cuSOLVER against a stand-in written in C, which checks every argument and solves on host memory; and,
where there is a GPU, against the CPU."""

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alphaprune import alpha, cusolver, spectrum, tridiagonal
from alphaprune.cusolver import Library, Solver, Unusable

SOURCE = Path(__file__).parent / "native" / "cusolver_stub.c"
STREAM = 0x5EED0
PLENTY = 1 << 40
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}  # of the largest eigenvalue

pytestmark = pytest.mark.usefixtures("one_thread")


def compiled(folder: Path, *options: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of cuSOLVER")
    library = folder / "libcusolver.so.11"
    command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", *options, "-shared", "-fPIC", "-o", library, SOURCE]
    subprocess.run([*map(str, command), "-lm"], check=True)
    return library


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A library of its own for each test, because it counts."""
    return compiled(tmp_path)


class Counts:
    """The stand-in's counters, to read and to set."""

    def __init__(self, path: Path) -> None:
        object.__setattr__(self, "library", ctypes.CDLL(str(path)))

    def _at(self, name: str):
        kind = {"status": ctypes.c_int, "stream": ctypes.c_size_t}.get(name, ctypes.c_int64)
        return kind.in_dll(self.library, f"stub_{name}")

    def __getattr__(self, name: str) -> int:
        return self._at(name).value

    def __setattr__(self, name: str, value: int) -> None:
        self._at(name).value = value


def solver(path: Path, free: int = PLENTY) -> Solver:
    return Solver(Library(str(path)), lambda: free, lambda: STREAM)


def matrices(batch: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Symmetric positive matrices by their lower triangles; above them is what no one may read."""
    half = torch.randn(batch, n, n + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (half @ half.mT).to(dtype).tril() + torch.full((n, n), float("nan"), dtype=dtype).triu(1)


def truth(gram: Tensor) -> Tensor:
    lower = gram.double().nan_to_num().tril()
    return torch.linalg.eigvalsh(lower + lower.tril(-1).mT)


def assert_solved(found: Tensor, gram: Tensor) -> None:
    wanted = truth(gram)
    assert found.shape == wanted.shape and found.dtype == gram.dtype
    error = (found.double() - wanted).abs() / wanted[:, -1:]
    assert bool((error <= TOLERANCE[gram.dtype]).all()), error


@pytest.mark.parametrize("route", ["batched", "looped"])
@pytest.mark.parametrize("dtype", cusolver.KINDS)
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 2), (7, 13), (2, 40)])
def test_every_route_gives_the_eigenvalues(stub: Path, route, dtype, batch, n) -> None:
    gram = matrices(batch, n, dtype)
    before = gram.clone()
    found = cusolver.eigvalsh(gram, route, solver(stub))
    assert_solved(found, gram)
    assert torch.equal(gram.nan_to_num(7), before.nan_to_num(7)), "the caller's matrices were changed"
    counts = Counts(stub)
    assert (counts.calls, counts.matrices) == (1 if route == "batched" else batch, batch)
    assert counts.stream == STREAM


def test_matrices_that_are_not_contiguous(stub: Path) -> None:
    wide = matrices(3, 30).mT.contiguous().mT
    for gram in (wide, matrices(6, 12)[::2], matrices(1, 12).expand(3, 12, 12)):
        assert not gram.is_contiguous()
        assert_solved(cusolver.eigvalsh(gram, "batched", solver(stub)), gram)


@pytest.mark.parametrize("free", [1 << 13, 1 << 15, 1 << 17])
def test_chunks_fit_into_the_free_memory(stub: Path, free: int) -> None:
    """One matrix of float64 takes 800 bytes, its share of the workspace 512, and 80 more are for the call."""
    counts, gram = Counts(stub), matrices(40, 10)
    counts.per_matrix = 512
    assert_solved(cusolver.eigvalsh(gram, "batched", solver(stub, free)), gram)
    room = cusolver.SHARE * free
    fit = min(40, int((room - 80) // 1312))
    assert counts.largest_batch <= fit, "more memory than was free"
    assert counts.calls == -(-40 // fit) and counts.matrices == 40


def test_chunks_keep_the_limits_of_one_call(stub: Path, monkeypatch) -> None:
    assert cusolver.most(4096, torch.float64) == 15 and cusolver.most(4096, torch.float32) == 31
    assert cusolver.most(40_000, torch.float64) == 1 and cusolver.most(3, torch.float32) == cusolver.MOST_MATRICES
    monkeypatch.setattr(cusolver, "MOST_BYTES", 5 * 8 * 9 + 3)
    counts, gram = Counts(stub), matrices(11, 3)
    assert_solved(cusolver.eigvalsh(gram, "batched", solver(stub)), gram)
    assert (counts.calls, counts.largest_batch) == (3, 4), "11 in chunks of 5 at most are 4, 4 and 3"
    monkeypatch.setattr(cusolver, "MOST_MATRICES", 2)
    assert_solved(cusolver.eigvalsh(gram, "batched", solver(stub)), gram)
    assert counts.calls == 3 + 6


def test_memory_for_not_even_one_matrix(stub: Path, caplog) -> None:
    gram = matrices(2, 10)
    with pytest.raises(Unusable, match=r"one matrix \[10, 10\] and its workspace need 944 bytes, and 80 may be taken"):
        cusolver.eigvalsh(gram, "batched", solver(stub, 100))
    assert_solved(cusolver.eigvalsh(gram, solver=solver(stub, 100)), gram)
    assert Counts(stub).calls == 0 and "eigenvalues by torch.linalg, because one matrix" in caplog.text


def test_what_was_not_solved_is_named_and_solved_again(stub: Path, caplog) -> None:
    gram = matrices(5, 6)
    counts = Counts(stub)
    counts.unsolved = 3
    with caplog.at_level(logging.WARNING, "alphaprune"):
        found = cusolver.eigvalsh(gram, solver=solver(stub))
    assert_solved(found, gram)
    assert "has not solved matrices 3 (info 3) of 5 [6, 6]; torch.linalg solves them again" in caplog.text
    counts.unsolved = 0
    with pytest.raises(Unusable, match=r"matrices 0 \(info 3\) of 5"):
        cusolver.eigvalsh(gram, "batched", solver(stub))


def test_a_refused_call_falls_back_with_one_line(stub: Path, caplog) -> None:
    gram, made = matrices(4, 8), solver(stub)
    Counts(stub).status = 6
    cusolver._log_once.cache_clear()
    for _ in range(3):
        assert_solved(cusolver.eigvalsh(gram, solver=made), gram)
    assert caplog.text.count("returned 6 (execution failed)") == 1
    for route in ("batched", "looped"):
        with pytest.raises(Unusable, match="returned 6"):
            cusolver.eigvalsh(gram, route, made)
    with pytest.raises(Unusable, match="cusolverDnCreate returned 6"):
        solver(stub)


def test_memory_that_is_in_pieces_falls_back(stub: Path, monkeypatch, caplog) -> None:
    """What the driver calls free may not be had in one piece."""

    def scarce(self, *arguments) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Solver, "eigenvalues", scarce)
    gram, made = matrices(2, 6), solver(stub)
    assert_solved(cusolver.eigvalsh(gram, solver=made), gram)
    assert "because CUDA out of memory" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        cusolver.eigvalsh(gram, "batched", made)


def test_an_old_library_is_named(tmp_path: Path) -> None:
    path = compiled(tmp_path, "-DOLD")
    with pytest.raises(Unusable, match=r"has no cusolverDnXsyevBatched_bufferSize: it is 11\.6\.4, wanted 11\.7\.1"):
        Library(str(path))
    with pytest.raises(Unusable, match="cannot be loaded"):
        Library(str(tmp_path / "none.so"))
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(Unusable, match="cannot be loaded"):
        Library(str(tmp_path / "text.so"))


def test_where_libraries_are_looked_for(tmp_path: Path, monkeypatch) -> None:
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 1   "
    maps.write_text(f"{line}/usr/lib/libm.so\n{line}/a b/libcusolver.so.12\n{line}/a b/libcusolver.so.12\n7f-80 rw-p\n")
    assert list(cusolver.paths(str(maps), "13.0")) == ["/a b/libcusolver.so.12"]
    maps.write_text("")
    for package, name in (("cusolver", "libcusolver.so.11"), ("cu13", "libcusolver.so.12")):
        (tmp_path / "nvidia" / package / "lib").mkdir(parents=True)
        (tmp_path / "nvidia" / package / "lib" / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for cuda, package, name in (
        ("12.6", "cusolver", "libcusolver.so.11"),
        ("13.0", "cu13", "libcusolver.so.12"),
    ):
        found = list(cusolver.paths(str(maps), cuda))
        assert (found[0], found[-1]) == (str(tmp_path / "nvidia" / package / "lib" / name), name)
        assert all("nvidia" in path for path in found[1:-1])  # what torch brings where it has CUDA
    assert list(cusolver.paths(str(tmp_path / "no maps"), None)) == []


def test_without_any_library_the_reason_is_a_sentence(monkeypatch, tmp_path: Path) -> None:
    cusolver._library.cache_clear()
    monkeypatch.setattr(cusolver, "paths", lambda: iter([]))
    try:
        assert cusolver.status() == "no libcusolver is loaded or lies beside torch"
        with pytest.raises(Unusable, match="no libcusolver"):
            cusolver.eigvalsh(matrices(1, 3), "batched")
        cusolver._library.cache_clear()
        monkeypatch.setattr(cusolver, "paths", lambda: iter(["/nowhere.so", str(compiled(tmp_path))]))
        assert cusolver.status() is None
        with pytest.raises(Unusable, match="the matrices are on cpu"):
            cusolver.eigvalsh(matrices(1, 3), "batched")
    finally:
        cusolver._library.cache_clear()


def test_the_table_chooses(stub: Path, monkeypatch) -> None:
    rows = ((8, 1, "torch"), (10, 3, "looped"), (12, 1, "batched"))
    monkeypatch.setattr(cusolver, "FASTEST", {torch.float64: rows})
    counts, made = Counts(stub), solver(stub)
    for n, batch, calls in ((8, 3, 0), (9, 3, 3), (10, 4, 4), (10, 2, 1), (11, 3, 1), (13, 3, 0)):
        counts.calls = 0
        gram = matrices(batch, n)
        assert_solved(cusolver.eigvalsh(gram, solver=made), gram)
        assert counts.calls == calls, n


def test_tables_rise_and_know_their_routes() -> None:
    for dtype in cusolver.KINDS:
        rows = cusolver.FASTEST[dtype]
        assert [n for n, *_ in rows] == sorted(n for n, *_ in rows) and rows[-1][:2] == (cusolver.LARGEST, 1)
        assert {route for *_, route in rows} <= {"batched", "looped", "torch", "tridiagonal"}
        assert all(n <= tridiagonal.LARGEST for n, _, route in rows if route == "tridiagonal")
    assert cusolver.LARGEST**2 < 2**31 <= (cusolver.LARGEST + 1) ** 2


def test_refusals_and_empty_batches(stub: Path) -> None:
    for gram in (torch.ones(3, 3), torch.ones(2, 3, 4), torch.ones(2, 3, 3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"wanted \[b, n, n\]"):
            cusolver.eigvalsh(gram)
    assert cusolver.eigvalsh(torch.ones(0, 3, 3), "batched", solver(stub)).shape == (0, 3)
    assert cusolver.eigvalsh(torch.ones(4, 0, 0)).shape == (4, 0)


def test_spectra_are_solved_by_it(stub: Path, monkeypatch) -> None:
    """What spectrum.solve hands over: lower triangles, of several matrices at once."""
    made, solve = solver(stub), cusolver.eigvalsh
    monkeypatch.setattr(cusolver, "eigvalsh", lambda gram: solve(gram, "batched", made))
    generator = torch.Generator().manual_seed(3)
    weights = [0.02 * torch.randn(24, 60, generator=generator) for _ in range(5)]
    for solver_name in spectrum.SOLVERS:
        for weight, (values, used) in zip(weights, spectrum.solve(weights, "tail", "cpu", solver_name), strict=True):
            wanted = torch.linalg.svdvals(weight.double()).square().flip(0)
            assert bool(((values - wanted).abs() <= TOLERANCE[used.gram] * wanted[-1]).all())
    counts = Counts(stub)
    assert (counts.calls, counts.matrices, counts.largest_batch) == (2, 10, 5)


def test_as_many_together_as_the_device_holds() -> None:
    side = spectrum.BATCHED_UP_TO
    assert [spectrum.together(shape, 7, None) for shape in ((side, 999), (999, side), (side + 1, 999))] == [7, 7, 1]
    each = 16 * 11008 * 4096 + 8 * 4096 * 4096  # float32, scaled, float64; and its Gram matrix
    assert [spectrum.together((11008, 4096), 7, 2 * each * k + 1) for k in (0, 1, 6, 100)] == [1, 1, 6, 7]


WRONG = {
    "triangle": (lambda m: m.setattr(cusolver, "UPPER", 0), 7),
    "vectors": (lambda m: m.setattr(cusolver, "NO_VECTORS", 1), 3),
    "kinds": (lambda m: m.setattr(cusolver, "KINDS", {torch.float32: 1, torch.float64: 0}), None),
    "kind that is none": (lambda m: m.setattr(cusolver, "KINDS", {torch.float64: 2}), 6),
}


@pytest.mark.parametrize("planted", WRONG)
def test_wrong_constants_are_seen(stub: Path, monkeypatch, planted: str) -> None:
    """That the stand-in can fail: what it is told is what it does."""
    plant, position = WRONG[planted]
    made, gram = solver(stub), matrices(3, 6)
    plant(monkeypatch)
    try:
        found = cusolver.eigvalsh(gram, "batched", made)
    except Unusable as error:
        assert "invalid value" in str(error) and Counts(stub).wrong == position
        return
    with pytest.raises(AssertionError):
        assert_solved(found, gram)


SWAPS = {  # positions of two arguments of cusolverDnXsyevBatched, from 0 → the argument, from 1, that is refused
    "handle and params": (0, 1, 1),
    "n and its kind": (4, 5, 6),
    "matrices and eigenvalues": (6, 9, 7),
    "bytes on host and device": (12, 14, 13),
    "batch and its workspace": (12, 16, 13),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_arguments_are_seen(stub: Path, monkeypatch, swap: str) -> None:
    first, second, position = SWAPS[swap]
    made, gram, call = solver(stub), matrices(3, 6), Library.call

    def swapped(self, name: str, *arguments) -> None:
        given = list(arguments)
        if name == "cusolverDnXsyevBatched":
            given[first], given[second] = given[second], given[first]
        call(self, name, *given)

    monkeypatch.setattr(Library, "call", swapped)
    with pytest.raises(Unusable):
        cusolver.eigvalsh(gram, "batched", made)
    assert Counts(stub).wrong == position


@pytest.mark.parametrize(("less", "position"), [((1, 0), 13), ((0, 1), 15)])
@pytest.mark.parametrize("route", ["batched", "looped"])
def test_a_workspace_too_small_is_seen(stub: Path, monkeypatch, route, less, position) -> None:
    right = Solver._workspace

    def small(self, *arguments) -> tuple[int, int]:
        return tuple(size - by for size, by in zip(right(self, *arguments), less, strict=True))

    monkeypatch.setattr(Solver, "_workspace", small)
    with pytest.raises(Unusable, match="invalid workspace"):
        cusolver.eigvalsh(matrices(3, 6), route, solver(stub))
    assert Counts(stub).wrong == position


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("route", ["batched", "looped"])
@pytest.mark.parametrize("dtype", cusolver.KINDS)
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (5, 32), (3, 33), (4, 200), (2, 1100)])
def test_cuda_solves(route, dtype, batch, n) -> None:
    if reason := cusolver.status():
        pytest.skip(reason)
    gram = matrices(batch, n, dtype)
    assert_solved(cusolver.eigvalsh(gram.cuda(), route).cpu(), gram)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("method", alpha.METHODS)
@pytest.mark.parametrize("route", ["batched", "tridiagonal"])
def test_alphas_are_those_of_the_cpu(method: alpha.Method, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusolver, "FASTEST", {torch.float64: ((cusolver.LARGEST, 1, route),)})
    generator = torch.Generator().manual_seed(0)
    weights = [0.02 * torch.randn(768, 512, generator=generator) for _ in range(3)]
    pairs = zip(
        spectrum.solve(weights, "all", "cuda", "float64"),
        spectrum.solve(weights, "all", "cpu", "float64"),
        strict=True,
    )
    for (here, used), (there, same) in pairs:
        assert used == same
        found, wanted = (alpha.fit(values, method, noise=used.noise).alpha for values in (here, there))
        assert abs(found - wanted) <= 1e-6
