"""The engine in this process: bfloat16, a cache that is too small, windows, and an error in the middle of a step."""

import asyncio
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import serving_here  # noqa: F401
import torch
from conftest import ROOT, make_model
from recorded import Fake, record_products
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

import alphaprune
from alphaprune import data
from alphaprune.graphs import Steps
from alphaprune.serving import engine as engine_file
from alphaprune.serving import kv, ours, shortage, theirs
from alphaprune.serving.answer import Answer
from alphaprune.serving.engine import Engine, ReasoningText, Stream, ToolCall
from alphaprune.serving.ours import Ours
from alphaprune.serving.request import Asked, Defaults, Refused, parse
from alphaprune.serving.shortage import BATCH_TOKENS

sys.path.insert(0, str(ROOT / "bench"))
from served import pack_demo


def ask(prompt: object, new: int, **settings: object) -> Asked:
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, **settings}
    return parse(json.dumps(body).encode(), False, "model", 10**6, Defaults())


@pytest.fixture(params=["alphaprune", "transformers", pytest.param("graphs", marks=pytest.mark.slow)])
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Starts engines, each way of batching, and stops them; "graphs" is ours as on a GPU, by recordings."""
    started: list[Engine] = []
    if request.param == "graphs":
        record_products(monkeypatch)
        monkeypatch.setattr(engine_file, "Ours", lambda *given: Ours(*given, recorder=Fake()))
        monkeypatch.setattr(Steps, "prepare", lambda steps: None)

    def make(model: nn.Module, tokenizer: object, blocks: int = 256, running: int = 32) -> Engine:
        cache = kv.plan(model.config, model.dtype, running, 16, blocks=blocks)
        kind = "transformers" if request.param == "transformers" else "alphaprune"
        started.append(Engine(model, tokenizer, cache, running, lambda kind, value: None, kind))
        started[-1].start()
        return started[-1]

    make.kind = request.param

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


@pytest.fixture(scope="module")
def tokenizer(directory: Path):
    return data.load_tokenizer(directory)


def test_bfloat16_differs_only_where_dense_hardly_knows(tmp_path: Path, start) -> None:
    """A token may differ from that of dense alone where the gap of its two best is below what bfloat16 loses there."""
    packed = alphaprune.load(pack_demo(tmp_path / "packed"))
    dense = packed.__class__.from_pretrained(tmp_path / "packed").dequantize()
    exact = packed.__class__.from_pretrained(tmp_path / "packed", dtype=torch.float32).dequantize()
    engine = start(packed, data.load_tokenizer(tmp_path / "packed"))
    given = prompts(12, 4096, 60)
    differing = 0
    for prompt, stream in zip(given, generate(engine, [ask(p, 24) for p in given]), strict=True):
        wanted = alone(dense, prompt, 24)
        place = next((i for i, (a, b) in enumerate(zip(stream.tokens, wanted, strict=False)) if a != b), None)
        if place is None:
            assert stream.tokens == wanted
            continue
        differing += 1
        with torch.inference_mode():
            so_far = torch.tensor([prompt + wanted[:place]])
            truth, rounded = exact(so_far).logits[0, -1], dense(so_far).logits[0, -1].float()
        best = rounded.topk(2).values
        assert best[0] - best[1] <= 2 * (rounded - truth).abs().max(), (place, best)
    assert differing < 6  # most are the same


def test_a_cache_too_small_for_all_gives_everyone_the_same(tokenizer, start) -> None:
    model = make_model(seed=4).eval()
    given = prompts(12, 256, 20)
    wanted = [alone(model, prompt, 40) for prompt in given]
    engine = start(model, tokenizer, blocks=9)  # of 16 tokens: two or three of the twelve at a time
    streams = generate(engine, [ask(prompt, 40) for prompt in given])
    assert [stream.tokens for stream in streams] == wanted
    assert engine.kv_used() == engine.running() == engine.queued() == 0


def test_attention_in_windows(tokenizer, start) -> None:
    model = windows_model()
    given = prompts(6, 256, 20)
    wanted = [alone(model, prompt, 20) for prompt in given]
    assert [s.tokens for s in generate(start(model, tokenizer), [ask(p, 20) for p in given])] == wanted


def test_an_error_in_a_step_is_told(tokenizer, start) -> None:
    model = make_model(seed=4)
    engine = start(model, tokenizer)
    model.forward = lambda *_, **__: 1 / 0
    if start.kind != "transformers":
        engine.batching.ragged.prefill = lambda _: 1 / 0
    (stream,) = generate(engine, [ask("hello", 4)])
    assert stream.error == "generation failed: division by zero"
    assert not engine.alive()
    with pytest.raises(Refused, match="restart the server") as refused:
        generate(engine, [ask("hello", 4)])
    assert refused.value.status == 503


def short_of_memory(kind: str) -> Exception:
    if kind == "GPU":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB")
    return RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried")


def windows_model() -> nn.Module:
    """Attention in windows of 8 positions, which a part of a prompt overwrites in the cache."""
    torch.manual_seed(6)
    config = make_model().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range")
    config = MistralConfig(**{name: config[name] for name in names}, sliding_window=8)
    return MistralForCausalLM(config).eval()


def each_call(engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str, seen: Callable[[int], None]) -> None:
    """Calls `seen` in each "prompt", "step" of answers alone, or "sample"; what it raises ends that.

    It is given the number of tokens of prompts, or 0. Where transformers batches, all has been computed by then.
    """
    batching = engine.batching
    if batching.name == "transformers":
        runner = batching._cb.batch_processor.model_runner
        places = dict.fromkeys(("prompt", "step"), (engine.model, "forward")) | {"sample": (runner, "logit_processor")}
    else:
        places = {"prompt": (batching.ragged, "prefill"), "step": (batching, "steps")}
        places |= {"sample": (batching.steps.sampler, "choose")}
    owner, name = places[where]
    call = getattr(owner, name)

    def tokens_of(given: tuple, named: dict) -> int:
        if where == "sample":
            return 0
        if batching.name == "transformers":
            lengths = named["cu_seq_lens_q"].diff()
            return int(lengths[lengths > 1].sum())
        return sum(len(tokens) for _, tokens in given[0]) if where == "prompt" else 0

    class Watched:
        def __call__(self, *given: object, **named: object) -> object:
            found = call(*given, **named) if batching.name == "transformers" else None
            tokens = tokens_of(given, named)
            if where == "sample" or bool(tokens) == (where == "prompt"):
                seen(tokens)
            return call(*given, **named) if found is None else found

        def __getattr__(self, name: str) -> object:
            return getattr(call, name)

    monkeypatch.setattr(owner, name, Watched())


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", ["GPU", "CPU"])
def test_prompts_are_read_in_smaller_pieces_where_memory_is_short(
    kind: str, windows: bool, tokenizer, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(windows_model() if windows else make_model(seed=4), tokenizer)
    asked, read = [ask(prompt, 5) for prompt in prompts(6, 256, 60)], []
    wanted = [stream.tokens for stream in generate(engine, asked)]

    def limited(tokens: int) -> None:
        read.append(tokens)
        pieces = sum(16 < one <= 50 for one in read)
        if tokens > 50 or (tokens > 16 and pieces == 3):  # the third is no beginning of a prompt
            raise short_of_memory(kind)

    each_call(engine, monkeypatch, "prompt", limited)
    found = generate(engine, asked)
    assert [stream.tokens for stream in found] == wanted
    assert not any(stream.error for stream in found) and max(read) > 50
    assert engine.alive() and engine.kv_used() == 0
    whole = engine.batching
    whole = whole.batch_tokens if whole.name == "alphaprune" else whole._cb.batch_processor.max_batch_tokens
    assert whole == BATCH_TOKENS, "the next prompt is tried as a whole again"


def test_a_prompt_that_is_read_again_keeps_its_pages(tokenizer, start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third request waits for pages of the first two, one of which has no memory at its first try."""
    engine = start(make_model(seed=4), tokenizer, blocks=9)
    asked, read = [ask([one] * 60, 2) for one in (7, 8, 9)], []
    wanted = [stream.tokens for stream in generate(engine, asked)]

    def once(tokens: int) -> None:
        read.append(tokens)
        if len(read) == 1:
            raise short_of_memory("CPU")

    each_call(engine, monkeypatch, "prompt", once)
    assert [(stream.tokens, stream.error) for stream in generate(engine, asked)] == [(new, None) for new in wanted]
    assert engine.alive() and engine.kv_used() == 0


@pytest.mark.parametrize("where", ["prompt", "sample", "step"])
def test_a_request_that_there_is_no_memory_for_ends_alone(
    where: str, tokenizer, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(make_model(seed=4), tokenizer, running=3)
    asked = [ask(prompt, 8) for prompt in prompts(5, 256, 20)]
    wanted = [stream.tokens for stream in generate(engine, asked)]
    sizes = []

    def fewer(*given: object) -> int:
        sizes.append(shortage.fewer(*given))
        return sizes[-1]

    for file in (ours, theirs):
        monkeypatch.setattr(file, "fewer", fewer)

    def short(_: int) -> None:
        if engine.running() == 3 and 0 not in sizes:
            raise short_of_memory("GPU")

    each_call(engine, monkeypatch, where, short)
    found = generate(engine, asked)
    ended = [stream for stream in found if stream.error]
    assert len(ended) == 1
    assert ended[0].error.startswith("generation failed: out of memory: 2.00 GiB more could not be had; take ")
    assert ended[0].tokens == wanted[found.index(ended[0])][: len(ended[0].tokens)]
    assert all(stream.tokens == tokens for stream, tokens in zip(found, wanted, strict=True) if not stream.error)
    assert engine.alive() and engine.kv_used() == 0
    assert [stream.tokens for stream in generate(engine, asked[:2])] == wanted[:2]


@pytest.mark.parametrize("windows", [False, True])
def test_whenever_memory_is_short_answers_are_right_as_far_as_they_go(
    windows: bool, tokenizer, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fifth of all calls at random, with a cache that is too small for all requests at a time."""
    model = windows_model() if windows else make_model(seed=4)
    given = prompts(8, 256, 60)
    wanted = [alone(model, prompt, 12) for prompt in given]
    engine = start(model, tokenizer, blocks=9)
    draws = torch.Generator().manual_seed(0)

    def short(_: int) -> None:
        if torch.rand((), generator=draws) < 1 / 5:
            raise short_of_memory("CPU")

    for where in ("prompt", "sample", "step"):
        each_call(engine, monkeypatch, where, short)
    found = generate(engine, [ask(prompt, 12) for prompt in given])
    for stream, tokens in zip(found, wanted, strict=True):
        assert stream.tokens == tokens[: len(stream.tokens)]
        assert (stream.error is None) == (len(stream.tokens) == 12)
    assert engine.alive() and engine.kv_used() == engine.running() == engine.queued() == 0
    if start.kind == "transformers":
        cache = engine.batching._cb.batch_processor.cache
        cache.evict_cached_blocks()
        assert cache.compute_free_capacity() == 1
    else:
        assert len(engine.batching.ragged.free_pages) == 9


def test_a_model_that_cannot_be_served_says_so(tokenizer, start) -> None:
    model = make_model(seed=4)
    model.forward = model.lm_head.forward = lambda *_, **__: 1 / 0
    model.lm_head.register_forward_hook(lambda *_: None)  # our decoder calls the module, then
    words = "do(es)? not run under (transformers' continuous|our) batching: division by zero"
    with pytest.raises(ValueError, match=words):
        start(model, tokenizer)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        start(make_model(), SimpleNamespace())


@pytest.mark.parametrize("streamed", [False, True])
def test_thoughts_and_calls_have_fields_of_their_own(streamed: bool) -> None:
    """What a chat model of the Qwen kind says, as transformers' parser gives it."""

    class Said:
        id, prompt_tokens, tokens, finish, error = "chatcmpl-1", 3, [1, 2], "tool_calls", None

        async def pieces(self):
            yield [ReasoningText("so, "), ReasoningText("two")]
            yield ["It is ", ToolCall("add", '{"a": 1}')]
            yield [ToolCall("add", '{"a": 2}')]

    sent, ended = [], []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        await asyncio.sleep(60)

    body = {"messages": [{"role": "user", "content": "x"}], "stream": streamed}
    asked = parse(json.dumps(body).encode(), True, "model", 10, Defaults())
    asyncio.run(Answer(Said(), asked, "model", lambda: ended.append(1))({}, receive, send))
    raw = b"".join(message.get("body", b"") for message in sent)
    if streamed:
        events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
        thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
        text = "".join(delta.get("content", "") for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        finish = events[-1]["choices"][0]["finish_reason"]
        assert raw.endswith(b"data: [DONE]\n\n")
    else:
        choice = json.loads(raw)["choices"][0]
        thought, text = choice["message"]["reasoning_content"], choice["message"]["content"]
        calls, finish = choice["message"]["tool_calls"], choice["finish_reason"]
    assert (thought, text, finish, ended) == ("so, two", "It is ", "tool_calls", [1])
    assert [(call["index"], call["function"]["arguments"]) for call in calls] == [(0, '{"a": 1}'), (1, '{"a": 2}')]


def test_remembered_prefixes_never_keep_a_request_out(tokenizer, start) -> None:
    model = make_model(seed=4)
    engine = start(model, tokenizer, blocks=4, running=2)  # the context, and not a block more
    generator = torch.Generator().manual_seed(1)
    for length in (17, 50, 33, 60, 60, 20, 62, 49, 63):
        prompt = torch.randint(1, 256, (length,), generator=generator).tolist()
        (stream,) = generate(engine, [ask(prompt, 64)])
        assert stream.error is None and stream.tokens == alone(make_model(seed=4), prompt, 64 - length)
    with pytest.raises(Refused, match="the prompt has 64 tokens, and 63 fit beside a new one"):
        engine.encode(ask([1] * 64, 1))


def test_nothing_is_kept_of_requests_that_were_cancelled(tokenizer, start) -> None:
    engine = start(make_model(seed=4), tokenizer)

    async def leave(number: int) -> None:
        asked = ask([number + 1] * 20, 40)
        stream = engine.submit(engine.encode(asked), asked, str(number), perf_counter())
        while not stream.tokens:
            await asyncio.sleep(0.001)
        stream.cancel()
        assert len(stream.tokens) < 40

    async def everyone() -> None:
        await asyncio.gather(*(leave(number) for number in range(8)))
        for _ in range(100):
            if engine.running() + engine.queued() + engine.kv_used() == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("requests or blocks were left")

    asyncio.run(everyone())
    if start.kind == "transformers":
        assert not engine.batching._cb.output_router.result_handlers
        assert engine.batching._cb.current_batch < 30  # steps: none of the 40 tokens was made for nobody
    else:
        assert engine.batching.turns < 60 and len(engine.batching.ragged.free_slots) == 32
