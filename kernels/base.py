"""What a kernel is, and which one is taken."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alphaprune.formats import Packed
from alphaprune.kernels import table

MEMBERS = ("amx", "avx512", "avx512bw", "avx2", "neon", "scalar", "expand", "reference")  # in order of preference
FILES = ("cpu", "expansion", "reference")  # each exports KERNELS

# Bound(x [M, K], bias [N] | None) -> y [M, N]: a kernel bound to one packed weight.
Bound = Callable[[Tensor, Tensor | None], Tensor]

log = logging.getLogger("alphaprune")


@dataclass(frozen=True)
class Kernel:
    """One way to compute y = x Wᵀ + b from a packed weight.

    available() -> None, or the sentence that says why it does not run on this machine.
    supports(shape, tokens, weight_dtype, x_dtype) -> None, or the sentence that says why it does not take this problem.
    bind(packed) -> Bound, for a packed weight that was validated; it keeps the tensors alive.
    most_tokens: without a time table, the automatic choice takes it up to so many; where None, for any number.
    """

    name: str
    device: str
    available: Callable[[], str | None]
    supports: Callable[[tuple[int, int], int, torch.dtype, torch.dtype], str | None]
    bind: Callable[[Packed], Bound]
    most_tokens: int | None = None


def kernels() -> dict[str, Kernel]:
    """Every kernel by name, in order of preference."""
    found = {
        kernel.name: kernel
        for file in FILES
        for kernel in importlib.import_module(f"alphaprune.kernels.{file}").KERNELS
    }
    return {name: found[name] for name in MEMBERS}


def named(name: str) -> Kernel:
    """The kernel called `name`, usable here; ValueError with the reason if there is none or it cannot run."""
    if name not in MEMBERS:
        raise ValueError(f"no kernel is called {name!r}; there are: {', '.join(MEMBERS)}")
    kernel = kernels()[name]
    if reason := kernel.available():
        raise ValueError(f"kernel {name} cannot run: {reason}")
    return kernel


def choose(
    shape: tuple[int, int],
    tokens: int,
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    device: str = "cpu",
    density: float | None = None,
) -> tuple[Kernel, str]:
    """The kernel for the problem, and why.

    density: kept / weights. With it the fastest by the time table of this machine; without it, or where the table knows
    none of the kernels, the first in order of preference. ValueError if no kernel takes the problem.
    """
    usable, passed = _usable(shape, tokens, weight_dtype, x_dtype, device)
    found = _table(device, density)
    best = found and found.best(shape, density, found.step(tokens), weight_dtype, x_dtype, usable)
    if best:
        return usable[best[0]], f"fastest by the time table, {best[1]:.1e} s"
    for kernel in usable.values():
        if kernel.most_tokens is None or tokens <= kernel.most_tokens:
            return kernel, "; ".join(passed)
        passed.append(f"{kernel.name}: past {kernel.most_tokens} tokens another is faster")
    raise ValueError(f"no kernel takes {shape} in {weight_dtype} with {x_dtype} on {device}: {'; '.join(passed)}")


def limits(
    shape: tuple[int, int],
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    device: str = "cpu",
    density: float | None = None,
) -> tuple[int, ...]:
    """The numbers of tokens past which `choose` may take another kernel, rising; between them it takes the same."""
    preferred = sorted({k.most_tokens for k in kernels().values() if k.most_tokens is not None})
    found = _table(device, density)
    if found is None:
        return tuple(preferred)
    usable, _ = _usable(shape, found.tokens[0], weight_dtype, x_dtype, device)
    best = [found.best(shape, density, tokens, weight_dtype, x_dtype, usable) for tokens in found.tokens]
    names = [pair and pair[0] for pair in best]
    changes = {border for border, (a, b) in zip(found.borders, pairwise(names), strict=True) if a != b}
    return tuple(sorted(changes.union(preferred) if None in names else changes))


def gain(
    shape: tuple[int, int],
    tokens: int,
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    device: str = "cpu",
    density: float = 1.0,
) -> tuple[float, float] | None:
    """Predicted seconds packed, by the kernel that `choose` takes, and dense; None without a table that knows both."""
    found = _table(device, density)
    if found is None:
        return None
    usable, _ = _usable(shape, tokens, weight_dtype, x_dtype, device)
    best = found.best(shape, density, found.step(tokens), weight_dtype, x_dtype, usable)
    packed = best and found.predict(best[0], shape, density, tokens, weight_dtype, x_dtype)
    dense = found.dense(shape, tokens, weight_dtype, x_dtype)
    return (packed, dense) if packed and dense else None


def _usable(
    shape: tuple[int, int], tokens: int, weight_dtype: torch.dtype, x_dtype: torch.dtype, device: str
) -> tuple[dict[str, Kernel], list[str]]:
    """The kernels that take the problem, in order of preference, and why the others do not."""
    usable, passed = {}, []
    for kernel in kernels().values():
        if kernel.device not in (device, "any"):
            continue
        if reason := kernel.available() or kernel.supports(shape, tokens, weight_dtype, x_dtype):
            passed.append(f"{kernel.name}: {reason}")
        else:
            usable[kernel.name] = kernel
    return usable, passed


def _table(device: str, density: float | None) -> "table.Table | None":
    """Tables hold times of CPUs, of packed weights whose density is known."""
    return None if density is None or device != "cpu" else table.current()
