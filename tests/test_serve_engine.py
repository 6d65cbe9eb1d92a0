"""The engine in this process: bfloat16, a cache that is too small, windows, and an error in the middle of a step."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_model
from engines import WAYS, alone, ask, generate, prompts, starting, windows_model

import alphaprune
from alphaprune import data
from alphaprune.serving.answer import Answer
from alphaprune.serving.engine import Engine, ReasoningText, ToolCall
from alphaprune.serving.request import Defaults, Refused, parse

sys.path.insert(0, str(ROOT / "bench"))
from served import pack_demo


@pytest.fixture(params=WAYS)
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    yield from starting(request.param, monkeypatch)


@pytest.fixture(scope="module")
def tokenizer(directory: Path):
    return data.load_tokenizer(directory)


def test_scores_that_are_not_finite_end_a_request(tokenizer, start) -> None:
    """At the first token where a prompt brings them; where a token of the answer does, after that one."""
    model = make_model(0, tie_word_embeddings=False)
    prompt = [5, 6, 7]
    wanted = alone(model, prompt, 4)
    assert not {*prompt, 3} & {*wanted[:1]}
    with torch.no_grad():
        model.get_input_embeddings().weight[[9, wanted[0]]] = float("nan")
    engine = start(model, tokenizer)
    first, second, third = generate(engine, [ask([5, 9, 7], 4), ask(prompt, 4), ask([*prompt, 3], 1)])
    for stream, tokens in ((first, []), (second, wanted[:1])):
        assert stream.tokens == tokens and "scores for the next token are not finite" in stream.error
    assert third.error is None and len(third.tokens) == 1


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
