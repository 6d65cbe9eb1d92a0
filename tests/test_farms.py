"""FARMS: windows and their spectra as published, cheap and exact; the fit to pooled spectra; the allocator."""

import importlib.util
import math
import threading
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphaprune import allocators, alpha, cli, cusolver, farms, planning, spectrum
from alphaprune.analysis import Analysis, analyze
from alphaprune.farms import Windows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def published_starts(side: int, size: int, count: int) -> list[int]:
    """FARMS, lib/sampling.py, fixed_sampling, for one side; which divides by zero for a count of 1."""
    step = max(1, (side - size) // (count - 1)) if count > 1 else 1
    number = min(count, max(1, (side - size) // step + 1))
    return [min(i * step, side - size) for i in range(number)]


def published_spectrum(weight: Tensor, size: int, count: int) -> Tensor:
    """All windows' eigenvalues, by float64 singular values, window by window."""
    size = min(size, *weight.shape)
    rows, cols = (published_starts(side, size, count) for side in weight.shape)
    cut = [weight[r : r + size, c : c + size].double() for r in rows for c in cols]
    return torch.cat([torch.linalg.svdvals(window).square() for window in cut]).sort().values


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 300), st.integers(2, 300), st.integers(1, 20))
def test_positions_are_the_published_ones_and_differ(side: int, size: int, count: int) -> None:
    size = min(size, side)
    starts = list(Windows(size, count).along(side, size))
    assert starts == published_starts(side, size, count)
    assert len(set(starts)) == len(starts) == min(count, side - size + 1)
    assert starts[0] == 0 and starts[-1] + size <= side


@pytest.mark.parametrize(
    "shape, size, count",
    [
        ((40, 70), 16, 3),
        ((70, 40), 16, 3),
        ((64, 64), 60, 15),
        ((33, 33), 64, 4),
        ((50, 20), 20, 5),
        ((30, 99), 9, 1),
        ((700, 310), 300, 2),  # more than one strip of rows in a Gram matrix
        ((5, 90), 2000, 15),
        ((41, 67), 2, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_spectra_are_those_of_the_windows(shape, size, count, dtype) -> None:
    weight = (0.02 * torch.randn(*shape)).to(dtype)
    before = weight.clone()
    found, noise = farms.pooled(weight, Windows(size, count), "cpu")
    wanted = published_spectrum(weight, size, count)
    assert found.shape == wanted.shape and found.dtype == torch.float64 and torch.equal(weight, before)
    assert bool((found.diff() >= 0).all()) and bool((found >= 0).all())
    assert torch.allclose(found, wanted, rtol=1e-5, atol=noise * float(wanted[-1]))


def test_the_column_is_the_robust_fit() -> None:
    weight = torch.randn(90, 130) * torch.exp(0.7 * torch.randn(90, 1))
    found = farms.columns(weight, Windows(48, 4), "cpu")
    assert list(found) == list(farms.COLUMNS)
    wanted = alpha.fit(published_spectrum(weight, 48, 4), "robust")
    assert found["alpha_farms"] == pytest.approx(wanted.alpha, abs=1e-4)
    one = farms.columns(weight, Windows(500, 7), "cpu")["alpha_farms"]  # windows of all 90 rows
    assert one == pytest.approx(alpha.fit(published_spectrum(weight, 90, 7)).alpha, abs=1e-4)


def test_shapes_are_comparable_where_plain_alphas_are_not() -> None:
    """Why there is FARMS: the same random entries have another alpha in another shape."""
    weights = [torch.randn(96, 96), torch.randn(96, 700)]
    plain = [alpha.fit(spectrum.eigenvalues(w, device="cpu")).alpha for w in weights]
    windowed = [farms.columns(w, Windows(64, 6), "cpu")["alpha_farms"] for w in weights]
    assert abs(plain[0] - plain[1]) > max(1, 2 * abs(windowed[0] - windowed[1]))


def steep(rows: int = 90, cols: int = 90) -> Tensor:
    """A direction so large that a float32 Gram matrix loses the other eigenvalues of windows that it crosses, and of
    no window without the last rows."""
    spike = torch.outer(torch.nn.functional.one_hot(torch.tensor(rows - 1), rows).float(), torch.randn(cols))
    return torch.randn(rows, cols) + 5000 * spike


@pytest.mark.parametrize("flipped", [False, True])
def test_windows_that_are_steep_are_solved_in_float64(flipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = steep().flip(0) if flipped else steep()  # flipped: seen in the first window already
    found, noise = farms.pooled(weight, Windows(40, 3), "cpu")
    wanted = published_spectrum(weight, 40, 3)
    assert (noise < 1e-10) == flipped
    upper = slice(len(wanted) // 2, None)
    assert torch.allclose(found[upper], wanted[upper], rtol=1e-4)
    monkeypatch.setattr(spectrum, "WORST_RATIO", 0)
    careless, _ = farms.pooled(weight, Windows(40, 3), "cpu")
    assert not torch.allclose(careless[upper], wanted[upper], rtol=1e-4)


def test_bfloat16_rounding_moves_it_little() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        weight = torch.randn(120, 200) * torch.exp(0.5 * torch.randn(120, 1))
        here, there = (farms.columns(w, Windows(80, 5), "cpu")["alpha_farms"] for w in (weight, weight.bfloat16()))
        assert here == pytest.approx(there, abs=0.01)


def test_batches_of_a_gpu_are_the_matrices_of_a_cpu() -> None:
    """The batch goes to cusolver.eigvalsh as it would from a GPU; here it is solved where it lies."""
    gram = torch.randn(60, 60, dtype=torch.float64)
    gram = gram @ gram.mT
    batches = [gram.unfold(0, 24, 6).unfold(1, 24, 6).diagonal().movedim(-1, 0)[:5] for _ in range(2)]
    there, here = (list(farms._eigenvalues(batches, torch.device(kind))) for kind in ("cuda", "cpu"))
    assert len(there) == len(here) == 10
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(there, here, strict=True))
    assert torch.allclose(here[1], torch.linalg.eigvalsh(gram[6:30, 6:30]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_matrix_per_thread_and_torch_keeps_its_own(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, seen, solve = torch.randn(50, 70), set(), cusolver.eigvalsh
    wanted = published_spectrum(weight, 20, 6)
    all_at_work = threading.Barrier(threads, timeout=60)  # 36 windows: a multiple of the threads

    def watched(gram: Tensor, *rest) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            seen.add((threading.get_ident(), torch.get_num_threads()))
            all_at_work.wait()
        return solve(gram, *rest)

    monkeypatch.setattr(cusolver, "eigvalsh", watched)
    torch.set_num_threads(threads)
    found, noise = farms.pooled(weight, Windows(20, 6), "cpu")
    assert torch.get_num_threads() == threads
    assert {count for _, count in seen} == {1} and len(seen) == threads
    assert torch.allclose(found, wanted, rtol=1e-5, atol=noise * float(wanted[-1]))


def test_an_error_in_a_thread_is_raised_and_torch_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)

    def fails(*_) -> Tensor:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(spectrum, "solve", lambda *_: [(None, spectrum.TAIL)])
    monkeypatch.setattr(cusolver, "eigvalsh", fails)
    with pytest.raises(torch.linalg.LinAlgError, match="no convergence"):
        farms.pooled(torch.randn(30, 30), Windows(10, 3), "cpu")
    assert torch.get_num_threads() == 2


def test_no_more_than_a_few_gram_matrices_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """225 windows of 2000² in float32 are 3.6 GB; what is alive is counted where they are made."""
    alive, most, make = [], 0, spectrum.lower_gram

    def counted(side: Tensor) -> Tensor:
        nonlocal most
        gram = make(side)
        alive.append(weakref.ref(gram))
        most = max(most, sum(ref() is not None for ref in alive))
        return gram

    monkeypatch.setattr(spectrum, "lower_gram", counted)
    farms.pooled(torch.randn(80, 80), Windows(30, 8), "cpu")
    assert len(alive) == 8 + 1  # a strip each, and the window that says which precision is needed
    assert most <= 2


@pytest.mark.parametrize("size, count", [(1, 15), (0, 3), (-4, 3), (2000, 0), (64, -1)])
def test_windows_that_are_none(size: int, count: int) -> None:
    with pytest.raises(
        ValueError, match=f"a size of 2 and a count of 1 at least, got {count} positions of {size} rows"
    ):
        Windows(size, count)


def test_weights_that_have_no_spectrum() -> None:
    for weight, few in [(torch.zeros(20, 20), 0), (torch.randn(4, 4), 4), (torch.ones(20, 30), 1)]:
        with pytest.raises(ValueError, match=f"a power law needs 8 eigenvalues .* this spectrum has {few} of"):
            farms.columns(weight, Windows(20, 1), "cpu")
    with pytest.raises(ValueError, match="NaN or infinity"):
        farms.columns(torch.full((20, 20), math.nan), Windows(10, 2), "cpu")
    assert math.isfinite(farms.columns(torch.randn(4, 60), Windows(), "cpu")["alpha_farms"])  # pooled, it has enough


def test_large_pooled_spectra_are_thinned_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Densities and distances see every n-th eigenvalue of many; alpha is that of all of them. A weight's own are few
    enough to be seen all: 28 672 is the smaller side of the largest there are."""
    assert alpha._stride(torch.zeros(28_672)) == 1 and alpha._stride(torch.zeros(450_000)) == 27
    parts = [torch.randn(150, 150) * torch.exp(0.5 * torch.randn(150, 1)) for _ in range(100)]
    values = torch.cat([torch.linalg.svdvals(part).square() for part in parts]).double().sort().values
    whole = alpha.fit(values)
    monkeypatch.setattr(alpha, "ENOUGH", 1500)
    thinned = alpha.fit(values)
    assert thinned != whole
    assert thinned.alpha == pytest.approx(whole.alpha, abs=2e-3) and thinned.ks == pytest.approx(whole.ks, abs=2e-3)
    assert thinned.spread == pytest.approx(whole.spread, abs=2e-2) and thinned.unstable == whole.unstable


def test_analysis_and_plans(tmp_path: Path) -> None:
    live = make_model(1)
    made = analyze(live, device="cpu", windows=Windows(48, 3))
    for name, stat in made.layers.items():
        weight = live.get_submodule(name).weight.detach()
        assert stat.columns["alpha_farms"] == farms.columns(weight, Windows(48, 3), "cpu")["alpha_farms"]
    renamed = {n: {"alpha": s.columns["alpha_farms"]} for n, s in made.layers.items()}
    by_farms = planning.real_sparsities(made, 0.7, "farms", 0.3)
    swapped = Analysis.load(_rewritten(made, renamed, tmp_path / "a.json"))
    assert by_farms == planning.real_sparsities(swapped, 0.7, "alpha", 0.3)
    assert allocators.get("farms").columns == farms.COLUMNS
    name = "model.layers.1.mlp.up_proj"
    live.get_submodule(name).weight.data.zero_()
    with pytest.raises(ValueError, match=f"{name}: a power law needs 8 eigenvalues"):
        analyze(live, None, "cpu", windows=Windows(48, 3))


def _rewritten(made: Analysis, columns: dict[str, dict[str, float]], path: Path) -> Path:
    for name, stat in made.layers.items():
        stat.columns.clear()
        stat.columns.update(columns[name])
    made.save(path)
    return path


def test_from_the_command_line(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, planned = str(tmp_path / "a.json"), str(tmp_path / "p.json")
    assert cli.main(["analyze", str(directory), "-o", file, "--farms", "--window", "64", "--windows", "3"]) == 0
    for allocator in ("farms", "stable_rank", "mp_soft_rank"):
        assert cli.main(["plan", file, "--sparsity", "0.7", "--allocator", allocator, "-o", planned]) == 0
        assert planning.Plan.load(planned).allocator == allocator
    assert cli.main(["analyze", str(directory), "-o", file]) == 0
    capsys.readouterr()
    assert cli.main(["plan", file, "--sparsity", "0.7", "--allocator", "farms", "-o", planned]) == 2
    assert (
        "reads alpha_farms, which this analysis lacks; run `alphaprune analyze` with --farms" in capsys.readouterr().err
    )
    assert cli.main(["analyze", str(directory), "-o", file, "--farms", "--window", "1"]) == 2
    assert capsys.readouterr().err.startswith("alphaprune analyze: windows: wanted a size of 2")


def test_the_benchmark_times_the_windows_it_says() -> None:
    spec = importlib.util.spec_from_file_location("bench_farms", ROOT / "bench" / "farms.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    weight = torch.randn(100, 100)
    part, cut = bench.first_windows(weight, Windows(40, 5), 9)
    assert len(cut) == 9 and torch.equal(cut[-1], weight[30:70, 30:70])
    found, _ = farms.pooled(part, Windows(40, 3), "cpu")
    wanted = torch.cat([torch.linalg.svdvals(c.double()).square() for c in cut]).sort().values
    assert float((found - wanted).abs().max()) < 2e-6 * float(wanted[-1])
    row = bench.measure(100, Windows(40, 5), 0, 1, torch.device("cpu"))
    assert row["windows"] == 25 and not row["extrapolated"] and row["timed_windows"] == {"ours": 25, "svdvals": 25}
    assert row["ratio"] == pytest.approx(row["seconds"]["svdvals"] / row["seconds"]["ours"])
