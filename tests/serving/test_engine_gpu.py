"""An engine on a GPU: captured ticks give the eager bits, wait for nothing, and are made once; many threads, flat memory."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice

import mixed
import pytest
import torch
from torch import nn

from amed_engine import ContinuousSampler, Sampler, StaleGraphError
from amed_engine.serving.rows import Kind

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SAID = {"solver": "ipndm", "nfe": 6}
PATIENCE = 120
BUCKETS = (1, 4, 16)


@pytest.fixture
def model():
    return mixed.Classes().to(CUDA).requires_grad_(False)


def made(model, backend="graph", rows=16, buckets=BUCKETS, **options):
    return ContinuousSampler(model, rows, device=CUDA, backend=backend, buckets=buckets, verify=False, **options)


def programs(count, seed=0):
    return list(islice(mixed.asks(random.Random(seed)), count))


def drawn(engine, asks):
    """All of them at once, so that the ticks are the same whatever runs them."""
    with mixed.held(engine):
        futures = [
            engine.submit([k, k + 1000], k % 4, **ask.program, guidance_scale=ask.guidance)
            for k, ask in enumerate(asks)
        ]
    return [future.result(PATIENCE) for future in futures]


def test_replayed_ticks_give_the_eager_bits(model):
    asks = programs(60)
    with made(model) as graph, made(model, "eager") as plain:
        captured, eager = drawn(graph, asks), drawn(plain, asks)
        assert (graph.stats().captures > 0, plain.stats().captures) == (True, 0)
    for ask, one, other in zip(asks, captured, eager, strict=True):
        assert one.buckets == other.buckets
        assert torch.equal(one.images, other.images), ask.name


def test_they_are_what_a_sampler_gives(model):
    asks = programs(60, seed=1)
    with made(model) as engine:
        for k, (ask, result) in enumerate(zip(asks, drawn(engine, asks), strict=True)):
            expected = ask.alone(model, torch.float32, [k, k + 1000], k % 4).images
            assert (result.images - expected).abs().max() < 1e-4 * expected.abs().max(), ask.name


def learned_plan(guidance=None):
    said = {"solver": "amed", "nfe": 6, "afs": False, "schedule": "polynomial"}
    return mixed.plan_of(said, {}, midpoint=True, guidance_scale=guidance)


def kinds_of(model, backend):
    """A ticker with rows of every kind on their way, and the kinds."""
    engine = made(model, backend)
    predictor = mixed.learned(1)
    predictor.plan = learned_plan()
    engine.submit([1, 2, 3], **SAID).result(PATIENCE)
    engine.submit([1], predictor=predictor).result(PATIENCE)
    kinds = [Kind(size, size * both, learned) for size in BUCKETS for both in (0, 1) for learned in (False, True)]
    return engine, kinds


@pytest.mark.parametrize("backend", ["graph", "eager"])
def test_no_tick_waits_for_the_device(model, backend):
    engine, kinds = kinds_of(model, backend)
    ticker = engine._loop.ticker

    def ticks():
        for kind in kinds:
            ticker.tick(kind)  # captured here, which may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for kind in kinds * 3:
                ticker.tick(kind)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with engine:
        engine._loop.between_ticks(ticks)
        assert engine.submit([1, 2, 3], **SAID).result(PATIENCE).images.isfinite().all()


def test_rows_are_written_moved_and_read_without_a_wait(model):
    """What is sent comes from pinned memory; what is read is looked at when its event is done."""
    with made(model) as engine:
        rows = engine._loop.rows
        order = engine._orders.make(list(range(4)), [0, 1, 2, 3], guidance_scale=2.0, **SAID)

        def moved():
            rows.write(list(enumerate(order.starts(range(4), rows))))  # the table too
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                rows.write(list(enumerate(order.starts(range(4), rows))))
                rows.move([(3, 7), (2, 8)])
                rows.read([0, 1, 7, 8])
                rows.free([0, 1, 7, 8])
            finally:
                torch.cuda.set_sync_debug_mode("default")

        engine._loop.between_ticks(moved)
        assert engine.submit([5], **SAID).result(PATIENCE).images.isfinite().all()


def test_a_kind_of_tick_is_captured_once(model):
    asks = programs(40, seed=2)
    with made(model, queue=20_000) as engine:
        generator, futures = random.Random(3), []
        for k in range(2_000):
            ask = generator.choice(asks)
            futures.append(engine.submit([k], k % 4, **ask.program, guidance_scale=ask.guidance))
        assert not wait(futures, 600).not_done
        captures = engine.stats().captures
        assert captures == len(engine._loop.ticker._graphs) <= len(BUCKETS) * 4
        assert all(future.result().buckets for future in futures)
        drawn(engine, asks)
        assert engine.stats().captures - captures <= len(BUCKETS) * 4 - captures


def test_warm_up_leaves_nothing_to_capture(model):
    with made(model) as engine:
        report = engine.warmup()
        assert [bucket.batch for bucket in report.buckets] == [16, 16, 4, 4, 1, 1]
        engine.submit(list(range(16)), **SAID).result(PATIENCE)
        engine.submit(list(range(3)), guidance_scale=2.0, **SAID).result(PATIENCE)
        assert engine.stats().captures == 6
        assert set(engine.stats().bucket_seconds) >= set(BUCKETS)


def test_warm_up_with_predictors_leaves_nothing_to_capture(model):
    own = mixed.learned(1)
    own.plan = learned_plan()
    with made(model, predictors=[own]) as engine:
        assert [bucket.batch for bucket in engine.warmup().buckets] == [16] * 4 + [4] * 4 + [1] * 4
        for scale in (None, 2.0):
            with mixed.held(engine):
                futures = [engine.submit(list(range(3)), nfe=nfe, guidance_scale=scale) for nfe in (None, 5, 6)]
                futures.append(engine.submit([9], guidance_scale=1.5, **SAID))
            assert {future.result(PATIENCE).backend for future in futures} == {"ticks"}
        assert engine.submit([1]).result(PATIENCE).plan == own.plan
        assert engine.stats().captures == 12


def test_one_bucket_gives_the_same_bits_in_any_company(model):
    with made(model, buckets=(16,)) as engine:
        alone = engine.submit([7], 2, guidance_scale=2.5, **SAID).result(PATIENCE)
        assert alone.buckets == (16,)
        for ask in programs(20, seed=4):
            with mixed.held(engine):
                engine.submit(list(range(5)), 1, **ask.program, guidance_scale=ask.guidance)
                future = engine.submit([7], 2, guidance_scale=2.5, **SAID)
            assert torch.equal(future.result(PATIENCE).images, alone.images), ask.name


def test_many_threads_get_what_they_asked_for(model):
    with made(model, queue=4_000) as engine:
        asks = programs(8, seed=5)

        def work(thread):
            ask = asks[thread]
            seeds = [[100 * thread + k] for k in range(50)]
            futures = [engine.submit(each, 1, **ask.program, guidance_scale=ask.guidance) for each in seeds]
            return [(each, future.result(PATIENCE).images) for each, future in zip(seeds, futures, strict=True)]

        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(work, range(8)))
    for ask, part in zip(asks, parts, strict=True):
        for seeds, images in part[::10]:
            expected = ask.alone(model, torch.float32, seeds, 1).images
            assert (images - expected).abs().max() < 1e-4 * expected.abs().max(), ask.name


def test_results_are_done_when_they_are_given(model):
    """Not while the device is still at work on them, nor in memory that later ticks write to."""
    with made(model) as engine:
        images = [engine.submit([k], **SAID).result(PATIENCE).images for k in range(50)]
        host = [each.cpu() for each in images]
        engine.submit(list(range(16)), **SAID).result(PATIENCE)
        torch.cuda.synchronize()
        assert all(torch.equal(each.cpu(), before) for each, before in zip(images, host, strict=True))


def test_weights_that_left_their_place_fail_what_is_live_and_nothing_after(model):
    with made(model) as engine:
        engine.submit([1], **SAID).result(PATIENCE)
        with mixed.held(engine):
            model.means = nn.Parameter(model.means * 2, requires_grad=False)
            live = engine.submit([1], **SAID)
        with pytest.raises(StaleGraphError, match="send it again"):
            live.result(PATIENCE)
        images = engine.submit([1], **SAID).result(PATIENCE).images
    expected = Sampler(model, **SAID, device=CUDA, backend="eager", verify=False).run([1]).images
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_table_is_drawn_beside_the_rows(model):
    said = {"solver": "dpmpp", "solver_options": {"thresholding": True}, "nfe": 4}
    with made(model) as engine:
        ticking = engine.submit([1] * 16, solver="euler", nfe=60)
        result = engine.submit([1, 2], 3, **said).result(PATIENCE)
        assert ticking.result(PATIENCE).backend == "ticks"
    expected = Sampler(model, **said, device=CUDA, backend="eager", verify=False).run([1, 2], 3)
    assert result.backend == "eager"
    torch.testing.assert_close(result.images, expected.images, rtol=1e-4, atol=1e-4)


def test_memory_stays_flat(model):
    asks = programs(40, seed=6)

    def draw(engine, count):
        futures = [
            engine.submit([k], k % 4, **ask.program, guidance_scale=ask.guidance)
            for k, ask in enumerate(asks * (count // len(asks)))
        ]
        assert not wait(futures, 600).not_done

    with made(model, queue=20_000) as engine:
        engine.warmup()
        draw(engine, 800)
        gc.collect()
        torch.cuda.synchronize()
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        captures = engine.stats().captures
        for _ in range(4):
            draw(engine, 800)
        gc.collect()
        torch.cuda.synchronize()
        assert engine.stats().captures == captures
        assert torch.cuda.memory_allocated() - allocated <= 1 << 20
        assert torch.cuda.memory_reserved() - reserved <= 32 << 20


def test_closing_gives_the_graphs_back(model):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        with made(model) as engine:
            engine.warmup()
            engine.submit([1], **SAID).result(PATIENCE)
        del engine
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before <= 64 << 20
