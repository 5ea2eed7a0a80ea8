"""A load, offered and reported."""

from __future__ import annotations

import asyncio

from amed_engine.errors import AmedError
from amed_engine.serving.load.arrivals import Arrival, Load
from amed_engine.serving.load.loop import offer
from amed_engine.serving.load.report import LoadReport
from amed_engine.serving.load.targets import Rows, Target


async def measure(load: Load, target: Target) -> LoadReport:
    """Offer a load to a target, after one request of each number of evaluations that does not count: the first of its kind
    builds its program. Raises what the target raises of those, e.g. ConfigError for options that it does not take."""
    for nfe in load.nfe.weights:
        await _first(target, nfe, load.timeout)
    before = await target.rows()
    outcomes = await offer(load.arrivals(), target.ask, outstanding=load.outstanding, timeout=load.timeout)
    return LoadReport.of(load, outcomes, target.name, _useful(before, await target.rows()))


async def _first(target: Target, nfe: int, timeout: float) -> None:
    try:
        async with asyncio.timeout(timeout) as limit:
            await target.ask(Arrival(0.0, nfe, (0,)))
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise AmedError(f"{target.name} gave no answer within {timeout:g} s") from error


def _useful(before: Rows | None, after: Rows | None) -> float | None:
    if before is None or after is None or after.evaluated == before.evaluated:
        return None
    return (after.evaluations - before.evaluations) / (after.evaluated - before.evaluated)
