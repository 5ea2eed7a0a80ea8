"""Requests sent when they are due, whatever became of those before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple

from amed_engine.errors import AmedError
from amed_engine.serving.load.arrivals import Arrival


class Refused(AmedError):
    """A request that was turned away unharmed: the queue is full, a deadline cannot be met, the server stops."""


class Outcome(NamedTuple):
    """What became of a request. due, sent, done: readings of one clock, in seconds. reason: why not, where not answered."""

    arrival: Arrival
    due: float
    sent: float
    done: float
    kind: Literal["answered", "refused", "failed"]
    reason: str = ""

    @property
    def latency(self) -> float:
        """From when it was due: a request that is sent late, or waits in a queue, has waited."""
        return self.done - self.due


Ask = Callable[[Arrival], Awaitable[None]]


async def offer(
    arrivals: Sequence[Arrival],
    ask: Ask,
    *,
    outstanding: int | None = None,
    timeout: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Outcome]:
    """The outcome of every request, in the order of `arrivals`.

    ask: raises Refused, or another AmedError where a request failed; what else it raises ends the run. outstanding: a
    closed loop, where a request is due when it may be sent: once fewer than so many are on their way.
    """
    start, slots = clock(), asyncio.Semaphore(outstanding or len(arrivals))

    async def one(arrival: Arrival, due: float) -> Outcome:
        sent = clock()
        try:
            kind, reason = await _asked(ask, arrival, timeout)
        finally:
            slots.release()
        return Outcome(arrival, due, sent, clock(), kind, reason)

    async with asyncio.TaskGroup() as group:
        tasks = []
        for arrival in arrivals:
            await slots.acquire()
            due = clock() if outstanding else start + arrival.at
            await sleep(max(0.0, due - clock()))
            tasks.append(group.create_task(one(arrival, due)))
    return [task.result() for task in tasks]


async def _asked(ask: Ask, arrival: Arrival, timeout: float) -> tuple[Literal["answered", "refused", "failed"], str]:
    try:
        async with asyncio.timeout(timeout) as limit:
            await ask(arrival)
    except Refused as error:
        return "refused", str(error)
    except AmedError as error:  # before TimeoutError, which some of them are
        return "failed", str(error)
    except TimeoutError:
        if not limit.expired():
            raise
        return "failed", f"no answer within {timeout:g} s"
    return "answered", ""
