"""The tick through a double of CUDA's capture, whose recordings do again what was recorded and know nothing else."""

import random
from concurrent.futures import wait
from functools import partial
from itertools import islice

import mixed
import pytest
import torch
from torch import nn

from amed_engine import AmedError, ContinuousSampler, StaleGraphError
from amed_engine.serving.rows import Kind

SAID = {"solver": "ipndm", "nfe": 6}


@pytest.fixture
def engines(double):
    """Makes engines that capture; with `captures=False`, as they would be on a GPU without."""
    made = []

    def make(model, *, captures=True, rows=8, buckets=(1, 2, 4, 8), **options):
        engine = ContinuousSampler(model, rows, buckets=buckets, verify=False, **options)
        engine._loop.rows.apart = False  # as graphs are where no buckets were asked for
        if captures:
            engine._loop.ticker.device = mixed.taping(double)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close(drain=False)


def kinds(engine):
    return set(engine._loop.ticker._graphs)


def test_the_tape_does_what_was_recorded_and_sees_no_change_of_the_host(double):
    """Else the tests of this file would show nothing."""
    state, host = torch.zeros(3), {"step": 1.0}
    recording, output = mixed.taping(double).record(lambda: state.add_(host["step"]).mul(2.0))
    host["step"] = 100.0
    recording.replay()
    recording.replay()
    assert (state.tolist(), output.tolist()) == ([3.0] * 3, [6.0] * 3)
    with pytest.raises(RuntimeError, match="waits for the device"):
        double.record(lambda: state * float(state[0]))


def test_ten_thousand_mixed_requests_capture_a_kind_of_tick_once(engines):
    model, generator = mixed.Classes(), random.Random(1)
    engine = engines(model, rows=128, buckets=(1, 4, 16, 64, 128), queue=20_000)
    asked = list(islice(mixed.asks(generator), 60))
    futures = []
    for k in range(10_000):
        ask = generator.choice(asked)
        futures.append(engine.submit([k], k % 4, **ask.program, guidance_scale=ask.guidance))
    assert not wait(futures, timeout=300).not_done
    assert all(future.result().backend == "ticks" for future in futures)
    ticker = engine._loop.ticker
    assert ticker.captures == len(kinds(engine)) == engine.stats().captures <= 5 * 2 * 2
    replays = sum(recording.replays for recording in ticker.device.recordings)
    assert replays == engine.stats().ticks + ticker.captures  # one more to compare each with the eager tick
    for k in (0, 4_321, 9_999):
        assert futures[k].result().seeds == [k]


def test_replays_give_what_eager_ticks_give(engines):
    model, generator = mixed.Classes(), random.Random(2)
    asked = [(generator.choice(list(islice(mixed.asks(generator), 40))), [k, k + 500]) for k in range(60)]
    images = []
    for captures in (True, False):
        engine = engines(model, captures=captures)
        with mixed.held(engine):
            futures = [engine.submit(seeds, **ask.program, guidance_scale=ask.guidance) for ask, seeds in asked]
        images.append([future.result(120).images for future in futures])
        assert (engine.stats().captures > 0) == captures
    assert all(torch.equal(captured, eager) for captured, eager in zip(*images, strict=True))


def test_a_capture_in_the_middle_changes_nobody(engines):
    """A larger bucket, guidance, a predictor: each is captured while rows are on their way."""
    model, predictor = mixed.Classes(), mixed.learned(3)
    said = {"solver": "amed", "nfe": 6, "afs": False, "schedule": "polynomial"}
    predictor.plan = mixed.plan_of(said, {}, midpoint=True)
    images = []
    for captures in (True, False):
        engine = engines(model, captures=captures)
        taken, came = [], iter([{"predictor": predictor}, {"guidance_scale": 2.0, **SAID}, {**SAID}])

        def more(sample, engine=engine, taken=taken, came=came):
            taken.append(engine.submit([sample.index + 50], 1, **next(came)))

        with mixed.held(engine):
            first = engine.submit([1], 2, solver="ipndm", nfe=10)
            # Each ends while the first is on its way, and what it brings runs beside that.
            engine.submit([2, 3, 4], 0, solver="euler", nfe=1, on_sample=more)
        images.append(first.result(60).images)
        assert all(future.result(60) for future in taken)
    assert torch.equal(*images)


def test_warm_up_captures_every_bucket_with_and_without_guidance(engines):
    engine = engines(mixed.Classes())
    report = engine.warmup()
    assert [bucket.batch for bucket in report.buckets] == [8, 8, 4, 4, 2, 2, 1, 1]
    assert all(bucket.bitwise for bucket in report.buckets)
    engine.submit([1, 2, 3], **SAID).result(60)
    engine.submit([1, 2, 3], guidance_scale=2.0, **SAID).result(60)
    assert engine.stats().captures == 8
    assert engine.warmup().buckets == ()


def own_predictor(seed, nfe, guidance=None):
    predictor = mixed.learned(seed)
    said = {"solver": "amed", "nfe": nfe, "afs": False, "schedule": "polynomial"}
    predictor.plan = mixed.plan_of(said, {}, midpoint=True, guidance_scale=guidance)
    return predictor


def test_warm_up_captures_what_predictors_of_the_engine_need(engines):
    own = [own_predictor(1, 6), own_predictor(2, 4, guidance=2.0)]
    engine = engines(mixed.Classes(), predictors=own)
    assert [bucket.batch for bucket in engine.warmup().buckets] == [8] * 4 + [4] * 4 + [2] * 4 + [1] * 4
    assert kinds(engine) == {
        Kind(n, n * both, among) for n in (1, 2, 4, 8) for both in (0, 1) for among in (False, True)
    }
    for nfe in (None, 6, 4, 5):
        for scale in (None, 2.0):
            with mixed.held(engine):
                futures = [engine.submit([k], nfe=nfe, guidance_scale=scale) for k in range(3)]
                futures += [engine.submit([3], **SAID), engine.submit([4], guidance_scale=1.5, **SAID)]
            assert all(future.result(60).backend == "ticks" for future in futures)
    assert engine.stats().captures == 16


def test_room_for_predictors_changes_nothing_that_is_there(engines):
    """Neither the rows nor the programs that were in them before."""
    images, own = [], own_predictor(1, 6)
    for warm in (True, False):
        engine = engines(mixed.Classes(), captures=warm, predictors=[own])
        engine.submit([7], **SAID).result(60)
        if warm:
            rows, ticker = engine._loop.rows, engine._loop.ticker
            before = rows.snapshot()
            engine._loop.between_ticks(partial(ticker.warmup, True, own))
            assert all(torch.equal(*pair) for pair in zip(before, rows.snapshot(), strict=True))
        with mixed.held(engine):
            futures = [engine.submit([7], 1, **SAID), engine.submit([8], 2, nfe=6)]
        images.append(torch.cat([future.result(60).images for future in futures]))
    assert torch.equal(*images)


def test_warm_up_makes_room_for_predictors_where_there_are_some(engines):
    """Numbers alone are no predictor that looks at a row."""
    fixed = mixed.fixed(3)
    fixed.plan = own_predictor(0, 6).plan
    for predictors in ([], [fixed]):
        engine = engines(mixed.Classes(), predictors=predictors)
        engine.warmup()
        assert not any(kind.learned for kind in kinds(engine))
        assert engine._loop.rows.bank.learned is None


def test_nothing_in_a_tick_waits_for_the_device(engines):
    """The tape refuses what would: of every kind of tick, a predictor's too."""
    engine, predictor = engines(mixed.Classes()), mixed.learned(1)
    said = {"solver": "ipndm", "nfe": 5, "afs": True, "schedule": "polynomial"}
    predictor.plan = mixed.plan_of(said, {}, midpoint=True)
    with mixed.held(engine):
        futures = [engine.submit([1], **SAID), engine.submit([2], predictor=predictor)]
    assert all(future.result(60) for future in futures)
    futures = [engine.submit([3], guidance_scale=2.0, **SAID)]
    assert all(future.result(60) for future in futures)
    assert {kind.learned for kind in kinds(engine)} == {kind.halves > 0 for kind in kinds(engine)} == {True, False}


def test_weights_changed_in_place_are_seen(engines):
    model = mixed.Classes()
    engine, plain = engines(model), engines(model, captures=False)
    before = engine.submit([1], **SAID).result(60).images
    with torch.no_grad():
        model.means.mul_(1.5)
    after = engine.submit([1], **SAID).result(60).images
    assert not torch.equal(before, after)
    assert torch.equal(after, plain.submit([1], **SAID).result(60).images)


def reassign(model):
    model.means = nn.Parameter(model.means.detach() * 2)


def test_weights_that_left_their_place_fail_what_is_live_and_nothing_after(engines):
    model = mixed.Classes()
    engine, plain = engines(model), engines(model, captures=False)
    engine.submit([1], **SAID).result(60)
    with mixed.held(engine):
        reassign(model)
        live = engine.submit(list(range(8)), **SAID)
        waiting = engine.submit([9], **SAID)
    with pytest.raises(StaleGraphError, match=r"'means' was re-assigned or moved.*send it again"):
        live.result(60)
    expected = plain.submit([9], **SAID).result(60).images
    assert torch.equal(waiting.result(60).images, expected)
    assert torch.equal(engine.submit([9], **SAID).result(60).images, expected)
    alive = [recording.alive for recording in engine._loop.ticker.device.recordings]
    assert alive == [False, False, True]  # a size captured meanwhile went with the others


def test_other_numerics_are_captured_again(engines):
    engine = engines(mixed.Classes())
    engine.submit([1], **SAID).result(60)
    before = torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = not before
        engine.submit([1], **SAID).result(60)
        engine.submit([2], **SAID).result(60)
    finally:
        torch.backends.cudnn.deterministic = before
    assert engine.stats().captures == 2
    first, second = engine._loop.ticker.device.recordings
    assert (first.alive, second.alive) == (False, True)


def test_after_clear_the_next_tick_is_captured_with_the_weights_of_now(engines):
    model = mixed.Classes()
    engine = engines(model)
    engine.submit([1], **SAID).result(60)
    reassign(model)
    engine._loop.between_ticks(engine._loop.ticker.clear)
    assert not engine._loop.ticker.device.recordings[0].alive
    images = engine.submit([1], **SAID).result(60).images
    assert torch.equal(images, engines(model, captures=False).submit([1], **SAID).result(60).images)


def test_a_tick_that_cannot_be_captured_fails_its_requests_and_is_tried_again(engines):
    engine = engines(mixed.Classes())
    engine._loop.ticker.device.fail_at = 0
    with pytest.raises(torch.OutOfMemoryError):
        engine.submit([1], **SAID).result(60)
    engine._loop.ticker.device.fail_at = None
    expected = engines(mixed.Classes(), captures=False).submit([1], **SAID).result(60).images
    assert torch.equal(engine.submit([1], **SAID).result(60).images, expected)


def test_a_tick_that_is_not_reproduced_is_refused(engines):
    engine = engines(mixed.Classes())
    device = engine._loop.ticker.device
    record = device.record

    def broken(work):
        recording, output = record(work)
        recording.tape.operations.clear()
        return recording, output

    device.record = broken
    with pytest.raises(AmedError, match="the captured tick of 1 rows does not reproduce the eager one"):
        engine.submit([1], **SAID).result(60)


def test_a_module_in_training_is_captured_in_evaluation(engines):
    model = mixed.Classes()
    engine = engines(model)
    model.train()
    with mixed.held(engine):
        future = engine.submit([1], **SAID)
    assert future.result(60).images.isfinite().all()
    engine.submit([1], **SAID).result(60)
    assert (model.training, engine.stats().captures) == (True, 1)


def test_kinds_are_counted_by_size_halves_and_predictor(engines):
    ticker = engines(mixed.Classes())._loop.ticker
    assert [ticker.kind(live, 0, False).size for live in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert ticker.kind(3, 1, True) == Kind(4, 4, True)
