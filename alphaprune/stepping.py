"""How long steps of a batch take in graphs, beside the products that they are made of, and how long a prompt takes.

On a GPU times are those between events of the device; nothing waits for a token, as in serving. On a CPU the same
calls run one after the other.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune.decoder import Decoder
from alphaprune.graphs import Steps
from alphaprune.ragged import Ragged

WARM_UPS = 3
TURN = 8  # calls in a row, the first of which is not timed


class Watch:
    """Seconds between marks on a device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next one; waits for the device."""
        marks, self.marks = self.marks, []
        if not self.on_gpu:
            return [after - before for before, after in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]


@torch.inference_mode()
def time_steps(
    model: nn.Module, batch: int, prompt: int, new: int, how: str = "auto", ahead: int = 0
) -> dict[str, float]:
    """Greedy steps of `batch` sequences after random prompts; how, ahead: as `Steps` takes them.

    step_seconds: median of `new` steps; tokens_per_second: of all sequences together, over the sum of these steps.
    kernel_seconds: every product of a step with a weight called alone with a random x, in one graph, median.
    step_over_kernels: median of the ratios of steps to the products next to them, each several in a row.
    """
    decoder = Decoder(model, direct=how != "compile")
    steps, slots = started(decoder, batch, prompt, WARM_UPS + new + max(TURN, new), how, ahead)
    products = [(call, _random(batch, k, decoder)) for call, k in decoder.products()]
    multiply = steps.recorder.record(lambda: [call(x) for call, x in products])
    for _ in range(WARM_UPS):
        steps(slots)
        multiply()
    watch = Watch(decoder.device)
    watch.mark()
    for _ in range(new):
        steps(slots)
        watch.mark()
    found = watch.seconds()
    # By turns of several, as steps follow one another: after a pause or another graph a device waits for a launch.
    kernels, ratios = [], []
    for _ in range(max(1, new // TURN)):
        turns = []
        for call in (functools.partial(steps, slots), multiply):
            call()
            watch.mark()
            for _ in range(TURN - 1):
                call()
                watch.mark()
            turns.append(watch.seconds())
        kernels += turns[1]
        ratios.append(statistics.median(turns[0]) / statistics.median(turns[1]))
    return {
        "step_seconds": statistics.median(found),
        "tokens_per_second": batch * new / sum(found),
        "kernel_seconds": statistics.median(kernels),
        "step_over_kernels": statistics.median(ratios),
    }


@torch.inference_mode()
def time_prefill(model: nn.Module, tokens: int, repeats: int) -> dict[str, float]:
    """seconds: median of reading a prompt of so many random tokens in one pass; tokens_per_second."""
    decoder = Decoder(model)
    read, watch, found = reading(decoder, tokens), Watch(decoder.device), []
    for _ in range(1 + repeats):
        watch.mark()
        read()
        watch.mark()
        found += watch.seconds()
    seconds = statistics.median(found[1:])
    return {"prefill_seconds": seconds, "tokens_per_second": tokens / seconds}


@torch.inference_mode()
def time_theirs(model: nn.Module, batch: int, prompt: int, new: int) -> dict[str, float]:
    """As `time_steps` by transformers' generate: the difference between `new` + 1 tokens and one, per step."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(model.device)
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    watch = Watch(tokens.device)

    def seconds(count: int) -> float:
        watch.mark()
        model.generate(tokens, min_new_tokens=count, max_new_tokens=count, **settings)
        watch.mark()
        return watch.seconds()[0]

    seconds(2)
    taken = seconds(new + 1) - seconds(1)
    return {"step_seconds": taken / new, "tokens_per_second": batch * new / taken}


def started(
    decoder: Decoder, batch: int, prompt: int, count: int, how: str = "auto", ahead: int = 0
) -> tuple[Steps, list[int]]:
    """Steps, `count` at most, and the slots of `batch` sequences that have read random prompts; others as `Steps`."""
    ragged = Ragged(decoder, batch, prompt + count + 1)
    steps = Steps(ragged, how, buckets=(batch,), ahead=ahead)
    slots = [ragged.open() for _ in range(batch)]
    for slot, row in zip(slots, random_tokens(decoder, batch, prompt).tolist(), strict=True):
        ragged.begin(slot, ragged.prefill([(slot, row)])[0].argmax())
    return steps, slots


def reading(decoder: Decoder, tokens: int) -> Callable[[], object]:
    """Reads a prompt of so many random tokens in one pass, each time anew."""
    ragged = Ragged(decoder, 1, tokens)
    slot, row = ragged.open(), random_tokens(decoder, 1, tokens)[0].tolist()

    def read() -> None:
        ragged.prefill([(slot, row)])
        ragged.trim(slot, 0)

    return read


def random_tokens(decoder: Decoder, batch: int, count: int) -> Tensor:
    """[batch, count] int64 on the CPU, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, decoder.config.vocab_size, (batch, count), generator=generator)


def _random(batch: int, k: int, decoder: Decoder) -> Tensor:
    return torch.randn(batch, k, generator=torch.Generator().manual_seed(k)).to(decoder.device, decoder.dtype)
