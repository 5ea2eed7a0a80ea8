"""What a caller sees of `ContinuousSampler`: futures, streams, refusals, errors, its end."""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ALL_COMPLETED, CancelledError, ThreadPoolExecutor, wait

import mixed
import numpy as np
import pytest
import torch

import amed_engine
from amed_engine import (
    ConfigError,
    ContinuousSampler,
    DeadlineError,
    EngineClosedError,
    FileFormatError,
    NonFiniteError,
    QueueFullError,
    Sampler,
    save_predictor,
)
from amed_engine.serving.programs import KEPT

SAID = {"solver": "ipndm", "nfe": 3}
PATIENCE = 60  # seconds, after which something waits for ever


class Network(mixed.Classes):
    """Counts its calls, stands still at a gate, and fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.calls, self.sizes, self.trouble = 0, [], None
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def forward(self, x, sigma, labels):
        self.calls += 1
        self.sizes.append(len(x))
        self.reached.set()
        assert self.gate.wait(PATIENCE)
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise trouble
        return super().forward(x, sigma, labels)

    def stop(self):
        """The next call stands still."""
        self.reached.clear()
        self.gate.clear()

    def wait_for_a_call(self):
        assert self.reached.wait(PATIENCE)


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def engine(network):
    with ContinuousSampler(network, rows=4, queue=16, verify=False) as made:
        yield made
        network.gate.set()


def until(condition):
    for _ in range(PATIENCE * 200):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be")


def alone(network, *arguments, guidance_scale=None, **said):
    return Sampler(network, **(said or SAID), verify=False).run(*arguments, guidance_scale=guidance_scale)


def is_empty(engine):
    loop = engine._loop
    return not len(loop.scheduler) and not loop._orders and not any(loop._at)


# ---- futures


def test_a_result_says_what_a_sampler_says(engine, network):
    result, expected = engine.submit([1, 2], [0, 3], **SAID).result(PATIENCE), alone(network, [1, 2], [0, 3])
    torch.testing.assert_close(result.images, expected.images, rtol=2e-5, atol=2e-5)
    assert (result.seeds, result.nfe, result.plan, result.chunks) == ([1, 2], 3, expected.plan, 1)
    assert (result.backend, result.buckets, result.labels.tolist()) == ("ticks", (2,), [0, 3])
    assert result.seconds > 0


def test_a_number_draws_seeds_that_say_the_samples_again(engine):
    result = engine.submit(3, **SAID).result(PATIENCE)
    again = engine.submit(result.seeds, **SAID).result(PATIENCE)
    assert len(set(result.seeds)) == 3
    assert torch.equal(result.images, again.images)
    assert torch.equal(result.labels, again.labels)


def test_results_own_their_memory(engine):
    results = [engine.submit([k], **SAID).result(PATIENCE) for k in range(3)]
    kept = [result.images.clone() for result in results]
    engine.submit(list(range(4)), **SAID).result(PATIENCE)
    results[0].images.zero_()
    assert all(torch.equal(result.images, images) for result, images in zip(results[1:], kept[1:], strict=True))


def test_cancelled_while_it_waits(engine, network):
    with mixed.held(engine):
        future = engine.submit([1, 2], **SAID)
        assert future.cancel()
        assert is_empty(engine)
    with pytest.raises(CancelledError):
        future.result(0)
    assert (network.calls, engine.stats().cancelled) == (0, 2)


def test_cancelled_while_it_runs_its_rows_are_free_at_the_next_tick(engine, network):
    network.stop()
    future = engine.submit([1, 2, 3, 4], solver="euler", nfe=60)
    network.wait_for_a_call()
    other = engine.submit([5], **SAID)
    assert future.cancel()
    network.gate.set()
    torch.testing.assert_close(other.result(PATIENCE).images, alone(network, [5]).images, rtol=2e-5, atol=2e-5)
    assert network.sizes[:4] == [4, 1, 1, 1]
    stats = engine.stats()
    assert (stats.ticks, stats.cancelled, stats.completed) == (4, 4, 1)


def test_cancelled_when_part_of_it_is_done(engine, network):
    seen = []
    with mixed.held(engine):
        future = engine.submit(list(range(9)), on_sample=lambda sample: seen.append(sample.index) or future.cancel(), **SAID)
    with pytest.raises(CancelledError):
        future.result(PATIENCE)
    until(lambda: is_empty(engine))
    assert seen == [0]  # on_sample is not called for what nobody waits for
    assert engine.stats().cancelled == 8


def test_a_result_is_not_cancelled(engine):
    future = engine.submit([1], **SAID)
    future.result(PATIENCE)
    assert not future.cancel()
    assert engine.stats().cancelled == 0


@pytest.mark.parametrize("beside", [False, True])
def test_whoever_waits_for_a_cancelled_future_is_told(engine, network, beside):
    """`wait` and `as_completed` count a future as done once its executor has seen that it was cancelled."""
    said = {"solver": "dpmpp", "solver_options": {"thresholding": True}, "nfe": 3} if beside else SAID
    network.stop()
    first, future = engine.submit([1], **said), engine.submit([2], **said)
    network.wait_for_a_call()
    assert future.cancel()
    assert wait([future], timeout=PATIENCE, return_when=ALL_COMPLETED).done == {future}
    network.gate.set()
    assert first.result(PATIENCE)
    assert engine.stats().cancelled == 1


def test_many_threads_at_once(engine, network):
    sampler = Sampler(network, **SAID, verify=False)

    def work(thread):
        taken = []
        for k in range(12):
            while True:
                try:
                    taken.append((100 * thread + k, engine.submit([100 * thread + k], **SAID)))
                    break
                except QueueFullError as error:
                    time.sleep(min(error.retry_after, 0.01))
        return [(seed, future.result(PATIENCE).images) for seed, future in taken]

    with ThreadPoolExecutor(8) as pool:
        drawn = [each for part in pool.map(work, range(8)) for each in part]
    for seed, images in drawn[::7]:
        torch.testing.assert_close(images, sampler.run([seed]).images, rtol=2e-5, atol=2e-5)
    stats = engine.stats()
    assert (len(drawn), stats.completed, stats.admitted) == (96, 96, 96)
    assert is_empty(engine)


def test_a_callback_of_a_future_may_submit(engine, network):
    more = []
    with mixed.held(engine):
        first = engine.submit([1], **SAID)
        first.add_done_callback(lambda _: more.append(engine.submit([2], **SAID)))
    first.result(PATIENCE)
    until(lambda: more)
    torch.testing.assert_close(more[0].result(PATIENCE).images, alone(network, [2]).images, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("why", ["done", "failed", "beside"])
def test_a_callback_of_a_future_may_close_the_engine(network, drain, why):
    """It runs in a thread of the engine, which others wait for."""
    engine, closed = ContinuousSampler(network, rows=2, verify=False), threading.Event()
    said = {"solver": "dpmpp", "solver_options": {"thresholding": True}, "nfe": 2} if why == "beside" else SAID
    with mixed.held(engine):
        network.trouble = RuntimeError("no") if why == "failed" else None
        first, other = engine.submit([1, 2], **said), engine.submit([3, 4, 5], solver="euler", nfe=9)
        first.add_done_callback(lambda _: (engine.close(drain=drain), closed.set()))
        if why == "beside":
            assert wait([first], PATIENCE).done
    assert closed.wait(PATIENCE)
    assert wait([other], PATIENCE).done
    if drain:
        assert other.result(0).seeds == [3, 4, 5]
    else:
        assert other.done()
    for thread in engine._loop._threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


# ---- the order of things


class Clock:
    """Stands still until somebody moves it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


@pytest.fixture
def one_row(network, clock):
    """An engine of one row, whose ticks take a second by its own measure."""
    with ContinuousSampler(network, rows=1, queue=16, verify=False) as made:
        made._loop.pace.of = lambda size: 1.0
        yield made
        network.gate.set()


def order_of(engine, requests):
    """The names of requests in the order in which they are done."""
    done, futures = [], []
    with mixed.held(engine):
        for name, said in requests.items():
            futures.append(engine.submit([1], on_sample=lambda _, name=name: done.append(name), **SAID, **said))
    assert wait(futures, PATIENCE).not_done == set()
    return done


def test_larger_priorities_come_first_and_then_who_came_first(one_row):
    said = {"a": 0, "b": 5, "c": -1, "d": 5, "e": 0}
    assert order_of(one_row, {name: {"priority": value} for name, value in said.items()}) == ["b", "d", "a", "e", "c"]


def test_deadlines_come_before_priorities(one_row):
    said = {"a": {"priority": 9}, "b": {"deadline": 50.0}, "c": {"deadline": 20.0, "priority": -5}, "d": {}}
    assert order_of(one_row, said) == ["c", "b", "a", "d"]


def test_a_deadline_that_cannot_be_met_is_refused_at_once(one_row):
    with pytest.raises(DeadlineError, match="got 2.9 s from now, expected time for 3 ticks"):
        one_row.submit([1], deadline=2.9, **SAID)
    assert is_empty(one_row)
    assert one_row.submit([1], deadline=3.1, **SAID).result(PATIENCE)
    assert (one_row.stats().refused, one_row.stats().completed) == (1, 1)


def test_before_any_tick_was_measured_no_deadline_is_out_of_reach(one_row):
    one_row._loop.pace.of = lambda size: None
    assert one_row.submit([1], deadline=1e-9, **SAID)


def test_what_can_no_longer_be_done_in_time_fails_while_it_waits(one_row, network, clock):
    with mixed.held(one_row):
        late = one_row.submit([1, 2], deadline=10.0, **SAID)
        other = one_row.submit([3], **SAID)
        clock.now += 5
    with pytest.raises(DeadlineError, match="can no longer be met"):
        late.result(PATIENCE)
    assert other.result(PATIENCE)
    stats = one_row.stats()
    assert (stats.missed, stats.completed, stats.ticks, network.calls) == (2, 1, 3, 3)


def test_what_has_begun_is_finished_however_late(one_row, clock):
    def slow(sample):
        clock.now += 100

    future = one_row.submit([1, 2], deadline=10.0, on_sample=slow, **SAID)
    assert future.result(PATIENCE).seeds == [1, 2]
    assert (one_row.stats().missed, one_row.stats().completed) == (2, 2)


def test_beside_the_rows_deadlines_are_looked_at_before_drawing(one_row, network, clock):
    said = {"solver": "dpmpp", "solver_options": {"thresholding": True}, "nfe": 3}
    network.stop()
    first, late = one_row.submit([1], **said), one_row.submit([2], deadline=5.0, **said)
    network.wait_for_a_call()
    clock.now += 6
    network.gate.set()
    assert first.result(PATIENCE)
    with pytest.raises(DeadlineError, match="passed before this request came to be drawn"):
        late.result(PATIENCE)
    assert one_row.stats().missed == 1


# ---- samples as they are done


def test_samples_are_told_of_as_they_are_done(engine, network):
    seen, result = [], None
    with mixed.held(engine):
        future = engine.submit([10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 0, 1], on_sample=seen.append, **SAID)
    result = future.result(PATIENCE)
    assert [(sample.index, sample.seed, int(sample.label)) for sample in seen] == [
        (k, 10 + k, k % 4) for k in range(6)
    ]
    assert all(torch.equal(sample.image, result.images[sample.index]) for sample in seen)


def test_latents_have_no_seeds_and_unconditional_models_no_labels(tiny_model):
    seen = []
    with ContinuousSampler(tiny_model, rows=2) as engine:
        latents = torch.randn(2, 1, 8, 8)
        result = engine.submit(latents, on_sample=seen.append, **SAID).result(PATIENCE)
    assert (result.seeds, result.labels) == (None, None)
    assert [sample[:3] for sample in seen] == [(0, None, None), (1, None, None)]


def test_on_sample_that_raises_is_logged_and_the_request_goes_on(engine, caplog):
    def broken(sample):
        raise ValueError("mine")

    with mixed.held(engine):
        futures = [engine.submit([1, 2], on_sample=broken, **SAID), engine.submit([3], **SAID)]
    assert [future.result(PATIENCE).seeds for future in futures] == [[1, 2], [3]]
    assert caplog.text.count("on_sample failed for sample") == 2
    assert "mine" in caplog.text


def test_a_slow_on_sample_holds_up_no_tick(engine, network):
    go_on = threading.Event()
    with mixed.held(engine):
        slow = engine.submit([1], on_sample=lambda _: go_on.wait(PATIENCE), **SAID)
        other = engine.submit([2], solver="euler", nfe=9)
    until(lambda: network.calls == 9)
    assert not slow.done()
    assert not other.done()  # results are handed out in order
    go_on.set()
    assert slow.result(PATIENCE)
    assert other.result(PATIENCE)


def collected(engine, *arguments, until_index=None, **options):
    async def work():
        seen = []
        stream = engine.stream(*arguments, **options)
        async for sample in stream:
            seen.append(sample)
            if sample.index == until_index:
                break
        await stream.aclose()
        return seen

    return asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_a_stream_hands_out_samples_as_they_are_done(engine, network):
    seen = collected(engine, [4, 5, 6, 7, 8, 9], 2, **SAID)
    assert [sample.seed for sample in seen] == [4, 5, 6, 7, 8, 9]
    expected = alone(network, [4, 5, 6, 7, 8, 9], 2).images
    torch.testing.assert_close(torch.stack([sample.image for sample in seen]), expected, rtol=2e-5, atol=2e-5)


def test_leaving_a_stream_cancels_the_rest(engine):
    assert [sample.index for sample in collected(engine, list(range(16)), until_index=1, **SAID)] == [0, 1]
    until(lambda: is_empty(engine))
    stats = engine.stats()
    assert stats.completed + stats.cancelled == 16
    assert stats.cancelled > 0


def test_a_stream_raises_what_submit_and_its_future_raise(engine, network):
    with pytest.raises(ConfigError, match="unknown solver"):
        collected(engine, [1], solver="magic")
    with pytest.raises(QueueFullError), mixed.held(engine):
        engine.submit(list(range(20)), **SAID)
        collected(engine, [1], **SAID)
    network.trouble = RuntimeError("a broken model")
    with pytest.raises(RuntimeError, match="a broken model"):
        collected(engine, [1], **SAID)
    with pytest.raises(TypeError, match="leave on_sample out"):
        collected(engine, [1], on_sample=print, **SAID)


def test_a_stream_that_is_given_up_while_it_is_being_taken_leaves_nothing(engine, monkeypatch):
    entered, go_on, submit = threading.Event(), threading.Event(), engine.submit

    def slow(*arguments, **options):
        entered.set()
        assert go_on.wait(PATIENCE)
        return submit(*arguments, **options)

    monkeypatch.setattr(engine, "submit", slow)

    async def work():
        stream = engine.stream([1, 2], solver="euler", nfe=60)
        task = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(entered.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    with mixed.held(engine):
        asyncio.run(work())
        until(lambda: engine.stats().cancelled == 2)
    assert is_empty(engine)


# ---- what fails


def test_an_error_in_a_tick_fails_what_was_in_it_alone(engine, network):
    with mixed.held(engine):
        live = [engine.submit([1, 2], **SAID), engine.submit([3, 4, 5], **SAID)]  # the last sample waits
        waiting = engine.submit([6], **SAID)
        network.trouble = RuntimeError("a broken model")
    for future in live:
        with pytest.raises(RuntimeError, match="a broken model"):
            future.result(PATIENCE)
    torch.testing.assert_close(waiting.result(PATIENCE).images, alone(network, [6]).images, rtol=2e-5, atol=2e-5)
    assert (engine.stats().failed, engine.stats().completed) == (5, 1)
    assert is_empty(engine)


def test_samples_that_were_done_before_an_error_count_once(engine, network):
    done = threading.Event()

    def spoil(sample):
        if sample.index == 0:
            network.trouble = RuntimeError("late")
            done.set()

    with mixed.held(engine):
        future = engine.submit(list(range(8)), on_sample=spoil, solver="euler", nfe=1)
        blocker = engine.submit([50], solver="euler", nfe=60)  # something for the error to come in
    assert wait([future, blocker], PATIENCE).not_done == set()
    until(lambda: is_empty(engine))
    stats = engine.stats()
    assert stats.completed + stats.failed == 9


class Spoiled(mixed.Classes):
    """NaN for class 3 from noise level 1 on."""

    def forward(self, x, sigma, labels):
        d, features = super().forward(x, sigma, labels)
        bad = (labels[:, 3] == 1) & (sigma < 1)
        return d.masked_fill(bad[:, None, None, None], float("nan")), features


def test_a_row_that_is_not_finite_fails_alone_and_names_seed_and_evaluation():
    levels = torch.tensor([20.0, 5.0, 2.0, 0.5, 0.1, 0.01])
    seen, model = [], Spoiled()
    with ContinuousSampler(model, rows=3, verify=False) as engine:
        with mixed.held(engine):
            future = engine.submit([11, 12, 13, 14], [0, 3, 1, 3], solver="ipndm", schedule=levels, on_sample=seen.append)
            other = engine.submit([15], 2, solver="ipndm", schedule=levels)
        with pytest.raises(NonFiniteError, match=r"in evaluation 4 of 5, seeds \[12, 14\]") as caught:
            future.result(PATIENCE)
        expected = alone(model, [11, 13], [0, 1], solver="ipndm", schedule=levels).images
        assert other.result(PATIENCE).images.isfinite().all()
        stats = engine.stats()
    assert (caught.value.step, caught.value.seeds) == (4, [12, 14])
    assert sorted(sample.seed for sample in seen) == [11, 13]
    images = torch.stack([sample.image for sample in sorted(seen)])
    torch.testing.assert_close(images, expected, rtol=2e-5, atol=2e-5)
    assert (stats.failed, stats.completed) == (2, 3)


def test_rows_of_latents_are_named_by_their_number():
    levels = torch.tensor([20.0, 5.0, 0.5, 0.01])
    with ContinuousSampler(Spoiled(), rows=3, verify=False) as engine:
        future = engine.submit(torch.randn(3, *mixed.SHAPE), [0, 1, 3], solver="euler", schedule=levels)
        with pytest.raises(NonFiniteError, match=r"in evaluation 3 of 3, rows \[2\]"):
            future.result(PATIENCE)


class Loud(mixed.Classes):
    """Near the largest float32 at the last noise level."""

    def forward(self, x, sigma, labels):
        d, features = super().forward(x, sigma, labels)
        return torch.where((sigma < 1)[:, None, None, None], 3e38, d), features


def test_a_sample_that_overflows_where_no_answer_did_fails_too():
    """At sigma 0.5, (0.25 - 0.5) (x - 3e38) / 0.5 of order 2 is beyond float32 though 3e38 is not."""
    said = {"solver": "ipndm", "schedule": torch.tensor([20.0, 5.0, 0.5, 0.01])}
    model = Loud()
    with pytest.raises(NonFiniteError):
        alone(model, [1], **said)
    with ContinuousSampler(model, rows=2, verify=False) as engine:
        with pytest.raises(NonFiniteError, match="in evaluation 3 of 3") as caught:
            engine.submit([1], **said).result(PATIENCE)
    assert caught.value.step == 3


def test_nobody_looks_where_nobody_is_to():
    levels = torch.tensor([20.0, 5.0, 0.5, 0.01])
    with ContinuousSampler(Spoiled(), rows=2, verify=False, check_finite=False) as engine:
        images = engine.submit([1, 2], [0, 3], solver="euler", schedule=levels).result(PATIENCE).images
    assert images[0].isfinite().all()
    assert images[1].isnan().all()


def test_a_predictor_that_cannot_read_the_bottleneck_fails_its_request_alone(engine, network):
    predictor = mixed.learned(1, bottleneck=(4, 4))
    said = {"solver": "amed", "nfe": 4, "afs": False, "schedule": "polynomial"}
    predictor.plan = mixed.plan_of(said, {}, midpoint=True)
    with pytest.raises(ConfigError, match="predictor expects bottleneck features"):
        engine.submit([1], predictor=predictor).result(PATIENCE)
    assert engine.submit([1], **SAID).result(PATIENCE)


def test_the_queue_is_bounded(engine):
    with mixed.held(engine):
        futures = [engine.submit(list(range(10)), **SAID), engine.submit(list(range(10)), **SAID)]
        with pytest.raises(QueueFullError, match="expected at most 0") as caught:
            engine.submit([1], **SAID)
        assert caught.value.retry_after > 0
        futures[0].cancel()
        futures.append(engine.submit([1], **SAID))
    assert [len(future.result(PATIENCE).seeds) for future in futures[1:]] == [10, 1]
    with pytest.raises(ConfigError, match="expected at most 20"):
        engine.submit(list(range(21)), **SAID)
    assert engine.stats().refused == 1
    assert is_empty(engine)


# ---- beside the rows

BESIDE = {
    "thresholding": {"solver": "dpmpp", "solver_options": {"thresholding": True}, "nfe": 4},
    "history": {"solver": "ipndm", "nfe": 6},
}


def parallel_points():
    predictor = amed_engine.ConstantPredictor(2, points=3)
    predictor.plan = mixed.plan_of(
        {"solver": "amed", "nfe": 8, "afs": False, "schedule": "polynomial"}, {"points": 3}, midpoint=True
    )
    return {"predictor": predictor}


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("name", [*BESIDE, "points"])
def test_what_is_no_table_is_drawn_beside_the_rows_exactly(network, name, guidance):
    said, seen = BESIDE[name] if name in BESIDE else parallel_points(), []
    if name == "points" and guidance:
        said["predictor"].plan = amed_engine.Plan.from_json({**said["predictor"].plan.to_json(), "guidance_scale": guidance})
    with ContinuousSampler(network, rows=4, history=2, verify=False) as engine:
        future = engine.submit([1, 2, 3], [0, 3, 2], guidance_scale=guidance, on_sample=seen.append, **said)
        result = future.result(PATIENCE)
        stats = engine.stats()
    expected = alone(network, [1, 2, 3], [0, 3, 2], guidance_scale=guidance, **said)
    assert (result.backend, result.buckets, result.nfe, result.plan) == ("eager", (), expected.nfe, expected.plan)
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.labels, expected.labels)
    assert [(sample.index, sample.seed, int(sample.label)) for sample in seen] == [(0, 1, 0), (1, 2, 3), (2, 3, 2)]
    assert (stats.beside, stats.completed, stats.admitted, stats.ticks) == (3, 3, 0, 0)


def test_beside_the_rows_seeds_draw_labels_and_latents_are_taken(network):
    latents = torch.randn(2, *mixed.SHAPE, generator=torch.Generator().manual_seed(1))
    with ContinuousSampler(network, rows=4, verify=False) as engine:
        for batch in ([7, 8], latents):
            result = engine.submit(batch, **BESIDE["thresholding"]).result(PATIENCE)
            expected = alone(network, batch, **BESIDE["thresholding"])
            assert torch.equal(result.images, expected.images)
            assert torch.equal(result.labels, expected.labels)


def test_beside_the_rows_what_fails_fails_alone(network):
    levels = torch.tensor([20.0, 5.0, 0.5, 0.01])
    said = {"solver": "dpmpp", "solver_options": {"thresholding": True}, "schedule": levels}
    with ContinuousSampler(Spoiled(), rows=2, verify=False) as engine:
        bad, good = engine.submit([1, 2], [0, 3], **said), engine.submit([1], 0, **said)
        with pytest.raises(NonFiniteError) as caught:
            bad.result(PATIENCE)
        assert good.result(PATIENCE).backend == "eager"
        assert caught.value.seeds == [2]
        assert (engine.stats().failed, engine.stats().completed) == (2, 1)


def test_beside_the_rows_the_queue_is_bounded_too(engine, network):
    network.stop()
    futures = [engine.submit(list(range(10)), **BESIDE["thresholding"]) for _ in range(2)]
    with pytest.raises(QueueFullError, match="beside the rows, expected at most 0"):
        engine.submit([1], **BESIDE["thresholding"])
    network.gate.set()
    assert all(future.result(PATIENCE) for future in futures)


def test_what_is_cancelled_or_given_up_while_it_is_drawn_beside_is_no_success(network, caplog):
    engine = ContinuousSampler(network, rows=2, verify=False)
    network.stop()
    first = engine.submit([1, 2], **BESIDE["thresholding"])
    network.wait_for_a_call()
    first.cancel()
    network.gate.set()
    assert engine.submit([3], **BESIDE["thresholding"]).result(PATIENCE)
    stats = engine.stats()
    assert (stats.cancelled, stats.completed, stats.beside) == (2, 1, 1)
    network.stop()
    second = engine.submit([4], **BESIDE["thresholding"])
    network.wait_for_a_call()
    engine.close(drain=False)
    with pytest.raises(EngineClosedError):
        second.result(0)
    network.gate.set()
    engine._loop._beside.threads.shutdown(wait=True)
    assert engine.stats().completed == 1
    assert caplog.records == []


# ---- the end


def test_closing_waits_for_what_was_taken(network):
    engine = ContinuousSampler(network, rows=2, verify=False)
    futures = [engine.submit([k, k + 50], **SAID) for k in range(5)] + [engine.submit([1], **BESIDE["thresholding"])]
    engine.close()
    assert all(future.done() and future.result(0) for future in futures)
    assert engine.closed
    assert not any(thread.is_alive() for thread in engine._loop._threads)


def test_closing_without_draining_gives_up_what_is_left(network):
    engine = ContinuousSampler(network, rows=1, verify=False)
    network.stop()
    futures = [engine.submit([1], **SAID), engine.submit([2], **SAID), engine.submit([3], **BESIDE["thresholding"])]
    network.wait_for_a_call()
    closing = threading.Thread(target=engine.close, args=(False,))
    closing.start()
    for future in futures:
        with pytest.raises(EngineClosedError, match="closed before this request was done"):
            future.result(PATIENCE)
    network.gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert is_empty(engine)


def test_closing_gives_up_after_the_time_that_it_was_given(network):
    engine = ContinuousSampler(network, rows=1, verify=False)
    network.stop()
    future = engine.submit([1], **SAID)
    network.wait_for_a_call()
    engine.close(timeout=0.01)
    with pytest.raises(EngineClosedError):
        future.result(0)
    network.gate.set()


def test_a_closed_engine_takes_nothing_and_can_be_closed_again(engine):
    engine.close()
    engine.close(drain=False)
    for call in (engine.submit, engine.warmup):
        with pytest.raises(EngineClosedError):
            call(*([[1]] if call == engine.submit else []))
    assert is_empty(engine)


def test_a_context_drains_unless_something_was_raised_in_it(network):
    with ContinuousSampler(network, rows=2, verify=False) as engine:
        future = engine.submit([1], **SAID)
    assert future.result(0)
    with pytest.raises(KeyError), ContinuousSampler(network, rows=2, verify=False) as engine:
        network.stop()
        future = engine.submit([1], solver="euler", nfe=60)
        network.wait_for_a_call()
        threading.Timer(0.05, network.gate.set).start()
        raise KeyError
    with pytest.raises(EngineClosedError):
        future.result(0)
    assert engine.closed


def test_an_engine_that_is_dropped_ends_its_threads(network):
    engine = ContinuousSampler(network, rows=2, verify=False)
    future = engine.submit([1], **SAID)
    future.result(PATIENCE)
    threads, alive = engine._loop._threads, weakref.ref(engine)
    del engine
    gc.collect()
    assert alive() is None
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_between_ticks_errors_are_the_callers(engine):
    def broken():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine._loop.between_ticks(broken)
    assert engine.submit([1], **SAID).result(PATIENCE)


# ---- cost, statistics, warm-up


def test_cost_says_what_submit_would_take(engine, network):
    assert engine.cost([1, 2, 3], **SAID) == (3, 9, None)
    engine.warmup()
    assert engine.stats().captures == 0
    calls = network.calls
    engine._loop.pace.of = lambda size: 0.5
    assert engine.cost(2, class_labels=1, nfe=5, solver="ipndm", guidance_scale=2.0) == (2, 10, 2.5)
    assert engine.cost(list(range(8)), **SAID) == (8, 24, 3.0)  # in two turns
    assert engine.cost([1], **parallel_points()) == (1, 8, 4.0)  # three points at once, twice
    assert engine.cost(torch.randn(2, *mixed.SHAPE), **SAID).samples == 2
    assert (network.calls, is_empty(engine)) == (calls, True)


def test_cost_counts_what_comes_first(one_row):
    with mixed.held(one_row):
        one_row.submit([1, 2], **SAID)
        assert one_row.cost([3], **SAID).seconds == 9.0
        assert one_row.cost([3], priority=1, **SAID).seconds == 3.0
        assert one_row.cost([3], deadline=100.0, **SAID).seconds == 3.0


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max", "seed"])
def test_cost_takes_the_arguments_of_submit_alone(engine, name):
    with pytest.raises(TypeError, match=name):
        engine.cost([1], **{name: 1})


def test_statistics_count_samples_and_evaluations(engine):
    with mixed.held(engine):
        futures = [engine.submit([1, 2], **SAID), engine.submit([3], guidance_scale=2.0, solver="euler", nfe=5)]
        assert (engine.stats().waiting, engine.stats().live) == (3, 0)
    assert all(future.result(PATIENCE) for future in futures)
    stats = engine.stats()
    assert (stats.rows, stats.live, stats.waiting, stats.ticks) == (4, 0, 0, 5)
    assert (stats.evaluations, stats.evaluated) == (11, 16)  # five halves of the guided row
    assert (stats.admitted, stats.completed) == (3, 3)
    assert set(stats.bucket_seconds) == {3, 1}
    assert 0 < stats.network_seconds < stats.tick_seconds


def test_warm_up_measures_what_ticks_take(engine):
    assert engine.warmup().backend == "eager"
    assert set(engine.stats().bucket_seconds) == {1, 4}
    assert engine.cost([1], **SAID).seconds > 0


# ---- arguments


def test_seeds_in_every_form(engine):
    expected = engine.submit([3, 4], **SAID).result(PATIENCE).images
    for seeds in ((3, 4), range(3, 5), np.array([3, 4]), np.array([3, 4], dtype=np.uint8), torch.tensor([3, 4])):
        result = engine.submit(seeds, **SAID).result(PATIENCE)
        assert (result.seeds, torch.equal(result.images, expected)) == ([3, 4], True)
    assert len(engine.submit(np.int64(2), **SAID).result(PATIENCE).seeds) == 2


def test_latents_in_every_form(engine):
    latents = torch.randn(2, *mixed.SHAPE)
    expected = engine.submit(latents, 1, **SAID).result(PATIENCE).images
    for given in (latents.numpy(), latents.clone().requires_grad_(), latents.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        result = engine.submit(given, 1, **SAID).result(PATIENCE)
        assert result.seeds is None
        assert not result.images.requires_grad
        assert torch.equal(result.images, expected)


def test_latents_and_labels_are_read_when_they_are_given(engine):
    latents, vectors = torch.randn(1, *mixed.SHAPE), torch.rand(1, mixed.CLASSES)
    expected = engine.submit(latents, vectors, **SAID).result(PATIENCE)
    with mixed.held(engine):
        given = latents.clone(), vectors.clone()
        future = engine.submit(*given, **SAID)
        given[0].zero_(), given[1].zero_()
    assert torch.equal(future.result(PATIENCE).images, expected.images)
    assert torch.equal(future.result(PATIENCE).labels, vectors)


LABELS = [
    (2, [2, 2]),
    ([2, 0], [2, 0]),
    (np.array([2, 0]), [2, 0]),
    (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
    (np.int64(2), [2, 2]),
]


@pytest.mark.parametrize("labels", LABELS, ids=lambda case: type(case[0]).__name__)
def test_class_labels_in_every_form(engine, network, labels):
    result = engine.submit([3, 4], labels[0], **SAID).result(PATIENCE)
    assert result.labels.tolist() == labels[1]
    torch.testing.assert_close(result.images, alone(network, [3, 4], labels[1]).images, rtol=2e-5, atol=2e-5)


def test_class_labels_as_vectors(engine, network):
    vectors = torch.eye(mixed.CLASSES)[[2, 0]] * 0.5
    result = engine.submit([3, 4], vectors, **SAID).result(PATIENCE)
    assert torch.equal(result.labels, vectors)
    torch.testing.assert_close(result.images, alone(network, [3, 4], vectors).images, rtol=2e-5, atol=2e-5)


WRONG = {
    "no seeds": ([], {}, "the batch is empty"),
    "no number of seeds": (0, {}, "at least 1 sample"),
    "a negative number": (-1, {}, "at least 1 sample"),
    "a flag for seeds": (True, {}, "number of samples, a sequence of seeds"),
    "text for seeds": ("12", {}, "number of samples, a sequence of seeds"),
    "no seeds at all": (None, {}, "number of samples, a sequence of seeds"),
    "a broken seed": ([1.5], {}, "seeds must be integers"),
    "a large seed": ([1 << 32], {}, "outside 0 .. 2"),
    "shape of latents": (torch.zeros(1, 1, 5, 4), {}, "latents must have shape"),
    "dtype of latents": (torch.zeros(1, *mixed.SHAPE, dtype=torch.float64), {}, "latents must be torch.float32"),
    "no latents": (torch.zeros(0, *mixed.SHAPE), {}, "the batch is empty"),
    "latents that are NaN": (torch.full((2, *mixed.SHAPE), torch.nan), {}, "NaN or infinite values in rows"),
    "latents for fresh noise": (torch.zeros(1, *mixed.SHAPE), {"solver": "consistency", "nfe": 3}, "adds fresh noise"),
    "backward array": (np.arange(3)[::-1], {}, "negative strides"),
    "a class too many": ([1], {"class_labels": 4}, "class_labels must be in 0 .. 3"),
    "a class for others": ([1], {"class_labels": [1, 2]}, "class_labels must be one integer, 1 integers"),
    "no class": ([1], {"class_labels": "cat"}, "class_labels must be class numbers or vectors"),
    "a class that is NaN": ([1], {"class_labels": torch.full((1, 4), torch.nan)}, "NaN or infinite"),
    "solver": ([1], {"solver": "magic"}, "unknown solver 'magic'"),
    "solver's kind": ([1], {"solver": ["ipndm"]}, "unknown solver"),
    "nfe": ([1], {"solver": "euler", "nfe": 0}, "nfe must be a positive integer"),
    "half an evaluation": ([1], {"solver": "euler", "nfe": 2.5}, "nfe must be a positive integer"),
    "a flag for nfe": ([1], {"solver": "euler", "nfe": True}, "nfe must be a positive integer"),
    "odd nfe": ([1], {"solver": "heun", "nfe": 3, "afs": False}, "not a whole number of intervals"),
    "option": ([1], {"solver": "ipndm", "solver_options": {"order": 3}}, "has no option order"),
    "option's value": ([1], {"solver": "ipndm", "solver_options": {"max_order": 9}}, "max_order"),
    "options' kind": ([1], {"solver": "ipndm", "solver_options": ["max_order"]}, "solver_options must be a dict"),
    "option's name": ([1], {"solver": "ipndm", "solver_options": {1: 3}}, "has no option"),
    "options of two kinds": ([1], {"solver": "ipndm", "solver_options": {1: 3, "max_order": 2}}, "has no option"),
    "options without solver": ([1], {"solver_options": {"max_order": 3}}, "solver_options need a solver"),
    "schedule": ([1], {"schedule": "linear"}, "unknown schedule 'linear'"),
    "schedule's kind": ([1], {"schedule": [80.0, 1.0]}, "schedule must be a name"),
    "a schedule of lists": ([1], {"schedule": ([80.0], [1.0])}, "schedule must be a name"),
    "rising levels": ([1], {"schedule": torch.tensor([1.0, 2.0])}, "decreas"),
    "levels that are NaN": ([1], {"schedule": torch.tensor([torch.nan, 1.0])}, ""),
    "rho": ([1], {"schedule": "polynomial", "rho": -1.0}, "rho must be a positive number"),
    "rho's kind": ([1], {"schedule": "polynomial", "rho": [7]}, "rho must be a positive number"),
    "afs": ([1], {"afs": "zero"}, "afs must be True, False, 'mean' or None"),
    "predictor": ([1], {"predictor": 3}, "predictor must be one of this package"),
    "plan": ([1], {"plan": {"solver": "euler"}}, "plan must be a Plan"),
    "guidance": ([1], {"guidance_scale": "2"}, "guidance_scale must be a finite number"),
    "infinite guidance": ([1], {"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
    "no deadline": ([1], {"deadline": 0}, "deadline must be seconds from now"),
    "a past deadline": ([1], {"deadline": -2.0}, "deadline must be seconds from now"),
    "deadline that is NaN": ([1], {"deadline": float("nan")}, "deadline must be seconds from now"),
    "deadline's kind": ([1], {"deadline": "soon"}, "deadline must be seconds from now"),
    "priority": ([1], {"priority": 1.5}, "priority must be an integer"),
    "a flag for priority": ([1], {"priority": True}, "priority must be an integer"),
    "on_sample": ([1], {"on_sample": 3}, "on_sample must be a function"),
}


@pytest.fixture(scope="module")
def refusing():
    with ContinuousSampler(Network(), rows=4, queue=16, verify=False) as engine:
        yield engine


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_in_the_caller_at_once(refusing, name):
    seeds, options, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        refusing.submit(seeds, **options)
    assert is_empty(refusing)
    if "on_sample" not in options:
        with pytest.raises(ConfigError, match=message):
            refusing.cost(seeds, **options)
    assert (refusing.model.network.calls, refusing.stats().refused) == (0, 0)


def test_files_that_are_none_are_refused_in_the_caller(engine, tmp_path):
    (tmp_path / "broken").write_text("{")
    for name in ("plan", "predictor"):
        with pytest.raises((FileFormatError, ConfigError)):
            engine.submit([1], **{name: tmp_path / "broken"})
    assert is_empty(engine)


MADE_WRONG = {
    "rows": ({"rows": 0}, "rows must be an integer from 1 to 4096"),
    "rows' kind": ({"rows": 2.0}, "rows must be an integer"),
    "history": ({"history": 14}, "history must be an integer from 1 to 13"),
    "queue": ({"queue": -1}, "queue must be an integer from 0"),
    "dtype": ({"dtype": torch.float16}, "dtype is the state's"),
    "backend": ({"backend": "turbo"}, "backend must be one of"),
    "graphs": ({"backend": "graph"}, "backend='graph' needs a CUDA device"),
    "no buckets": ({"buckets": ()}, "buckets must be positive integers"),
    "buckets": ({"buckets": (0, 4)}, "buckets must be positive integers"),
    "buckets' kind": ({"buckets": (2.5,)}, "buckets must be positive integers"),
    "buckets beyond the rows": ({"buckets": (2, 8), "rows": 4}, "buckets must be at most the 4 rows, got 8"),
}


@pytest.mark.parametrize("name", MADE_WRONG)
def test_an_engine_that_cannot_work_is_refused_and_starts_no_thread(network, name):
    options, message = MADE_WRONG[name]
    before = threading.active_count()
    with pytest.raises(ConfigError, match=message):
        ContinuousSampler(network, **options, verify=False)
    assert threading.active_count() == before


def test_a_shape_that_nobody_said_is_asked_for(gaussian_denoiser):
    with pytest.raises(ConfigError, match="does not say what shape"):
        ContinuousSampler(gaussian_denoiser)
    with ContinuousSampler(gaussian_denoiser, rows=2, shape=(2, 3)) as engine:
        assert engine.submit([1], **SAID).result(PATIENCE).images.shape == (1, 2, 3)
        with pytest.raises(ConfigError, match="guidance_scale needs a class-conditional model"):
            engine.submit([1], guidance_scale=2.0)
        with pytest.raises(ConfigError, match="class_labels were given, but the model is unconditional"):
            engine.submit([1], 3)


def test_the_callers_modes_have_no_say(network):
    """inference_mode makes tensors that nobody else may write to, and a default dtype or device other numbers."""
    expected = alone(network, [1, 2], [0, 1]).images
    with torch.inference_mode():
        engine = ContinuousSampler(network, rows=2, verify=False)
        futures = [engine.submit([1, 2], [0, 1], **SAID), engine.submit([1, 2], [0, 1], **BESIDE["thresholding"])]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        futures.append(engine.submit([1, 2], [0, 1], **SAID))
        images = [future.result(PATIENCE).images for future in futures]
    finally:
        torch.set_default_dtype(default)
        engine.close()
    for drawn in (images[0], images[2]):
        torch.testing.assert_close(drawn, expected, rtol=2e-5, atol=2e-5)
        assert not drawn.is_inference()


# ---- programs


def programs(engine):
    return engine._programs


def tables(engine):
    return {id(made.table) for made in programs(engine)._tables.values()}


def test_programs_of_equal_value_are_one(engine, tmp_path):
    predictors = [mixed.learned(1), mixed.learned(1)]
    said = {"solver": "amed", "nfe": 4, "afs": False, "schedule": "polynomial"}
    for predictor in predictors:
        predictor.plan = mixed.plan_of(said, {}, midpoint=True)
    save_predictor(predictors[0], tmp_path / "mine.safetensors")
    forms = [*predictors, tmp_path / "mine.safetensors", str(tmp_path / "mine.safetensors")]
    drawn = [engine.submit([1], 0, predictor=form).result(PATIENCE).images for form in forms]
    assert len(tables(engine)) == len(programs(engine)._prepared) == 1
    assert all(torch.equal(images, drawn[0]) for images in drawn)


def test_plans_and_levels_of_equal_value_are_one(engine, tmp_path):
    plan = mixed.plan_of({"solver": "ipndm", "nfe": 3, "afs": False, "schedule": "polynomial"}, {})
    plan.save(tmp_path / "plan.json")
    for form in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        engine.submit([1], plan=form).result(PATIENCE)
    assert len(tables(engine)) == 1
    for levels in (torch.tensor([8.0, 4.0, 1.0]), torch.tensor([8.0, 4.0, 1.0])):
        engine.submit([1], solver="euler", schedule=levels, solver_options={}).result(PATIENCE)
    assert len(tables(engine)) == 2


DIFFERENT = [
    {"solver": "ipndm", "nfe": 3},
    {"solver": "ipndm", "nfe": 4},
    {"solver": "ipndm", "nfe": 3, "afs": True},
    {"solver": "ipndm", "nfe": 3, "solver_options": {"max_order": 2}},
    {"solver": "ipndm", "nfe": 3, "schedule": "logsnr"},
    {"solver": "ipndm", "nfe": 3, "schedule": "polynomial", "rho": 5.0},
    {"solver": "euler", "schedule": torch.tensor([8.0, 4.0, 1.0])},
    {"solver": "euler", "schedule": torch.tensor([8.0, 4.0, 1.5])},
    {"predictor": 1},
    {"predictor": 2},
]


def test_programs_of_different_value_are_not_one(engine):
    said = {"solver": "amed", "nfe": 4, "afs": False, "schedule": "polynomial"}
    for options in DIFFERENT:
        options = dict(options)
        if "predictor" in options:
            options["predictor"] = mixed.learned(options["predictor"])
            options["predictor"].plan = mixed.plan_of(said, {}, midpoint=True)
        engine.submit([1], **options).result(PATIENCE)
    assert len(tables(engine)) == len(DIFFERENT)


def test_a_predictor_that_is_changed_is_another(engine, network):
    predictor = mixed.learned(1)
    said = {"solver": "amed", "nfe": 4, "afs": False, "schedule": "polynomial"}
    predictor.plan = mixed.plan_of(said, {}, midpoint=True)
    before = engine.submit([1], 0, predictor=predictor).result(PATIENCE).images
    with torch.no_grad():
        predictor.fc_r.bias.add_(1.0)
    after = engine.submit([1], 0, predictor=predictor).result(PATIENCE).images
    assert not torch.allclose(before, after, rtol=1e-4)
    expected = Sampler(network, predictor, verify=False).run([1], 0).images
    torch.testing.assert_close(after, expected, rtol=2e-5, atol=2e-5)


def test_programs_and_tables_are_bounded(engine):
    """More programs than are kept, and than the device has room for at once."""
    for k in range(KEPT + 20):
        engine.submit([1], solver="euler", schedule=torch.tensor([8.0 + k, 4.0, 1.0])).result(PATIENCE)
    assert len(programs(engine)._prepared) == KEPT
    assert len(programs(engine)._tables) <= KEPT
    bank = engine._loop.rows.bank
    assert len(bank._held) <= bank._slots < KEPT


def test_programs_that_are_made_by_many_threads_are_made_once(engine):
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda k: engine.submit([k], **SAID), range(8)))
    assert all(future.result(PATIENCE) for future in futures)
    assert len(programs(engine)._prepared) == 1


# ---- memory


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_thousand_requests(network):
    import psutil

    model, process = mixed.Classes(), psutil.Process()
    options = [{"nfe": n, "solver": s} for n in (2, 4) for s in ("ipndm", "heun", "unipc")]

    def draw(engine, count, start):
        futures = []
        for k in range(start, start + count):
            futures.append(engine.submit([k], k % 4, **options[k % len(options)]))
            if k % 10 == 0:
                futures[-1].cancel()
        assert not wait(futures, 600).not_done

    with ContinuousSampler(model, rows=32, queue=4_000, verify=False) as engine:
        draw(engine, 2_000, 0)
        gc.collect()
        objects, before = len(gc.get_objects()), process.memory_info().rss
        for part in range(1, 10):
            draw(engine, 2_000, 2_000 * part)
        gc.collect()
        grown = process.memory_info().rss - before
        assert len(gc.get_objects()) - objects < 1_000
        assert is_empty(engine)
    assert grown < 32 << 20  # a kB of each would be more than half of that
