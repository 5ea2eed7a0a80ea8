"""The application under uvicorn in this process, until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from amed_engine.errors import ConfigError
from amed_engine.serving.http.service import Service

STUCK = 30  # seconds in which a client must take something of its answer; else its connection is closed (on Linux)
FAREWELL = 2  # seconds, at most, for answers on their way when the server is gone


def listener(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which nobody can connect to before the server is there. Raises ConfigError for a host of no
    known address, OSError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"host {host!r} has no address here ({error}); pass one of this machine, 127.0.0.1"
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # its connections inherit it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK * 1000)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    return bound


class Server(uvicorn.Server):
    """SIGTERM and SIGINT: the first lets what is asked for be answered, at most `grace` seconds, while new requests are
    refused; the second cuts that short. What is not answered by then is told so.

    ready: called when all engines are warmed up. close: called, in another thread, when no answer is waited for any more.
    """

    def __init__(self, app: FastAPI, grace: float, *, ready: Callable[[], None], close: Callable[[], None]):
        quiet = {"log_config": None, "access_log": False, "server_header": False}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=FAREWELL, **quiet))
        self._app, self._grace, self._ready, self._close = app, grace, ready, close
        self._leaving: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._said = False
        self.signals, self.unanswered = 0, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        warming: asyncio.Future[None] = self._app.state.warming
        if warming.done() and not self._said:
            warming.result()
            self._said = True
            self._ready()
        if self.signals and self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())
        if self.signals > 1:
            self._hurry.set()
        return await super().on_tick(counter)

    async def _leave(self) -> None:
        service: Service = self._app.state.service
        self.unanswered = await service.drain(self._grace, self._hurry)
        await asyncio.to_thread(self._close)
        self.should_exit = True
