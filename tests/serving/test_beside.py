"""What is no table is drawn beside the rows, exactly as `Sampler.run` draws it."""

import threading

import mixed
import pytest
import torch
from engines import BESIDE, PATIENCE, Spoiled, alone, parallel_points

from amed_engine import (
    ContinuousSampler,
    EngineClosedError,
    NonFiniteError,
    Plan,
    QueueFullError,
)


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("name", [*BESIDE, "points"])
def test_what_is_no_table_is_drawn_beside_the_rows_exactly(network, name, guidance):
    said, seen = BESIDE[name] if name in BESIDE else parallel_points(), []
    if name == "points" and guidance:
        said["predictor"].plan = Plan.from_json({**said["predictor"].plan.to_json(), "guidance_scale": guidance})
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
    closing = threading.Thread(target=engine.close, args=(False,))
    closing.start()
    with pytest.raises(EngineClosedError):
        second.result(PATIENCE)
    network.gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert engine.stats().completed == 1
    assert caplog.records == []
