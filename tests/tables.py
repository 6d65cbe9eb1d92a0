"""Small time tables, made up."""

import alphaprune
from alphaprune.kernels.table import Curve, Machine, Table

HERE = Machine("a CPU", "family 1", ("scalar",), 2)
TOKENS = (1, 4, 16, 64)


def curve(kernel: str, sparsity: float, seconds, shape=(64, 64), dtype: str = "float32", tokens=TOKENS) -> Curve:
    return Curve(kernel, dtype, dtype, shape, sparsity, tokens, tuple(seconds))


def made(*curves: Curve, machine: Machine = HERE, threads: int = 2, version: str = alphaprune.__version__) -> Table:
    return Table(machine, threads, curves, 1e9, {"alphaprune": version})


def linear(kernel: str, dense_seconds: float, sparse_seconds: float, **options) -> list[Curve]:
    """Seconds from the first at sparsity 0 to the second at 1, for any number of tokens."""
    ends = ((0.0, dense_seconds), (0.9, dense_seconds + 0.9 * (sparse_seconds - dense_seconds)))
    return [curve(kernel, sparsity, [seconds] * len(TOKENS), **options) for sparsity, seconds in ends]
