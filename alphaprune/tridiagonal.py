"""Eigenvalues of many large symmetric matrices at once on a GPU: Householder's reduction, then bisection.

A library reduces one matrix after another, by launches that each wait for the one before, and half of the work is a
product of the matrix with a vector, which takes as long as it takes to read the matrix. Here every launch works on all
matrices of a batch; there are three for each column; and the product reads no more than the lower half.

The reduction is LAPACK's sytrd by panels of columns (Dongarra, Sorensen, Hammarling 1989): A of a panel stays as it was
and what its columns change is kept as V and W, A − V Wᵀ − W Vᵀ. The eigenvalues of the three diagonals are found by
counting signs (Givens 1954; Barth, Martin, Wilkinson 1967), all at the same time, each with an error of ε·‖T‖.
"""

import contextlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from alphaprune import memory
from alphaprune.files import first_line
from alphaprune.gram import full_float32

PANEL = 32  # columns between two updates of the whole matrix
TILE = 128  # rows and columns of A that one program multiplies
LARGEST = 1 << 14  # rows: one program holds vectors of so many
STEPS = {torch.float32: 34, torch.float64: 58}  # halvings of an interval: a few bits more than the dtype has


log = logging.getLogger("alphaprune")


class Unusable(RuntimeError):
    """A way to the eigenvalues, or one call of it, cannot be had; the text says why."""


def eigvalsh(gram: Tensor) -> Tensor:
    """Eigenvalues [b, n], ascending, of symmetric gram [b, n, n], float32 or float64, by its lower triangles, which are
    not changed.

    Unusable where Triton cannot run, or for matrices larger than LARGEST. Of a matrix with entries that are not finite
    all eigenvalues are NaN.
    """
    if reason := missing(gram):
        raise Unusable(reason)
    if not gram.numel():
        return gram.new_zeros(gram.shape[:2])
    try:
        return solve(gram)
    except Exception as error:  # of Triton, its compiler, and the C compiler and assembler that it calls
        if memory.device_fault(error):
            raise
        raise Unusable(f"Triton cannot make or launch the kernels: {first_line(error)}") from error


def solve(gram: Tensor, panel: int = PANEL, tile: int = TILE) -> Tensor:
    """As `eigvalsh`, wherever Triton is told to run. panel, tile: as PANEL and TILE."""
    from alphaprune import tridiagonal_triton

    limits = torch.finfo(gram.dtype)
    lower = gram.tril()
    largest = torch.maximum(lower.amax((1, 2)), -lower.amin((1, 2))).clamp(limits.tiny, limits.max / 4)
    scale = torch.exp2(largest.log2().floor())  # [b]
    lower /= scale[:, None, None]  # by a power of two: no bit is lost, and no square leaves the range of the dtype
    lower += lower.tril(-1).mT
    with torch.cuda.device_of(gram):
        main, beside = _recorder(lower) if _recorder and lower.is_cuda else reduce(lower, panel, tile)
        return tridiagonal_triton.bisect(main, beside, STEPS[gram.dtype]) * scale[:, None]


def missing(gram: Tensor) -> str | None:
    """None if the kernels can run on gram [b, n, n], or the sentence that says why not."""
    if not gram.is_cuda:
        return f"the reduction by Triton needs matrices on a CUDA device, and these are on {gram.device}"
    if gram.shape[-1] > LARGEST:
        return f"the reduction by Triton takes matrices of up to {LARGEST} rows, and these have {gram.shape[-1]}"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def reduce(matrices: Tensor, panel: int = PANEL, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """The main diagonal [b, n] and the one beside it [b, n], the last of which is 0, of matrices that have the
    eigenvalues of symmetric `matrices` [b, n, n], contiguous, which are overwritten."""
    from alphaprune.tridiagonal_triton import Panel

    n = matrices.shape[-1]
    v, w, *others, main, beside = spaces(matrices, panel, tile)
    launch = Panel(matrices, v, w, *others, main, beside, tile)
    with full_float32():
        for begin in range(0, n, panel):
            columns, rest = min(panel, n - begin), n - begin - panel
            for column in range(columns):
                launch.step(begin, column, True)
                launch.multiply(begin, column)
            if rest > 0:
                launch.step(begin, columns, False)
                after = matrices[:, -rest:, -rest:]
                both = slice(panel, panel + rest)
                after.baddbmm_(torch.cat((v, w), 1)[..., both].mT, torch.cat((w, v), 1)[..., both], alpha=-1)
    return main, beside


class Recorder:
    """`reduce` of batches that are alike: from number `since` on, counted from 0, as a CUDA graph, which takes the host
    one call instead of thousands. What it works on is kept as long as the recorder."""

    def __init__(self, since: int = 1) -> None:
        self._since, self._alike, self._count = since, None, 0
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor] | None = None
        self._lock = threading.Lock()

    def __call__(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """See `reduce`. Where no graph can be made, for want of memory most likely, there is none from then on."""
        stream = torch.cuda.current_stream(matrices.device) if matrices.is_cuda else None
        alike = matrices.device, matrices.dtype, matrices.shape, stream  # those of two streams would meet in one graph
        with self._lock:
            if alike != self._alike:
                self._alike, self._count, self._recorded = alike, 0, None
            self._count += 1
            if self._recorded is None and self._count > self._since:
                try:
                    self._recorded = _record(matrices)
                except RuntimeError as reason:  # torch's for no memory, too
                    log.warning("eigenvalues without a CUDA graph, because %s", first_line(reason))
                    self._since = sys.maxsize
            if self._recorded is None:
                return reduce(matrices)
            graph, given, main, beside = self._recorded
            given.copy_(matrices)
            graph.replay()
            return main.clone(), beside.clone()


def _record(like: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
    """A graph of `reduce`, the matrices that it reduces, and the diagonals that it finds."""
    from alphaprune.tridiagonal_triton import Panel

    given, stream, graph = torch.zeros_like(like), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled, libraries take their workspaces
        warm = Panel(given, *spaces(given, PANEL, TILE), TILE)
        warm.step(0, 0, True)
        warm.multiply(0, 0)
        reduce(given[:, : 2 * PANEL, : 2 * PANEL].contiguous())
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        main, beside = reduce(given)
    return graph, given, main, beside


_recorder: Recorder | None = None


@contextlib.contextmanager
def recording(recorder: Recorder | None = None) -> Iterator[None]:
    """Until its end, batches that are like the one before are reduced by a graph, of the recorder if one is given."""
    global _recorder
    before, _recorder = _recorder, recorder or Recorder()
    try:
        yield
    finally:
        _recorder = before


def spaces(matrices: Tensor, panel: int, tile: int) -> list[Tensor]:
    """What the reduction of `matrices` [b, n, n] keeps beside them: v and w [b, panel, n]; parts [b, ceil(n / tile), n]
    of a product A v, from each tile of a row; dots [b, 2, panel] of the newest v with the rows of w and of v; raw
    [b, 2, n], columns; tau [b]; and the two diagonals [b, n]."""
    batch, n, _ = matrices.shape
    rows = (panel, n), (panel, n), (-(-n // tile), n), (2, panel), (2, n), (), (n,), (n,)
    return [matrices.new_zeros(batch, *shape) for shape in rows]
