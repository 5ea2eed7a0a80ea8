"""The threads of an engine: one ticks, one hands out what is done, one draws what is no table."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from torch import Tensor

from amed_engine.engine.runner import Runner
from amed_engine.errors import DeadlineError, EngineClosedError, QueueFullError
from amed_engine.serving.beside import Beside
from amed_engine.serving.order import Order, starts_of
from amed_engine.serving.rows import Rows, Start
from amed_engine.serving.scheduler import Placed, Scheduler
from amed_engine.serving.stats import Pace, ServingStats
from amed_engine.serving.threads import each, settle
from amed_engine.serving.ticker import Ticker

logger = logging.getLogger("amed_engine")
CLOSED = "the engine was closed before this request was done; send it to another engine"


class Loop:
    """What an engine runs, apart from the engine, so that one that is dropped can be collected and ends its threads."""

    def __init__(self, rows: Rows, ticker: Ticker, runner: Runner, scheduler: Scheduler):
        self.rows, self.ticker, self.runner, self.scheduler = rows, ticker, runner, scheduler
        self.pace = Pace(rows.device)
        self.counts: dict[str, int] = defaultdict(int)
        self.closing = False
        self._wake = threading.Condition()
        self._orders: set[Order] = set()  # taken and not done
        self._at: list[Start | None] = [None] * scheduler.rows  # what is in each row
        self._left: list[int] = []  # rows of samples that were taken out
        self._tasks: list[tuple[Callable[[], Any], Future]] = []
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._beside = Beside(rows, runner, scheduler.queue + scheduler.rows)
        work = {
            "ticks": self._serve,
            "delivery": partial(each, self._done, self._deliver),
            "beside": partial(each, self._beside.orders, self._draw_beside),
        }
        self._threads = [threading.Thread(target=work[name], name=f"amed-{name}", daemon=True) for name in work]
        for thread in self._threads:
            thread.start()

    # ---- for callers, from any thread ----

    def take(self, order: Order) -> None:
        """Raises EngineClosedError, QueueFullError, DeadlineError."""
        with self._wake:
            if self.closing:
                raise EngineClosedError("the engine is closed and takes no more requests; make another")
            try:
                if order.programmed.table is None:
                    self._beside.check(order, self._orders)
                else:
                    self.scheduler.offer(order, time.monotonic(), self._tick_seconds(order))
            except (QueueFullError, DeadlineError):
                self.counts["refused"] += order.samples
                raise
            self._orders.add(order)
            if order.programmed.table is None:
                self._beside.orders.put(order)
            self._wake.notify_all()
        order.when_cancelled(self._cancel)

    def seconds(self, order: Order) -> float | None:
        """Until it would be done if it came now and nothing after it; None before any tick was measured."""
        with self._wake:
            pace = self._tick_seconds(order)
            if pace is None:
                return None
            return pace * (order.ticks if order.programmed.table is None else self.scheduler.forecast(order))

    def between_ticks(self, work: Callable[[], Any]) -> Any:
        """The result of work that is done by the ticking thread while no tick runs. Raises EngineClosedError."""
        future: Future = Future()
        with self._wake:
            if self.closing:
                raise EngineClosedError("the engine is closed; make another")
            self._tasks.append((work, future))
            self._wake.notify_all()
        return future.result()

    def stats(self) -> ServingStats:
        with self._wake:
            gauges = {"rows": self.scheduler.rows, "live": self.scheduler.live, "waiting": self.scheduler.waiting}
            times = {"tick_seconds": self.pace.seconds, "bucket_seconds": dict(self.pace.by_bucket)}
            network = 0.0 if self.pace.on_gpu else self.rows.network_seconds
            return ServingStats(
                **gauges, **self.counts, **times, network_seconds=network, captures=self.ticker.captures
            )  # type: ignore[arg-type]

    def close(self, drain: bool, timeout: float | None) -> None:
        """Take no more; wait for what was taken, or give it up. Threads are gone afterwards; one of them waits for nothing."""
        until = None if timeout is None else time.monotonic() + timeout
        inside = threading.current_thread() in self._threads
        with self._wake:
            self.closing = True
            self._beside.orders.put(None)
            self._wake.notify_all()
            if drain and not inside:
                self._wake.wait_for(lambda: not self._orders, timeout)
            left = [] if drain and inside else list(self._orders)
        for order in left:
            self._fail(order, EngineClosedError(CLOSED), "cancelled")
        for thread in () if inside else self._threads:
            thread.join(None if until is None else max(0.1, until - time.monotonic()))

    # ---- the ticking thread ----

    def _serve(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            logger.exception("the engine stopped")
            self._stop(error)
        finally:
            self._done.put(None)

    def _step(self) -> bool:
        """One tick, or what is to be done between two; False where all is over."""
        with self._wake:
            self._wake.wait_for(lambda: self._tasks or len(self.scheduler) or self.closing)
            if not self._tasks and not len(self.scheduler):
                return False
            tasks, self._tasks = self._tasks, []
            late: list[Any] = self.scheduler.expire(time.monotonic(), self._tick_seconds())
            placed, moves = self.scheduler.admit(), self.scheduler.moves()
            self.counts["admitted"] += len(placed)
        for work, future in tasks:
            settle(work, future)
        for job in late:
            error = DeadlineError("the deadline can no longer be met: other requests came first; nothing was drawn")
            self._fail_later(job, error, "missed")
        self.pace.start()
        try:
            self._tick(placed, moves)
        except Exception as error:
            self._fail_live(error)
        return True

    def _tick(self, placed: Sequence[Placed], moves: Sequence[tuple[int, int]]) -> None:
        here = self._arranged(placed, moves)
        if not here:
            return
        at = self._at[: max(sample.row for sample in here) + 1]
        guided = [row for row, start in enumerate(at) if start and start.scale != 1]
        learned = any(start.table.predictor is not None for start in at if start)
        kind = self.ticker.kind(len(at), len(guided), learned)
        if guided and self.ticker.buckets is None:
            self.rows.halve(guided)
        orders: set[Any] = {sample.job for sample in here}
        for order in orders:
            order.buckets.add(kind.size)
        self.ticker.tick(kind)
        with self._wake:
            done = self.scheduler.tick()
            for sample in done:
                self._at[sample.row] = None
            self.counts["ticks"] += 1
            self.counts["evaluations"] += len(here)
            self.counts["evaluated"] += kind.size + kind.halves
        over = [sample.row for sample in done]
        results = self.rows.read(over) if done else ()
        self.rows.free(over)
        mark = self.pace.end(kind.size)
        if done:
            self._done.put((done, *results, mark))

    def _arranged(self, placed: Sequence[Placed], moves: Sequence[tuple[int, int]]) -> list[Placed]:
        """What is in the rows, once they are as the scheduler has them; without what was cancelled meanwhile."""
        starts = starts_of(placed, self.rows, self._fail_later)
        with self._wake:
            for row, start in starts:
                self._at[row] = start
            for old, new in moves:
                self._at[new], self._at[old] = self._at[old], None
            here = self.scheduler.placed()
            rows = {sample.row for sample in here}
            self._at = [start if row in rows else None for row, start in enumerate(self._at)]
            left, self._left = [row for row in self._left if row not in rows], []
        for act, given in ((self.rows.write, starts), (self.rows.move, moves), (self.rows.park, left)):
            if given:
                act(given)  # type: ignore[operator]
        return here

    def _fail_live(self, error: Exception) -> None:
        """A tick that failed is the end of all that was in it; what waits is not touched."""
        with self._wake:
            orders: set[Any] = {placed.job for placed in self.scheduler.placed()}
        logger.error("a tick failed, and %d requests with it: %s", len(orders), error)
        for order in orders:
            self._fail_later(order, error)

    def _fail_later(self, order: Order, error: BaseException, counted: str = "failed") -> None:
        """By the thread that delivers: what a future calls is a caller's, and no tick waits for it."""
        if self._take_out(order, counted):
            self._done.put(partial(order.finish, error))

    # ---- delivery ----

    def _deliver(self, item: Any) -> Any:
        """What one tick finished, or what is to be called."""
        if callable(item):
            return item()
        done, images, finite, mark = item
        try:
            if mark is not None:
                mark.synchronize()  # of samples and counts
            checked = finite.tolist() if self.runner.check_finite else [None] * len(done)
        except Exception as error:  # of the device
            for order in {placed.job for placed in done}:
                self._fail(order, error)
            return
        for placed, image, count in zip(done, images.unbind(0), checked, strict=True):
            self._hand_out(placed.job, placed.index, image, count)

    def _hand_out(self, order: Order, index: int, image: Tensor, finite: int | None, backend: str = "ticks") -> None:
        with self._wake:
            if order not in self._orders:
                return
            last = order.place(index, image, finite)
            self.counts["failed" if index in order.failed else "completed"] += 1
            self.counts["beside"] += backend != "ticks"
            if last and order.deadline is not None and time.monotonic() > order.deadline:
                self.counts["missed"] += order.samples
        order.tell(index)
        if last and self._take_out(order):  # first: what the future calls may wait for the engine to be drained
            with self.pace.aside():
                result = order.result(backend)
            order.finish(result)

    def _draw_beside(self, order: Order) -> None:
        """Of a program that is no table."""
        try:
            drawn = self._beside.draw(order, self._orders)
        except BaseException as error:
            self._fail(order, error, "missed" if isinstance(error, DeadlineError) else "failed")
            return
        for index, image in enumerate(drawn.images.unbind(0)):
            self._hand_out(order, index, image, None, drawn.backend)

    # ---- bookkeeping ----

    def _tick_seconds(self, order: Order | None = None) -> float | None:
        """Of the ticks to come, by how many rows they will have."""
        coming = len(self.scheduler) + (0 if order is None else order.samples)
        return self.pace.of(min(self.scheduler.rows, max(1, coming)))

    def _fail(self, order: Order, error: BaseException, counted: str = "failed") -> None:
        if self._take_out(order, counted):
            order.finish(error)

    def _cancel(self, order: Order) -> None:
        if self._take_out(order, "cancelled"):
            order.future.set_running_or_notify_cancel()  # for those who wait for several

    def _take_out(self, order: Order, counted: str | None = None) -> bool:
        """Out of the queue and the rows. Whether it was here: who took it out is the one to fulfil its future. counted: what
        became of the samples that are not delivered."""
        with self._wake:
            if order not in self._orders:
                return False
            for row in self.scheduler.cancel(order):
                self._at[row] = None
                self._left.append(row)
            self._orders.discard(order)
            order.owner = None
            if counted is not None:
                self.counts[counted] += order.samples - order.delivered
            self._wake.notify_all()
            return True

    def _stop(self, error: BaseException) -> None:
        with self._wake:
            self.closing = True
            self._beside.orders.put(None)
            tasks, self._tasks = self._tasks, []
            left = list(self._orders)
        for order in left:
            self._fail_later(order, error)
        for _, future in tasks:
            future.set_exception(error)
