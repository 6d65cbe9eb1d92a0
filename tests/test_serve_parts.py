"""What the server is made of, without a server: what bodies ask for, sampling, stop sequences, attention, the cache."""

import importlib
import json
import sys
import weakref
from types import ModuleType

import pytest
import torch
from conftest import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from alphaprune import memory
from alphaprune.sampling import Sampling
from alphaprune.serving import attention, kv, shortage
from alphaprune.serving.request import Defaults, Refused, parse
from alphaprune.serving.sampling import Sampler, adjust
from alphaprune.serving.stops import Stops

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
TEXT = {"prompt": "hello"}


def ask(body: object, chat: bool = False, defaults: Defaults | None = None):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse(raw, chat, "small", 257, defaults or Defaults())


def test_a_body_says_what_is_wanted() -> None:
    asked = ask(
        {**TEXT, "temperature": 0.5, "top_k": -1, "stop": "x", "seed": 3, "stream": True, "logit_bias": {"7": 1}}
    )
    assert asked.prompt == "hello" and asked.stops == ("x",) and asked.stream and asked.most == 16
    assert asked.sampling == Sampling(temperature=0.5, seed=3, bias={7: 1.0})
    chat = ask(
        {**CHAT, "max_completion_tokens": 4, "max_tokens": 9, "stream_options": {"include_usage": True}}, chat=True
    )
    assert chat.prompt is None and chat.messages == CHAT["messages"] and chat.most == 4 and chat.usage
    assert ask(CHAT, chat=True).most is None


def test_the_model_says_what_the_body_leaves_open() -> None:
    wanted = kv.defaults(type("Settings", (), {"temperature": 0.6, "top_p": None, "top_k": 20, "min_p": None,
                                               "repetition_penalty": 1.1}))  # fmt: skip
    sampling = ask(TEXT, defaults=wanted).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition) == (0.6, 1.0, 20, 1.1)
    assert ask({**TEXT, "temperature": 0}, defaults=wanted).sampling.temperature == 0
    assert ask(TEXT).sampling.seed != ask(TEXT).sampling.seed
    assert ask({**TEXT, "temperature": 1e-9}).sampling.temperature == 0


BAD_TEXT = [
    (b"{", None),
    (b"\xff", None),
    (b"[]", None),
    (b"[" * 100_000, None),
    (b'{"prompt": "\\ud800"}', None),
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [1, 257]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({**TEXT, "messages": []}, "messages"),
    ({**TEXT, "generation_config": "{}"}, "generation_config"),
    ({**TEXT, "temperature": -0.1}, "temperature"),
    ({**TEXT, "temperature": "hot"}, "temperature"),
    ({**TEXT, "temperature": True}, "temperature"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    ({**TEXT, "top_p": 1.1}, "top_p"),
    ({**TEXT, "top_k": 1.5}, "top_k"),
    ({**TEXT, "seed": 2**64}, "seed"),
    ({**TEXT, "max_tokens": 0}, "max_tokens"),
    ({**TEXT, "max_tokens": "9"}, "max_tokens"),
    ({**TEXT, "stop": [""]}, "stop"),
    ({**TEXT, "stop": ["x"] * 17}, "stop"),
    ({**TEXT, "stream": "yes"}, "stream"),
    ({**TEXT, "stream_options": {"other": 1}}, "stream_options"),
    ({**TEXT, "logit_bias": {"x": 1}}, "logit_bias"),
    ({**TEXT, "logit_bias": {"257": 1}}, "logit_bias"),
    ({**TEXT, "logit_bias": {"1": 101}}, "logit_bias"),
    ({**TEXT, "n": 2}, "n"),
    ({**TEXT, "n": True}, "n"),
    ({**TEXT, "logprobs": 3}, "logprobs"),
    ({**TEXT, "echo": True}, "echo"),
    ({**TEXT, "best_of": 2}, "best_of"),
    ({**TEXT, "suffix": "end"}, "suffix"),
]
BAD_CHAT = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "messages[0].tool_calls"),
    ({**CHAT, "tools": [{}]}, "tools"),
    ({**CHAT, "tools": "all"}, "tools"),
    ({**CHAT, "tool_choice": "required"}, "tool_choice"),
    ({**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ({**CHAT, "logprobs": True}, "logprobs"),
    ({**CHAT, "chat_template_kwargs": "x"}, "chat_template_kwargs"),
    ({**CHAT, "prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize(("body", "param"), BAD_TEXT + BAD_CHAT, ids=lambda value: str(value)[:60])
def test_what_is_wrong_with_a_body(body: object, param: str | None) -> None:
    with pytest.raises(Refused) as refused:
        ask(body, chat=any(body is bad for bad, _ in BAD_CHAT))
    error = refused.value.body()["error"]
    assert refused.value.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and "\n" not in error["message"] and len(error["message"]) < 300


class Lacking(ModuleType):
    """A module that cannot be imported from without a package that is not here."""

    def __getattr__(self, name: str) -> object:
        raise ModuleNotFoundError(f"No module named {self.__name__!r}", name=self.__name__)


@pytest.mark.parametrize(("lacks", "wanted"), [("pydantic", ModuleNotFoundError), ("transformers.x", ValueError)])
def test_what_the_server_lacks_is_named(lacks: str, wanted: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package, which the command says how to install; or transformers of another version."""
    importlib.import_module("alphaprune.serving.engine")  # and all that it needs
    monkeypatch.delitem(sys.modules, "alphaprune.serving.engine")
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.utils", Lacking(lacks))
    with pytest.raises(wanted, match=lacks):
        importlib.import_module("alphaprune.serving.engine")


def test_another_model_is_not_here() -> None:
    assert ask({**TEXT, "model": "small"}).prompt == "hello"
    for model in ("gpt-4", 5, ["small"]):
        with pytest.raises(Refused) as refused:
            ask({**TEXT, "model": model})
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_values_that_ask_for_nothing_are_taken() -> None:
    ask({**TEXT, "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "user": "me"})
    ask(
        {**CHAT, "response_format": {"type": "text"}, "tool_choice": "auto", "logprobs": False, "store": False},
        chat=True,
    )


def test_messages_become_what_templates_read() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = [{"role": "developer", "content": parts}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "1"}]  # fmt: skip
    system, assistant, tool = ask({"messages": body}, chat=True).messages
    assert system == {"role": "system", "content": "one\ntwo"}
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert tool["tool_call_id"] == "1"


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.randoms())
@settings(deadline=None)
def test_stop_sequences_end_a_text_however_it_is_cut(text: str, sequences: list[str], random) -> None:
    stops, out, left = Stops(tuple(sequences)), "", text
    while left and not stops.found:
        size = random.randint(1, 5)
        out, left = out + stops.feed(left[:size]), left[size:]
        assert text.startswith(out)
    complete = [(end, text[:end].find(s)) for end in range(len(text) + 1) for s in sequences if text[:end].endswith(s)]
    assert out + stops.end() == (text[: min(complete)[1]] if complete else text)
    assert stops.found == bool(complete)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = torch.tensor([int(adjust(logits, Sampling(0.7, seed=s), [0], []).argmax()) for s in range(4000)])
    expected = (logits / 0.7).softmax(-1)
    error = (draws.bincount(minlength=4) / 4000 - expected).abs()
    assert (error < 4 * (expected * (1 - expected) / 4000).sqrt()).all()
    again = [int(adjust(logits, Sampling(0.7, seed=5), [0], [1] * n).argmax()) for n in range(50)]
    assert again == [int(adjust(logits, Sampling(0.7, seed=5), [9], [2] * n).argmax()) for n in range(50)]
    assert len(set(again)) > 1


@pytest.mark.parametrize(("name", "value"), [("top_k", 3), ("top_p", 0.6), ("min_p", 0.3)])
def test_truncation_is_that_of_transformers(name: str, value: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    warper = {"top_k": theirs.TopKLogitsWarper, "top_p": theirs.TopPLogitsWarper, "min_p": theirs.MinPLogitsWarper}[
        name
    ]
    allowed = warper(value)(torch.tensor([[0]]), logits[None].clone())[0].isfinite()
    mine = adjust(logits, Sampling(1.0, **{name: value}), [0], []).isfinite()
    assert torch.equal(mine, allowed) and 0 < allowed.sum() < 50


def test_penalties_and_bias() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1))
    prompt, new = [3, 4, 4], [5, 5, 6]
    penalised = theirs.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + new]), logits[None].clone())[0]
    assert torch.equal(adjust(logits, Sampling(0, repetition=1.3), prompt, new), penalised)
    by_hand = logits.clone()
    by_hand[5] -= 0.5 + 2 * 0.25
    by_hand[6] -= 0.5 + 0.25
    by_hand[9] += 7
    found = adjust(logits, Sampling(0, presence=0.5, frequency=0.25, bias={9: 7.0}), prompt, new)
    torch.testing.assert_close(found, by_hand)


def test_each_request_of_a_batch_has_its_own_sampling() -> None:
    def request(sampling: Sampling, new: bool = True, true_length: int = 0):
        state = {"logit_processor_kwargs": {"sampling": sampling}, "initial_tokens": [1, 2], "generated_tokens": [3],
                 "_true_initial_tokens": true_length}  # fmt: skip
        return type("Request", (), {"state": type("State", (), state), "has_new_token": new})

    seeded, sampler = Sampling(1.0, seed=4), Sampler()
    batch = [request(Sampling(0)), request(Sampling(0), new=False), request(seeded), request(seeded, true_length=1)]
    sampler.prepare_tensor_args(batch, torch.empty(0, 4))
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))  # the last row belongs to nobody
    scores = sampler(torch.zeros(4), logits.clone(), torch.empty(0, 4))
    assert torch.equal(scores[0], logits[0]) and torch.equal(scores[3], logits[3])
    assert torch.equal(scores[1], adjust(logits[1], seeded, [1, 2], [3]))
    assert torch.equal(scores[2], adjust(logits[2], seeded, [1], [2, 3]))  # it lost its cache after one token


LENGTHS = {
    "one alone": [(1, 7)],
    "single tokens": [(1, 7), (1, 1), (1, 9)],
    "prompts": [(5, 5), (3, 3)],
    "all kinds": [(1, 4), (6, 6), (1, 8), (2, 5), (1, 5)],
    "one much longer": [(1, 90), (1, 2), (1, 3)],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_is_that_of_every_request_alone(lengths: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, groups, size = 6, 2, 8
    queries, keys = (sum(lengths[i][j] for i in range(len(lengths))) for j in (0, 1))
    query = torch.randn(1, heads, queries, size, generator=generator)
    key, value = torch.randn(2, 1, groups, keys, size, generator=generator).unbind()
    starts = [torch.tensor([0, *(n[j] for n in lengths)]).cumsum(0).int() for j in (0, 1)]
    names = {"cu_seq_lens_q": starts[0], "cu_seq_lens_k": starts[1]}
    function = attention.Paged()
    for _ in range(2):  # the second layer of the same batch
        found, _ = function(torch.nn.Module(), query, key, value, None, scaling=0.3, **names)
    query, key, value = query[0].double(), key[0].double(), value[0].double()
    for i, (tokens, own) in enumerate(lengths):
        q = query[:, starts[0][i] : starts[0][i + 1]]
        k, v = (x[:, starts[1][i] : starts[1][i + 1]].repeat_interleave(heads // groups, 0) for x in (key, value))
        hidden = torch.ones(tokens, own, dtype=torch.bool).triu(own - tokens + 1)
        weights = (0.3 * q @ k.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1)
        truth = (weights @ v).transpose(0, 1)
        torch.testing.assert_close(found[0, starts[0][i] : starts[0][i + 1]].double(), truth, rtol=1e-5, atol=1e-5)


def test_the_cache_is_as_large_as_asked_for_or_modest() -> None:
    config = make_config()  # 3 layers, 2 key heads of 24, context 64
    asked = kv.plan(config, torch.float32, running=8, block=16, blocks=10)
    assert asked.block_bytes == 2 * 3 * 2 * 24 * 4 * 16 and asked.tokens == 160 and asked.context == 64
    assert kv.plan(config, torch.float32, 8, 16).blocks == 8 * 4  # no more than eight requests can fill
    small = kv.plan(config, torch.bfloat16, 8, 16, limit=30_000)
    assert small.blocks == 30_000 // small.block_bytes == 3 and small.context == 48
    assert "at most 48 tokens per request" in str(small)
    with pytest.raises(ValueError, match="less than one block of 16 tokens"):
        kv.plan(config, torch.bfloat16, 8, 16, limit=100)


def test_on_a_gpu_the_cache_takes_what_is_free_but_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    config, gpu = make_config(max_position_embeddings=10**6), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    found = kv.plan(config, torch.float32, 64, 16, device=gpu)
    assert found.blocks == (2 * 10**9 + 500) // found.block_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 24 * 10**9))
    with pytest.raises(ValueError, match="0 B for keys and values is less than one block"):
        kv.plan(config, torch.float32, 64, 16, device=gpu)


def failing(kept: list[weakref.ref], error: Exception) -> None:
    """Raises an error while it holds tensors, as a layer does that wraps the error of another."""

    def inner() -> None:
        held = torch.ones(3)
        kept.append(weakref.ref(held))
        raise error

    outer = torch.ones(4)
    kept.append(weakref.ref(outer))
    try:
        inner()
    except Exception as cause:
        raise type(cause)(f"layer: {cause}") from cause


def test_what_a_step_without_memory_held_is_free_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref] = []
    alive = []
    release = memory.release
    monkeypatch.setattr(memory, "release", lambda *given: (release(*given), alive.extend(one() for one in kept)))
    try:
        failing(kept, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    except torch.OutOfMemoryError as error:
        assert all(one() is not None for one in kept)
        assert shortage.fewer(512, error, torch.device("cpu")) == 256
    assert alive == [None, None]


@pytest.mark.parametrize(("tokens", "wanted"), [(0, 0), (16, 0), (17, 16), (40, 20), (512, 256)])
def test_prompts_in_smaller_pieces(tokens: int, wanted: int) -> None:
    assert shortage.fewer(tokens, MemoryError(), torch.device("cpu")) == wanted
    with pytest.raises(ZeroDivisionError, match="by zero"):
        shortage.fewer(tokens, ZeroDivisionError("by zero"), torch.device("cpu"))
