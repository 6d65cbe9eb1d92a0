"""Engines of the server in this process, and requests to them."""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from time import perf_counter

import pytest
import serving_here  # noqa: F401
import torch
from conftest import make_model
from recorded import Fake, record_products
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from alphaprune.graphs import Steps
from alphaprune.serving import engine as engine_file
from alphaprune.serving import kv
from alphaprune.serving.engine import Engine, Stream
from alphaprune.serving.ours import Ours
from alphaprune.serving.request import Asked, Defaults, parse

WAYS = ("alphaprune", "transformers", pytest.param("graphs", marks=pytest.mark.slow))  # of batching


def ask(prompt: object, new: int, **settings: object) -> Asked:
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, **settings}
    return parse(json.dumps(body).encode(), False, "model", 10**6, Defaults())


def starting(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Starts engines, each way of batching, and stops them; "graphs" is ours as on a GPU, by recordings."""
    started: list[Engine] = []
    if way == "graphs":
        record_products(monkeypatch)
        monkeypatch.setattr(engine_file, "Ours", lambda *given: Ours(*given, recorder=Fake()))
        monkeypatch.setattr(Steps, "prepare", lambda steps: None)

    def make(model: nn.Module, tokenizer: object, blocks: int = 256, running: int = 32) -> Engine:
        cache = kv.plan(model.config, model.dtype, running, 16, blocks=blocks)
        kind = "transformers" if way == "transformers" else "alphaprune"
        started.append(Engine(model, tokenizer, cache, running, lambda kind, value: None, kind))
        started[-1].start()
        return started[-1]

    make.kind = way

    yield make
    for engine in started:
        engine.stop()


PATIENCE = 120  # seconds
numbers = itertools.count()  # of requests: none has the name of one that is being forgotten


def generate(engine: Engine, requests: list[Asked]) -> list[Stream]:
    """The streams of requests that come at the same time, at their ends."""

    async def one(asked: Asked) -> Stream:
        stream = engine.submit(engine.encode(asked), asked, str(next(numbers)), perf_counter())
        async for _ in stream.pieces():
            pass
        return stream

    async def everything() -> list[Stream]:
        return await asyncio.wait_for(asyncio.gather(*map(one, requests)), PATIENCE)

    return asyncio.run(everything())


@torch.inference_mode()
def alone(model: nn.Module, prompt: list[int], new: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def prompts(count: int, vocabulary: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def windows_model() -> nn.Module:
    """Attention in windows of 8 positions, which a part of a prompt overwrites in the cache."""
    torch.manual_seed(6)
    config = make_model().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range")
    config = MistralConfig(**{name: config[name] for name in names}, sliding_window=8)
    return MistralForCausalLM(config).eval()
