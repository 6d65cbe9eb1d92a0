"""What bench/gpu.py measures, the most important first: layer shapes, numbers of tokens, sparsities."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Shape = tuple[int, int]  # (N, K)


@dataclass(frozen=True)
class Kept:
    """Which weights of a layer are kept: a share at random places, or 2 of every 4 along K."""

    sparsity: float
    pattern: str = "unstructured"

    def __str__(self) -> str:
        return self.pattern if self.pattern != "unstructured" else f"{self.sparsity:.0%}"


@dataclass(frozen=True)
class Case:
    """One layer with so many tokens; all its contenders are measured by turns."""

    shape: Shape
    tokens: int
    kept: tuple[Kept, ...]


KEY: tuple[Shape, ...] = ((28672, 4096), (4096, 14336), (11008, 4096))
FUSED: tuple[Shape, ...] = (  # q+k+v, gate+up, of LLaMA 2 and 3; its key projection; and those of 70 B
    (12288, 4096),
    (22016, 4096),
    (6144, 4096),
    (28672, 4096),
    (1024, 4096),
    (10240, 8192),
    (57344, 8192),
)
_TABLE = """
    4096x4096 11008x4096 4096x11008 14336x4096 4096x14336 5120x5120 13824x5120 5120x13824 8192x8192 28672x8192
    8192x28672 8192x29568 32000x4096 32000x5120 32000x8192 3584x18944 18944x3584 3584x20480 20480x3584 7168x7168
    21504x7168 28672x7168 7168x28672 9216x9216 27648x9216 36864x9216 9216x36864 12288x12288 36864x12288 49152x12288
    12288x49152"""


def shapes_from(text: str) -> tuple[Shape, ...]:
    """`NxK NxK` or `NxK,NxK` as shapes. ValueError for anything else."""
    found = tuple(tuple(map(int, part.split("x"))) for part in text.replace(",", " ").split())
    if not all(len(shape) == 2 and min(shape) > 0 for shape in found):
        raise ValueError(f"shapes {text}: wanted NxK[,NxK...]")
    return found


TABLE: tuple[Shape, ...] = shapes_from(_TABLE)  # the 31 shapes of SpInfer's and MACKO's measurements
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFILL = (2048, 512)  # tokens of a prompt
FIRST = (Kept(0.5), Kept(0.7), Kept(0.8), Kept(0.9), Kept(0.5, "2:4"))
REST = (Kept(0.6),)
TINY: tuple[Shape, ...] = ((48, 128), (100, 192))  # of a dry run
# How what is kept is stored: as W is, or as integers with a scale per row or per so many columns of it.
VALUES: dict[str, int | None] = {"float": None, "int8": None, "int8/128": 128}

Tier = tuple[tuple[Shape, ...], tuple[int, ...], tuple[Kept, ...]]


def tiers(key: tuple[Shape, ...] = KEY, others: tuple[Shape, ...] = (*FUSED, *TABLE)) -> tuple[Tier, ...]:
    """(shapes, tokens, kept), those that a short run should have first; later ones repeat earlier ones."""
    return (
        (key, (1,), FIRST),
        (key, (16,), FIRST),
        (key, (32, 128, 256), FIRST),
        (key, PREFILL, FIRST),
        (key, (8, 64, 2, 4), FIRST),
        (others, (1, 16), FIRST),
        (key, TOKENS, REST),
        (others, (*TOKENS, *PREFILL), FIRST + REST),
    )


def cases(found: Iterable[Tier]) -> Iterator[Case]:
    """Every combination once, where it comes first; a case has all of its combinations that no earlier one had."""
    seen = set()
    for shapes, tokens, kept in found:
        for shape, many in itertools.product(dict.fromkeys(shapes), tokens):
            new = tuple(one for one in kept if (shape, many, one) not in seen)
            seen.update((shape, many, one) for one in new)
            if new:
                yield Case(shape, many, new)


def chosen(shapes: tuple[Shape, ...], tokens: tuple[int, ...], kept: tuple[Kept, ...]) -> list[Case]:
    """The cases of these shapes (none: all that are known), tokens and sparsities, in order of importance."""
    every = shapes or (*KEY, *FUSED, *TABLE)
    order = tiers(tuple(shape for shape in KEY if shape in every), every)
    asked = (every, tokens, kept)
    picked = (Case(c.shape, c.tokens, tuple(k for k in c.kept if k in kept)) for c in cases((*order, asked)))
    return [case for case in picked if case.kept and case.tokens in tokens]


def kept_from(text: str) -> tuple[Kept, ...]:
    """`0.5,0.7,2:4` as what is kept. ValueError for anything else."""
    found = tuple(Kept(0.5, "2:4") if part == "2:4" else Kept(float(part)) for part in text.split(","))
    if not all(0 <= one.sparsity < 1 for one in found):
        raise ValueError(f"sparsity {text}: wanted shares from 0 to below 1, and 2:4")
    return found


def launches_from(text: str) -> tuple[tuple[str, int, str], ...]:
    """`sbt_mma:1:0.5,nm_mma_sp:16:2:4` as (kernel, tokens, what `kept_from` takes). ValueError for anything else."""
    found = []
    for part in text.split(","):
        kernel, tokens, kept = [*part.split(":", 2), "", ""][:3]
        if not (kernel and tokens.isdecimal() and int(tokens)) or len(kept_from(kept or "none")) != 1:
            raise ValueError(f"case {part}: wanted kernel:tokens:sparsity, such as sbt_mma:1:0.5 or nm_mma_sp:16:2:4")
        found.append((kernel, int(tokens), kept))
    return tuple(found)


def values_from(text: str) -> tuple[str, ...]:
    """`float,int8` as ways to store what is kept. ValueError for anything else."""
    found = tuple(text.split(","))
    if not set(found) <= VALUES.keys():
        raise ValueError(f"values {text}: wanted {', '.join(VALUES)}, with commas")
    return found
