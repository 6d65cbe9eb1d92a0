"""Random layers with correlated inputs, for the tests of pruners."""

import torch
from torch import Tensor

from alphaprune.calibrate import InputStat
from alphaprune.gram import Gram

SAMPLES = 4


def correlated(tokens: int, columns: int, seed: int) -> Tensor:
    """Inputs [tokens, K] float32 with falling directions, sizes that differ between columns, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    x = torch.randn(tokens, columns, generator=generator) @ mix / columns**0.5
    x += 0.1 * torch.randn(tokens, columns, generator=generator)
    return x * (0.1 + 3 * torch.rand(columns, generator=generator))


def weights(rows: int, columns: int, seed: int) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def gram_of(x: Tensor) -> Gram:
    return Gram(x.T @ x / SAMPLES, len(x))


def stat(gram: Gram) -> InputStat:
    return InputStat(gram.matrix.diagonal().sqrt(), gram, gram.tokens)


def bad_inputs() -> dict[str, Tensor]:
    """Inputs [tokens, 96] of the kinds that have broken pruners, by name."""
    x = correlated(300, 96, 7)
    dead = x.clone()
    dead[:, [0, 5, 95]] = 0
    return {
        "dead inputs": dead,
        "duplicate tokens": x[:3].repeat(100, 1),
        "fewer tokens than columns": x[:40],
        "one token": x[:1],
        "nothing but zeros": torch.zeros(20, 96),
        "large and small": x * torch.logspace(-6, 6, 96),
    }
