"""The socket, the signals and the order in which things start and end."""

import signal
import socket
import sys
from time import monotonic
from typing import Any

import uvicorn

from alphaprune.serving.app import Service

GRACE_SECONDS = 3  # for connections to close once their answers have ended


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet; ValueError if the address is taken or not of this machine."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.set_inheritable(True)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{host}:{port} cannot be served on: {reason}; give another --host or --port") from error
    return made


class Server(uvicorn.Server):
    """Serves until a signal: SIGTERM lets answers finish for `drain` seconds, SIGINT or a second signal does not."""

    def __init__(self, service: Service, drain: float) -> None:
        config = uvicorn.Config(
            service.app,
            interface="asgi3",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        super().__init__(config)
        self.service, self.drain = service, drain
        self.interrupted = False
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        if sig == signal.SIGTERM and self._deadline is None:
            self.service.draining = True
            self._deadline = monotonic() + self.drain
            print(f"draining {self.service.admitted} requests", file=sys.stderr, flush=True)
        else:
            self.interrupted |= sig == signal.SIGINT
            self.service.draining = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        stop = await super().on_tick(counter)
        if self._deadline is not None:
            stop = stop or not self.service.admitted or monotonic() >= self._deadline
        if stop:
            self.service.draining = True
            self.service.end("this server is shutting down")
        return stop


def run(service: Service, sock: socket.socket, drain: float) -> None:
    """Serves until a signal; KeyboardInterrupt if that was SIGINT."""
    server = Server(service, drain)
    server.run(sockets=[sock])
    if server.interrupted:
        raise KeyboardInterrupt
