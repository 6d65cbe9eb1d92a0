"""Who is measured on a GPU: torch's dense products, cuSPARSELt for 2:4, and every kernel of this package."""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_cases import VALUES, Case, Kept, Shape
from gpu_rig import Call, Rig
from torch import Tensor
from torch.nn import functional

from alphaprune import timing
from alphaprune.formats import Packed, quantize, sbt
from alphaprune.kernels import base, spmm
from alphaprune.mask import keep_mask
from alphaprune.pattern import NM

sys.path.insert(0, str(Path(__file__).parent / "engines"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import cublaslt
import problems
import tolerance

ROWS = 4096  # of a weight that are compared with float64 at a time
SPARSE_ROWS = 8  # torch hands cuSPARSELt multiples of so many tokens


class Weights:
    """A random layer on a device: W [N, K], what is left of it at each sparsity, and x [tokens, K]."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dense = torch.randn(shape, generator=self._generator(device, 0), device=device).to(dtype)
        self._masks: dict[Kept, Tensor] = {}
        self._packed: dict[tuple[Kept, str], Packed] = {}

    def x(self, tokens: int) -> Tensor:
        """The activations, [tokens, K]."""
        generator = self._generator(self.dense.device, 2)
        every = torch.randn(tokens, self.shape[1], generator=generator, device=self.dense.device)
        return every.to(self.dense.dtype)

    def mask(self, kept: Kept) -> Tensor:
        """[N, K] bool, True = kept."""
        if kept not in self._masks:
            scores = torch.rand(self.shape, generator=self._generator(self.dense.device, 1), device=self.dense.device)
            if kept.pattern == "2:4":
                mask = keep_mask(scores, scores.numel() // 2, NM(2, 4))
            else:
                mask = scores >= kept.sparsity
            self._masks[kept] = mask
        return self._masks[kept]

    def pruned(self, kept: Kept | None, values: str = "float") -> Tensor:
        """W [N, K] with zeros; W itself for None. Of integers exactly what they stand for, in float64."""
        if kept is None or values == "float":
            return self.dense if kept is None else self.dense * self.mask(kept)
        packed = self.packed(kept, values)
        return problems.exact_weight(sbt.unpack_torch(packed)[0], packed.scale)

    def packed(self, kept: Kept, values: str = "float") -> Packed:
        """What is left, in SBT."""
        if (kept, values) not in self._packed:
            mask, weight, scale = self.mask(kept), self.dense, None
            if values != "float":
                weight, scale, _ = quantize.quantize(self.dense, mask, VALUES[values])
            self._packed[kept, values] = sbt.pack(weight, mask, scale)
        return self._packed[kept, values]

    @staticmethod
    def _generator(device: torch.device, seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Contender:
    """One way to compute y [tokens, N] = x Wᵀ.

    name: what the row calls it. kept: None if it is dense and gains nothing from zeros. nbytes: of one weight.
    make(count) -> as many calls, each on a weight in memory of its own. library: what torch's products run on.
    values: one of VALUES. rounded: whether it may use 16-bit integers for x.
    """

    name: str
    kind: str  # "dense", "library" (somebody else's sparse product) or "kernel" (ours)
    kept: Kept | None
    nbytes: int
    make: Callable[[int], list[Call]] = field(repr=False)
    library: str | None = None
    values: str = "float"
    rounded: bool = False


def contenders(
    weights: Weights, case: Case, rig: Rig, only: set[str], without: set[str], values: tuple[str, ...] = ("float",)
) -> Iterator[Contender]:
    """All of a case, dense first: there is no ratio without them. only: kernels, all if empty. without: names.

    values: of VALUES, in this order.
    """
    x = weights.x(case.tokens)
    found = [*dense(weights, x, rig)]
    for kept in case.kept:
        if kept.pattern == "2:4" and rig.device.type == "cuda":
            found.extend(cusparselt(weights, x, kept))
        if "float" in values:
            found.extend(ours(weights, x, kept, only))
    for kind in values:
        for kept in case.kept if kind != "float" else ():
            found.extend(ours(weights, x, kept, only, kind))
    yield from (one for one in found if one.name not in without)


def dense(weights: Weights, x: Tensor, rig: Rig) -> Iterator[Contender]:
    """torch's products, in both orders of the operands, with tokens as they are and padded, by each library."""
    tokens, weight = len(x), weights.dense
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda w: functional.linear(x, w),
        "transposed": lambda w: (w @ x.mT).mT,
    }
    for many in (8, 16):
        if tokens < many:
            padded = functional.pad(x, (0, 0, 0, many - tokens))
            ways[f"padded to {many}"] = lambda w, padded=padded: functional.linear(padded, w)[:tokens]
    for name, way in ways.items():
        for library in rig.libraries or (None,):
            called = name if library is None else f"{name} {library}"
            yield Contender(called, "dense", None, weight.nbytes, _on_copies(weight, way), library)
    if rig.device.type == "cuda":
        yield from proposals(weights, x)
    if tokens == 1:
        yield Contender("mv", "dense", None, weight.nbytes, _on_copies(weight, lambda w: torch.mv(w, x[0])[None]))


def _on_copies(weight: Tensor, way: Callable[[Tensor], Tensor]) -> Callable[[int], list[Call]]:
    return lambda count: [functools.partial(way, weight.clone()) for _ in range(count)]


def proposals(weights: Weights, x: Tensor) -> Iterator[Contender]:
    """Each algorithm that cuBLASLt proposes; one that fails, with the reason, if it cannot be asked."""
    weight = weights.dense
    try:
        found = _cublaslt().linear(x, weight)
    except (OSError, AttributeError, RuntimeError, ValueError) as fault:
        reason = fault

        def refuse(count: int) -> list[Call]:
            raise reason

        yield Contender("cublaslt", "dense", None, weight.nbytes, refuse)
        return
    for number, way in enumerate(found):
        yield Contender(f"cublaslt {number}", "dense", None, weight.nbytes, _on_copies(weight, way))


@functools.cache
def _cublaslt() -> cublaslt.CublasLt:
    return cublaslt.CublasLt(cublaslt.loaded(), torch.device("cuda"), lambda: torch.cuda.current_stream().cuda_stream)


def cusparselt(weights: Weights, x: Tensor, kept: Kept) -> Iterator[Contender]:
    """cuSPARSELt through torch's semi-structured tensors, by its default algorithm and by the one that its own search
    finds fastest; x is padded beforehand."""
    tokens = len(x)
    padded = functional.pad(x, (0, 0, 0, -tokens % SPARSE_ROWS))

    def make(count: int, search: bool) -> list[Call]:
        pruned, options = weights.pruned(kept), {}
        if search:
            options["alg_id"] = torch._cslt_sparse_mm_search(torch._cslt_compress(pruned), padded.mT)
        found = [torch.sparse.to_sparse_semi_structured(pruned, **options) for _ in range(count)]
        if "CUSPARSELT" not in type(found[0]).__name__:
            raise RuntimeError(f"torch made a {type(found[0]).__name__}, not one of cuSPARSELt")
        return [lambda w=w: functional.linear(padded, w)[:tokens] for w in found]

    nbytes = weights.dense.nbytes * 9 // 16  # half of the values, and two bits for each of them
    for name, search in (("cusparselt", False), ("cusparselt searched", True)):
        yield Contender(name, "library", kept, nbytes, functools.partial(make, search=search))


def ours(weights: Weights, x: Tensor, kept: Kept, only: set[str], values: str = "float") -> Iterator[Contender]:
    """Every kernel of this package that runs on the device and takes the problem; N:M kernels get N:M weights only."""
    dtype = weights.dense.dtype if values == "float" else torch.int8
    for kernel in base.kernels().values():
        if kernel.device != weights.dense.device.type or (only and kernel.name not in only) or kernel.available():
            continue
        if kernel.supports(weights.shape, len(x), dtype, x.dtype):
            continue
        if kernel.name.startswith("nm_") and kept.pattern == "unstructured":
            continue
        packed = weights.packed(kept, values)

        def make(count: int, name: str = kernel.name, packed: Packed = packed) -> list[Call]:
            prepared = [spmm.prepare(packed.map(Tensor.clone), "bench", name) for _ in range(count)]
            return [functools.partial(one, x) for one in prepared]

        name, rounded = kernel.name, problems.may_round(kernel.name, packed, x.dtype)
        name = name if values == "float" else f"{name} {values}"
        yield Contender(name, "kernel", kept, packed.nbytes, make, values=values, rounded=rounded)


def copies(contender: Contender, rotate: int) -> int:
    """Weights that the calls go round: they fill `rotate` bytes."""
    return timing.copy_count(contender.nbytes, rotate)


def error(y: Tensor, x: Tensor, weight: Tensor, rounded: bool = False) -> dict[str, float]:
    """How far y [tokens, N] is from x Wᵀ in float64: the largest |error|, what the tests allow there, and the largest
    share of what is allowed. NaN if any output is. rounded: whether the tests allow 16-bit integers for x."""
    worst = {"max_error": 0.0, "allowed": 0.0, "of_allowed": 0.0}
    for first in range(0, weight.shape[0], ROWS):
        part, rows = y[:, first : first + ROWS], weight[first : first + ROWS]
        found = (part.double() - tolerance.exact(x, rows)).abs()
        allowed = tolerance.bound(x, rows, rounded=rounded)
        if not bool(found.isfinite().all()):
            return dict.fromkeys(worst, float("nan"))
        at = int(found.argmax())
        share = float((found / allowed).max())
        if (size := float(found.flatten()[at])) > worst["max_error"]:
            worst |= {"max_error": size, "allowed": float(allowed.flatten()[at])}
        worst["of_allowed"] = max(worst["of_allowed"], share)
    return worst
