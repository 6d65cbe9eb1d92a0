"""The server over a socket, with OpenAI's own client: answers, limits, and how it ends."""

import asyncio
import http.client
import json
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from serving_here import openai

import alphaprune
from alphaprune import data

sys.path.insert(0, str(ROOT / "bench"))
from serve import PROMPTS
from served import Served, pack_demo, serve

KEY = "a key with spaces"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ '' if tools else '' }}assistant:"
REFUSING = "{{ raise_exception('only cats may speak') if messages[0].content == 'woof' }}" + TEMPLATE
BODY = 20_000


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_demo(tmp_path_factory.mktemp("models") / "packed")


@pytest.fixture(scope="module")
def server(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """In float32, where every token has to be the same."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(REFUSING)
    options = ("--dtype", "float32", "--chat-template", folder / "template.jinja", "--max-body", BODY)
    with serve(packed, folder / "log", *options, environment={"ALPHAPRUNE_API_KEY": KEY}) as found:
        yield found
    assert "Traceback" not in found.log.read_text()


@pytest.fixture(scope="module")
def alone(packed: Path):
    """The greedy continuation of a prompt, text or tokens, by transformers' generate: the prompt alone, float32."""
    model, tokenizer = alphaprune.load(packed, dtype="float32"), data.load_tokenizer(packed)

    def generate(prompt: str, new: int) -> str:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(tokens, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)

    return generate


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def call(server: Served, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of a plain request."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    given = {"authorization": f"Bearer {KEY}", **headers}
    connection.request(method, path, body, {name: value for name, value in given.items() if value})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def gauge(server: Served, name: str) -> float:
    text = call(server, "GET", "/metrics")[1].decode()
    return float(re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)[1])


def soon(check: Any, seconds: float = 20) -> bool:
    limit = time.monotonic() + seconds
    while not (done := check()) and time.monotonic() < limit:
        time.sleep(0.05)
    return done


def idle(server: Served) -> bool:
    names = ("running_requests", "queued_requests", "kv_blocks_used")
    return all(gauge(server, f"alphaprune_{name}") == 0 for name in names)


def test_32_streams_at_once_each_as_if_alone(server: Served, alone) -> None:
    lengths = [8 + 5 * (i % 7) for i in range(32)]

    async def stream(client: openai.AsyncOpenAI, i: int) -> tuple[str, str, int]:
        asked = {"model": "packed", "prompt": PROMPTS[i], "max_tokens": lengths[i], "temperature": 0}
        pieces, finish, tokens = [], "", 0
        options = {"include_usage": True}
        async for chunk in await client.completions.create(**asked, stream=True, stream_options=options):
            if chunk.choices:
                pieces.append(chunk.choices[0].text)
                finish = chunk.choices[0].finish_reason or finish
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return "".join(pieces), finish, tokens

    async def everything() -> list[tuple[str, str, int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(stream(client, i) for i in range(32)))

    for i, (text, finish, tokens) in enumerate(asyncio.run(everything())):
        assert text == alone(PROMPTS[i], lengths[i]), i
        assert (finish, tokens) == ("length", lengths[i]) or finish == "stop"
    assert soon(lambda: idle(server))


def test_a_chat_streamed_and_whole(client: openai.OpenAI, alone) -> None:
    messages = [
        {"role": "developer", "content": "import os"},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    asked = {"model": "packed", "messages": messages, "temperature": 0, "max_completion_tokens": 20}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert whole.choices[0].message.content == text == alone("system: import os\nuser: x\nassistant:", 20)
    assert whole.choices[0].finish_reason == pieces[-1].choices[0].finish_reason == "length"
    assert pieces[0].choices[0].delta.role == whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 20
    with pytest.raises(openai.BadRequestError, match="only cats may speak"):
        client.chat.completions.create(model="packed", messages=[{"role": "user", "content": "woof"}])


def test_sampling_depends_on_the_request_alone(server: Served, client: openai.OpenAI, alone) -> None:
    asked = {"model": "packed", "prompt": PROMPTS[0], "max_tokens": 24}
    wanted = [client.completions.create(**asked, seed=s, temperature=1.2).choices[0].text for s in (1, 2)]
    assert wanted[0] != wanted[1]
    settings = [{"temperature": 0}, *({"seed": s, "temperature": 1.2} for s in (1, 2, 1, 2))]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as many:
            made = await asyncio.gather(*(many.completions.create(**asked, **s) for s in settings))
            return [each.choices[0].text for each in made]

    assert asyncio.run(together()) == [alone(PROMPTS[0], 24), *wanted, *wanted]


def test_tokens_as_prompt_and_stop_sequences(packed: Path, client: openai.OpenAI, alone) -> None:
    text = alone(PROMPTS[3], 30)
    stop = text[12:15]
    tokens = data.load_tokenizer(packed)(PROMPTS[3])["input_ids"]
    asked = {"model": "packed", "prompt": tokens, "max_tokens": 30, "temperature": 0, "stop": [stop, "\0"]}
    whole = client.completions.create(**asked).choices[0]
    pieces = [piece.choices[0] for piece in client.completions.create(**asked, stream=True)]
    assert whole.text == "".join(piece.text for piece in pieces) == text[: text.find(stop)]
    assert whole.finish_reason == pieces[-1].finish_reason == "stop"


def test_clients_that_leave_free_their_memory(server: Served, client: openai.OpenAI) -> None:
    asked = {"model": "packed", "prompt": "x", "max_tokens": 480, "temperature": 1.9, "logit_bias": {"0": -100}}
    streams = [client.completions.create(**asked, stream=True) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
    body = json.dumps(asked).encode()
    sockets = [socket.create_connection((server.host, server.port)) for _ in range(3)]  # these wait for whole answers
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    for each in sockets:
        each.sendall(head.encode() + body)
    assert soon(lambda: gauge(server, "alphaprune_running_requests") == 7)
    assert gauge(server, "alphaprune_kv_blocks_used") >= 7
    for each in (*streams, *sockets):
        each.close()
    assert soon(lambda: idle(server), 2)
    made = gauge(server, "alphaprune_generated_tokens_total")
    time.sleep(0.2)
    assert gauge(server, "alphaprune_generated_tokens_total") == made
    assert re.search(
        r'requests_total{route="/v1/completions",status="499"} 7.0', call(server, "GET", "/metrics")[1].decode()
    )


BROKEN = {
    "no JSON": (b"{", None),
    "no text": (b"\xff\xfe", None),
    "half a pair": (b'{"prompt": "\\ud800"}', None),
    "deep": (b"[" * 15_000, None),
    "a list": (b"[]", None),
    "nothing": (b"", None),
    "role": (b'{"messages": [{"role": "robot", "content": "x"}]}', "messages[0].role"),
    "no messages": (b'{"messages": []}', "messages"),
    "cold": (b'{"prompt": "x", "temperature": -1}', "temperature"),
    "two answers": (b'{"prompt": "x", "n": 2}', "n"),
    "another template": (b'{"messages": [{"role": "user", "content": "x"}], '
                         b'"chat_template_kwargs": {"chat_template": "x"}}', "chat_template_kwargs"),
    "long": (json.dumps({"prompt": "word " * 1000}).encode(), "prompt"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_bodies_get_a_sentence(server: Served, kind: str) -> None:
    body, param = BROKEN[kind]
    path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
    status, answer = call(server, "POST", path, body)
    error = json.loads(answer)["error"]
    assert status == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_answers_end_with_the_context(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="packed", prompt="x", max_tokens=10**6, logit_bias={"0": -100}, temperature=0
    )
    assert made.usage.total_tokens == 512 and made.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="the prompt has 512 tokens, and 511 fit beside a new one"):
        client.completions.create(model="packed", prompt=[5] * 512)


def test_bodies_that_are_too_large(server: Served) -> None:
    large = b'{"prompt": "' + b"x" * BODY + b'"}'
    assert call(server, "POST", "/v1/completions", large)[0] == 413
    status, answer = call(server, "POST", "/v1/completions", (large[i : i + 999] for i in range(0, len(large), 999)))
    assert status == 413 and str(BODY) in json.loads(answer)["error"]["message"]  # in chunks, their sum unknown before
    assert call(server, "POST", "/v1/completions", b"x" * 10**7)[0] == 413


def test_the_key(server: Served) -> None:
    for wrong in ("", "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY):
        for path in ("/v1/models", "/metrics", "/nowhere"):
            status, answer = call(server, "GET", path, authorization=wrong)
            assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key"
    assert call(server, "GET", "/health", authorization="") == (200, b'{"status":"ok"}')
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_one_model_and_no_way_to_another(server: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["packed"]
    with pytest.raises(openai.NotFoundError, match="this server has 'packed'"):
        client.completions.create(model="gpt-4", prompt="x")
    for path in ("/load_model", "/reset", "/v1/responses", "/docs"):
        assert call(server, "POST", path, b'{"model": "x"}')[0] == 404
    assert call(server, "GET", "/v1/completions")[0] == 405


def test_metrics_count_what_happened(server: Served, client: openai.OpenAI) -> None:
    names = ["prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_count",
             "time_per_token_seconds_count"]  # fmt: skip
    before = [gauge(server, f"alphaprune_{name}") for name in names]
    usage = client.completions.create(model="packed", prompt=PROMPTS[1], max_tokens=9, temperature=0).usage
    after = [gauge(server, f"alphaprune_{name}") for name in names]
    new = usage.completion_tokens
    assert [a - b for a, b in zip(after, before, strict=True)] == [usage.prompt_tokens, new, 1, new - 1]
    assert gauge(server, "alphaprune_kv_blocks") == 512 and gauge(server, "alphaprune_weight_bytes") > 10**7
    assert gauge(server, "process_resident_memory_bytes") > 10**8
    assert 'status="5' not in call(server, "GET", "/metrics")[1].decode()


def test_a_taken_port_and_bad_options(directory: Path, run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = run("serve", directory, "--port", taken.getsockname()[1])
    assert status == 2 and "in use; give another --host or --port" in err and err.count("\n") == 1
    for options, words in (
        (("--port", 70000), "--port 70000"),
        (("--host", "192.0.2.1"), "192.0.2.1:8000 cannot be served on"),
        (("--kv-blocks", 5, "--kv-memory", 1), "one of --kv-blocks and --kv-memory"),
        (("--kv-memory", 1e-6, "--port", 0), "less than one block"),
        (("--copies", -1), "--copies -1.0: wanted 0 or more"),
        (("--copies", "nan"), "--copies nan: wanted 0 or more"),
        (("--max-running", 0), "--max-running 0: wanted 1 or more"),
        (("--chat-template", "nowhere.jinja"), "nowhere.jinja: there is no such file"),
    ):
        status, _, err = run("serve", directory, *options)
        assert status == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("missing", "again", "words"),
    [
        ("uvicorn", "server", r"uvicorn is not installed: pip install 'alphaprune\[serve\]'"),
        ("transformers.cli.serving.utils", "engine", r"install transformers==5\.24"),
    ],
)
def test_what_is_not_installed(directory: Path, run, monkeypatch, missing: str, again: str, words: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for module in ("server", "app", "answer", again):
        monkeypatch.delitem(sys.modules, f"alphaprune.serving.{module}", raising=False)
        monkeypatch.delattr(f"alphaprune.serving.{module}", raising=False)
    status, _, err = run("serve", directory, "--port", 0)
    assert status == 2 and re.search(words, err) and err.count("\n") == 1


def test_a_full_queue_and_a_drain(packed: Path, tmp_path: Path) -> None:
    with serve(packed, tmp_path / "log", "--max-running", 1, "--queue", 1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)
        with pytest.raises(openai.BadRequestError, match="start the server with --chat-template FILE"):
            client.chat.completions.create(model="packed", messages=[{"role": "user", "content": "x"}])
        asked = {"model": "packed", "prompt": "x", "temperature": 0, "logit_bias": {"0": -100}}
        streams = [iter(client.completions.create(**asked, max_tokens=n, stream=True)) for n in (300, 20)]
        next(streams[0])
        assert gauge(server, "alphaprune_queued_requests") == 1
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already") as full:
            client.completions.create(**asked)
        assert int(full.value.response.headers["retry-after"]) >= 1
        server.process.send_signal(signal.SIGTERM)
        assert soon(lambda: call(server, "GET", "/health")[0] == 503, 5)
        with pytest.raises(openai.InternalServerError, match="shutting down") as late:
            client.completions.create(**asked)
        assert late.value.status_code == 503
        pieces = [list(stream) for stream in streams]
        assert [made[-1].choices[0].finish_reason for made in pieces] == ["length", "length"]
        assert server.process.wait(10) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_answers_that_are_cut_off(packed: Path, tmp_path: Path, sent: signal.Signals, status: int) -> None:
    with serve(packed, tmp_path / "log", "--drain", 0.1, "--threads", 1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)
        asked = {"model": "packed", "prompt": "x", "temperature": 0, "logit_bias": {"0": -100}, "max_tokens": 500}
        stream = client.completions.create(**asked, stream=True)
        with pytest.raises(openai.APIError, match="this server is shutting down"):
            for count, _ in enumerate(stream):
                if count == 5:
                    server.process.send_signal(sent)
        assert server.process.wait(15) == status
    log = server.log.read_text()
    assert "Traceback" not in log and ("interrupted" in log) == (status == 130)


def test_memory_is_told(server: Served) -> None:
    names = ("packed", "weight", "copies", "kv", "scratch", "memory_allocated", "memory_peak", "memory_limit")
    found = {name: gauge(server, f"alphaprune_{name}_bytes") for name in names}
    assert 0 < found["packed"] < found["weight"] and found["kv"] > 0 and found["copies"] == 0  # none on a CPU
    assert found["memory_limit"] == found["weight"] + found["kv"] + 1e9
    assert found["memory_peak"] >= found["memory_allocated"] >= found["scratch"] > 0


def test_a_device_that_is_not_here_is_one_sentence(packed: Path, run) -> None:
    for device in ("tpu", "cuda:x", "cuda:99"):
        status, _, err = run("serve", packed, "--device", device)
        assert status == 2 and f"--device {device}: " in err and len(err.strip().splitlines()) == 1
