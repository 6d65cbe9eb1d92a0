"""Plans for a small model whose blocks differ in alpha."""

import torch
from conftest import make_model
from torch import nn

import alphaprune
from alphaprune import compressions
from alphaprune import model as models
from alphaprune.compressions.plans import CompressionPlan

BUDGETS = {"bits": 4.5, "rank": 0.6, "structured": 0.3}


def tokens(samples: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (samples, 32), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens(2, 9), use_cache=False).logits


def with_alphas(found: alphaprune.Analysis, alphas: tuple[float, ...] = (2.0, 3.0, 4.0)) -> alphaprune.Analysis:
    """The analysis with these alphas by block: small models have none to speak of."""
    for entry in found.layers.values():
        entry.columns["alpha"] = alphas[entry.block]
    return found


def planned(analysis: alphaprune.Analysis, method: str, budget: float | None = None, **options) -> CompressionPlan:
    source = models.open_source(make_model(1))
    options = {"which": "both"} | options if method == "structured" else options
    return compressions.plan(source, analysis, method, budget or BUDGETS[method], **options)
