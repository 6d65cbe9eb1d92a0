"""New tokens from a model: through our decoder where it knows the family, otherwise through transformers' own loop."""

import contextlib
import queue
import statistics
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import logits_process as processors
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from alphaprune import ragged, rollout
from alphaprune.decoder import Decoder, State, why_not
from alphaprune.families import text_config
from alphaprune.graphs import Steps
from alphaprune.sampling import NOT_FINITE, sound

OURS = "alphaprune"
WORKER = "alphaprune generate"  # the thread of transformers' generate
# What a generation_config may hold beside the defaults: what is done here, and what changes no token.
HANDLED = {
    *("eos_token_id", "repetition_penalty", "temperature", "top_k", "top_p", "min_p", "do_sample"),
    "num_return_sequences",
}
HARMLESS = {
    *("bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "transformers_version", "_from_model_config"),
    *("use_cache", "cache_implementation", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "return_dict_in_generate"),
}
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "length_penalty", "typical_p"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "diversity_penalty", "epsilon_cutoff", "eta_cutoff"), 0),
}
Choose = Callable[[Tensor, Tensor], Tensor]  # tokens so far [batch, length], logits [batch, vocabulary] → [batch]


class Memory:
    """Keys and values of one conversation between its turns. Each turn reads only what the last did not."""

    def __init__(self) -> None:
        self._state: State | None = None
        self.steps: Steps | None = None  # on a GPU, in the place of the state
        self.tokens: list[int] = []  # of the sequence whose first state.length the state holds

    @torch.inference_mode()
    def resume(self, decoder: Decoder, tokens: list[int], capacity: int) -> State:
        """A state for `capacity` positions that holds as much of the beginning of `tokens` as was kept."""
        state = self._state
        if state is None:
            state = decoder.state(1, capacity)
        # Keys from beyond the length up to which frequencies are fixed were turned by others.
        fixed = max(state.length, len(tokens)) <= decoder.table_end
        held = self.tokens[: state.length] if fixed else []
        pairs = zip(held, tokens, strict=False)
        state.length = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(held), len(tokens)))
        if capacity > state.capacity:
            larger = decoder.state(1, max(capacity, 2 * state.capacity))
            larger.cache[..., : state.length, :] = state.cache[..., : state.length, :]
            larger.length, state = state.length, larger
        self._state, self.tokens = state, list(tokens)
        return state


def new_tokens(
    model: nn.Module,
    tokens: Tensor,
    max_new: int,
    settings: Any,
    seed: int = 0,
    lock: Any = None,
    scores: list[Tensor] | None = None,
    memory: Memory | None = None,
) -> Generator[Tensor, None, None]:
    """The new tokens [sequences], one by one, on the CPU, after a prompt `tokens` [1, length].

    settings: a GenerationConfig; its num_return_sequences is the number of sequences. It ends after `max_new`, or when
    every sequence has had an end of text; what follows that in one of them means nothing. lock: held while the model
    computes, for threads that share it. scores: takes the logits [sequences, vocabulary] of each token in float32;
    through transformers not before the end. memory: of this conversation, used by our decoder.
    """
    lock = lock or contextlib.nullcontext()
    if settings.num_beams in (None, 1):
        tokens = tokens.expand(settings.num_return_sequences or 1, -1)
    if why_not_ours(model, settings) is None:
        return _ours(model, tokens, max_new, settings, seed, lock, scores, memory)
    return _theirs(model, tokens, max_new, settings, seed, lock, scores)


def why_not_ours(model: nn.Module, settings: Any = None) -> str | None:
    """Why transformers has to generate with this model, in one sentence; None if our decoder does what it asks for.

    settings: a GenerationConfig, by default the model's own.
    """
    if reason := why_not(model.config, model):
        return reason
    unknown = not_done(settings or model.generation_config)
    return f"generation_config asks for {', '.join(unknown)}" if unknown else None


def not_done(settings: Any) -> list[str]:
    """The names in a GenerationConfig that change tokens and are not done here."""
    asked = settings.to_diff_dict()
    idle = HANDLED | HARMLESS | {name for name, value in asked.items() if value is None or value is False}
    idle |= {name for name, value in NEUTRAL.items() if asked.get(name) == value}
    return sorted(asked.keys() - idle)


def continuation(
    decoder: Decoder,
    tokens: Tensor,
    max_new: int,
    choose: Choose,
    ends: frozenset[int] = frozenset(),
    state: State | None = None,
) -> Iterator[Tensor]:
    """The new tokens [batch], one by one, after a batch of prompts `tokens` [batch, length].

    It stops after `max_new`, or when every sequence has had a token of `ends`. state: holds the first of the tokens
    already, and has room for all.
    """
    batch, length = tokens.shape
    if state is None:
        state = decoder.state(batch, length + max_new)
    state.length = min(state.length, length - 1)  # the logits after the last are wanted
    ended = torch.zeros(batch, dtype=torch.bool)
    logits = decoder.prefill(state, tokens[:, state.length :])
    if not sound(logits).all():
        raise ValueError(NOT_FINITE)
    for count in range(1, max_new + 1):
        new = choose(tokens, logits)
        yield new
        ended |= torch.tensor([token in ends for token in new.tolist()])
        if count == max_new or ended.all():
            return
        tokens = torch.cat((tokens, new[:, None]), 1)
        logits = decoder.step(state, new)


def greedy(_: Tensor, logits: Tensor) -> Tensor:
    """The likeliest token of each sequence."""
    return logits.argmax(-1)


def chooser(settings: Any, seed: int = 0) -> Choose:
    """How the next token is chosen: as transformers does with the same generation_config, and the same seed.

    Greedy without do_sample; otherwise from the likeliest top_k (50 unless settings say otherwise, 0 for all).
    """
    found = processors.LogitsProcessorList()
    if settings.repetition_penalty not in (None, 1.0):
        found.append(processors.RepetitionPenaltyLogitsProcessor(penalty=settings.repetition_penalty))
    if not settings.do_sample and not found:
        return greedy
    if settings.do_sample:
        found.append(processors.TemperatureLogitsWarper(float(settings.temperature or 1)))
        top_k = 50 if settings.top_k is None else settings.top_k
        if top_k:
            found.append(processors.TopKLogitsWarper(top_k))
        if settings.top_p not in (None, 1.0):
            found.append(processors.TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            found.append(processors.MinPLogitsWarper(settings.min_p))
    generators: dict[torch.device, torch.Generator] = {}

    def choose(tokens: Tensor, logits: Tensor) -> Tensor:
        scores = found(tokens, logits.to(torch.float32, copy=True))
        if not settings.do_sample:
            return scores.argmax(-1)
        if scores.device not in generators:
            generators[scores.device] = torch.Generator(scores.device).manual_seed(seed)
        try:
            return torch.multinomial(scores.softmax(-1), 1, generator=generators[scores.device])[:, 0]
        except RuntimeError as error:
            if _drew_among_nan(error):
                raise ValueError(NOT_FINITE) from error
            raise

    return choose


def _drew_among_nan(error: BaseException) -> bool:
    """Whether this is what torch says of drawing a token where scores are not finite."""
    return str(error).startswith("probability tensor contains")


def ends_of(settings: Any) -> frozenset[int]:
    """The tokens that end a text: one, several or none."""
    ends = settings.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def decode_rates(
    models: Sequence[nn.Module], prompt: int = 16, new: int = 48, repeats: int = 7, ours: bool = True
) -> list[float]:
    """Tokens per second of greedy decoding after the prompt, of each model the median over `repeats`, by turns.

    Random prompt tokens; one round of all is a warm-up. ours: through our decoder where it knows the model; otherwise
    through transformers' generate.
    """
    turns = [[new / sum(step_seconds(model, prompt, new, ours)) for model in models] for _ in range(repeats + 1)]
    return [statistics.median(rates) for rates in zip(*turns[1:], strict=True)]


def step_seconds(model: nn.Module, prompt: int = 16, new: int = 48, ours: bool = True) -> list[float]:
    """Seconds of each of `new` greedy steps of one sequence, choice included, after random prompt tokens.

    new + 1 tokens are made; the first comes with the prompt and is not timed.
    """
    vocabulary, generator = text_config(model.config).vocab_size, torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, prompt), generator=generator).to(model.device)
    clock = _Clock()
    with torch.inference_mode():
        if ours and why_not(model.config, model) is None:
            settings = GenerationConfig(max_new_tokens=new + 1)
            for token in new_tokens(model, tokens, new + 1, settings):
                clock.put(token)
        else:
            settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
            model.generate(tokens, min_new_tokens=new + 1, max_new_tokens=new + 1, streamer=clock, **settings)
            clock.times = clock.times[1:]  # the prompt comes first
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


class _Clock(BaseStreamer):
    """Takes the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None: ...


def _ours(
    model: nn.Module,
    tokens: Tensor,
    max_new: int,
    settings: Any,
    seed: int,
    lock: Any,
    scores: list[Tensor] | None,
    memory: Memory | None,
) -> Generator[Tensor, None, None]:
    chosen = chooser(settings, seed)

    def choose(tokens: Tensor, logits: Tensor) -> Tensor:
        if scores is not None:
            scores.append(logits.to("cpu", torch.float32, copy=True))
        return chosen(tokens, logits)

    with lock:
        decoder = Decoder(model)
    capacity = tokens.shape[1] + max_new
    if in_graphs(decoder, capacity):
        yield from _on_device(model, tokens, max_new, settings, seed, lock, scores, memory)
        return
    with lock:
        state = memory and memory.resume(decoder, tokens[0].tolist(), capacity)
    steps = continuation(decoder, tokens, max_new, choose, ends_of(settings), state)
    while True:
        with lock, torch.inference_mode():
            token = next(steps, None)
            token = token if token is None else token.cpu()
        if token is None:
            return
        if memory is not None:
            memory.tokens.append(int(token))
        yield token


def in_graphs(decoder: Decoder, capacity: int) -> bool:
    """Whether sequences of up to `capacity` positions are decoded by CUDA graphs."""
    return decoder.device.type == "cuda" and ragged.why_not(decoder, capacity) is None


def _on_device(
    model: nn.Module,
    tokens: Tensor,
    max_new: int,
    settings: Any,
    seed: int,
    lock: Any,
    scores: list[Tensor] | None,
    memory: Memory | None,
) -> Generator[Tensor, None, None]:
    """As `_ours`, in CUDA graphs; draws are those of sampling.py, the same for a seed on every device."""
    prompt, sequences = tokens[0].tolist(), len(tokens)
    with lock:
        steps, slots = _batch(model, sequences, len(prompt) + max_new, memory, prompt)
    batch = [rollout.sampling_of(settings, seed + place) for place in range(sequences)]
    made = rollout.roll(steps, slots, prompt, max_new, batch, ends_of(settings), scores)
    try:
        while True:
            with lock, torch.inference_mode():
                token = next(made, None)
            if token is None:
                return
            if memory is not None:
                memory.tokens.append(int(token))
            yield token
    finally:
        if memory is None:
            for slot in slots:
                steps.ragged.close(slot)
            rollout.leave(model, steps)


def _batch(
    model: nn.Module, sequences: int, capacity: int, memory: Memory | None, prompt: list[int]
) -> tuple[Steps, list[int]]:
    """Steps and slots of their own; with a memory those of the conversation, trimmed to what the prompt shares."""
    kept = memory and memory.steps
    if kept is None or kept.ragged.capacity < capacity:
        steps = rollout.take(model, sequences, capacity)
        slots = [steps.ragged.open() for _ in range(sequences)]
        if memory is not None:
            memory.steps, memory.tokens = steps, list(prompt)
        return steps, slots
    held = memory.tokens[: kept.ragged.held[0]]
    pairs = zip(held, prompt, strict=False)
    kept.ragged.trim(0, next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(held), len(prompt))))
    memory.tokens = list(prompt)
    return kept, [0]


class _Watch(StoppingCriteria):
    """Sees every token that transformers' generate makes, and may end it."""

    def __init__(self, found: "queue.SimpleQueue") -> None:
        self.found, self.halt = found, threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.found.put(input_ids[:, -1].cpu())
        return torch.full((len(input_ids),), self.halt.is_set(), device=input_ids.device)


def _theirs(
    model: nn.Module,
    tokens: Tensor,
    max_new: int,
    settings: Any,
    seed: int,
    lock: Any,
    scores: list[Tensor] | None,
) -> Generator[Tensor, None, None]:
    """As `new_tokens`, from a thread in which transformers' generate runs; with beams, all come after the last."""
    found: queue.SimpleQueue = queue.SimpleQueue()
    watch, config = _Watch(found), deepcopy(settings)
    beams = config.num_beams not in (None, 1)
    config.max_new_tokens, config.use_cache, config.return_dict_in_generate = max_new, True, True
    config.output_logits, config.pad_token_id = scores is not None, min(ends_of(settings), default=None)
    if not beams:
        config.num_return_sequences = 1  # the prompts are there so many times already
    criteria = StoppingCriteriaList([] if beams else [watch])
    devices = [model.device] if model.device.type == "cuda" else []

    def work() -> None:
        try:
            with lock, torch.random.fork_rng(devices), torch.inference_mode():
                torch.manual_seed(seed)
                mask = torch.ones_like(tokens)
                made = model.generate(tokens, config, attention_mask=mask, stopping_criteria=criteria)
            if beams:
                for column in made.sequences[:, tokens.shape[1] :].T:
                    found.put(column.cpu())
            if scores is not None:
                scores.extend(logits.float().cpu() for logits in made.logits)
            found.put(None)
        except BaseException as error:
            found.put(error)

    worker = threading.Thread(target=work, name=WORKER, daemon=True)
    worker.start()
    try:
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                if _drew_among_nan(item):
                    raise ValueError(NOT_FINITE) from item
                raise item
            yield item
    finally:
        watch.halt.set()
        worker.join()
