"""New tokens after one prompt in graphs and on the device: the host reads a token while the next one is computed."""

import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from alphaprune.decoder import CHUNK, Decoder
from alphaprune.graphs import Steps, fetch
from alphaprune.memory import upload
from alphaprune.ragged import Ragged
from alphaprune.sampling import NOT_FINITE, Kind, Sampling, sound

LEAST = 512  # positions of a batch that is made for one prompt, so that the next ones fit, too
DEFAULT_TOP_K = 50  # of transformers, where sampling is asked for and top_k is not

_kept: "WeakKeyDictionary[nn.Module, list[tuple[tuple, Steps]]]" = WeakKeyDictionary()
_lock = threading.Lock()


def sampling_of(settings: Any, seed: int) -> Sampling:
    """What a GenerationConfig asks for, greedy without do_sample."""
    drawn = bool(settings.do_sample)
    top_k = DEFAULT_TOP_K if settings.top_k is None else settings.top_k
    return Sampling(
        temperature=float(settings.temperature or 1) if drawn else 0.0,
        top_p=1.0 if settings.top_p is None else settings.top_p,
        top_k=top_k,
        min_p=settings.min_p or 0.0,
        seed=seed,
        repetition=settings.repetition_penalty or 1.0,
    )


def take(model: nn.Module, sequences: int, capacity: int, make: Callable[[Ragged], Steps] = Steps) -> Steps:
    """Empty steps of a model for so many sequences of up to `capacity` positions, kept from earlier calls if there are.

    Nobody else has them until they are given back with `leave`.
    """
    state = _state(model)
    with _lock:
        kept = _kept.setdefault(model, [])
        kept[:] = [(of, steps) for of, steps in kept if of == state]
        for place, (_, steps) in enumerate(kept):
            if steps.ragged.slots == sequences and steps.ragged.capacity >= capacity:
                return kept.pop(place)[1]
        kept.clear()  # too small: its memory is for the larger one
    decoder = Decoder(model)
    roomy = LEAST
    while roomy < capacity:
        roomy *= 2
    return make(Ragged(decoder, sequences, min(roomy, max(capacity, decoder.table_end))))


def leave(model: nn.Module, steps: Steps) -> None:
    """Gives back what `take` gave, all sequences of which are closed."""
    with _lock:
        _kept.setdefault(model, []).append((_state(model), steps))


def _state(model: nn.Module) -> tuple:
    """What changes when layers, weights or hooks are exchanged: then the kernels that a graph launches are others."""
    tensors = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return (hooks, *tensors)


@torch.inference_mode()
def roll(
    steps: Steps,
    slots: list[int],
    tokens: list[int],
    max_new: int,
    batch: list[Sampling],
    ends: frozenset[int] = frozenset(),
    scores: list[Tensor] | None = None,
) -> Iterator[Tensor]:
    """New tokens [sequences] on the CPU, one after the other, of sequences with one prompt and a sampling each.

    The first positions that a slot holds are those of `tokens`. It ends after `max_new`, or when every sequence has had
    a token of `ends`, which is noticed one step late. scores: takes the logits of each token, float32.
    """
    ragged, kind = steps.ragged, Kind.of(batch)
    for slot, sampling in zip(slots, batch, strict=True):
        ragged.trim(slot, len(tokens) - 1)
        steps.sampler.put(slot, sampling, tokens, [])
        for begin in range(ragged.held[slot], len(tokens), CHUNK):
            logits = ragged.prefill([(slot, tokens[begin : begin + CHUNK])])
        if not sound(logits).all():
            raise ValueError(NOT_FINITE)
        first = upload(torch.tensor([slot]), ragged.decoder.device)
        new = steps.sampler.choose(logits, first, ragged.lengths[first] - 1, kind)
        ragged.begin(slot, new[0])
        if scores is not None:
            scores.append(logits.to("cpu", torch.float32, copy=True))
    if scores is not None:
        scores[-len(slots) :] = [torch.cat(scores[-len(slots) :])]
    pending, ended = fetch(ragged.tokens[upload(torch.tensor(slots), ragged.decoder.device)]), set()
    for count in range(1, max_new + 1):
        late = pending
        if count < max_new:
            found, logits = steps(slots, kind)
            pending = fetch(found)
        token = late()
        yield token
        ended |= {place for place, one in enumerate(token.tolist()) if one in ends}
        if len(ended) == len(slots):
            return
        if scores is not None and count < max_new:
            scores.append(logits.to("cpu", torch.float32, copy=True))
