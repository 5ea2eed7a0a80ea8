"""What goes wrong round an engine: in the functions that it calls, in cancelling and closing, in what it is given."""

import concurrent.futures
import gc
import random
import sys
import threading
import time
import weakref

import pytest
import torch
from served import Gate, gated

from amed_engine import AmedError, AMEDPredictor, ConfigError, ContinuousSampler, QueueFullError, Sampler

SHORT = {"solver": "euler", "nfe": 3, "afs": False}
BESIDE = {"solver": "dpmpp", "nfe": 2, "solver_options": {"thresholding": True}}
SOON = 20  # seconds
SHAPE = (1, 8, 8)


def plain(x, sigma):
    return x / (1 + sigma.reshape(-1, *[1] * (x.dim() - 1)) ** 2)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def engine(gate):
    engine = gated(gate, rows=4)
    yield engine
    gate.open.set()
    engine.close(timeout=SOON)


# ---- futures, and what they call


def test_those_who_wait_for_several_are_told_of_one_that_is_cancelled(gate, engine):
    gate.open.clear()
    future = engine.submit(3, **SHORT)
    assert future.cancel()
    assert concurrent.futures.wait([future], timeout=SOON).done == {future}


@pytest.mark.parametrize("program", [SHORT, BESIDE])
def test_callbacks_may_raise_anything(engine, program):
    def leave(_):
        raise SystemExit

    future = engine.submit(3, on_sample=leave, **program)
    future.add_done_callback(leave)
    assert len(future.result(SOON).images) == 3
    assert len(engine.submit(3, **program).result(SOON).images) == 3


@pytest.mark.parametrize("program", [SHORT, BESIDE])
def test_callbacks_may_close_the_engine_and_what_was_taken_is_done(engine, program):
    future = engine.submit(9, on_sample=lambda _: engine.close(), **program)
    assert len(future.result(SOON).images) == 9
    assert engine.closed


def test_no_tick_waits_for_what_a_failed_request_calls(gate):
    called, go_on = threading.Event(), threading.Event()
    engine = gated(lambda x, sigma: gate(x, sigma)[:, :0], rows=2)  # of another shape
    gate.open.clear()
    future = engine.submit(1, **SHORT)
    future.add_done_callback(lambda _: (called.set(), go_on.wait()))
    gate.open.set()
    assert called.wait(SOON)
    with concurrent.futures.ThreadPoolExecutor(1) as others:
        between_ticks = others.submit(engine.warmup)
        try:
            assert isinstance(between_ticks.exception(SOON), ConfigError)  # of the shape, at once
        finally:
            go_on.set()
    engine.close(timeout=SOON)


@pytest.mark.parametrize("program", [SHORT, BESIDE])
def test_what_nobody_holds_is_gone_without_a_collection(engine, program):
    gc.disable()
    try:
        kept = []
        future = engine.submit(2, on_sample=lambda sample: kept.append(weakref.ref(sample.image)), **program)
        kept.append(weakref.ref(future.result(SOON).images))
        del future
        until = time.monotonic() + SOON
        while any(image() is not None for image in kept) and time.monotonic() < until:
            time.sleep(0.001)  # the engine's thread is on its way out of what it called
        assert [image() for image in kept] == [None] * 3
    finally:
        gc.enable()


# ---- counts


def test_what_is_taken_adds_up_when_the_engine_closes_in_the_middle(gate, engine):
    gate.open.clear()
    futures = [engine.submit(n, **program) for n, program in ((3, SHORT), (6, SHORT), (2, BESIDE))]
    futures[0].cancel()
    closing = threading.Thread(target=engine.close, args=(False,))
    closing.start()
    concurrent.futures.wait(futures, timeout=SOON)
    gate.open.set()
    closing.join(SOON)
    assert not closing.is_alive()
    stats = engine.stats()
    assert (stats.completed, stats.failed, stats.cancelled) == (0, 0, 11)
    assert stats.live == stats.waiting == 0


def test_a_failed_tick_counts_the_samples_that_were_not_delivered():
    answers = iter([plain, plain, None])
    engine = gated(lambda x, sigma: next(answers)(x, sigma), rows=1)
    first = threading.Event()
    with pytest.raises(TypeError):
        engine.submit(3, solver="euler", nfe=1, afs=False, on_sample=lambda _: first.set()).result(SOON)
    engine.close(timeout=SOON)
    stats = engine.stats()
    assert stats.completed + stats.failed == 3
    assert stats.admitted == 3


def test_a_draw_beside_the_rows_ends_when_it_is_cancelled(gate, engine):
    gate.open.clear()
    future = engine.submit(1, solver="dpmpp", nfe=20, solver_options={"thresholding": True})
    while not gate.calls:
        time.sleep(0.001)
    assert future.cancel()
    gate.open.set()
    assert len(engine.submit(1, **BESIDE).result(SOON).images) == 1
    assert gate.calls <= 4  # the one that ran, and the two of the second request


@pytest.mark.parametrize("drain", [True, False])
def test_everything_is_settled_whatever_many_threads_do(drain):
    def denoise(x, sigma):
        if random.random() < 0.01:
            raise ArithmeticError
        return plain(x, sigma)

    before, interval = threading.active_count(), sys.getswitchinterval()
    engine = gated(denoise, rows=4, queue=20)
    futures: list = []

    def ask(seed):
        chance = random.Random(seed)
        for _ in range(60):
            try:
                program, count = chance.choice([SHORT, SHORT, BESIDE]), chance.choice([1, 2, 6])
                futures.append((engine.submit(count, deadline=chance.choice([None, 5.0]), **program), count))
            except AmedError as error:
                if not isinstance(error, QueueFullError):
                    return
                continue
            if chance.random() < 0.3:
                futures[-1][0].cancel()

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        engine.close(drain, timeout=None)
        for thread in threads:
            thread.join(SOON)
        done = concurrent.futures.wait([future for future, _ in futures], timeout=SOON)
    finally:
        sys.setswitchinterval(interval)
    assert not done.not_done
    stats = engine.stats()
    assert stats.completed + stats.failed + stats.cancelled == sum(count for _, count in futures)
    assert stats.live == stats.waiting == 0
    assert threading.active_count() == before


# ---- settings


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"deadline": 10**400}, "deadline"),
        ({"guidance_scale": 10**400}, "guidance_scale"),
        ({"nfe": 10**30}, "nfe"),
        ({"rho": 10**400}, "rho"),
        ({"solver": ["euler"]}, "solver"),
        ({"solver": "dpmpp", "solver_options": {1: 2, "max_order": 3}}, "no option 1"),
        ({"schedule": torch.tensor([80 + 1j, 1])}, "schedule"),
        ({"schedule": torch.tensor([80.0, 1.0]).to_sparse()}, "schedule"),
        ({"schedule": torch.zeros(3, device="meta")}, "schedule"),
    ],
)
def test_what_is_no_setting_is_refused_by_its_name(engine, asked, what):
    with pytest.raises(ConfigError, match=what):
        engine.submit(1, **asked)
    with pytest.raises(ConfigError, match=what):
        engine.cost(1, **asked)


@pytest.mark.parametrize("seeds", [10**12, range(10**12), 10**30])
@pytest.mark.parametrize("program", [SHORT, BESIDE])
def test_requests_that_never_fit_are_refused_before_a_seed_is_drawn(engine, seeds, program):
    with pytest.raises(ConfigError, match="at most 1028"):
        engine.submit(seeds, **program)


def test_more_than_the_queue_beside_the_rows_holds_is_no_matter_of_waiting(engine):
    latents = torch.zeros(1029, *SHAPE)
    with pytest.raises(ConfigError, match="at most 1028"):
        engine.submit(latents, **BESIDE)


def test_cost_takes_the_arguments_of_submit_alone(engine):
    for name in ("foo", "sigma_min", "labels"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            engine.cost(1, **{name: 1})


def test_a_bucket_larger_than_the_rows_is_padded():
    sizes = []

    def counted(x, sigma):
        sizes.append(len(x))
        return plain(x, sigma)

    with ContinuousSampler(counted, rows=4, buckets=(16,), shape=(1, 2, 2), verify=False) as engine:
        sizes.clear()
        found = engine.submit(range(6), nfe=3, solver="euler").result(30)
        assert (engine.stats().rows, found.buckets, set(sizes)) == (4, (16,), {16})
        assert engine.stats().ticks == 6
    expected = Sampler(plain, nfe=3, solver="euler", shape=(1, 2, 2), verify=False).run(range(6)).images
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("asked", [{"timeout": "1"}, {"timeout": -1}, {"timeout": float("nan")}, {"drain": "no"}])
def test_closing_is_asked_for_in_seconds(engine, asked):
    with pytest.raises(ConfigError, match=next(iter(asked))):
        engine.close(**asked)
    assert not engine.closed


# ---- where it is made, and of what


def test_it_may_be_made_under_inference_mode_or_another_default_device():
    with torch.inference_mode():
        engine = gated(plain, rows=2)
    with torch.device("meta"):
        future = engine.submit([1], **SHORT)
    images = future.result(SOON).images
    engine.close()
    torch.testing.assert_close(
        images, Sampler(plain, shape=SHAPE, sigma_min=0.002, sigma_max=80.0, **SHORT).run([1]).images
    )


def test_samples_may_be_single_numbers():
    with ContinuousSampler(plain, rows=2, shape=()) as engine:
        images = engine.submit([1, 2], **SHORT).result(SOON).images
    torch.testing.assert_close(images, Sampler(plain, shape=(), **SHORT).run([1, 2]).images)


class Packed(torch.nn.Module):
    """A network that takes few at once, as compiled ones do; with two classes."""

    label_dim, batch_range = 2, (1, 4)

    def forward(self, x, sigma, labels):
        assert 1 <= len(x) <= 4
        return plain(x, sigma) + 0.1 * labels[:, :1, None, None]


def test_ticks_are_no_larger_than_a_compiled_network_takes():
    with pytest.raises(ConfigError, match=r"batches of 1 to 4, and ticks would have 1 to 5 rows; pass rows=4"):
        ContinuousSampler(Packed(), rows=5, shape=SHAPE)
    asked = {"class_labels": 0, "guidance_scale": 2.0}
    with ContinuousSampler(Packed(), rows=4, shape=SHAPE, verify=False) as engine:  # with the halves 8
        images = engine.submit([1, 2, 3, 4], **asked, **SHORT).result(SOON).images
        stats = engine.stats()
    assert stats.evaluated == 2 * stats.evaluations == 24
    alone = Sampler(Packed(), shape=SHAPE, verify=False, **SHORT)
    torch.testing.assert_close(images, torch.cat([alone.run([seed], **asked).images for seed in (1, 2, 3, 4)]))


def test_a_predictor_of_another_network_fails_nobody_else(gate):
    def denoise(x, sigma):
        return gate(x, sigma), x[:, :, :2, :2]

    engine = gated(denoise, rows=4)
    gate.open.clear()
    other = engine.submit(2, solver="ipndm", nfe=8)
    gate.open.set()
    with pytest.raises(ConfigError, match=r"bottleneck features \(B, C, 4, 4\)"):
        engine.submit(1, nfe=4, predictor=AMEDPredictor(bottleneck=(4, 4)))
    assert engine.submit(1, nfe=4, predictor=AMEDPredictor(bottleneck=(2, 2))).result(SOON).backend == "ticks"
    assert len(other.result(SOON).images) == 2
    engine.close()


def test_a_sample_that_cannot_start_fails_alone(gate, engine, monkeypatch):
    gate.open.clear()
    fine = engine.submit(1, **SHORT)
    while not gate.calls:
        time.sleep(0.001)
    broken = engine.submit(1, **SHORT)
    order = next(order for order in engine._loop._orders if order.future is broken)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(order, "starts", fail)
    gate.open.set()
    with pytest.raises(MemoryError):
        broken.result(SOON)
    assert len(fine.result(SOON).images) == 1


# ---- what is not wanted any more


def test_an_engine_lives_until_what_it_was_asked_for_is_done(gate):
    gate.open.clear()
    engine = gated(gate, rows=2)
    dropped, future = weakref.ref(engine), engine.submit(5, **SHORT)
    del engine
    gc.collect()
    gate.open.set()
    assert len(future.result(SOON).images) == 5
    until = time.monotonic() + SOON
    while dropped() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert dropped() is None


def test_a_program_whose_sample_was_cancelled_ends(gate):
    """A predictor says the next noise level; a tick without predictors would tell the network 0 of such a row."""
    told = []

    def noted(x, sigma):
        told.extend(sigma.tolist())
        return gate(x, sigma)

    predictor = AMEDPredictor(0.1, 0.0, bottleneck=(8, 8))
    engine = ContinuousSampler(noted, rows=4, buckets=(4,), shape=SHAPE, verify=False)
    learned = engine.submit(2, nfe=60, solver="amed", predictor=predictor, afs=False)
    until = time.monotonic() + SOON
    while gate.calls < 3 and time.monotonic() < until:
        time.sleep(0.001)
    gate.open.clear()
    assert learned.cancel()
    gate.open.set()
    assert len(engine.submit(1, **SHORT).result(SOON).images) == 1
    engine.close(timeout=SOON)
    assert min(told) > 0
