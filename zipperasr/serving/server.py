"""uvicorn with what it lacks: a limit on how long headers may take, and an end by signal that is a good end."""

import asyncio
import json
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from zipperasr.errors import UserError
from zipperasr.serving import ServingSettings
from zipperasr.serving.refusal import Refusal

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"short": {"format": "%(asctime)s %(message)s", "datefmt": "%H:%M:%S"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "short"}},
    "loggers": {
        "uvicorn.error": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "zipperasr": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "uvicorn.access": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, but does not listen yet. Raises UserError naming the mend."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        what = getattr(error, "strerror", None) or "not the name of a machine"
        raise UserError(f"--host {host}: {what}; give an address of this machine") from error
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise _taken(f"{host}:{port}", error) from error
    return found


def _taken(address: str, error: OSError) -> UserError:
    mend = "give another --port (0: any that is free) or --host"
    return UserError(f"{address}: {(error.strerror or str(error)).lower()}; {mend}")


def url(bound: socket.socket) -> str:
    """Where it is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, bound: socket.socket, settings: ServingSettings, *, greeting: str) -> None:
    """Serve until SIGINT or SIGTERM, and end what is in flight; print `greeting` when requests are taken."""
    server(app, settings, greeting=greeting).run(sockets=[bound])


def server(app: FastAPI, settings: ServingSettings, *, greeting: str) -> "Server":
    """What `serve` runs."""
    config = uvicorn.Config(
        app,
        http=type("Protocol", (Protocol,), {"idle_s": settings.idle_s}),
        ws="none",
        lifespan="off",
        log_config=LOGGING,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=settings.drain_s,
    )
    return Server(config, greeting)


class Server(uvicorn.Server):
    """A signal ends it, and a second one at once; the process then goes on, where uvicorn's would die of the signal."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self.greeting = greeting

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process, which had bound the address too, listens
            raise _taken(url(sockets[0]).removeprefix("http://"), error) from error
        print(self.greeting, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


class Protocol(H11Protocol):
    """A connection that is closed when it takes `idle_s` to send a request's headers, or the rest of a refused body.

    The rest is read, and dropped, because a client that is still sending when the connection closes may never see why.
    """

    idle_s: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()  # the application has its own limits
        elif self._timer is None:
            self._timer = self.loop.call_later(self.idle_s, self._expire)

    def _stop(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            message = f"the request's headers are not there after {self.idle_s:g} s; send them faster"
            body = json.dumps(Refusal(408, message).body()).encode()
            head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            self.transport.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
        self.transport.close()
