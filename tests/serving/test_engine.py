"""What an engine says of itself: cost, statistics, what its ticks take."""

import mixed
import pytest
import torch
from engines import PATIENCE, SAID, is_empty, parallel_points


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
