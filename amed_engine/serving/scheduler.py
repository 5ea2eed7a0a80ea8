"""Which sample sits in which row of a batch, tick by tick: admission, deadlines, backpressure. No clock, no thread, no device.

A tick is one evaluation of the network for every live row. A sample of T evaluations takes one row for T ticks, so all ends
are known beforehand. The caller's loop, with offer() and cancel() between any two of them:

    expire(now, tick_seconds);  admit();  moves();  tick()

* Order: earliest deadline, then larger priority, then arrival, then order of offers. What runs is never put back.
* A job needs no row but the next free one: its samples start in order as rows come free, and may end in different ticks.
* Deadlines: a job that by the forecast ends too late is refused, or taken out while nothing of it has started.
* Backpressure: at most `queue` samples wait beyond those that free rows take at once.

Jobs are compared by identity and are not changed while they are here. Times are in seconds on the caller's clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from operator import attrgetter
from typing import NamedTuple

from amed_engine.errors import ConfigError, DeadlineError, QueueFullError


@dataclass(eq=False)
class Job:
    """A request: `samples` rows for `ticks` evaluations each. Raises ConfigError.

    deadline: when the last sample must be done, None: whenever. priority: larger first. arrival: smaller first.
    """

    samples: int
    ticks: int
    deadline: float | None
    priority: int
    arrival: int

    def __post_init__(self):
        if self.samples < 1 or self.ticks < 1:
            raise ConfigError(
                f"samples, ticks: got {self.samples}, {self.ticks}, expected at least 1; nothing needs no row"
            )
        if self.deadline is not None and self.deadline != self.deadline:
            raise ConfigError("deadline: got nan, expected seconds on the engine's clock; None: whenever it is done")


class Placed(NamedTuple):
    """A sample of a job, by its index 0 .. samples - 1, in its row."""

    job: Job
    index: int
    row: int


@dataclass(eq=False, slots=True)
class _Waiting:
    """A job of which samples `index` .. samples - 1 wait, and its place in the order."""

    job: Job
    key: tuple[float, int, int, int]
    index: int = 0

    @property
    def left(self) -> int:
        return self.job.samples - self.index


_KEY = attrgetter("key")


def _late(deadline: float, now: float, ticks: int, tick_seconds: float | None) -> bool:
    """Whether `ticks` ticks from now end after the deadline. Ticks that are not measured take longer than no time."""
    return now >= deadline if tick_seconds is None else now + ticks * tick_seconds > deadline


def _fill(ends: list[int], waiting: _Waiting) -> int:
    """Each waiting sample takes the row that is free first; returns the tick in which the last is done.

    ends: a heap of the ticks in which the rows come free; updated.
    """
    end = 0
    for _ in range(waiting.left):
        end = ends[0] + waiting.job.ticks
        heapreplace(ends, end)
    return end


class Scheduler:
    """`rows` samples at once, at most `queue` waiting beyond. `len`: samples in it, live and waiting; 0: drained."""

    def __init__(self, rows: int, queue: int):
        if rows < 1 or queue < 0:
            raise ConfigError(f"rows, queue: got {rows}, {queue}, expected a row or more and a queue of at least 0")
        self.rows, self.queue = rows, queue
        self.waiting = 0  # samples
        self._jobs: dict[Job, _Waiting] = {}
        # Sorted, not a heap: forecasts walk it in order, and cancelling finds its place. 10,000 entries move in microseconds.
        self._order: list[_Waiting] = []
        self._placed: list[Placed | None] = [None] * rows
        self._end = [0] * rows  # tick number in which the row's sample is done
        self._free = list(range(rows))  # a heap
        self._ticks = self._offers = 0
        self._pace: tuple[float, int, float] | None = None  # see _keeps_pace

    @property
    def live(self) -> int:
        """Rows that are occupied."""
        return self.rows - len(self._free)

    def __len__(self) -> int:
        return self.live + self.waiting

    def remaining(self, row: int) -> int:
        """Ticks until the row is free; 0: it is."""
        return self._end[row] - self._ticks if self._placed[row] else 0

    def offer(self, job: Job, now: float, tick_seconds: float | None) -> None:
        """Queue a job. What is refused leaves no trace.

        tick_seconds: what a tick takes; None: not measured yet, so that only a deadline that is past is refused.
        Raises ConfigError (it is here already, or larger than rows and queue together), QueueFullError, DeadlineError.
        """
        if job in self._jobs or self._rows_of(job):
            raise ConfigError("job: got one that waits or runs already, expected a new one; cancel it first")
        self._check_room(job, tick_seconds)
        if job.deadline is not None:
            self._check_deadline(job, job.deadline, now, tick_seconds)
            self._pace = None  # those behind it end later now
        waiting = self._jobs[job] = self._entry(job)
        insort(self._order, waiting, key=_KEY)
        self._offers += 1
        self.waiting += job.samples

    def forecast(self, job: Job) -> int:
        """Ticks from now until its last sample is done if nothing comes or goes. A job not in here: as if offered now."""
        waiting, running = self._jobs.get(job), self._rows_of(job)
        if waiting is None and running:
            return max(map(self.remaining, running))
        waiting = waiting or self._entry(job)
        ends = self._ends()
        for ahead in self._order[: self._position(waiting.key)]:  # those behind cannot delay it
            _fill(ends, ahead)
        return _fill(ends, waiting)

    def expire(self, now: float, tick_seconds: float | None) -> list[Job]:
        """Take out the jobs, nothing of which has started, that by the forecast end after their deadline; in their order.

        Those that go make room for those behind. Takes constant time while ticks are as fast as the deadlines need.
        """
        if self._keeps_pace(now, tick_seconds):
            return []
        ends, kept, late, pace = self._ends(), [], [], inf
        timed = self._position((inf,))
        for waiting in self._order[:timed]:
            end = _fill(filled := ends.copy(), waiting)
            if waiting.index == 0 and _late(waiting.key[0], now, end, tick_seconds):
                late.append(waiting)
                continue
            ends = filled
            kept.append(waiting)
            pace = pace if waiting.index else min(pace, (waiting.key[0] - now) / end)
        self._order[:timed] = kept
        self._pace = now, self._ticks, pace
        return [self._forget(waiting) for waiting in late]

    def admit(self) -> list[Placed]:
        """Waiting samples go into free rows: jobs in order, their samples in order, lowest free row first."""
        placed, emptied = [], 0
        while self._free and self.waiting:
            waiting = self._order[emptied]
            placed.append(self._start(waiting))
            if not waiting.left:
                self._forget(waiting)
                emptied += 1
        del self._order[:emptied]
        return placed

    def moves(self) -> list[tuple[int, int]]:
        """(from, to): live rows close up to the front. Those beyond the first `live` rows move, once each; the rest stay.

        No row is both left and entered, so all may move at once. From now on they go by their new rows.
        """
        live, placed = self.live, self._placed
        holes = [row for row in range(live) if placed[row] is None]
        beyond = [sample for sample in placed[live:] if sample]
        for sample, row in zip(beyond, holes, strict=True):
            placed[sample.row], placed[row] = None, sample._replace(row=row)
            self._end[row] = self._end[sample.row]
        self._free = list(range(live, self.rows))
        return [(sample.row, row) for sample, row in zip(beyond, holes, strict=True)]

    def tick(self) -> list[Placed]:
        """One evaluation of every live row is done. Returns the samples that are finished, by row; their rows are free."""
        if self._free and self.waiting:
            self._pace = None  # rows stood empty that the forecast had filled
        self._ticks += 1
        done = [sample for sample in self._placed if sample and self._end[sample.row] == self._ticks]
        self._release([sample.row for sample in done])
        return done

    def cancel(self, job: Job) -> list[int]:
        """Take a job out; one that is not here changes nothing. Returns the rows it had, free from now."""
        if waiting := self._jobs.get(job):
            del self._order[self._position(waiting.key)]
            self._forget(waiting)
        rows = self._rows_of(job)
        self._release(rows)
        return rows

    def _check_room(self, job: Job, tick_seconds: float | None) -> None:
        most, here = self.rows + self.queue, len(self)
        if job.samples > most:
            raise ConfigError(f"samples: got {job.samples}, expected at most {most}, rows and queue; split the request")
        if (excess := here + job.samples - most) > 0:
            retry = 1.0 if tick_seconds is None else self._until_finished(excess) * tick_seconds
            raise QueueFullError(
                f"queue: got {job.samples} samples, expected at most {most - here}, as {self.live} run and {self.waiting} "
                f"wait; try again in {retry:.3g} s, or ask for fewer",
                retry,
            )

    def _check_deadline(self, job: Job, deadline: float, now: float, tick_seconds: float | None) -> None:
        ticks = 0 if tick_seconds is None else self.forecast(job)
        if _late(deadline, now, ticks, tick_seconds):
            need = "more than none" if tick_seconds is None else f"{ticks} ticks of {tick_seconds:.3g} s"
            raise DeadlineError(
                f"deadline: got {deadline - now:.3g} s from now, expected time for {need}; allow more, "
                "ask for fewer samples or evaluations, or try when less is waiting"
            )

    def _until_finished(self, count: int) -> int:
        """Ticks until `count` of the samples here are finished: each makes room for one."""
        ends, end = self._ends(), 0
        coming = (waiting.job.ticks for waiting in self._order for _ in range(waiting.left))
        for _ in range(len(self._free) + count):  # free rows are ends at 0 that finish nothing
            end = heappop(ends)
            if ticks := next(coming, 0):
                heappush(ends, end + ticks)
        return end

    def _keeps_pace(self, now: float, tick_seconds: float | None) -> bool:
        """Whether no deadline is missed, by the last look at all, at now_0, and its p = min (deadline - now_0) / end.

        After n ticks, now - now_0 <= p n and tick_seconds <= p leave deadline - now >= p (end - n) >= tick_seconds (end - n).
        """
        if self._pace is None or tick_seconds is None:
            return False
        start, tick, pace = self._pace
        return tick_seconds <= pace and now - start <= pace * (self._ticks - tick)

    def _ends(self) -> list[int]:
        """A heap of the ticks from now in which the rows come free."""
        ends = [self.remaining(row) for row in range(self.rows)]
        heapify(ends)
        return ends

    def _entry(self, job: Job) -> _Waiting:
        return _Waiting(job, (inf if job.deadline is None else job.deadline, -job.priority, job.arrival, self._offers))

    def _position(self, key: tuple) -> int:
        return bisect_left(self._order, key, key=_KEY)

    def _start(self, waiting: _Waiting) -> Placed:
        placed = Placed(waiting.job, waiting.index, heappop(self._free))
        self._placed[placed.row], self._end[placed.row] = placed, self._ticks + placed.job.ticks
        waiting.index += 1
        self.waiting -= 1
        return placed

    def _release(self, rows: list[int]) -> None:
        for row in rows:
            self._placed[row] = None
            heappush(self._free, row)

    def _forget(self, waiting: _Waiting) -> Job:
        self.waiting -= waiting.left
        return self._jobs.pop(waiting.job).job

    def _rows_of(self, job: Job) -> list[int]:
        return [row for row, sample in enumerate(self._placed) if sample and sample.job is job]
