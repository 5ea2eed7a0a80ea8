"""Server-sent events: samples as they are done."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from amed_engine.engine.result import SampleResult
from amed_engine.serving.http import answers
from amed_engine.serving.http.errors import told
from amed_engine.serving.http.waiting import gone, taken
from amed_engine.serving.order import Sample

QUIET = 15.0  # seconds, after which a comment keeps a stream's proxies from closing it


class Events:
    """What happens to a request, in order, as its stream reads it: samples, then the future that is done, or that the client is
    gone. Filled from threads of the engine."""

    def __init__(self) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def put(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def read(self) -> AsyncIterator[Sample | Future[SampleResult] | None]:
        """None after QUIET seconds without any. Ends with the future; raises ClientDisconnect."""
        while True:
            try:
                event = await asyncio.wait_for(self._queue.get(), QUIET)
            except TimeoutError:
                event = None
            if event is ClientDisconnect:
                raise ClientDisconnect
            yield event
            if isinstance(event, Future):
                return


class Stream(Response):
    """Server-sent events: `sample` for each, then `done`, or `error`."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, future: Future[SampleResult], model: str):
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._future, self._model = events, future, model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(gone(receive))
        watch.add_done_callback(lambda _: self._events.put(ClientDisconnect))
        try:
            await self._write(send)
        except ClientDisconnect:
            pass
        finally:
            watch.cancel()
            self._future.cancel()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events.read():
            text = await asyncio.to_thread(self._text, event)
            await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _text(self, event: Sample | Future[SampleResult] | None) -> str:
        if event is None:
            return ": waiting\n\n"
        if isinstance(event, Sample):
            return _event("sample", answers.event(event))
        try:
            result = taken(event)
        except Exception as error:
            return _event("error", told(error).body)
        return _event("done", {"samples": len(result.images), "model": self._model, **answers.facts(result)})


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
