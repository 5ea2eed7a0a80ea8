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
from heapq import heappop, heappush, heapreplace
from math import inf
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
            raise ConfigError(f"samples, ticks: got {self.samples}, {self.ticks}, expected 1 or more; send no job")
        if self.deadline is not None and self.deadline != self.deadline:
            raise ConfigError("deadline: got nan, expected seconds on the engine's clock; None: whenever it is done")


class Placed(NamedTuple):
    """A sample of a job, by its index 0 .. samples - 1, in its row."""

    job: Job
    index: int
    row: int


def _late(deadline: float, now: float, ticks: int, tick_seconds: float | None) -> bool:
    """Whether `ticks` ticks from now end after the deadline. Ticks that are not measured take longer than no time."""
    return now >= deadline if tick_seconds is None else now + ticks * tick_seconds > deadline


def _fill(ends: list[int], samples: int, ticks: int) -> int:
    """The tick in which the last of the samples is done, each in the row of `ends` that is free first; `ends` is updated."""
    end = 0
    for _ in range(samples):
        end = ends[0] + ticks
        heapreplace(ends, end)
    return end


class Scheduler:
    """`rows` samples at once, at most `queue` waiting beyond. `len`: samples in it, live and waiting; 0: drained."""

    def __init__(self, rows: int, queue: int):
        if rows < 1 or queue < 0:
            raise ConfigError(f"rows, queue: got {rows}, {queue}, expected a row or more and a queue of at least 0")
        self.rows, self.queue = rows, queue
        self.waiting = 0  # samples
        self._left: dict[Job, int] = {}  # samples that wait, of jobs of which any do
        self._keys: dict[Job, tuple] = {}
        # Sorted keys, no heap: forecasts walk them in order, and cancelling finds one. 10,000 are moved up in microseconds.
        self._order: list[tuple] = []
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

    def placed(self) -> list[Placed]:
        """The samples in rows."""
        return [sample for sample in self._placed if sample]

    def offer(self, job: Job, now: float, tick_seconds: float | None) -> None:
        """Queue a job. What is refused leaves no trace.

        tick_seconds: what a tick takes; None: not measured yet, so that only a deadline that is past is refused.
        Raises ConfigError (it is here already, or larger than rows and queue together), QueueFullError, DeadlineError.
        """
        if job in self._left or self._rows_of(job):
            raise ConfigError("job: got one that waits or runs already, expected a new one; cancel it first")
        self._check_room(job, tick_seconds)
        if job.deadline is not None:
            self._check_deadline(job, job.deadline, now, tick_seconds)
            self._pace = None  # those behind it end later now
        self._left[job], self._keys[job] = job.samples, self._key(job)
        insort(self._order, self._keys[job])
        self._offers += 1
        self.waiting += job.samples

    def forecast(self, job: Job) -> int:
        """Ticks from now until its last sample is done if nothing comes or goes. A job not in here: as if offered now."""
        running = self._rows_of(job)
        if running and job not in self._left:
            return max(map(self.remaining, running))
        ends, key = self._ends(), self._keys.get(job) or self._key(job)
        for *_, ahead in self._order[: bisect_left(self._order, key)]:  # those behind cannot delay it
            _fill(ends, self._left[ahead], ahead.ticks)
        return _fill(ends, self._left.get(job, job.samples), job.ticks)

    def expire(self, now: float, tick_seconds: float | None) -> list[Job]:
        """Take out the jobs, nothing of which has started, that by the forecast end after their deadline; in their order.

        Those that go make room for those behind. Takes constant time while ticks are as fast as the deadlines need.
        """
        if self._keeps_pace(now, tick_seconds):
            return []
        ends, late, pace = self._ends(), [], inf
        for deadline, *_, job in self._order[: bisect_left(self._order, (inf,))]:
            end = _fill(filled := ends.copy(), self._left[job], job.ticks)
            fresh = self._left[job] == job.samples
            if fresh and _late(deadline, now, end, tick_seconds):
                self.cancel(job)
                late.append(job)
                continue
            ends = filled
            pace = min(pace, (deadline - now) / end) if fresh else pace
        self._pace = now, self._ticks, pace
        return late

    def admit(self) -> list[Placed]:
        """Waiting samples go into free rows: jobs in order, their samples in order, lowest free row first."""
        placed, emptied = [], 0
        while self._free and self.waiting:
            *_, job = self._order[emptied]
            placed.append(self._start(job))
            if not self._left[job]:
                del self._left[job], self._keys[job]
                emptied += 1
        del self._order[:emptied]
        return placed

    def moves(self) -> list[tuple[int, int]]:
        """(from, to): live rows close up to the front. Those beyond the first `live` rows move, once each; the rest stay.

        No row is both left and entered, so all may move at once. From now on they go by their new rows.
        """
        live, placed = self.live, self._placed
        holes = [row for row in range(live) if placed[row] is None]
        moved = list(zip([sample for sample in placed[live:] if sample], holes, strict=True))
        for sample, row in moved:
            placed[sample.row], placed[row] = None, sample._replace(row=row)
            self._end[row] = self._end[sample.row]
        self._free = list(range(live, self.rows))
        return [(sample.row, row) for sample, row in moved]

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
        if job in self._left:
            del self._order[bisect_left(self._order, self._keys.pop(job))]
            self.waiting -= self._left.pop(job)
        rows = self._rows_of(job)
        self._release(rows)
        return rows

    def _check_room(self, job: Job, tick_seconds: float | None) -> None:
        most, here = self.rows + self.queue, len(self)
        if job.samples > most:
            raise ConfigError(f"samples: got {job.samples}, expected at most {most}, rows and queue; split the request")
        if (excess := here + job.samples - most) > 0:
            retry = 1.0 if tick_seconds is None else self._until_finished(excess) * tick_seconds
            got = f"got {job.samples} samples, expected {most - here} at most: {self.live} run, {self.waiting} wait"
            raise QueueFullError(f"queue: {got}; try again in {retry:.3g} s, or ask for fewer", retry)

    def _check_deadline(self, job: Job, deadline: float, now: float, tick_seconds: float | None) -> None:
        ticks = 0 if tick_seconds is None else self.forecast(job)
        if _late(deadline, now, ticks, tick_seconds):
            left = f"is {deadline - now:.3g} s away" if deadline > now else "has passed"
            each = tick_seconds or 0.0
            need = (
                f", and {ticks} evaluations take {ticks * each:.3g} s, what comes before it among them" if ticks else ""
            )
            raise DeadlineError(
                f"the deadline {left}{need}; allow more, ask for fewer evaluations, or try when less is waiting"
            )

    def _until_finished(self, count: int) -> int:
        """Ticks until `count` of the samples here are finished: each makes room for one."""
        ends, end = self._ends(), 0
        coming = (job.ticks for *_, job in self._order for _ in range(self._left[job]))
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
        return sorted(map(self.remaining, range(self.rows)))

    def _key(self, job: Job) -> tuple[float, int, int, int, Job]:
        """What jobs are sorted by; the number of the offer is unique, so that the jobs themselves are never compared."""
        return (inf if job.deadline is None else job.deadline, -job.priority, job.arrival, self._offers, job)

    def _start(self, job: Job) -> Placed:
        row = heappop(self._free)
        self._placed[row] = placed = Placed(job, job.samples - self._left[job], row)
        self._end[row] = self._ticks + job.ticks
        self._left[job] -= 1
        self.waiting -= 1
        return placed

    def _release(self, rows: list[int]) -> None:
        for row in rows:
            self._placed[row] = None
            heappush(self._free, row)

    def _rows_of(self, job: Job) -> list[int]:
        return [row for row, sample in enumerate(self._placed) if sample and sample.job is job]
