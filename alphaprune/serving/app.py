"""The routes, and what stands before them: key, sizes, queue, and the end of the server."""

import asyncio
import hmac
import logging
from dataclasses import dataclass
from time import monotonic, perf_counter, time
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from alphaprune.serving.answer import Answer
from alphaprune.serving.engine import Engine, Stream
from alphaprune.serving.metrics import CONTENT_TYPE, Metrics
from alphaprune.serving.request import Defaults, Refused, parse

BODY_SECONDS = 30  # for a client to send its request
SHORT_BODY = 4096  # bytes: a prompt that is tokenised faster than a thread is woken
LONGEST_WAIT = 60  # seconds that a client is told to wait for at most
OPEN = ("/health",)  # needs no key: load balancers ask for it
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
log = logging.getLogger("alphaprune.serve")


@dataclass(frozen=True)
class Limits:
    """running: requests in the batch. queue: requests beside them. body: bytes of one request."""

    running: int
    queue: int
    body: int


class Service:
    """One model behind its routes; `app` is what a web server runs."""

    def __init__(
        self, engine: Engine, metrics: Metrics, name: str, limits: Limits, defaults: Defaults, key: str | None
    ) -> None:
        self.engine, self.metrics, self.name, self.limits, self.defaults = engine, metrics, name, limits, defaults
        self.key = None if key is None else key.encode()
        self.draining = False
        self.admitted = 0  # requests between their arrival and the end of their answer
        self.streams: set[Stream] = set()
        self._created = int(time())
        self._seconds = 1.0  # that a request takes, a moving average
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers: Any = {Refused: _refuse, HTTPException: _refuse_route, ClientDisconnect: _refuse_left}
        self._inner = Starlette(routes=routes, exception_handlers={**handlers, Exception: _fail})

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI: checks the key and counts the answer."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        status = 499

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._allowed(scope):
                await self._inner(scope, receive, counted)
            else:
                words = "this server wants an API key: send the header Authorization: Bearer KEY"
                await _refuse(None, Refused(401, words, code="invalid_api_key"))(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in ROUTES else "other"
            left = scope.get("alphaprune_left") and status == 200
            self.metrics.requests.labels(path, str(499 if left else status)).inc()

    def end(self, words: str) -> None:
        """Ends all answers that are under way with an error."""
        for stream in list(self.streams):
            stream.cancel(words)

    def _allowed(self, scope: Any) -> bool:
        if self.key is None or scope["path"] in OPEN:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self.key) and scheme.lower() == b"bearer"

    async def _chat(self, request: Request) -> Answer:
        return await self._generate(request, chat=True)

    async def _complete(self, request: Request) -> Answer:
        return await self._generate(request, chat=False)

    async def _generate(self, request: Request, chat: bool) -> Answer:
        arrived = perf_counter()
        self._admit()
        try:
            raw = await self._body(request)
            asked = parse(raw, chat, self.name, self.engine.vocabulary, self.defaults)
            if len(raw) > SHORT_BODY:
                tokens = await asyncio.to_thread(self.engine.encode, asked)
            else:
                tokens = self.engine.encode(asked)
            request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}"
            stream = self.engine.submit(tokens, asked, request_id, arrived)
        except BaseException:
            self.admitted -= 1
            raise
        self.streams.add(stream)

        def over() -> None:
            stream.cancel()
            self.streams.discard(stream)
            self.admitted -= 1
            self._seconds += 0.1 * (perf_counter() - arrived - self._seconds)

        return Answer(stream, asked, self.name, over)

    def _admit(self) -> None:
        if self.draining:
            raise Refused(503, "this server is shutting down", code="shutting_down", retry=LONGEST_WAIT)
        waiting = self.admitted - self.limits.running
        if waiting >= self.limits.queue:
            wait = min(LONGEST_WAIT, max(1, round(self._seconds * (waiting + 1) / self.limits.running)))
            raise Refused(
                429, f"{waiting} requests are waiting already; try again later", code="queue_full", retry=wait
            )
        self.admitted += 1

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than the limit, whatever its header says."""
        limit, body, ends = self.limits.body, bytearray(), monotonic() + BODY_SECONDS
        too_large = Refused(413, f"the request is larger than {limit} bytes, the limit of this server")
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        chunks = request.stream()
        try:
            while chunk := await asyncio.wait_for(anext(chunks, b""), ends - monotonic()):
                body += chunk
                if len(body) > limit:
                    raise too_large
        except asyncio.TimeoutError as error:
            raise Refused(408, f"the request did not arrive within {BODY_SECONDS} seconds") from error
        return bytes(body)

    async def _models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self._created, "owned_by": "alphaprune"}
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": self.engine.kv.context}]})

    async def _health(self, request: Request) -> Response:
        state = "ok" if self.engine.alive() else "generation has stopped"
        state = "shutting down" if self.draining else state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)


def _refuse(request: Request | None, refused: Refused) -> Response:
    headers = {"retry-after": str(refused.retry)} if refused.retry else None
    return JSONResponse(refused.body(), refused.status, headers)


def _refuse_route(request: Request, error: HTTPException) -> Response:
    words = f"{request.method} {request.url.path}: this server has {', '.join(ROUTES)}"
    return _refuse(request, Refused(error.status_code, words))


def _refuse_left(request: Request, error: ClientDisconnect) -> Response:
    return _refuse(request, Refused(499, "the client left"))


def _fail(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _refuse(request, Refused(500, "the server failed at this request, and its log says why"))
