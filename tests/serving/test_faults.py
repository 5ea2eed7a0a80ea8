"""What fails, fails alone: errors of a model, rows that are not finite, a full queue; and memory stays flat."""

import gc
import resource
import threading
from concurrent.futures import wait

import mixed
import pytest
import torch
from engines import BESIDE, PATIENCE, SAID, Spoiled, alone, is_empty, until

from amed_engine import (
    ConfigError,
    ContinuousSampler,
    EngineClosedError,
    NonFiniteError,
    QueueFullError,
)

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


def test_a_row_that_is_not_finite_fails_alone_and_names_seed_and_evaluation():
    levels = torch.tensor([20.0, 5.0, 2.0, 0.5, 0.1, 0.01])
    seen, model = [], Spoiled()
    with ContinuousSampler(model, rows=3, verify=False) as engine:
        with mixed.held(engine):
            future = engine.submit(
                [11, 12, 13, 14], [0, 3, 1, 3], solver="ipndm", schedule=levels, on_sample=seen.append
            )
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
        future = engine.submit([1], **said)
    with pytest.raises(NonFiniteError, match="in evaluation 3 of 3") as caught:
        future.result(0)
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
        with pytest.raises(QueueFullError, match="expected 0 at most") as caught:
            engine.submit([1], **SAID)
        assert caught.value.retry_after > 0
        futures[0].cancel()
        futures.append(engine.submit([1], **SAID))
    assert [len(future.result(PATIENCE).seeds) for future in futures[1:]] == [10, 1]
    with pytest.raises(ConfigError, match="expected at most 20"):
        engine.submit(list(range(21)), **SAID)
    assert engine.stats().refused == 1
    assert is_empty(engine)


def test_an_engine_that_is_broken_itself_leaves_nobody_waiting(engine, network, monkeypatch, caplog):
    network.stop()
    first = engine.submit([1], **SAID)
    network.wait_for_a_call()
    second = engine.submit([2], **BESIDE["thresholding"])
    monkeypatch.setattr(engine._loop.scheduler, "moves", lambda: 1 / 0)
    third = engine.submit([3], **SAID)
    network.gate.set()
    for future in (first, second, third):
        assert wait([future], PATIENCE).done
    for future in (first, third):
        with pytest.raises(ZeroDivisionError):
            future.result(0)
    assert "the engine stopped" in caplog.text
    with pytest.raises(EngineClosedError):
        engine.submit([4], **SAID)


# ---- memory


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def draw_many(engine, count, start):
    """Of many kinds, a tenth of them cancelled, a tenth failing."""
    options = [{"nfe": n, "solver": s} for n in (2, 4) for s in ("ipndm", "heun", "unipc")]
    futures = []
    for k in range(start, start + count):
        futures.append(engine.submit([k], 3 if k % 10 == 1 else k % 3, **options[k % len(options)]))
        if k % 10 == 0:
            futures[-1].cancel()
    assert not wait(futures, 600).not_done
    assert sum(not future.cancelled() and future.exception() is None for future in futures) >= 0.8 * count


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_thousand_requests():
    with ContinuousSampler(Spoiled(), rows=32, queue=4_000, verify=False) as engine:
        draw_many(engine, 4_000, 0)
        gc.collect()
        objects, before = len(gc.get_objects()), resident()
        for part in range(2, 10):
            draw_many(engine, 2_000, 2_000 * part)
        gc.collect()
        assert len(gc.get_objects()) - objects < 1_000
        assert resident() - before < 16 << 20  # a kB for each would be that
        assert is_empty(engine)
