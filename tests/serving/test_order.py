"""Who comes first, by when, and samples as they are done: priorities, deadlines, on_sample and streams."""

import asyncio
import threading
from concurrent.futures import wait

import mixed
import pytest
import torch
from engines import PATIENCE, SAID, alone, is_empty, until

from amed_engine import (
    ConfigError,
    ContinuousSampler,
    DeadlineError,
    QueueFullError,
)

# ---- the order of things


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
    with pytest.raises(DeadlineError, match=r"is 2\.9 s away, and 3 evaluations take 3 s"):
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
    assert [(sample.index, sample.seed, int(sample.label)) for sample in seen] == [(k, 10 + k, k % 4) for k in range(6)]
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


def test_leaving_a_stream_cancels_the_rest(engine, network):
    network.stops_at = 4  # when four of them are done
    assert [sample.index for sample in collected(engine, list(range(16)), until_index=1, **SAID)] == [0, 1]
    until(lambda: is_empty(engine))
    network.gate.set()
    stats = engine.stats()
    assert stats.completed + stats.cancelled == 16
    assert stats.cancelled >= 12


def test_a_stream_raises_what_submit_and_its_future_raise(engine, network):
    with pytest.raises(ConfigError, match="unknown solver"):
        collected(engine, [1], solver="magic")
    with mixed.held(engine):
        future = engine.submit(list(range(20)), **SAID)
        with pytest.raises(QueueFullError):
            collected(engine, [1], **SAID)
    future.result(PATIENCE)
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
        await asyncio.wait([task])
        go_on.set()
        return task.cancelled()

    with mixed.held(engine):
        assert asyncio.run(work())
        until(lambda: engine.stats().cancelled == 2)
    assert is_empty(engine)
