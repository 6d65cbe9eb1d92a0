"""Generated pieces → the JSON or the stream of events that OpenAI's clients read."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from time import time
from typing import Any

from alphaprune.serving.engine import Piece, ReasoningText, Stream, ToolCall
from alphaprune.serving.request import Asked, Refused

DONE = b"data: [DONE]\n\n"
MARK = "\0"  # no id, name or number of an answer holds it


class Answer:
    """One answer; it ends, and its generation with it, when it is complete or its client has left.

    over: called once, whatever happened.
    """

    def __init__(self, stream: Stream, asked: Asked, model: str, over: Callable[[], None]) -> None:
        self.stream, self.asked, self.over = stream, asked, over
        self.chat = asked.prompt is None
        self.head = {"id": stream.id, "object": "", "created": int(time()), "model": model}
        self.calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        work = asyncio.create_task((self._send_events if self.asked.stream else self._send_whole)(send))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            scope["alphaprune_left"] = not work.done()
        finally:
            self.over()
            for task in (gone, work):
                task.cancel()
            results = await asyncio.gather(gone, work, return_exceptions=True)
        if isinstance(results[1], Exception) and not isinstance(results[1], OSError):
            raise results[1]

    async def _send_whole(self, send: Any) -> None:
        text, thought, calls = [], [], []
        async for pieces in self.stream.pieces():
            for piece in pieces:
                if isinstance(piece, ToolCall):
                    calls.append(self._call(piece))
                else:
                    (thought if isinstance(piece, ReasoningText) else text).append(piece)
        if self.stream.error:
            body, status = Refused(500, self.stream.error).body(), 500
        else:
            message: dict[str, Any] = {"role": "assistant", "content": "".join(text)}
            if thought:
                message["reasoning_content"] = "".join(thought)
            if calls:
                message["tool_calls"] = calls
            said = {"message": message} if self.chat else {"text": "".join(text)}
            self.head["object"] = "chat.completion" if self.chat else "text_completion"
            body, status = self._json(said, self.stream.finish) | {"usage": self._usage()}, 200
        await self._start(send, status, b"application/json")
        await send({"type": "http.response.body", "body": _encode(body)})

    async def _send_events(self, send: Any) -> None:
        await self._start(send, 200, b"text/event-stream; charset=utf-8")
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        self.head["object"] = "chat.completion.chunk" if self.chat else "text_completion"
        if self.chat:
            yield _event(self._json({"delta": {"role": "assistant", "content": ""}}))
        before, after = self._frame()
        async for pieces in self.stream.pieces():
            yield b"".join([before + _encode(self._said(piece)) + after for piece in pieces])
        if self.stream.error:
            yield _event(Refused(500, self.stream.error).body())
            return
        yield _event(self._json({"delta": {}} if self.chat else {"text": ""}, self.stream.finish))
        if self.asked.usage:
            yield _event({**self.head, "choices": [], "usage": self._usage()})
        yield DONE

    def _said(self, piece: Piece) -> Any:
        """What stands between the two parts of the frame."""
        if not self.chat:
            return piece
        if isinstance(piece, ToolCall):
            return {"tool_calls": [self._call(piece)]}
        return {"reasoning_content" if isinstance(piece, ReasoningText) else "content": piece}

    def _frame(self) -> tuple[bytes, bytes]:
        """An event before and after what is said in it: the same for all events of an answer."""
        before, after = _event(self._json({"delta" if self.chat else "text": MARK})).split(_encode(MARK))
        return before, after

    def _call(self, call: ToolCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        made = {"index": self.calls, "id": f"call-{self.stream.id}-{self.calls}", "type": "function"}
        self.calls += 1
        return {**made, "function": function}

    def _json(self, said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**self.head, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]}

    def _usage(self) -> dict[str, int]:
        prompt, new = self.stream.prompt_tokens, len(self.stream.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def _start(self, send: Any, status: int, kind: bytes) -> None:
        headers = [(b"content-type", kind), (b"cache-control", b"no-cache"), (b"x-request-id", self.stream.id.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})


def _encode(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _event(body: Any) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
