"""Models in folders, a server in a process, a client of few cycles: for bench/serve.py, soak.py and tests."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any
from urllib.request import urlopen

PATIENCE = 90  # seconds until a server has loaded its model


def pack_demo(folder: Path, sparsity: float = 0.7) -> Path:
    """The embedded model, pruned by magnitude to the same sparsity in every layer, and packed."""
    import alphaprune
    from alphaprune.demo.run import MODEL
    from alphaprune.mask import keep_mask
    from alphaprune.model import open_source

    model = alphaprune.load(MODEL)
    masks = {}
    for block in open_source(model).blocks():
        for name, layer in block.linears.items():
            scores = layer.weight.detach().abs().float()
            masks[name] = keep_mask(scores, round(sparsity * scores.numel()))
    alphaprune.save(alphaprune.sparsify(model, masks, tokens=None), folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, folder)
    return folder


def random_folder(folder: Path, shape: str, sparsity: float | None, values: str = "float") -> Path:
    """A model of random weights in the shapes of `shape`, bfloat16, dense or packed, with a tokenizer for all its
    tokens."""
    import torch

    import alphaprune
    from alphaprune import decoding

    spoken = tokenizer(decoding.config_of(shape).vocab_size)
    alphaprune.save(decoding.random_model(shape, sparsity, values=torch.int8 if values == "int8" else None), folder)
    spoken.save_pretrained(folder)
    return folder


def tokenizer(size: int) -> Any:
    """Of transformers: a token for each byte, and others that texts do not have, but models say. ValueError if there
    are fewer than bytes."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(letters):
        raise ValueError(f"{size} tokens are fewer than the {len(letters)} of single bytes; take a larger model")
    words = [*letters, *(f"w{number}" for number in range(size - len(letters)))]
    made = tokenizers.Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@dataclass
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen
    host: str
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def gauge(self, name: str) -> float:
        """What /metrics says of alphaprune_NAME."""
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return float(re.search(rf"^alphaprune_{re.escape(name)} (.+)$", text, re.MULTILINE)[1])

    def rss(self) -> int:
        """Bytes of its resident memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serve(model: Path, log: Path, *options: Any, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """Starts `alphaprune serve` on a free port and ends it afterwards; what it prints goes to `log`."""
    command = [sys.executable, "-m", "alphaprune", "serve", str(model), "--port", "0", *map(str, options)]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    try:
        limit = monotonic() + PATIENCE
        while not (line := next((x for x in log.read_text().splitlines() if x.startswith("http://")), "")):
            if process.poll() is not None or monotonic() > limit:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            sleep(0.1)
        host, _, port = line.removeprefix("http://").rpartition(":")
        yield Served(process, host, int(port), log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Reply:
    """A streamed completion. first, seconds: from sending the request to the first and to the last token."""

    text: str
    tokens: int
    first: float
    seconds: float

    @property
    def per_token(self) -> float:
        return (self.seconds - self.first) / max(1, self.tokens - 1)


async def complete(host: str, port: int, prompt: str, new: int, **settings: Any) -> Reply:
    """Streams one greedy completion of `new` tokens; RuntimeError with what the server said if it refuses.

    Plain sockets: OpenAI's own client takes as long per token as the server does, on the same cores.
    """
    asked = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, **settings}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
    started = perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()}")
        return await _read(reader, started)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, started: float) -> Reply:
    """Reads first and understands afterwards: while others generate, a client is not to take their time."""
    received, first, last = bytearray(), started, started
    while data := await reader.read(2**16):
        received += data
        if b'"text":' in data:
            first = perf_counter() if first == started else first
        if b'"usage":' not in data:
            last = perf_counter()
    events = [json.loads(line[6:]) for line in received.splitlines() if line.startswith(b"data: {")]
    if "error" in events[-1]:
        raise RuntimeError(events[-1]["error"]["message"])
    if b"data: [DONE]" not in received:
        raise RuntimeError("the stream ended before its end")
    text = "".join(event["choices"][0]["text"] for event in events[:-1])
    return Reply(text, events[-1]["usage"]["completion_tokens"], first - started, last - started)
