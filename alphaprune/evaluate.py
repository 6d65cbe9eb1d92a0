"""Perplexity and bits per byte of a model on a text, and how far it is from the dense model there."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import calibrate
from alphaprune.data import Text
from alphaprune.families import text_config
from alphaprune.model import Block, Source
from alphaprune.states import Room, States

TOKENS_AT_ONCE = 4096
LOGITS_AT_ONCE = 512  # tokens whose logits are in memory together where two models are compared


@dataclass(frozen=True)
class Evaluation:
    """Quality on a text, and what is needed to name the figure."""

    perplexity: float
    bits_per_byte: float | None  # over the bytes of the scored tokens; None where a slow tokenizer gives no offsets
    tokens: int  # scored
    bytes: int | None  # scored
    windows: int
    length: int
    stderr: float | None  # of the mean loss in nats per token, over windows; None where there is one window only
    data_sha256: str
    dtype: str
    seconds: float
    seed: None = None  # nothing is drawn; it stands here because the results of tasks have one

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judged:
    """What a model makes of windows, one entry per window, [windows] float64 in nats per predicted token.

    losses: the mean loss.   divergences: the mean KL(dense ‖ model); all 0 for the dense model itself.
    """

    losses: Tensor
    divergences: Tensor


@dataclass(frozen=True)
class Reference:
    """The dense model on windows: `tokens` [windows, length] int64; `states`, parts [batch, length, D] of the inputs of
    its head in its own dtype, from which its logits are made again window by window; `losses` [windows] float64."""

    tokens: Tensor
    states: States
    losses: Tensor


def evaluate(
    model: nn.Module,
    text: Text,
    length: int = 2048,
    windows: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Perplexity by the protocol of Wanda and SparseGPT: non-overlapping windows of `length`, the tail dropped.

    In every window tokens 2…length are predicted; perplexity = exp(mean over windows of the mean loss).
    windows: only the first so many.   Raises ValueError if the text is shorter than a window, or a loss not finite.
    """
    context = getattr(text_config(model.config), "max_position_embeddings", length)
    if length > context:
        raise ValueError(f"length {length} is more than the {context} positions of this model; give --length {context}")
    tokens = windows_of(text, length, windows)
    count = len(tokens)
    started = perf_counter()
    losses = window_losses(model, tokens, progress)
    if (wrong := losses.isfinite().logical_not().nonzero()).numel():
        first = int(wrong[0])
        raise ValueError(
            f"{text.name}: the loss of window {first + 1} is {losses[first].item()}: the model's outputs are not "
            f"finite; its weights or config.json are damaged, or its dtype is too narrow for it"
        )
    scored = scored_bytes(text, length, count)
    mean, spread = mean_and_error(losses)
    return Evaluation(
        perplexity=perplexity(mean),
        bits_per_byte=bits_per_byte(mean, count * (length - 1), scored),
        tokens=count * (length - 1),
        bytes=scored,
        windows=count,
        length=length,
        stderr=spread if count > 1 else None,
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


def windows_of(text: Text, length: int, windows: int | None = None) -> Tensor:
    """[windows, length] int64: non-overlapping windows from the start of a text; ValueError if there is not one."""
    count = window_count(text, length, windows)
    return text.tokens[: count * length].reshape(count, length)


def scored_bytes(text: Text, length: int, count: int) -> int | None:
    """Bytes of the predicted tokens in the first `count` windows; None where a slow tokenizer gives no offsets."""
    ends = text.ends[: count * length].reshape(count, length)
    return int((ends[:, -1] - ends[:, 0]).sum()) if int(text.ends[-1]) >= 0 else None


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens: int, scored: int | None) -> float | None:
    """The mean loss over `tokens` in nats, in bits over the bytes that they cover."""
    return loss * tokens / math.log(2) / scored if scored else None


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of one value per window and the standard error of that mean; NaN of a single window."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def window_losses(model: nn.Module, tokens: Tensor, progress: Callable[[str], None] | None = None) -> Tensor:
    """Mean loss of every window in nats per predicted token; tokens [windows, length] → [windows] float64."""
    return torch.cat([_losses(model, part, progress) for part in _parts(tokens)])


def reference(
    source: Source, tokens: Tensor, progress: Callable[[str], None] | None = None, room: Room | None = None
) -> Reference:
    """The dense model on windows, tokens [windows, length]; its logits are not kept, the inputs of its head are.

    One block is in memory at a time.   room: where hidden states may lie, see states.py.
    """
    states, losses = States(room), []
    for part, found in _judged(source, source.blocks(), tokens, room):
        losses.append(judge(source.skeleton, part, found).losses)
        states.append(found.cpu())
        _tick(progress, len(part))
    return Reference(tokens, states, torch.cat(losses))


def against(
    source: Source,
    dense: Reference,
    blocks: Iterable[Block] | None = None,
    progress: Callable[[str], None] | None = None,
    room: Room | None = None,
) -> Judged:
    """Losses of a pruned model and its divergence from the dense one, whose head (never pruned) it must share.

    blocks: those of the model, each pruned by the time that it comes; by default as the source has them.
    """
    found, parts = [], _judged(source, source.blocks() if blocks is None else blocks, dense.tokens, room)
    for (tokens, inputs), states in zip(parts, dense.states, strict=True):
        found.append(judge(source.skeleton, tokens, inputs, states))
        _tick(progress, len(tokens))
    return Judged(torch.cat([f.losses for f in found]), torch.cat([f.divergences for f in found]))


def _judged(
    source: Source, blocks: Iterable[Block], tokens: Tensor, room: Room | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and the inputs of the head [windows, length, D], part by part, of a model that is had block by block."""
    activations = calibrate.first_inputs(source, tokens, room)
    for block in blocks:
        calibrate.run(block, activations)
    with calibrate.loaded(source):
        for part, hidden in zip(calibrate.batches(tokens), activations.hidden, strict=True):
            yield part, calibrate.head_inputs(source, part, hidden)


def judge(model: nn.Module, tokens: Tensor, states: Tensor, dense: Tensor | None = None) -> Judged:
    """Losses and divergences of windows from the inputs of the head, `states` and those of the `dense` model.

    tokens: [windows, length].   states, dense: [windows, length, D].   KL(dense ‖ model) = Σ p·(log p − log q) over the
    vocabulary; softmax in float32, sums in float64; the last token of a window predicts nothing that is scored.
    """
    head, device = model.get_output_embeddings(), _device(model)
    targets = tokens[:, 1:].flatten().to(device)  # [windows · (length − 1)]
    sides = [side[:, :-1].flatten(0, 1) for side in (states, dense) if side is not None]
    losses, divergences = [], []
    with torch.inference_mode():
        for target, *inputs in zip(*(x.split(LOGITS_AT_ONCE) for x in (targets, *sides)), strict=True):
            logs = [head(x.to(device)).float().log_softmax(-1) for x in inputs]  # [tokens, vocabulary]
            losses.append(nn.functional.nll_loss(logs[0], target, reduction="none").double())
            if dense is not None:
                divergences.append((logs[1].exp() * (logs[1] - logs[0])).sum(-1, dtype=torch.float64))
    mean = [torch.cat(values).reshape(len(tokens), -1).mean(1).cpu() for values in (losses, divergences) if values]
    return Judged(mean[0], mean[1] if dense is not None else torch.zeros_like(mean[0]))


def _parts(windows: Tensor) -> tuple[Tensor, ...]:
    """[windows, length, …] in parts that go through a model together."""
    return windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))


def _tick(progress: Callable[[str], None] | None, windows: int) -> None:
    for _ in range(windows if progress else 0):
        progress("")


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device


def _losses(model: nn.Module, tokens: Tensor, progress: Callable[[str], None] | None) -> Tensor:
    """Mean loss of every window in nats per token; tokens [windows, length] → [windows] float64."""
    device = _device(model)
    with torch.inference_mode():
        logits = model(input_ids=tokens.to(device), use_cache=False).logits  # [windows, length, vocabulary]
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(device), reduction="none"
        )
    _tick(progress, len(tokens))
    return loss.reshape(len(tokens), -1).double().mean(1).cpu()
