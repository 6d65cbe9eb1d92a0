"""Text from a model, through transformers' own generation loop."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Generation:
    """What was made and how fast: `seconds` from the prompt to the last token."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float


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

    stream: called with each piece of text as it is made.
    Raises ValueError if prompt and new tokens do not fit into the context of the model.
    """
    tokens = tokenizer(prompt, return_tensors="pt").input_ids  # [1, length]
    if tokens.numel() == 0:
        tokens = torch.tensor([[model.config.bos_token_id or 0]])
    context = getattr(model.config, "max_position_embeddings", None)
    if context and tokens.shape[1] + max_new > context:
        raise ValueError(
            f"{tokens.shape[1]} prompt tokens and {max_new} new ones do not fit into {context} positions of this "
            f"model; shorten the prompt or give a smaller --max-new"
        )
    settings: dict[str, Any] = {"max_new_tokens": max_new, "do_sample": temperature > 0, "use_cache": True}
    if temperature > 0:
        settings["temperature"] = temperature
        torch.manual_seed(seed)
    settings["pad_token_id"] = model.config.eos_token_id
    started = perf_counter()
    with torch.inference_mode():
        out = model.generate(
            tokens.to(model.device),
            attention_mask=torch.ones_like(tokens),
            streamer=_streamer(tokenizer, stream) if stream else None,
            **settings,
        )
    seconds = perf_counter() - started
    new = out[0, tokens.shape[1] :]
    return Generation(tokenizer.decode(new, skip_special_tokens=True), tokens.shape[1], len(new), seconds)


def decode_rate(model: nn.Module, prompt: int = 16, new: int = 48, repeats: int = 3) -> float:
    """Tokens per second of greedy decoding, median over `repeats`, after one warm-up; random prompt tokens."""
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    rates = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            started = perf_counter()
            out = model.generate(tokens, min_new_tokens=new, max_new_tokens=new, **settings)
            rates.append((out.shape[1] - prompt) / (perf_counter() - started))
    return sorted(rates[1:])[repeats // 2]


def _streamer(tokenizer: Any, stream: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            stream(text + ("\n" if stream_end else ""))

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
