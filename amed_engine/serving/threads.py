"""What threads do with what comes to them, and how work is handed to one."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any


def each(items: queue.SimpleQueue, work: Callable[[Any], None]) -> None:
    """Work on what comes until None does."""
    while (item := items.get()) is not None:
        work(item)
        del item  # else its samples are kept until the next comes


def settle(work: Callable[[], Any], future: Future) -> None:
    """Fulfil a future by what the work returns or raises."""
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


async def handed_over(
    submit: Callable[[], Future], start: Callable[[Callable[[], Future]], Awaitable[Future]] = asyncio.to_thread
) -> Future:
    """The future of a request that another thread submits; cancelled where nobody waits for it any more. start: has work
    done there, and awaits it."""
    taken: list[Future] = []
    left = threading.Event()

    def work() -> Future:
        taken.append(submit())
        if left.is_set():
            taken[0].cancel()
        return taken[0]

    try:
        return await start(work)
    except asyncio.CancelledError:
        left.set()
        for future in taken:
            future.cancel()
        raise
