"""What a kernel is, and which one is taken."""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alphaprune.formats import Packed
from alphaprune.kernels import table

MEMBERS = (  # in order of preference, on each device
    *("amx", "avx512bf16", "avx512", "avx512vnni", "avx512bw", "avxvnni", "avx2", "neondot", "neon", "scalar"),
    "expand",
    *(
        "nm_mma_sp",
        "delta_spmv",
        "triton_ell",
        "pair_mma",
        "sbt_wgmma",
        "sbt_mma",
        "sbt_expand",
        "nm_cusparselt",
        "triton",
        "triton_expand",
    ),
    "reference",
)
FILES = ("cpu", "cuda", "cuda_layouts", "expansion", "nm_library", "portable", "reference")  # each exports KERNELS

# Bound(x [M, K], bias [N] | None) -> y [M, N]: a kernel bound to one packed weight. That of a kernel which `adds` takes
# a third one, [M, N], to which y is added in place, and returns it.
Bound = Callable[..., Tensor]
Norm = tuple[Tensor, float]  # of an RMSNorm: weight [K], epsilon

log = logging.getLogger("alphaprune")


@dataclass(frozen=True)
class Together:
    """A kernel bound to several packed weights [N_i, K] that share x. It keeps none of the packed tensors alive.

    run(x [M, K], biases | None, norm | None) -> y of each, contiguous [M, N_i], or of two their SwiGLU alone.
    norms: whether run takes an RMSNorm of x before the products. nbytes: what it keeps in a layout of its own.
    """

    run: Callable[[Tensor, Sequence[Tensor | None] | None, Norm | None], list[Tensor]]
    norms: bool = False
    nbytes: int = 0


@dataclass(frozen=True)
class Kernel:
    """One way to compute y = x Wᵀ + b from a packed weight.

    available() -> None, or the sentence that says why it does not run on this machine.
    supports(shape, tokens, weight_dtype, x_dtype) -> None, or the sentence that says why it does not take this problem.
    bind(packed) -> Bound, for a packed weight that was validated; it keeps the tensors alive.
    most_tokens: without a time table, the automatic choice takes it up to so many; where None, for any number.
    again_from() -> from how many tokens past these on it does so again on this machine; None where it does not.
    least_tokens: without a time table, the automatic choice takes it from so many on.
    most_density: without a time table, the automatic choice takes it for weights of which so much is kept at most.
    The latter two are functions where that depends on the machine. All are the built-in default: predicted, not
    measured on the machine at hand. What `supports` says of tokens changes at most_tokens or at a number that time
    tables measure, if at all.
    fits(packed) -> None, or the sentence that says why it does not take this weight, whatever its shape and dtype.
    bind_group(weights, swiglu) -> Together, or None where it does not take these weights in one launch; swiglu: the one
    output is silu(y_0) * y_1.
    adds: its Bound adds to a tensor in place.
    any_tokens(weight_dtype, x_dtype, density or None) -> whether most_tokens does not hold for these.
    """

    name: str
    device: str
    available: Callable[[], str | None]
    supports: Callable[[tuple[int, int], int, torch.dtype, torch.dtype], str | None]
    bind: Callable[[Packed], Bound]
    most_tokens: int | None = None
    most_density: float | Callable[[], float] = 1.0
    fits: Callable[[Packed], str | None] | None = None
    least_tokens: int | Callable[[], int] = 0
    bind_group: Callable[[Sequence[Packed], bool], Together | None] | None = None
    adds: bool = False
    any_tokens: Callable[[torch.dtype, torch.dtype, float | None], bool] | None = None
    again_from: Callable[[], int | None] | None = None

    def takes(self, tokens: int, weight: torch.dtype, x: torch.dtype, density: float | None) -> bool:
        """Whether the automatic choice takes it for so many tokens where no time table says."""
        if self.most_tokens is None or tokens <= self.most_tokens:
            return True
        if self.resumes is not None and tokens >= self.resumes:
            return True
        return self.any_tokens is not None and self.any_tokens(weight, x, density)

    @property
    def resumes(self) -> int | None:
        """again_from on this machine."""
        return None if self.again_from is None else self.again_from()

    @property
    def many(self) -> bool:
        """Whether it is made for many tokens, whatever it takes with few."""
        return self.most_tokens is None or self.resumes is not None

    @property
    def fewest(self) -> int:
        """least_tokens on this machine."""
        return self.least_tokens() if callable(self.least_tokens) else self.least_tokens

    @property
    def densest(self) -> float:
        """most_density on this machine."""
        return self.most_density() if callable(self.most_density) else self.most_density


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


def on(name: str, device: torch.device) -> Kernel:
    """As `named`, for packed weights on a device; ValueError if it does not run there."""
    kernel = named(name)
    if reason := elsewhere(kernel, device):
        raise ValueError(f"kernel {name} cannot run: {reason}")
    return kernel


def elsewhere(kernel: Kernel, device: torch.device) -> str | None:
    """None, or that a kernel does not run where the packed weight lies."""
    if kernel.device in (device.type, "any"):
        return None
    return f"it runs on {kernel.device}, the packed weight is on {device}"


def choose(
    shape: tuple[int, int],
    tokens: int,
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    device: str = "cpu",
    density: float | None = None,
    fits: Callable[[Kernel], str | None] | None = None,
) -> tuple[Kernel, str]:
    """The kernel for the problem, and why.

    device: where the weight lies, such as "cuda:1". density: kept / weights. With it the fastest by that device's time
    table; without it, or where the table knows none of the kernels, the first in order of preference, which is
    predicted, not measured. ValueError if no kernel takes the problem.
    fits: None or the reason why a kernel does not take the weight; without it, those that do not take every weight are
    passed over.
    """
    usable, passed = _usable(shape, tokens, weight_dtype, x_dtype, device, fits)
    found = _table(device, density)
    best = found and found.best(shape, density, found.step(tokens), weight_dtype, x_dtype, usable)
    if best:
        return usable[best[0]], f"fastest by the time table, {best[1]:.1e} s"
    for kernel in usable.values():
        if not kernel.takes(tokens, weight_dtype, x_dtype, density):
            passed.append(f"{kernel.name}: past {kernel.most_tokens} tokens another is faster")
        elif tokens < kernel.fewest:
            passed.append(f"{kernel.name}: below {kernel.fewest} tokens another is faster")
        elif kernel.densest < 1 and (density is None or density > kernel.densest):
            passed.append(f"{kernel.name}: another is thought to be faster above a density of {kernel.densest}")
        else:
            return kernel, "; ".join(passed)
    raise ValueError(f"no kernel takes {shape} in {weight_dtype} with {x_dtype} on {device}: {'; '.join(passed)}")


def limits(
    shape: tuple[int, int],
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    device: str = "cpu",
    density: float | None = None,
    fits: Callable[[Kernel], str | None] | None = None,
) -> tuple[int, ...]:
    """The numbers of tokens past which `choose` may take another kernel, rising; between them it takes the same."""
    known = kernels().values()
    most = {k.most_tokens for k in known if k.most_tokens is not None}
    begins = {begin for k in known for begin in (k.fewest, k.resumes) if begin is not None and begin > 1}
    preferred = sorted(most | {begin - 1 for begin in begins})
    found = _table(device, density)
    if found is None:
        return tuple(preferred)
    borders = sorted({*found.borders, *found.tokens, *preferred})
    names = [
        choose(shape, tokens, weight_dtype, x_dtype, device, density, fits)[0].name
        for tokens in (*borders, borders[-1] + 1)
    ]
    return tuple(border for border, (a, b) in zip(borders, pairwise(names), strict=True) if a != b)


def gain(
    shape: tuple[int, int],
    tokens: int,
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    device: str = "cpu",
    density: float = 1.0,
    fits: Callable[[Kernel], str | None] | None = None,
) -> tuple[float, float] | None:
    """Predicted seconds packed, by the kernel that `choose` takes, and dense; None without a table that knows both."""
    found = _table(device, density)
    if found is None:
        return None
    usable, _ = _usable(shape, tokens, weight_dtype, x_dtype, device, fits)
    best = found.best(shape, density, found.step(tokens), weight_dtype, x_dtype, usable)
    packed = best and found.predict(best[0], shape, density, tokens, weight_dtype, x_dtype)
    dense = found.dense(shape, tokens, weight_dtype, x_dtype)
    return (packed, dense) if packed and dense else None


def _usable(
    shape: tuple[int, int],
    tokens: int,
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    device: str,
    fits: Callable[[Kernel], str | None] | None = None,
) -> tuple[dict[str, Kernel], list[str]]:
    """The kernels that take the problem, in order of preference, and why the others do not."""
    usable, passed, kind = {}, [], torch.device(device).type
    for kernel in kernels().values():
        if kernel.device not in (kind, "any"):
            continue
        reason = kernel.available() or kernel.supports(shape, tokens, weight_dtype, x_dtype)
        if reason is None and fits is not None:
            reason = fits(kernel)
        elif reason is None and kernel.fits is not None:
            reason = "it does not take every weight"
        if reason:
            passed.append(f"{kernel.name}: {reason}")
        else:
            usable[kernel.name] = kernel
    return usable, passed


def _table(device: str, density: float | None) -> "table.Table | None":
    """Tables hold times of packed weights whose density is known."""
    return None if density is None else table.current(device)
