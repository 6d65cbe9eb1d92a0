"""The kernels of tridiagonal.py: rows of a column, then one program per matrix for all of it, then tiles of A for the
product with it.

Positions count from the panel's first row. V and W [b, PANEL, n] hold columns of the panel as rows, zero up to and with
the diagonal of their column.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32  # columns of a tile at once
WARPS = 4  # of a program that multiplies a tile
GATHERED = 256  # rows of a program that gathers a column
VECTOR = 1024  # rows at once of a product of two columns
EIGENVALUES = 128  # of one program
UNROLLED = 8  # rows of T at once
SMALLEST_PIVOT = tl.constexpr(1e-290)


@triton.jit(do_not_specialize=["begin", "column", "more"])
def gather_kernel(
    a, v, w, parts, dots, raw, n, tiles, begin, column, more,
    BLOCK: tl.constexpr, PANEL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some rows of what `step_kernel` works on: raw[b, 0], the product with column `column` − 1 of A as the columns of
    the panel before it have left it; and raw[b, 1], if `more`, column `column` of A as all but `column` − 1 have."""
    batch = tl.program_id(1).to(tl.int64)
    begin = tl.multiple_of(begin, PANEL)
    rows, at = n - begin, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows
    v += batch * PANEL * n
    w += batch * PANEL * n
    dots += batch * 2 * PANEL
    raw += batch * 2 * n + at
    if column > 0:
        change = tl.zeros((BLOCK,), a.dtype.element_ty)
        for tile in tl.range(0, (rows + TILE - 1) // TILE, loop_unroll_factor=4):
            change += tl.load(parts + (batch * tiles + tile) * n + at, mask=inside, other=0)
        for k in tl.range(0, column - 1, loop_unroll_factor=4):
            change -= tl.load(v + k * n + at, mask=inside, other=0) * tl.load(dots + k)
            change -= tl.load(w + k * n + at, mask=inside, other=0) * tl.load(dots + PANEL + k)
        tl.store(raw, change, mask=inside)
    if more != 0:
        entry = tl.load(a + (batch * n + begin + column) * n + begin + at, mask=inside, other=0)
        for k in tl.range(0, column - 1, loop_unroll_factor=4):
            entry -= tl.load(v + k * n + at, mask=inside, other=0) * tl.load(w + k * n + column)
            entry -= tl.load(w + k * n + at, mask=inside, other=0) * tl.load(v + k * n + column)
        tl.store(raw + n, entry, mask=inside)


@triton.jit(do_not_specialize=["begin", "column", "more"])
def step_kernel(
    raw, v, w, tau, main, beside, n, begin, column, more, BLOCK: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    """Column `column` − 1 is finished: its row of W. If `more`, the next one is begun: what is on its diagonal and
    beside it, its row of V, and tau. All of it from what `gather_kernel` leaves."""
    batch = tl.program_id(0).to(tl.int64)
    begin = tl.multiple_of(begin, PANEL)
    rows, at = n - begin, tl.arange(0, BLOCK)
    inside = at < rows
    v += batch * PANEL * n + at
    w += batch * PANEL * n + at
    raw += batch * 2 * n + at
    newest = tl.zeros((BLOCK,), raw.dtype.element_ty)
    change = tl.zeros((BLOCK,), raw.dtype.element_ty)
    if column > 0:
        newest = tl.load(v + (column - 1) * n, mask=inside, other=0)
        scale = tl.load(tau + batch)
        change = tl.where(at >= column, tl.load(raw, mask=inside, other=0) * scale, 0)
        change -= 0.5 * scale * tl.sum(change * newest, 0) * newest
        tl.store(w + (column - 1) * n, change, mask=inside)
    if more != 0:
        here = at == column
        entry = tl.load(raw + n, mask=inside, other=0)
        entry -= newest * tl.sum(tl.where(here, change, 0), 0) + change * tl.sum(tl.where(here, newest, 0), 0)
        first = tl.sum(tl.where(at == column + 1, entry, 0), 0)
        below = tl.sum(tl.where(inside & (at > column + 1), entry * entry, 0), 0)
        length = tl.sqrt(first * first + below)
        length = tl.where(first > 0, -length, length)
        turned = below > 0
        tl.store(main + batch * n + begin + column, tl.sum(tl.where(here, entry, 0), 0))
        tl.store(beside + batch * n + begin + column, tl.where(turned, length, first))
        tl.store(tau + batch, tl.where(turned, (length - first) / tl.where(turned, length, 1), 0))
        entry = tl.where(inside & (at > column + 1), entry / tl.where(turned, first - length, 1), 0)
        tl.store(v + column * n, tl.where(at == column + 1, 1, entry), mask=inside)


@triton.jit(do_not_specialize=["begin", "column"])
def multiply_kernel(
    a, v, w, parts, dots, n, tiles, begin, column,
    PANEL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A v of the newest row of V, by the lower tiles of A: parts[b, c, r] is what tile (r, c) adds to row r, from above
    the diagonal as well. Programs that are left: dots[b, 0, k] = W_k·v and dots[b, 1, k] = V_k·v of rows k before."""
    batch = tl.program_id(2).to(tl.int64)
    begin = tl.multiple_of(begin, PANEL)
    rows = n - begin
    count = (rows + TILE - 1) // TILE
    v += batch * PANEL * n
    w += batch * PANEL * n
    x, y = tl.program_id(0), tl.program_id(1)
    half = (count + 1) // 2
    if y < half:
        # Rows y and count − 1 − y of tiles have count + 1 together.
        later = count - y
        if x < later:
            row, col = later - 1, x
        else:
            row, col = y, x - later
        if col <= row:
            down, along = row * TILE + tl.arange(0, TILE), tl.arange(0, CHUNK)
            source = a + (batch * n + begin + down[:, None]) * n + begin
            of_rows = tl.load(v + column * n + down, mask=down < rows, other=0)
            total = tl.zeros((TILE, CHUNK), a.dtype.element_ty)
            for first in range(col * TILE, (col + 1) * TILE, CHUNK):
                across = first + along
                both = (down < rows)[:, None] & (across < rows)[None, :]
                block = tl.load(source + across[None, :], mask=both, other=0)
                total += block * tl.load(v + column * n + across, mask=across < rows, other=0)[None, :]
                if col < row:
                    sums = tl.sum(block * of_rows[:, None], 0)
                    tl.store(parts + (batch * tiles + row) * n + across, sums, mask=across < rows)
            tl.store(parts + (batch * tiles + col) * n + down, tl.sum(total, 1), mask=down < rows)
    else:
        k = (y - half) * (count + 1) + x
        if k < column:
            with_w = tl.zeros((VECTOR,), a.dtype.element_ty)
            with_v = tl.zeros((VECTOR,), a.dtype.element_ty)
            for first in range(0, rows, VECTOR):
                at = first + tl.arange(0, VECTOR)
                newest = tl.load(v + column * n + at, mask=at < rows, other=0)
                with_w += newest * tl.load(w + k * n + at, mask=at < rows, other=0)
                with_v += newest * tl.load(v + k * n + at, mask=at < rows, other=0)
            tl.store(dots + batch * 2 * PANEL + k, tl.sum(with_w, 0))
            tl.store(dots + batch * 2 * PANEL + PANEL + k, tl.sum(with_v, 0))


@triton.jit(do_not_specialize=["steps"])
def bisect_kernel(
    main, squares, low, high, found, n, padded, steps, BLOCK: tl.constexpr, UNROLLED: tl.constexpr
):  # fmt: skip
    """Eigenvalue k of each T, the middle of the interval that is left: below a number lie as many eigenvalues as
    pivots of T less that number are negative. squares[i]: of the entry between main[i − 1] and main[i]."""
    batch = tl.program_id(1).to(tl.int64)
    which = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    main += batch * padded
    squares += batch * padded
    left = tl.load(low + batch) + tl.zeros((BLOCK,), tl.float64)
    right = tl.load(high + batch) + tl.zeros((BLOCK,), tl.float64)
    for _ in range(steps):
        middle = 0.5 * (left + right)
        pivot = tl.full((BLOCK,), 1, tl.float64)
        smaller = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, padded, UNROLLED):
            for more in tl.static_range(UNROLLED):
                pivot = tl.load(main + first + more) - middle - tl.load(squares + first + more) / pivot
                pivot = tl.where(tl.abs(pivot) < SMALLEST_PIVOT, -SMALLEST_PIVOT, pivot)
                smaller += (pivot < 0).to(tl.int32)
        above = smaller <= which
        left = tl.where(above, middle, left)
        right = tl.where(above, right, middle)
    tl.store(found + batch * n + which, 0.5 * (left + right), mask=which < n)


class Panel:
    """The launches on matrices a [b, n, n] and what tridiagonal.reduce keeps of them. tile: rows and columns of one.

    There are thousands of them, so all but the first go around what Triton does to find out what to launch: they differ
    in whole numbers that no kernel is made for.
    """

    def __init__(
        self, a: Tensor, v: Tensor, w: Tensor, parts: Tensor, dots: Tensor, raw: Tensor, tau: Tensor, main: Tensor,
        beside: Tensor, tile: int,
    ) -> None:  # fmt: skip
        self.batch, self.n, _ = a.shape
        self.panel, self.tile = v.shape[1], tile
        self.block = triton.next_power_of_2(self.n)
        self._multiplied, self._gathered = (a, v, w, parts, dots), (a, v, w, parts, dots, raw)
        self._stepped = raw, v, w, tau, main, beside
        self._sizes = self.n, parts.shape[1]
        self._ready: dict[Any, tuple[Any, tuple[int, ...]]] = {}
        self._stream = torch.cuda.current_stream(a.device).cuda_stream if a.is_cuda else None

    def step(self, begin: int, column: int, more: bool) -> None:
        """Finishes the column before `column` of the panel from row `begin` on and, if more, begins that one."""
        place = begin, column, int(more)
        grid = -(-(self.n - begin) // GATHERED), self.batch, 1
        self._launch(gather_kernel, grid, self._gathered, (*self._sizes, *place, GATHERED, self.panel, self.tile), 4)
        warps = max(1, min(16, self.block // 256))
        self._launch(step_kernel, (self.batch, 1, 1), self._stepped, (self.n, *place, self.block, self.panel), warps)

    def multiply(self, begin: int, column: int) -> None:
        """The products of a column's row of V, which the next step reads."""
        count = -(-(self.n - begin) // self.tile)
        grid = count + 1, (count + 1) // 2 + -(-self.panel // (count + 1)), self.batch
        rest = *self._sizes, begin, column, self.panel, self.tile, min(CHUNK, self.tile), VECTOR
        self._launch(multiply_kernel, grid, self._multiplied, rest, WARPS)

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], rest: tuple[int, ...], warps: int
    ) -> None:
        if kernel in self._ready:
            compiled, addresses = self._ready[kernel]
            compiled[grid](*addresses, *rest, stream=self._stream)
        elif (compiled := kernel[grid](*tensors, *rest, num_warps=warps)) is not None:  # as it is in the interpreter
            self._ready[kernel] = compiled, tuple(tensor.data_ptr() for tensor in tensors)


def bisect(main: Tensor, beside: Tensor, steps: int) -> Tensor:
    """Eigenvalues [b, n], ascending, of symmetric matrices with the diagonals main [b, n] and beside [b, n], the last
    of which is 0: `steps` halvings, in float64, of an interval with all of them. In the dtype of `main`."""
    batch, n = main.shape
    d, e = main.double(), beside.double()
    before = e.roll(1, 1)  # of the first row that 0
    reach = e.abs() + before.abs()
    low, high = (d - reach).amin(1), (d + reach).amax(1)
    room = 1e-14 * torch.maximum(low.abs(), high.abs()) + SMALLEST_PIVOT.value
    low, high = low - room, high + room
    padded = -(-n // UNROLLED) * UNROLLED
    diagonal = high[:, None].repeat(1, padded)
    diagonal += diagonal.abs() + 1  # rows that count for nothing
    diagonal[:, :n] = d
    squares = d.new_zeros(batch, padded)
    squares[:, :n] = before * before
    found = d.new_empty(batch, n)
    grid = -(-n // EIGENVALUES), batch
    bisect_kernel[grid](diagonal, squares, low, high, found, n, padded, steps, EIGENVALUES, UNROLLED)
    return found.to(main.dtype)
