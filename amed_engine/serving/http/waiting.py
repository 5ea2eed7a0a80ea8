"""Waiting for an engine while the client may go away, which cancels its request."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from amed_engine.errors import EngineClosedError

T = TypeVar("T")


async def result_of(request: Request, future: Future[T]) -> T:
    """Raises what the engine raises, and ClientDisconnect."""
    drawing, watch = asyncio.wrap_future(future), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({drawing, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise ClientDisconnect
        _ = drawing.cancelled() or drawing.exception()  # asyncio logs what nobody looked at
        return taken(future)
    finally:
        watch.cancel()
        future.cancel()  # of one that is done it does nothing


async def gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def taken(future: Future[T]) -> T:
    if future.cancelled():
        raise EngineClosedError("the server went away before these samples were drawn; ask another one")
    return future.result()
