"""The shape that zeros may take: anywhere, or a fixed number kept of every few along K."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """`keep` weights are kept of every `of` consecutive ones along K: `NM(keep=2, of=4)` is 2:4."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of:
            raise ValueError(f"pattern {self.keep}:{self.of}: N:M keeps N of every M, so it needs 0 < N <= M")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of


Pattern = Unstructured | NM


def parse(text: "str | Pattern") -> Pattern:
    """`unstructured` or `N:M` as a pattern; a pattern is returned as it is.

    `N:8` with a literal N is not a pattern but a family; plans choose N per layer (see planning).
    """
    if isinstance(text, Unstructured | NM):
        return text
    if text == "unstructured":
        return Unstructured()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(found[1]), int(found[2]))
    raise ValueError(f"pattern {text!r}: wanted 'unstructured' or N:M such as 2:4")
