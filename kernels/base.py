"""What a kernel is, and which one is taken."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaprune.formats import Packed

MEMBERS = ("avx512", "avx2", "scalar", "expand", "reference")  # in order of preference
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
    most_tokens: the automatic choice takes it up to so many; where None, for any number.
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
    shape: tuple[int, int], tokens: int, weight_dtype: torch.dtype, x_dtype: torch.dtype, device: str = "cpu"
) -> tuple[Kernel, str]:
    """The first kernel in order of preference that takes the problem, and why the ones before it do not.

    ValueError if none does.
    """
    passed = []
    for kernel in kernels().values():
        if kernel.device not in (device, "any"):
            continue
        reason = kernel.available() or kernel.supports(shape, tokens, weight_dtype, x_dtype)
        if not reason and kernel.most_tokens is not None and tokens > kernel.most_tokens:
            reason = f"past {kernel.most_tokens} tokens another is faster"
        if not reason:
            return kernel, "; ".join(passed)
        passed.append(f"{kernel.name}: {reason}")
    raise ValueError(f"no kernel takes {shape} in {weight_dtype} with {x_dtype} on {device}: {'; '.join(passed)}")
