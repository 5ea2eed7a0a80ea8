"""Requests whose programs are no tables: drawn whole by `Sampler.run`'s loop, one after another, beside the rows."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable
from queue import SimpleQueue
from typing import Any

from amed_engine.engine.request import Request, make_request
from amed_engine.engine.runner import Drawn, Runner
from amed_engine.errors import DeadlineError, EngineClosedError, QueueFullError
from amed_engine.serving.order import Order
from amed_engine.serving.rows import Rows


class Beside:
    """At most `limit` samples wait for the one thread that draws them; None in `orders` ends it."""

    def __init__(self, rows: Rows, runner: Runner, limit: int):
        self.rows, self.runner, self.limit = rows, runner, limit
        self.orders: SimpleQueue[Order | None] = SimpleQueue()

    def check(self, order: Order, others: Iterable[Order]) -> None:
        """Raises QueueFullError."""
        waiting = sum(each.samples for each in others if each.programmed.table is None)
        if waiting + order.samples > self.limit:
            raise QueueFullError(
                f"queue: got {order.samples} samples beside the rows, expected at most {self.limit - waiting}, as {waiting} "
                "wait there; try again later, or ask for fewer",
                1.0,
            )

    def draw(self, order: Order, wanted: Container[Order]) -> Drawn:
        """All samples of an order, as long as it is wanted. Raises DeadlineError where it is late, NonFiniteError."""

        def look(*_: Any) -> None:
            if order not in wanted:
                raise EngineClosedError("nobody waits for these samples any more")

        look()
        if order.deadline is not None and time.monotonic() > order.deadline:
            raise DeadlineError("the deadline passed before this request came to be drawn; allow more seconds")
        return self.runner.run(order.programmed.program, self._request(order), order.scale, look)

    def _request(self, order: Order) -> Request:
        batch: Any = order.latents if order.seeds is None else order.seeds
        kind: dict[str, Any] = {"dtype": self.rows.dtype, "device": self.rows.device}
        noises = order.programmed.program.noises
        request = make_request(self.rows.model, batch, order.classes, None, noises=noises, **kind)
        if request.classes is not None:
            order.labels[:] = request.classes.unbind(0)
        return request
