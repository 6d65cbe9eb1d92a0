"""Weight → alpha of the pooled spectra of windows of one aspect ratio (FARMS, arXiv 2506.06280).

The spectrum of a random matrix is as wide as the matrix is square, so alphas of layers of different shapes do not
compare. FARMS cuts square windows of one size out of every layer, at positions that overlap, and fits the power law to
the eigenvalues of all of them together.

A strip is what all windows at one position along the longer side of W have in common. Its Gram matrix [side, side] over
the shorter side holds those of its windows as blocks on the diagonal, so the products of a weight are done `count`
times and not `count`² times, and a strip's Gram matrix is all that is in memory at once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaprune import alpha, cusolver, spectrum

COLUMNS = ("alpha_farms",)


@dataclass(frozen=True)
class Windows:
    """Square windows: `size` rows and columns, `count` positions along either side.

    ValueError for a size below 2 or a count below 1.
    """

    size: int = 2000
    count: int = 15

    def __post_init__(self) -> None:
        if self.size < 2 or self.count < 1:
            raise ValueError(
                f"windows: wanted a size of 2 and a count of 1 at least, got {self.count} positions of {self.size} rows"
            )

    def along(self, side: int, size: int) -> range:
        """Where windows of `size` begin along a side of W, as published: evenly, from the start on, fewer of them where
        the side has no room for `count` different ones."""
        step = max(1, (side - size) // max(1, self.count - 1))
        return range(0, min(self.count * step, side - size + 1), step)


def columns(weight: Tensor, windows: Windows, device: str = "auto") -> dict[str, float]:
    """The column of a weight [N, K]: the alpha of the robust fit to the pooled spectra of its windows.

    device: "auto" (CUDA if there is one), "cpu", "cuda"…
    Raises ValueError for weights with NaN or infinity, or too few eigenvalues to fit (see `alpha.fit`).
    """
    values, noise = pooled(weight, windows, device)
    return {"alpha_farms": alpha.fit(values, "robust", noise).alpha}


def pooled(weight: Tensor, windows: Windows, device: str = "auto") -> tuple[Tensor, float]:
    """Eigenvalues of WᵀW of all windows of a weight [N, K] together, ascending, float64 on the CPU; and the λ/λ_max
    below which they are round-off. Windows have min(size, N, K) rows and columns.
    """
    target = spectrum.check("auto", device)
    side = weight.detach().to(target)
    side = side.mT if side.shape[0] < side.shape[1] else side  # [long, short]
    size = min(windows.size, side.shape[1])
    tops, lefts = windows.along(side.shape[0], size), windows.along(side.shape[1], size)
    # The first window says which precision the layer needs; any other that needs more is solved again.
    ((_, used),) = spectrum.solve([side[:size, :size]], "tail", str(target))
    scaled, scale = spectrum.scaled(side[None])

    def grams() -> Iterator[Tensor]:
        for top in tops:
            strip = scaled[0, top : top + size].to(used.gram)  # [size, short]
            gram = spectrum.lower_gram(strip.mT[None])[0]  # [short, short]
            blocks = gram.unfold(0, size, lefts.step).unfold(1, size, lefts.step)
            yield blocks.diagonal().movedim(-1, 0)[: len(lefts)]  # [windows, size, size], views of gram

    found, places = [], ((top, left) for top in tops for left in lefts)
    for (top, left), values in zip(places, _eigenvalues(grams(), target), strict=True):
        if not used.exact_enough(values, "tail"):
            window = scaled[0, top : top + size, left : left + size]
            values = spectrum.eigenvalues(window, "float64", str(target))
        found.append(values)
    return torch.cat(found).mul_(float(scale) ** 2).sort().values, used.noise


def _eigenvalues(grams: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """[size] ascending float64 on the CPU, of every matrix of every one of `grams` [windows, size, size].

    On a GPU one batch after another, on a CPU one matrix per thread: LAPACK gains little from more.
    """
    if device.type == "cuda":
        for blocks in grams:
            yield from cusolver.eigvalsh(blocks).double().clamp_min(0).cpu()
        return
    ahead = 2 * torch.get_num_threads()
    with spectrum.threads() as pool:
        matrices = (block for blocks in grams for block in blocks)
        yield from _ahead(pool, lambda block: cusolver.eigvalsh(block[None])[0], matrices, ahead)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Tensor], Tensor], items: Iterable[Tensor], most: int
) -> Iterator[Tensor]:
    """function(item) of every item, in order, with at most so many waiting or done ahead of the one that is taken."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= most:
            yield waiting.popleft().result().double().clamp_min(0)
    while waiting:
        yield waiting.popleft().result().double().clamp_min(0)
