"""The futures of an engine: results, cancelling, callbacks, threads, and how the engine ends."""

import gc
import threading
import time
import weakref
from concurrent.futures import ALL_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from contextlib import suppress

import mixed
import pytest
import torch
from engines import BESIDE, PATIENCE, SAID, Clock, alone, is_empty, until

from amed_engine import (
    ContinuousSampler,
    EngineClosedError,
    QueueFullError,
    Sampler,
)

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
        future = engine.submit(
            list(range(9)), on_sample=lambda sample: seen.append(sample.index) or future.cancel(), **SAID
        )
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
        network.stop()  # what is drawn beside the rows begins at once
        first, other = engine.submit([1, 2], **said), engine.submit([3, 4, 5], solver="euler", nfe=9)
        first.add_done_callback(lambda _: (engine.close(drain=drain), closed.set()))
        network.gate.set()
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
    network.stop()
    with suppress(KeyError), ContinuousSampler(network, rows=2, verify=False) as engine:
        future = engine.submit([1], solver="euler", nfe=60)
        network.wait_for_a_call()
        future.add_done_callback(lambda _: network.gate.set())
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


def test_work_between_ticks_is_no_part_of_a_tick(engine, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    def work():
        clock.now += 100

    with mixed.held(engine):
        future = engine.submit([1], **SAID)
        others = [threading.Thread(target=engine._loop.between_ticks, args=(work,)) for _ in range(2)]
        for other in others:
            other.start()
        until(lambda: len(engine._loop._tasks) == 2)
    assert future.result(PATIENCE)
    assert (clock.now, engine.stats().tick_seconds) == (1200.0, 0.0)


def test_between_ticks_from_a_callback_of_a_tick_that_failed(engine, network):
    reports = []
    with mixed.held(engine):
        future = engine.submit([1], **SAID)
        future.add_done_callback(lambda _: reports.append(engine.warmup()))
        network.trouble = RuntimeError("a broken model")
    with pytest.raises(RuntimeError):
        future.result(PATIENCE)
    until(lambda: reports)
