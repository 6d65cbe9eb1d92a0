"""Weight → eigenvalues of WᵀW, in the cheapest way that is exact enough for what reads them.

λ = σ(W)² are had from the Gram matrix of the smaller side. One in float32 has an absolute error of some 1e-7·λ_max:
nothing to a fit of the upper tail, everything to one that reads the logarithm of the smallest eigenvalue of a square
matrix, where λ_min/λ_max is about 1/n². One in float64 keeps that one, too, with more digits than the float32 singular
values of the published estimator. So does one in float32 of a matrix twice as long as it is wide, λ_min/λ_max ≈ 0.03,
if its eigenvalues are found in float64: what is left are the products' own errors, which are independent of each other.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alphaprune import cusolver, devices, memory, two_stage
from alphaprune.gram import full_float32

Need = Literal["tail", "all"]  # what must be exact: the eigenvalues around and above the median, or the smallest, too

SOLVERS = ("auto", "float64")
# CUDA devices whose float64 units are half as many as their float32 ones: P100, V100, A100, H100/H200, B200.
CHEAP_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
BATCHED_UP_TO = 256  # smaller side, on a CPU; above, one call per matrix is as fast
BYTES_PER_WEIGHT = 16  # at most: as it came, scaled in float32, and in float64
STRIP = 256  # rows of a Gram matrix at once, at least: narrower ones do not fill the machine
WORST_RATIO = 1e-3  # median λ / λ_max below which a float32 Gram matrix is not exact enough for a tail
LONG = 2  # sides' ratio from which one is tried even where the smallest eigenvalue counts,
WORST_SMALLEST = 1e-5  # and λ_min / λ_max below which it was in vain


@dataclass(frozen=True)
class Solver:
    """How eigenvalues are had: from a Gram matrix in the dtype `gram`, in the dtype `eigen`."""

    gram: torch.dtype
    eigen: torch.dtype

    def __str__(self) -> str:
        both = f"gram {_short(self.gram)}"
        return both if self.gram == self.eigen else f"{both} solved in {_short(self.eigen)}"

    @property
    def noise(self) -> float:
        """λ/λ_max below which an eigenvalue is round-off: 16 ε."""
        return 16 * torch.finfo(self.gram).eps

    def exact_enough(self, values: Tensor, need: Need) -> bool:
        """Whether round-off, some 1e-7·λ_max of a float32 Gram matrix, is not felt in the ascending `values` that are
        needed."""
        if self.gram == torch.float64:
            return True
        if need == "all":
            return bool(values[0] >= WORST_SMALLEST * values[-1])
        return bool(values[values.numel() // 2] >= WORST_RATIO * values[-1])


TAIL = Solver(torch.float32, torch.float32)
LONG_SIDED = Solver(torch.float32, torch.float64)
EXACT = Solver(torch.float64, torch.float64)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose(need: Need, shape: tuple[int, int], device: torch.device, solver: str = "auto") -> Solver:
    """The cheapest solver that may be exact enough for `need` of a matrix [N, K]; float64 on request and, where the
    smallest eigenvalue counts, on devices where it is cheap."""
    if solver == "float64":
        return EXACT
    if need == "tail":
        return TAIL
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in CHEAP_FLOAT64:
        return EXACT
    return LONG_SIDED if max(shape) >= LONG * min(shape) else EXACT


def eigenvalues(
    weights: Tensor | Sequence[Tensor], solver: str = "auto", device: str = "auto", need: Need = "tail"
) -> Tensor:
    """λ of WᵀW, ascending, float64 on the CPU: [min(N, K)] of one weight [N, K], [B, min(N, K)] of B equal shapes."""
    if isinstance(weights, Tensor):
        return solve([weights], need, device, solver)[0][0]
    return torch.stack([found for found, _ in solve(weights, need, device, solver)])


def solve(
    weights: Sequence[Tensor], need: Need = "tail", device: str = "auto", solver: str = "auto"
) -> list[tuple[Tensor, Solver]]:
    """For every weight [N, K] of one shape, its eigenvalues [min(N, K)] float64 ascending, and what solved it.

    Only the eigenvalues of min(N, K) dimensions are returned; the other |N − K| are zero by construction.
    Raises ValueError for weights that are no matrices of one shape or hold NaN or infinity, or an unknown solver or
    device.
    """
    shapes = {tuple(weight.shape) for weight in weights}
    if len(shapes) != 1 or any(len(s) != 2 or 0 in s for s in shapes):
        raise ValueError(f"weights: wanted matrices of one shape [N, K], got {sorted(shapes)}")
    return solve_all(weights, need, device, solver)


def solve_all(
    weights: Sequence[Tensor], need: Need = "tail", device: str = "auto", solver: str = "auto"
) -> list[tuple[Tensor, Solver]]:
    """As `solve`, of matrices that are not empty, of any shapes: Gram matrices of one size are solved together."""
    target = check(solver, device)
    found: dict[int, tuple[Tensor, Solver]] = {}
    for chosen, places in _batches([tuple(weight.shape) for weight in weights], need, target, solver):
        solved = _together(weights, places, chosen, target)
        found |= {place: (values, chosen) for place, values in zip(places, solved, strict=True)}
        if again := [place for place in places if not chosen.exact_enough(found[place][0], need)]:
            solved = _together(weights, again, EXACT, target)
            found |= {place: (values, EXACT) for place, values in zip(again, solved, strict=True)}
    return [found[place] for place in range(len(weights))]


def _together(weights: Sequence[Tensor], places: list[int], solver: Solver, device: torch.device) -> list[Tensor]:
    """The eigenvalues [n] float64 of the weights at `places`, by one call: those of one shape side by side, all with
    Gram matrices of one size."""
    grams, scales = [], []
    needs = {f"the spectra of {len(places)} matrices": sum(working_bytes(tuple(weights[p].shape)) for p in places)}
    with memory.explained(needs, device, "compute them on --device cpu"):
        for _, same in itertools.groupby(places, key=lambda place: weights[place].shape):
            part, scale = scaled(_stacked([weights[place].detach().to(device) for place in same]))  # [b, N, K]
            grams.append(_gram(part, solver))
            scales += scale.tolist()
        solved = _eigenvalues(grams[0] if len(grams) == 1 else torch.cat(grams))
    return [values * scale**2 for values, scale in zip(solved, scales, strict=True)]


def _batches(
    shapes: list[tuple[int, int]], need: Need, device: torch.device, solver: str
) -> Iterator[tuple[Solver, list[int]]]:
    """The places of matrices [N, K] that are solved together, those of one shape side by side, and by what."""
    free = memory.free(device) if device.type == "cuda" else None
    alike: dict[tuple[Solver, int], list[int]] = {}
    for place in sorted(range(len(shapes)), key=lambda place: shapes[place]):
        key = choose(need, shapes[place], device, solver), min(shapes[place])
        alike.setdefault(key, []).append(place)
    for (chosen, _), places in alike.items():
        step = together(max((shapes[place] for place in places), key=math.prod), len(places), free)
        yield from ((chosen, places[start : start + step]) for start in range(0, len(places), step))


def together(shape: tuple[int, int], count: int, free: int | None) -> int:
    """How many of `count` matrices [N, K] are solved at once: on a CPU those that are small, on a GPU (free: its bytes)
    what half of the memory holds with their Gram matrices; the other half is for the solver's copy and workspace."""
    if free is None:
        return count if min(shape) <= BATCHED_UP_TO else 1
    return max(1, min(count, free // 2 // working_bytes(shape)))


def working_bytes(shape: tuple[int, int]) -> int:
    """At most so many are in use while a matrix [N, K] is solved, but for the solver's copy and workspace."""
    return BYTES_PER_WEIGHT * shape[0] * shape[1] + 8 * min(shape) ** 2


def check(solver: str, device: str) -> torch.device:
    """The device meant by a name; ValueError if it, or the solver, is not there."""
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}: wanted one of {', '.join(SOLVERS)}")
    return devices.named(device, auto=True)


def scaled(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [b, N, K] divided by a power of two near their largest entry, so that no square leaves the range of the
    dtype and no bit is lost; and that power, [b] float64 on the CPU."""
    largest = torch.maximum(weights.amax(dim=(1, 2)), -weights.amin(dim=(1, 2))).double()  # [b]
    if not bool(largest.isfinite().all()):
        raise ValueError("weights: NaN or infinity among them, so they have no spectrum")
    halves = weights.dtype in (torch.float16, torch.bfloat16)
    weights = weights.float() if halves else weights.clone()
    most = 126 if weights.dtype == torch.float32 else 1022  # powers of two that have a reciprocal
    power = torch.where(largest > 0, largest.log2().floor(), 0.0).clamp(-most, most)
    return weights.mul_(torch.exp2(-power).to(weights.dtype)[:, None, None]), torch.exp2(power).cpu()


def _gram(weights: Tensor, solver: Solver) -> Tensor:
    """The lower triangles of the Gram matrices [b, min(N, K), min(N, K)] of weights [b, N, K], as they are solved."""
    weights = weights.to(solver.gram)
    side = weights if weights.shape[1] <= weights.shape[2] else weights.mT  # [b, small, large]
    return lower_gram(side).to(solver.eigen)


def _eigenvalues(gram: Tensor) -> Tensor:
    """[b, n] float64 ascending, on the CPU, of gram [b, n, n] by its lower triangles."""
    if two_stage.serves(gram):
        values = torch.stack([two_stage.eigvalsh(matrix) for matrix in gram])
    else:
        values = cusolver.eigvalsh(gram)
    return values.double().clamp_min(0).cpu()


def _stacked(weights: list[Tensor]) -> Tensor:
    return torch.stack(weights) if len(weights) > 1 else weights[0][None]


@contextmanager
def threads(most: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, or `most`, which share torch's: each has a torch of its own with its part of them.
    The caller's torch keeps all. LAPACK gains little from a second thread: half of its work waits for the memory."""
    before = torch.get_num_threads()
    count = min(before, most or before)
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(before // count,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, or when nobody asks for the rest
        torch.set_num_threads(before)


def lower_gram(side: Tensor) -> Tensor:
    """The lower triangle of side·sideᵀ, [b, small, small], by strips of rows: little more than half of the work."""
    small = side.shape[1]
    gram = side.new_zeros(side.shape[0], small, small)
    strip = max(STRIP, -(-small // 16))
    with full_float32():
        for top in range(0, small, strip):
            end = min(top + strip, small)
            gram[:, top:end, :end] = side[:, top:end] @ side[:, :end].mT
    return gram
