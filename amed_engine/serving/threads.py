"""What the threads of an engine do with what comes to them."""

from __future__ import annotations

import queue
from collections.abc import Callable
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
