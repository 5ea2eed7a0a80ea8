"""The scheduler against a model that does everything the long way, and against numbers worked out by hand."""

from dataclasses import dataclass, field, replace
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from amed_engine.errors import ConfigError, DeadlineError, QueueFullError
from amed_engine.serving.scheduler import Job, Placed, Scheduler


def job(samples=1, ticks=1, deadline=None, priority=0, arrival=0):
    return Job(samples, ticks, deadline, priority, arrival)


@dataclass
class Model:
    """Waiting and live samples as plain lists, searched and sorted anew each time; forecasts by running a copy."""

    rows: int
    queue: int
    waiting: list = field(default_factory=list)  # [job, index], in order of offers
    live: dict = field(default_factory=dict)  # row -> [job, index, remaining]

    def copy(self):
        return replace(self, waiting=list(self.waiting), live={row: list(of) for row, of in self.live.items()})

    def free(self):
        return [row for row in range(self.rows) if row not in self.live]

    def jobs(self):
        return list(dict.fromkeys([of[0] for of in self.live.values()] + [of[0] for of in self.waiting]))

    def offer(self, job):
        self.waiting += [(job, index) for index in range(job.samples)]

    def ordered(self):
        by = [(inf if j.deadline is None else j.deadline, -j.priority, j.arrival) for j, _ in self.waiting]
        return [self.waiting[k] for k in sorted(range(len(by)), key=by.__getitem__)]  # a stable sort

    def admit(self):
        placed = []
        for (job, index), row in zip(self.ordered(), self.free(), strict=False):
            self.waiting.remove((job, index))
            self.live[row] = [job, index, job.ticks]
            placed.append((job, index, row))
        return placed

    def tick(self):
        for of in self.live.values():
            of[2] -= 1
        done = [(job, index, row) for row, (job, index, left) in sorted(self.live.items()) if left == 0]
        for *_, row in done:
            del self.live[row]
        return done

    def cancel(self, job):
        self.waiting = [of for of in self.waiting if of[0] is not job]
        rows = [row for row, of in sorted(self.live.items()) if of[0] is job]
        for row in rows:
            del self.live[row]
        return rows

    def ends(self):
        """job -> the tick of its last sample, if nothing comes or goes."""
        run, ends, ticks = self.copy(), {}, 0
        while run.live or run.waiting:
            run.admit()
            ticks += 1
            ends |= {job: ticks for job, *_ in run.tick()}
        return ends

    def forecast(self, job):
        run = self.copy()
        if job not in self.jobs():
            run.offer(job)
        return run.ends()[job]

    def has_room(self, samples):
        return len(self.waiting) + samples - len(self.free()) <= self.queue

    def ticks_until_room(self, samples):
        run, ticks = self.copy(), 0
        while not run.has_room(samples):
            run.admit()
            run.tick()
            ticks += 1
        return ticks

    def late(self, deadline, now, ticks, tick_seconds):
        return now >= deadline if tick_seconds is None else now + ticks * tick_seconds > deadline

    def expire(self, now, tick_seconds):
        """Again and again the first late one goes, and all is forecast anew."""
        gone = []
        while True:
            ends, ordered = self.ends(), dict.fromkeys(job for job, _ in self.ordered())
            whole = [job for job in ordered if sum(of[0] is job for of in self.waiting) == job.samples]
            timed = [job for job in whole if job.deadline is not None]
            late = [job for job in timed if self.late(job.deadline, now, ends[job], tick_seconds)]
            if not late:
                return gone
            gone.append(late[0])
            self.cancel(late[0])


EIGHTHS = st.integers(0, 64).map(lambda n: n / 8)  # sums and products of them are exact


class Machine(RuleBasedStateMachine):
    """Any operations in any order: the same answers as the model, and each sample finished once or not at all."""

    @initialize(rows=st.integers(1, 6), queue=st.integers(0, 10))
    def start(self, rows, queue):
        self.scheduler, self.model = Scheduler(rows, queue), Model(rows, queue)
        self.now, self.tick_seconds = 100.0, None
        self.seen, self.dropped = [], set()
        self.ticked, self.finished = {}, []

    @rule(
        samples=st.integers(1, 8),
        ticks=st.integers(1, 6),
        wait=st.none() | EIGHTHS,
        priority=st.integers(-1, 1),
        arrival=st.integers(0, 3),
    )
    def offer(self, samples, ticks, wait, priority, arrival):
        new = Job(samples, ticks, None if wait is None else self.now + wait, priority, arrival)
        self.seen.append(new)
        error = self._expected_refusal(new)
        if error is None:
            self.scheduler.offer(new, self.now, self.tick_seconds)
            self.model.offer(new)
            return
        self.dropped.add(new)
        with pytest.raises(type(error)) as caught:
            self.scheduler.offer(new, self.now, self.tick_seconds)
        assert getattr(caught.value, "retry_after", None) == getattr(error, "retry_after", None)

    def _expected_refusal(self, new):
        model, seconds = self.model, self.tick_seconds
        if new.samples > model.rows + model.queue:
            return ConfigError()
        if not model.has_room(new.samples):
            return QueueFullError("", 1.0 if seconds is None else model.ticks_until_room(new.samples) * seconds)
        if new.deadline is not None and model.late(new.deadline, self.now, model.forecast(new), seconds):
            return DeadlineError()
        return None

    @rule(seconds=st.none() | st.integers(1, 8).map(lambda n: n / 8))
    def measure(self, seconds):
        self.tick_seconds = seconds

    @rule(seconds=EIGHTHS)
    def pass_time(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        gone = self.model.expire(self.now, self.tick_seconds)
        self.dropped |= set(gone)
        assert self.scheduler.expire(self.now, self.tick_seconds) == gone

    @rule()
    def admit(self):
        placed = self.model.admit()
        assert self.scheduler.admit() == placed
        self.ticked |= {(job, index): 0 for job, index, _ in placed}

    @rule()
    def moves(self):
        live, before = len(self.model.live), dict(self.model.live)
        moves = self.scheduler.moves()
        assert len(moves) == sum(row >= live for row in before)  # each of them must, so this is the least
        self.model.live = {dict(moves).get(row, row): of for row, of in before.items()}
        assert sorted(self.model.live) == list(range(live))
        assert not {source for source, _ in moves} & {target for _, target in moves}

    @rule()
    def tick(self):
        self.ticked |= {(job, index): self.ticked[job, index] + 1 for job, index, _ in self.model.live.values()}
        done = self.scheduler.tick()
        assert done == self.model.tick()
        self.finished += [(placed.job, placed.index) for placed in done]
        assert all(self.ticked[placed.job, placed.index] == placed.job.ticks for placed in done)

    @rule(times=st.integers(1, 8))
    def turn(self, times):
        """What an engine does."""
        for _ in range(times):
            self.expire()
            self.admit()
            self.moves()
            self.tick()
            self.now += self.tick_seconds or 0.125

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def cancel(self, data):
        gone = data.draw(st.sampled_from(self.seen))
        self.dropped.add(gone)
        assert self.scheduler.cancel(gone) == self.model.cancel(gone)

    @precondition(lambda self: self.seen and self.model.jobs())
    @rule(data=st.data())
    def offer_again(self, data):
        here = data.draw(st.sampled_from(self.model.jobs()))
        with pytest.raises(ConfigError, match="waits or runs already"):
            self.scheduler.offer(here, self.now, self.tick_seconds)

    @invariant()
    def counts(self):
        scheduler, model = self.scheduler, self.model
        assert (scheduler.live, scheduler.waiting) == (len(model.live), len(model.waiting))
        assert len(scheduler) == len(model.live) + len(model.waiting)
        assert scheduler.placed() == [(job, index, row) for row, (job, index, _) in sorted(model.live.items())]
        remaining = [model.live[row][2] if row in model.live else 0 for row in range(model.rows)]
        assert [scheduler.remaining(row) for row in range(scheduler.rows)] == remaining
        assert scheduler.waiting <= scheduler.queue + scheduler.rows - scheduler.live

    @invariant()
    def forecasts(self):
        ends = self.model.ends()
        assert {job: self.scheduler.forecast(job) for job in self.model.jobs()} == ends

    def teardown(self):
        """Drain: what was neither refused, expired nor cancelled comes out whole, the rest never again."""
        if not self.seen:
            return
        before = set(self.finished)
        for _ in range(max(self.model.ends().values(), default=0)):
            self.admit()
            self.tick()
        assert len(self.scheduler) == 0
        assert len(set(self.finished)) == len(self.finished)
        whole = {(job, index) for job in self.seen if job not in self.dropped for index in range(job.samples)}
        assert {of for of in self.finished if of[0] not in self.dropped} == whole
        assert {of for of in self.finished if of[0] in self.dropped} <= before


TestAnyOperations = Machine.TestCase
TestAnyOperations.settings = settings(max_examples=300, stateful_step_count=40)

JOBS = st.builds(
    Job,
    samples=st.integers(1, 9),
    ticks=st.integers(1, 10),
    deadline=st.none() | st.integers(1000, 1003).map(float),
    priority=st.integers(0, 2),
    arrival=st.integers(0, 2),
)


def turn(scheduler):
    scheduler.admit()
    scheduler.moves()
    return scheduler.tick()


def drained(scheduler):
    """job -> the tick of its last sample."""
    ends, ticks = {}, 0
    while len(scheduler):
        ticks += 1
        ends |= {placed.job: ticks for placed in turn(scheduler)}
    return ends


@given(st.integers(1, 8), st.lists(JOBS, min_size=1), st.lists(JOBS), st.integers(0, 12))
def test_a_forecast_is_what_then_happens(rows, first, then, ticks):
    scheduler = Scheduler(rows, 10_000)
    for new in first:
        scheduler.offer(new, 0.0, None)
    for _ in range(ticks):
        turn(scheduler)
    for new in then:
        foretold = scheduler.forecast(new)  # before it is here
        scheduler.offer(new, 0.0, None)
        assert scheduler.forecast(new) == foretold
    foretold = {job: scheduler.forecast(job) for job in [*first, *then]}
    ends = drained(scheduler)
    assert ends == {job: foretold[job] for job in ends}


@given(st.integers(1, 8), st.lists(JOBS, min_size=1))
def test_work_is_never_put_off(rows, jobs):
    """No row is empty while a sample waits, so that all end within work / rows + the longest sample."""
    scheduler = Scheduler(rows, 10_000)
    for new in jobs:
        scheduler.offer(new, 0.0, None)
    work = sum(job.samples * job.ticks for job in jobs)
    last = max(drained(scheduler).values())
    assert work / rows <= last <= work / rows + max(job.ticks for job in jobs)


@given(st.integers(1, 4), st.lists(JOBS, min_size=1, max_size=12), EIGHTHS)
def test_a_deadline_taken_is_met_and_one_refused_would_be_missed(rows, jobs, tick_seconds):
    """Offered by deadline, so that none comes before one that was promised something."""
    scheduler, promised = Scheduler(rows, 10_000), []
    for number, plain in enumerate(jobs):
        new = replace(plain, deadline=4.0 + number)
        try:
            scheduler.offer(new, 0.0, tick_seconds)
            promised.append(new)
        except DeadlineError:
            unrefused = Scheduler(rows, 10_000)
            for each in [*promised, new]:
                unrefused.offer(each, 0.0, None)
            assert drained(unrefused)[new] * tick_seconds > new.deadline
    assert scheduler.expire(0.0, tick_seconds) == []
    ends = drained(scheduler)
    assert set(ends) == set(promised)
    assert all(ends[job] * tick_seconds <= job.deadline for job in promised)


TIMED = st.builds(
    Job, st.integers(1, 3), st.integers(1, 6), st.integers(16, 120).map(lambda n: n / 8), st.just(0), st.just(0)
)
TURNS = st.lists(st.tuples(st.none() | TIMED, st.integers(1, 6), st.integers(1, 6)), max_size=20)


@settings(max_examples=500)
@given(st.integers(1, 3), st.lists(TIMED, min_size=1, max_size=8), TURNS)
def test_whatever_ticks_take_the_late_ones_go_at_once(rows, first, turns):
    """Each turn: perhaps one more job, eighths of a second that the tick took, and what is thought to be its time."""
    scheduler, model, now = Scheduler(rows, 100), Model(rows, 100), 0.0
    for each in first:
        scheduler.offer(each, now, None)
        model.offer(each)
    for new, took, measured in turns:
        if new and new.deadline > now:
            scheduler.offer(new, now, None)
            model.offer(new)
        assert scheduler.expire(now, measured / 8) == model.expire(now, measured / 8)
        turn(scheduler)
        model.admit()
        model.tick()
        model.live = dict(enumerate(of for _, of in sorted(model.live.items())))
        now += took / 8


def test_a_job_by_hand():
    scheduler, three = Scheduler(rows=2, queue=4), job(samples=3, ticks=2)
    scheduler.offer(three, 0.0, None)
    assert (scheduler.live, scheduler.waiting, len(scheduler)) == (0, 3, 3)
    assert scheduler.admit() == [(three, 0, 0), (three, 1, 1)]
    assert scheduler.admit() == []
    assert scheduler.forecast(three) == 4
    assert scheduler.tick() == []
    assert [scheduler.remaining(row) for row in (0, 1)] == [1, 1]
    assert scheduler.tick() == [Placed(three, 0, 0), Placed(three, 1, 1)]
    assert scheduler.admit() == [Placed(job=three, index=2, row=0)]
    assert [scheduler.remaining(row) for row in (0, 1)] == [2, 0]
    assert (scheduler.tick(), scheduler.tick()) == ([], [(three, 2, 0)])
    assert len(scheduler) == 0


def test_earliest_deadline_then_priority_then_arrival_then_offer():
    names = {
        "last": job(arrival=9),
        "twin": job(arrival=9),
        "arrived": job(arrival=3),
        "late but urgent": job(priority=1, arrival=99),
        "due": job(deadline=50.0, priority=-5, arrival=100),
        "due, urgent": job(deadline=50.0, priority=0, arrival=101),
        "due first": job(deadline=49.0, priority=-9, arrival=102),
    }
    scheduler = Scheduler(rows=7, queue=0)
    for new in names.values():
        scheduler.offer(new, 0.0, 1.0)
    order = ["due first", "due, urgent", "due", "late but urgent", "arrived", "last", "twin"]
    assert scheduler.admit() == [(names[name], 0, row) for row, name in enumerate(order)]


def test_a_large_job_at_the_head_holds_nobody_up():
    """It takes the row that is free, and what is more urgent comes before the rest of it; what runs stays."""
    scheduler, large, small = Scheduler(rows=2, queue=10), job(samples=5, ticks=3), job(ticks=1, priority=1)
    scheduler.offer(large, 0.0, None)
    scheduler.admit()
    for _ in range(2):
        scheduler.tick()
    scheduler.offer(small, 0.0, None)
    assert scheduler.admit() == []
    assert [placed.index for placed in scheduler.tick()] == [0, 1]
    assert scheduler.admit() == [(small, 0, 0), (large, 2, 1)]
    assert scheduler.tick() == [(small, 0, 0)]
    assert scheduler.admit() == [(large, 3, 0)]


def test_rows_close_up_with_the_fewest_moves():
    scheduler = Scheduler(rows=6, queue=0)
    jobs = [job(ticks=ticks, arrival=ticks) for ticks in (1, 2, 3, 4, 5, 6)]
    for new in jobs:
        scheduler.offer(new, 0.0, None)
    scheduler.admit()
    assert scheduler.moves() == []
    assert scheduler.cancel(jobs[3]) == [3]
    scheduler.tick()
    assert scheduler.moves() == [(4, 0), (5, 3)]  # rows 1 and 2 stay
    assert [scheduler.remaining(row) for row in range(6)] == [4, 1, 2, 5, 0, 0]
    assert scheduler.moves() == []
    assert scheduler.cancel(jobs[4]) == [0]
    new = job(ticks=9)
    scheduler.offer(new, 0.0, None)
    assert scheduler.admit() == [(new, 0, 0)]
    assert scheduler.moves() == []
    assert scheduler.tick() == [(jobs[1], 0, 1)]
    assert scheduler.moves() == [(3, 1)]


def test_cancelling_frees_rows_and_places_at_once():
    scheduler, gone, other = Scheduler(rows=3, queue=1), job(samples=3, ticks=4), job(arrival=1)
    scheduler.offer(gone, 0.0, None)
    scheduler.offer(other, 0.0, None)
    scheduler.admit()
    assert scheduler.cancel(gone) == [0, 1, 2]
    assert scheduler.cancel(gone) == []
    assert (scheduler.live, scheduler.waiting) == (0, 1)
    assert scheduler.admit() == [(other, 0, 0)]
    assert scheduler.tick() == [(other, 0, 0)]
    assert scheduler.cancel(other) == []
    scheduler.offer(gone, 0.0, None)  # and may come again
    assert scheduler.cancel(gone) == []
    assert len(scheduler) == 0


def test_equal_jobs_are_two():
    scheduler, one, two = Scheduler(rows=1, queue=1), job(), job()
    scheduler.offer(one, 0.0, None)
    scheduler.offer(two, 0.0, None)
    scheduler.cancel(one)
    (placed,) = scheduler.admit()
    assert placed.job is two
    assert scheduler.cancel(one) == []
    assert scheduler.cancel(two) == [0]


def test_the_queue_is_bounded_beyond_the_free_rows():
    scheduler = Scheduler(rows=2, queue=3)
    with pytest.raises(ConfigError, match="samples: got 6, expected at most 5, rows and queue; split the request"):
        scheduler.offer(job(samples=6), 0.0, 0.5)
    scheduler.offer(job(samples=4, ticks=3), 0.0, 0.5)  # ends in ticks 3, 3, 6, 6
    with pytest.raises(QueueFullError) as full:
        scheduler.offer(job(samples=2), 0.0, 0.5)
    assert str(full.value) == (
        "queue: got 2 samples, expected 1 at most: 0 run, 4 wait; try again in 1.5 s, or ask for fewer"
    )
    assert full.value.retry_after == 1.5
    scheduler.offer(job(samples=1, ticks=3), 0.0, 0.5)  # and 9
    for samples, ticks in ((1, 3), (2, 3), (3, 6), (5, 9)):
        with pytest.raises(QueueFullError) as full:
            scheduler.offer(job(samples), 0.0, 0.5)
        assert full.value.retry_after == ticks * 0.5
    turn(scheduler)
    with pytest.raises(QueueFullError) as full:
        scheduler.offer(job(), 0.0, None)
    assert full.value.retry_after == 1.0
    with pytest.raises(QueueFullError, match="expected 0 at most: 2 run, 3 wait; try again in"):
        scheduler.offer(job(), 0.0, 0.01)
    turn(scheduler)
    turn(scheduler)
    scheduler.offer(job(samples=2), 0.0, 0.5)


def test_no_queue_takes_what_free_rows_take():
    scheduler = Scheduler(rows=2, queue=0)
    scheduler.offer(job(ticks=7), 0.0, 0.5)
    scheduler.offer(job(), 0.0, 0.5)
    with pytest.raises(QueueFullError) as full:
        scheduler.offer(job(), 0.0, 0.5)
    assert full.value.retry_after == 0.5


def test_a_deadline_is_refused_exactly_where_it_cannot_be_met():
    """One row: 4 ticks of others that are due earlier, then 2 of its own, at 0.25 s from second 10: done at 11.5."""
    scheduler = Scheduler(rows=1, queue=10)
    scheduler.offer(job(ticks=4, deadline=11.0), 10.0, 0.25)
    scheduler.offer(job(ticks=50), 10.0, 0.25)  # waits for whatever is due
    with pytest.raises(DeadlineError) as refused:
        scheduler.offer(job(ticks=2, deadline=11.49), 10.0, 0.25)
    assert str(refused.value) == (
        "the deadline is 1.49 s away, and 6 evaluations take 1.5 s, what comes before it among them; allow more, ask for fewer "
        "evaluations, or try when less is waiting"
    )
    assert (scheduler.waiting, scheduler.expire(10.0, 0.25)) == (2, [])
    scheduler.offer(job(ticks=2, deadline=11.5), 10.0, 0.25)


def test_before_ticks_are_measured_only_a_past_deadline_is_refused():
    scheduler = Scheduler(rows=1, queue=10)
    soon = job(ticks=100, deadline=5.1)
    scheduler.offer(soon, 5.0, None)
    for deadline in (4.9, 5.0, -inf):
        with pytest.raises(DeadlineError, match="the deadline has passed; allow more"):
            scheduler.offer(job(deadline=deadline), 5.0, None)
    assert scheduler.expire(5.0, None) == []
    assert scheduler.expire(5.1, None) == [soon]
    scheduler.offer(job(deadline=inf), 1e9, 1e9)
    assert scheduler.expire(1e12, 1e9) == []


def test_expired_jobs_leave_before_those_behind_are_judged():
    """One row of ticks of 1 s. Ticks slow down to 1.5 s: the second ends at 6 > 5, and without it the third at 6 <= 6.5."""
    scheduler = Scheduler(rows=1, queue=10)
    first, second, third = (job(ticks=2, deadline=deadline) for deadline in (4.0, 5.0, 6.5))
    for new in (first, second, third):
        scheduler.offer(new, 0.0, 1.0)
    assert scheduler.expire(0.0, 1.0) == []
    assert scheduler.expire(0.0, 1.5) == [second]
    assert scheduler.waiting == 2
    assert scheduler.expire(0.0, 1.5) == []


def test_a_job_that_has_started_does_not_expire():
    scheduler, begun, waits = Scheduler(rows=1, queue=10), job(samples=2, ticks=2, deadline=4.0), job(deadline=4.5)
    scheduler.offer(begun, 0.0, 1.0)
    turn(scheduler)
    scheduler.offer(waits, 0.0, 1.0)
    assert scheduler.expire(100.0, 1.0) == [waits]
    assert drained(scheduler) == {begun: 3}


def test_an_earlier_deadline_that_comes_later_can_crowd_out():
    scheduler, later, sooner = Scheduler(rows=1, queue=10), job(ticks=3, deadline=3.0), job(ticks=2, deadline=2.0)
    scheduler.offer(later, 0.0, 1.0)
    assert scheduler.expire(0.0, 1.0) == []
    scheduler.offer(sooner, 0.0, 1.0)
    assert scheduler.expire(0.0, 1.0) == [later]


def test_a_tick_without_admission_is_noticed():
    """The job could end in tick 3 of 1 s; a row that stood empty for one makes it 4."""
    scheduler, waits = Scheduler(rows=1, queue=10), job(ticks=3, deadline=3.0)
    scheduler.offer(waits, 0.0, 1.0)
    assert scheduler.expire(0.0, 1.0) == []
    scheduler.tick()
    assert scheduler.expire(1.0, 1.0) == [waits]


class Unforetold(Scheduler):
    def forecast(self, job):
        raise AssertionError("forecast")


def test_only_a_deadline_costs_a_forecast():
    scheduler = Unforetold(rows=1, queue=1)
    scheduler.offer(job(samples=2), 0.0, 1.0)
    scheduler.cancel(job())
    with pytest.raises(QueueFullError):
        scheduler.offer(job(), 0.0, 1.0)
    turn(scheduler)
    scheduler.offer(job(deadline=9.0), 0.0, None)
    turn(scheduler)
    with pytest.raises(AssertionError, match="forecast"):
        scheduler.offer(job(deadline=9.0), 0.0, 1.0)


class Counted(Job):
    """Counts how often anything of any such job is looked at."""

    looks = 0

    def __getattribute__(self, name):
        Counted.looks += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("wait", [None, 1e6])
@pytest.mark.parametrize("begun", [1, 100], ids=["first", "behind one that is late"])
def test_a_long_queue_does_not_make_a_turn_long(wait, begun):
    scheduler = Scheduler(rows=4, queue=20_000)
    scheduler.offer(job(begun, 2, deadline=1.0), 0.0, None)
    turn(scheduler)
    for arrival in range(10_000):
        scheduler.offer(Counted(1, 2, wait, 0, arrival), 0.0, None)
    scheduler.expire(1.0, 1.0)
    Counted.looks, waiting = 0, scheduler.waiting
    for now in range(20):
        assert scheduler.expire(1.0 + now, 1.0) == []
        turn(scheduler)
    assert 38 <= waiting - scheduler.waiting <= 44
    assert Counted.looks < 1000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheduler(0, 1), "rows, queue: got 0, 1, expected a row or more"),
        (lambda: Scheduler(1, -1), "rows, queue: got 1, -1, expected a row or more and a queue of at least 0"),
        (lambda: job(samples=0), "samples, ticks: got 0, 1, expected 1 or more"),
        (lambda: job(ticks=0), "samples, ticks: got 1, 0, expected 1 or more"),
        (lambda: job(deadline=nan), "deadline: got nan, expected seconds"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
