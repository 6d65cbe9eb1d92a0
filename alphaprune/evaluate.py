"""Perplexity and bits per byte of a model on a text."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune.data import Text

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Evaluation:
    """Quality on a text, and what is needed to name the figure."""

    perplexity: float
    bits_per_byte: float | None  # over the bytes of the scored tokens; None where a slow tokenizer gives no offsets
    tokens: int  # scored
    bytes: int | None  # scored
    windows: int
    length: int
    stderr: float  # of the mean loss in nats per token, over windows
    data_sha256: str
    dtype: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    text: Text,
    length: int = 2048,
    windows: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Perplexity by the protocol of Wanda and SparseGPT: non-overlapping windows of `length`, the tail dropped.

    In every window tokens 2…length are predicted; perplexity = exp(mean over windows of the mean loss).
    windows: only the first so many.   Raises ValueError if the text is shorter than one window.
    """
    context = getattr(model.config, "max_position_embeddings", length)
    if length > context:
        raise ValueError(f"length {length} is more than the {context} positions of this model; give --length {context}")
    count = window_count(text, length, windows)
    started = perf_counter()
    tokens = text.tokens[: count * length].reshape(count, length)
    losses = torch.cat([_losses(model, part, progress) for part in tokens.split(max(1, TOKENS_AT_ONCE // length))])
    ends = text.ends[: count * length].reshape(count, length)
    scored = int((ends[:, -1] - ends[:, 0]).sum()) if int(text.ends[-1]) >= 0 else None
    mean = losses.mean().item()
    spread = losses.std().item() / math.sqrt(count) if count > 1 else math.nan
    return Evaluation(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=mean * count * (length - 1) / math.log(2) / scored if scored else None,
        tokens=count * (length - 1),
        bytes=scored,
        windows=count,
        length=length,
        stderr=spread,
        data_sha256=text.sha256,
        dtype=str(next(p.dtype for p in model.parameters())).removeprefix("torch."),
        seconds=perf_counter() - started,
    )


def window_count(text: Text, length: int, windows: int | None = None) -> int:
    """How many windows of `length` tokens are evaluated; ValueError if there is not one."""
    if length < 2:
        raise ValueError(f"length {length}: a window needs two tokens, one to see and one to predict")
    if windows is not None and windows < 1:
        raise ValueError(f"windows {windows}: wanted one at least")
    count = text.tokens.numel() // length
    if count == 0:
        raise ValueError(
            f"{text.name}: {text.tokens.numel()} tokens, shorter than one window of {length}; "
            f"give a longer text or a smaller --length"
        )
    return min(count, windows or count)


def _losses(model: nn.Module, tokens: Tensor, progress: Callable[[str], None] | None) -> Tensor:
    """Mean loss of every window in nats per token; tokens [windows, length] → [windows] float64."""
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        logits = model(input_ids=tokens.to(device), use_cache=False).logits  # [windows, length, vocabulary]
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(device), reduction="none"
        )
    if progress:
        for _ in tokens:
            progress("")
    return loss.reshape(len(tokens), -1).double().mean(1).cpu()
