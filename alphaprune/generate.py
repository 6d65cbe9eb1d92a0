"""Text from a model: through our decoder where it knows the family, otherwise through transformers' own loop."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import logits_process as processors
from transformers.generation.streamers import BaseStreamer, TextStreamer

from alphaprune.decoder import Decoder, why_not

OURS = "alphaprune"
# What a generation_config may hold beside the defaults: what is done here, and what changes no token.
HANDLED = {"eos_token_id", "repetition_penalty", "temperature", "top_k", "top_p", "min_p", "do_sample"}
HARMLESS = {
    *("bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "transformers_version", "_from_model_config"),
    *("use_cache", "cache_implementation", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "return_dict_in_generate"),
}
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "typical_p"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "diversity_penalty", "epsilon_cutoff", "eta_cutoff"), 0),
}
Choose = Callable[[Tensor, Tensor], Tensor]  # tokens so far [batch, length], logits [batch, vocabulary] → [batch]


@dataclass(frozen=True)
class Generation:
    """What was made and how fast: `seconds` from the prompt to the last token.

    decoder: "alphaprune", or "transformers: " and why not ours.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    decoder: str


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
) -> Generation:
    """The continuation of `prompt`; greedy at temperature 0, otherwise sampled with `seed`.

    It ends at the end-of-text tokens of the model's generation_config, whose repetition penalty, top_k, top_p and
    min_p hold here as in transformers. stream: called with each piece of text as it is made.
    Raises ValueError if prompt and new tokens do not fit into the context of the model.
    """
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.long()  # [1, length]
    if tokens.numel() == 0:
        tokens = torch.tensor([[model.config.bos_token_id or 0]])
    context = getattr(model.config, "max_position_embeddings", None)
    if context and tokens.shape[1] + max_new > context:
        raise ValueError(
            f"{tokens.shape[1]} prompt tokens and {max_new} new ones do not fit into {context} positions of this "
            f"model; shorten the prompt or give a smaller --max-new"
        )
    streamer = _streamer(tokenizer, stream) if stream else None
    reason = why_not_ours(model)
    started = perf_counter()
    if reason is None:
        new = _ours(model, tokens.to(model.device), max_new, temperature, seed, streamer)
    else:
        new = _theirs(model, tokens.to(model.device), max_new, temperature, seed, streamer)
    seconds = perf_counter() - started
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Generation(text, tokens.shape[1], len(new), seconds, f"transformers: {reason}" if reason else OURS)


def why_not_ours(model: nn.Module) -> str | None:
    """Why transformers has to generate with this model, in one sentence; None if our decoder does what it asks for."""
    if reason := why_not(model.config, model):
        return reason
    asked = model.generation_config.to_diff_dict()
    idle = HANDLED | HARMLESS | {name for name, value in asked.items() if value is None or value is False}
    idle |= {name for name, value in NEUTRAL.items() if asked.get(name) == value}
    unknown = sorted(asked.keys() - idle)
    return f"generation_config asks for {', '.join(unknown)}" if unknown else None


def continuation(
    decoder: Decoder, tokens: Tensor, max_new: int, choose: Choose, ends: frozenset[int] = frozenset()
) -> Iterator[Tensor]:
    """The new tokens [batch], one by one, after a batch of prompts `tokens` [batch, length].

    It stops after `max_new`, or when every sequence has had a token of `ends`.
    """
    batch, length = tokens.shape
    state = decoder.state(batch, length + max_new)
    ended = torch.zeros(batch, dtype=torch.bool)
    logits = decoder.prefill(state, tokens)
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


def chooser(settings: Any, temperature: float = 0.0, seed: int = 0) -> Choose:
    """How the next token is chosen: as transformers does with the same generation_config, and the same seed.

    Greedy at temperature 0; otherwise from the likeliest top_k (50 unless settings say otherwise, 0 for all).
    """
    found = processors.LogitsProcessorList()
    if settings.repetition_penalty not in (None, 1.0):
        found.append(processors.RepetitionPenaltyLogitsProcessor(penalty=settings.repetition_penalty))
    if temperature == 0 and not found:
        return greedy
    if temperature > 0:
        found.append(processors.TemperatureLogitsWarper(temperature))
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
        if temperature == 0:
            return scores.argmax(-1)
        if scores.device not in generators:
            generators[scores.device] = torch.Generator(scores.device).manual_seed(seed)
        return torch.multinomial(scores.softmax(-1), 1, generator=generators[scores.device])[:, 0]

    return choose


def decode_rate(model: nn.Module, prompt: int = 16, new: int = 48, repeats: int = 3, ours: bool = True) -> float:
    """Tokens per second of greedy decoding after the prompt, median over `repeats`, after one warm-up.

    Random prompt tokens. ours: through our decoder where it knows the model; otherwise through transformers' generate.
    """
    rates = [new / sum(step_seconds(model, prompt, new, ours)) for _ in range(repeats + 1)]
    return statistics.median(rates[1:])


def step_seconds(model: nn.Module, prompt: int = 16, new: int = 48, ours: bool = True) -> list[float]:
    """Seconds of each of `new` greedy steps of one sequence, choice included, after random prompt tokens.

    new + 1 tokens are made; the first comes with the prompt and is not timed.
    """
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(model.device)
    clock = _Clock()
    with torch.inference_mode():
        if ours and why_not(model.config, model) is None:
            for token in continuation(Decoder(model), tokens, new + 1, greedy):
                clock.put(token.cpu())
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


def _ours(model: nn.Module, tokens: Tensor, max_new: int, temperature: float, seed: int, streamer: Any) -> Tensor:
    """New tokens [count] after tokens [1, length], through our decoder."""
    choose = chooser(model.generation_config, temperature, seed)
    found = []
    with torch.inference_mode():
        for token in continuation(Decoder(model), tokens, max_new, choose, _ends(model)):
            found.append(token.cpu())
            if streamer:
                streamer.put(found[-1])
    if streamer:
        streamer.end()
    return torch.cat(found)


def _theirs(model: nn.Module, tokens: Tensor, max_new: int, temperature: float, seed: int, streamer: Any) -> Tensor:
    """New tokens [count] after tokens [1, length], through transformers."""
    settings: dict[str, Any] = {"max_new_tokens": max_new, "do_sample": temperature > 0, "use_cache": True}
    if temperature > 0:
        settings["temperature"] = temperature
        torch.manual_seed(seed)
    settings["pad_token_id"] = min(_ends(model), default=None)
    if streamer:
        streamer.next_tokens_are_prompt = True
    with torch.inference_mode():
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=streamer, **settings)
    return out[0, tokens.shape[1] :]


def _ends(model: nn.Module) -> frozenset[int]:
    """The tokens that end a text: one, several or none."""
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def _streamer(tokenizer: Any, stream: Callable[[str], None]) -> TextStreamer:
    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            stream(text + ("\n" if stream_end else ""))

    pieces = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pieces.next_tokens_are_prompt = False  # our loop gives it new tokens only
    return pieces
