"""The graph cache against a double of CUDA's capture: which graphs are made, when, and what a batch gets from them."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from amed_engine import (
    AmedError,
    ConfigError,
    NonFiniteError,
    Sampler,
    StaleGraphError,
    distill,
    kernels,
    make_plan,
    sample,
)
from amed_engine.engine.capture import CudaDevice
from amed_engine.engine.graphs import GraphCache, Stats, graph_key
from amed_engine.engine.resolve import resolve
from amed_engine.training.batches import Batches
from amed_engine.training.teacher import Teacher

SIZES = (2, 8, 4)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, latents, labels):
        shift = 0 if labels is None else labels.sum(1).view(-1, 1)
        return self.weight.detach() * latents + shift


@pytest.fixture
def cache(double):
    return GraphCache(double, SIZES, Scale())


def draw(cache, batch, labels=None, guidance=None):
    latents = torch.randn(batch, 3)
    images = cache.run(graph_key(guidance, latents, labels, cache.module), cache.module, latents, labels)
    if images is None:
        return "none"
    torch.testing.assert_close(images, cache.module(latents, labels), rtol=0, atol=0)
    return "graph"


def test_any_batch_is_right_whether_padded_or_split(cache):
    for batch in range(1, 8 + 8):
        assert draw(cache, batch) == "graph"
        assert draw(cache, batch, torch.rand(batch, 5)) == "graph"
    assert cache.stats.captures == 2 * len(SIZES)
    assert cache.stats.replays == 2 * (8 + 2 * 7)  # one graph up to the largest size, two above


def test_all_warm_ups_come_before_the_first_capture_and_the_largest_is_captured_first(cache):
    draw(cache, 3)
    warm = [size for what, size in cache.device.log if what == "warm"]
    recorded = [size for what, size in cache.device.log if what == "record"]
    assert recorded == [8, 4, 2]
    assert warm == [8, 4, 2] * 3
    work = [what for what, _ in cache.device.log if what in ("warm", "record")]
    assert work[:12] == ["warm"] * 9 + ["record"] * 3


def test_warm_up_reports_each_batch_size_and_a_run_captures_nothing_more(cache):
    example = torch.randn(1, 3)
    report = cache.warmup(graph_key(None, example, None, cache.module), cache.module, example, None)
    assert [bucket.batch for bucket in report.buckets] == [8, 4, 2]
    assert all(bucket.bitwise and bucket.reserved_bytes == 100 and bucket.seconds >= 0 for bucket in report.buckets)
    draw(cache, 5)
    assert cache.stats.captures == 3
    assert cache.warmup(graph_key(None, example, None, cache.module), cache.module, example, None).buckets == ()


def test_static_buffers_are_only_used_between_begin_and_end(cache):
    draw(cache, 3)
    cache.device.log.clear()
    draw(cache, 11)
    assert [what for what, _ in cache.device.log] == ["begin", "end"]


def test_a_result_is_not_changed_by_later_runs(cache):
    latents = [torch.randn(4, 3) for _ in range(10)]
    key = graph_key(None, latents[0], None, cache.module)
    results = [cache.run(key, cache.module, x, None) for x in latents]
    for x, images in zip(latents, results, strict=True):
        torch.testing.assert_close(images, 2 * x, rtol=0, atol=0)


def test_weights_changed_in_place_are_seen(cache):
    draw(cache, 2)
    with torch.no_grad():
        cache.module.weight.fill_(5.0)
    assert draw(cache, 2) == "graph"


@pytest.mark.parametrize("change", ["assign", "move", "delete"])
def test_weights_that_left_their_place_raise_instead_of_replaying(cache, change):
    draw(cache, 2)
    if change == "assign":
        cache.module.weight = nn.Parameter(torch.tensor(3.0))
    elif change == "move":
        cache.module.weight.data = torch.tensor(2.0)
    else:
        old, cache.module._parameters["weight"] = cache.module.weight, None
    with pytest.raises(StaleGraphError, match="'weight' was re-assigned or moved"):
        cache.run(graph_key(None, torch.ones(2, 3), None, cache.module), cache.module, torch.ones(2, 3), None)
    if change == "delete":
        cache.module._parameters["weight"] = old
    cache.clear()
    assert draw(cache, 2) == "graph"


def test_a_module_put_in_the_place_of_another_raises_instead_of_replaying(double):
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"last": nn.Linear(3, 3)}))
    cache, latents = GraphCache(double, SIZES, model), torch.randn(2, 3)

    def run():
        return cache.run(graph_key(None, latents, None, model), lambda x, labels: model[1]["last"](x), latents, None)

    with torch.no_grad():
        run()
        model[1]["last"] = nn.Linear(3, 3)  # the one before lives on in no place that a replay could ask
        with pytest.raises(StaleGraphError, match="module 'last' was replaced"):
            run()
        cache.clear()
        assert run() is not None


def test_static_buffers_live_until_the_device_is_done_with_them(cache, monkeypatch):
    draw(cache, 2)
    graphs = []  # how many there are at each call
    for name in ("wait", "drop"):
        monkeypatch.setattr(
            cache.device, name, lambda *_: graphs.append(sum(len(c.graphs) for c in cache._captured.values()))
        )
    cache.clear()
    assert graphs == [3, 0]


@pytest.mark.parametrize("error", [None, ValueError("no"), torch.OutOfMemoryError("no")])
def test_a_capture_makes_workspaces_of_its_own_and_leaves_none_to_others(monkeypatch, error):
    """Those that others may clear, as torch.compile's graphs do, would be freed under the graph."""
    log = []

    @contextmanager
    def graph(*_, **settings):
        log.append(settings["capture_error_mode"])
        yield

    def work():
        log.append("work")
        if error is not None:
            raise error
        return "output"

    stand_ins = {
        "device": lambda _: nullcontext(),
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(pool=int, reset=lambda: log.append("reset")),
    }
    stand_ins |= dict.fromkeys(
        ("Stream", "Event", "graph_pool_handle", "current_stream", "set_stream"), lambda *_: None
    )
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: log.append("clear"), raising=False)
    device = CudaDevice(torch.device("cuda", 0))
    with nullcontext() if error is None else pytest.raises(type(error)):
        assert device.record(work)[1] == "output"
    failed = ["reset"] if isinstance(error, RuntimeError) else []
    assert log == ["clear", "thread_local", "work", *failed, "clear"]


def test_above_the_cap_there_is_no_graph(double):
    cache = GraphCache(double, SIZES, Scale(), max_graphs=5)
    assert draw(cache, 2) == "graph"
    assert draw(cache, 2, guidance=2.0) == "none"
    assert cache.stats.captures == 3
    assert draw(cache, 2) == "graph"


def test_inside_another_capture_nothing_is_captured(cache):
    draw(cache, 2, torch.rand(2, 5))
    cache.device.log.clear()
    cache.device.outer, example = True, torch.randn(1, 3)
    assert draw(cache, 2) == "none"
    assert draw(cache, 2, torch.rand(2, 5)) == "none"  # nor replayed
    assert cache.warmup(graph_key(None, example, None, None), cache.module, example, None).backend == "eager"
    assert cache.device.log == []


def test_what_changes_the_kernels_changes_the_key(cache):
    latents = torch.randn(2, 3)
    plain = graph_key(None, latents, None, cache.module)
    others = [
        graph_key(2.0, latents, None, cache.module),
        graph_key(None, latents, torch.rand(2, 5), cache.module),
        graph_key(None, latents.double(), None, cache.module),
        graph_key(None, latents[:, :2], None, cache.module),
    ]
    with torch.no_grad():
        others.append(graph_key(None, latents, None, cache.module))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if before == "highest" else "highest")
    others.append(graph_key(None, latents, None, cache.module))
    torch.set_float32_matmul_precision(before)
    cache.module.eval()
    others.append(graph_key(None, latents, None, cache.module))
    assert len({plain, *others}) == len(others) + 1


def test_the_loop_and_its_constants_live_as_long_as_its_graphs(cache):
    class Loop:
        def __call__(self, latents, labels):
            return latents + 1

    loop, latents = Loop(), torch.randn(2, 3)
    cache.run(graph_key(None, latents, None, None), loop, latents, None)
    alive = weakref.ref(loop)
    del loop
    gc.collect()
    assert alive() is not None


def test_a_replay_that_fails_still_frees_the_static_buffers(cache):
    draw(cache, 2)
    cache.device.recordings[-1].alive = False
    with pytest.raises(AssertionError, match="replayed after reset"):
        draw(cache, 2)
    assert cache.device.log[-1] == ("end", None)


def test_traced_modules_can_be_checked_for_stale_weights(cache):
    cache.module = torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))
    latents = torch.randn(2, 3)
    for _ in range(2):
        cache.run(graph_key(None, latents, None, cache.module), lambda x, labels: 2 * x, latents, None)
    assert cache.stats.captures == 3


def test_a_capture_that_fails_half_way_leaves_nothing_behind(cache):
    cache.device.fail_at = 1
    with pytest.raises(torch.OutOfMemoryError):
        draw(cache, 2)
    assert cache.device.log[-1] == ("drop", None)
    assert not cache.device.recordings[0].alive
    cache.device.fail_at = None
    assert draw(cache, 2) == "none"  # not tried again, batch after batch
    cache.clear()
    assert draw(cache, 2) == "graph"


def test_a_graph_that_does_not_reproduce_the_eager_result_is_refused(cache):
    cache.device.broken = True
    with pytest.raises(AmedError, match="does not reproduce the eager result"):
        draw(cache, 2)


def test_clear_resets_every_graph_and_the_next_run_captures_again(cache):
    draw(cache, 2)
    cache.clear()
    assert not any(recording.alive for recording in cache.device.recordings)
    assert draw(cache, 2) == "graph"
    assert cache.stats.captures == 6


def test_threads_get_what_one_thread_gets(cache):
    inputs = [torch.randn(1 + i % 11, 3) for i in range(200)]
    key = graph_key(None, inputs[0], None, cache.module)

    def work(part):
        return [torch.equal(cache.run(key, cache.module, x, None), 2 * x) for x in part]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, [inputs[k::8] for k in range(8)])) == [[True] * 25] * 8
    assert cache.stats.captures == 3


@pytest.mark.parametrize("sizes", [(), (0,), (-1, 4), (2.5,), (True,)])
def test_batch_sizes_must_be_positive_integers(double, sizes):
    with pytest.raises(ConfigError, match="batch_sizes must be positive integers"):
        GraphCache(double, sizes, None)


@pytest.fixture
def sampler(tiny_conditional, double):
    """A Sampler that captures through the double."""
    sampler = Sampler(tiny_conditional, solver="ipndm", nfe=3, backend="eager")
    sampler._runner.cache = GraphCache(double, (1, 4), tiny_conditional, stats=sampler._runner.stats)
    return sampler


def test_a_sampler_says_that_a_graph_ran_and_gives_the_eager_images(sampler, tiny_conditional):
    eager = Sampler(tiny_conditional, solver="ipndm", nfe=3)
    for guidance in (None, 2.0):
        result = sampler.run(range(6), guidance_scale=guidance)
        assert result.backend == "graph"
        torch.testing.assert_close(result.images, eager.run(range(6), guidance_scale=guidance).images)
    assert sampler.stats() == Stats(captures=4, replays=4, eager_runs=0)


def test_what_the_cache_has_no_graph_for_runs_eagerly_and_is_counted(sampler, tiny_conditional):
    sampler._runner.cache.max_graphs = 2
    expected = Sampler(tiny_conditional, solver="ipndm", nfe=3).run(range(4), guidance_scale=2.0)
    before = sampler.stats()
    assert sampler.run(4).backend == "graph"
    result = sampler.run(range(4), guidance_scale=2.0)
    assert (result.backend, sampler.stats()) == ("eager", Stats(captures=2, replays=1, eager_runs=1))
    assert torch.equal(result.images, expected.images)
    sampler._runner.cache.device.outer = True
    assert sampler.run(4).backend == "eager"
    assert (before, sampler.stats()) == (Stats(), Stats(captures=2, replays=1, eager_runs=2))


def test_runs_of_many_threads_are_all_counted(tiny_model):
    class Slow(Stats):
        def __setattr__(self, name, value):
            time.sleep(1e-3)  # long enough for every other thread to read the count that is about to change
            super().__setattr__(name, value)

    sampler = Sampler(tiny_model, solver="euler", nfe=1)
    sampler._runner.stats = Slow()
    threads = [threading.Thread(target=lambda: [sampler.run(1) for _ in range(4)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sampler.stats().eager_runs == 4 * 8


def test_a_sampler_with_a_callback_runs_eagerly_and_says_so(sampler):
    seen = []
    assert sampler.run([1], callback=seen.append).backend == "eager"
    assert len(seen) == sampler.plan.intervals
    assert sampler.stats().eager_runs == 1


def test_warm_up_of_a_sampler_makes_its_first_run_capture_nothing(sampler):
    assert [bucket.batch for bucket in sampler.warmup().buckets] == [4, 1]
    sampler.run(4)
    assert sampler.stats().captures == 2
    sampler.clear_graphs()
    sampler.run(4)
    assert sampler.stats().captures == 4


def test_a_nan_out_of_a_graph_is_named_like_any_other(sampler, tiny_conditional):
    sampler.run([1, 2])
    with torch.no_grad():
        next(tiny_conditional.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError) as caught:
        sampler.run([7, 9])
    assert caught.value.seeds == [7, 9]
    assert sampler.stats() == Stats(captures=2, replays=2, eager_runs=1)  # which told the step


def test_running_out_of_memory_while_capturing_runs_the_batch_eagerly(sampler, caplog):
    sampler._runner.cache.device.fail_at = 0
    assert sampler.run([1, 2]).backend == "eager"
    assert "out of memory while capturing" in caplog.text


def test_backends_are_what_they_say(tiny_model):
    with pytest.raises(ConfigError, match="backend='graph' needs a CUDA device"):
        Sampler(tiny_model, solver="euler", nfe=3, backend="graph")
    with pytest.raises(ConfigError, match="backend must be one of auto, graph, eager"):
        Sampler(tiny_model, solver="euler", nfe=3, backend="turbo")
    sampler = Sampler(tiny_model, solver="euler", nfe=3)
    assert sampler.run(2).backend == "eager"
    assert sampler.warmup().backend == "eager"
    assert sampler.stats().eager_runs == 1


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compile_modes_that_capture_themselves_are_refused(tiny_model, mode):
    with pytest.raises(ConfigError, match="captures graphs of its own"):
        Sampler(tiny_model, solver="euler", nfe=3, compile=mode)


def test_autocast_and_memory_format_change_the_network_not_the_state(tiny_model):
    latents = torch.randn(2, 1, 8, 8)
    plain = Sampler(tiny_model, solver="euler", nfe=3).run(latents).images
    last = Sampler(tiny_model, solver="euler", nfe=3, memory_format=torch.channels_last).run(latents).images
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)
    half = Sampler(tiny_model, solver="euler", nfe=3, autocast=torch.bfloat16).run(latents).images
    assert half.dtype == torch.float32
    assert not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0.1)
    with pytest.raises(ConfigError, match="autocast must be"):
        Sampler(tiny_model, solver="euler", nfe=3, autocast=torch.float64)


def test_whoever_insists_on_graphs_may_try_again_after_running_out_of_memory(double):
    cache = GraphCache(double, SIZES, Scale(), insist=True)
    cache.device.fail_at = 0
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            draw(cache, 2)
    cache.device.fail_at = None
    assert draw(cache, 2) == "graph"


def test_another_implementation_of_the_kernels_has_another_key(cache):
    latents = torch.randn(2, 3)
    plain = graph_key(None, latents, None, cache.module)
    with kernels.use("reference"):
        forced = graph_key(None, latents, None, cache.module)
    assert (plain == forced) == (kernels.backends()["cuda"] == "reference")


# ---- the teacher's trajectories, in training


def batches(model, conditions=None, guidance=None):
    plan = make_plan(3, solver="amed", afs=True, guidance_scale=guidance)
    return plan, Batches(model, plan, 4, torch.Generator().manual_seed(0), conditions)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_teacher_is_captured_once_and_gives_the_eager_states(tiny_conditional, guidance, double):
    plan, data = batches(resolve(tiny_conditional), guidance=guidance)
    teacher = Teacher.of(plan, "heun", None, 1)
    eager, teacher.cache = replace(teacher), GraphCache(double, (4,), tiny_conditional)
    for _ in range(3):  # other latents and labels every time
        ((denoiser, x),) = data.draw([slice(0, 4)])
        states = teacher.states(denoiser, x)
        assert states.shape == (plan.intervals + 1, *x.shape)
        assert torch.equal(states, eager.states(denoiser, x))
        exact = sample(denoiser, x, teacher.plan.levels, teacher.plan.make_solver(), trajectory=True)
        assert torch.equal(states, exact[::2])
    assert (teacher.cache.stats.captures, teacher.cache.stats.replays) == (1, 3)


def test_conditions_given_as_denoisers_are_not_captured(tiny_model, double):
    plan, data = batches(resolve(tiny_model), [lambda x, sigma: 0.5 * x, lambda x, sigma: 0.25 * x])
    teacher = Teacher.of(plan, "euler", None, 0)
    teacher.cache = GraphCache(double, (4,), tiny_model)
    for _ in range(2):
        ((denoiser, x),) = data.draw([slice(0, 4)])
        exact = sample(denoiser, x, teacher.plan.levels, teacher.plan.make_solver(), trajectory=True)
        assert torch.equal(teacher.states(denoiser, x), exact)
    assert teacher.cache.device.log == []


@pytest.mark.parametrize("trouble", ["memory", "broken"])
def test_a_teacher_that_cannot_be_captured_says_so_and_runs_eagerly(tiny_model, trouble, caplog, double):
    plan, data = batches(resolve(tiny_model))
    teacher = Teacher.of(plan, "euler", None, 0)
    teacher.cache = cache = GraphCache(double, (4,), tiny_model)
    cache.device.fail_at, cache.device.broken = (0, False) if trouble == "memory" else (None, True)
    for _ in range(2):
        ((denoiser, x),) = data.draw([slice(0, 4)])
        exact = sample(denoiser, x, teacher.plan.levels, teacher.plan.make_solver(), trajectory=True)
        assert torch.equal(teacher.states(denoiser, x), exact)
    assert caplog.text.count("the teacher runs eagerly from here on") == 1


def test_training_by_graph_ends_in_the_bits_of_training_without(tiny_conditional, monkeypatch, double):
    caches = []

    def doubled(model, rows):
        caches.append(GraphCache(double, (rows,), model.module))
        return caches[-1]

    run = {"nfe": 3, "total_kimg": 0.008, "batch": 4, "accumulate": 2, "teacher_intermediate": 1, "progress": False}
    eager = distill(tiny_conditional, **run).state_dict()
    monkeypatch.setattr("amed_engine.training.distill._graphs", doubled)
    captured = distill(tiny_conditional, **run).state_dict()
    assert all(torch.equal(captured[name], value) for name, value in eager.items())
    assert [(c.batch_sizes, c.stats.captures, c.stats.replays) for c in caches] == [([2], 1, 4)]


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_a_captured_loop_starts_about_the_mean_of_each_class(double, tiny_conditional, guidance_scale):
    """Labels of a replay are others than those of the capture."""
    sampler = Sampler(tiny_conditional, solver="ipndm", nfe=3, afs="mean")
    eager = sampler.run([0, 1, 2], [3, 5, 7], guidance_scale=guidance_scale)
    sampler._runner.cache = GraphCache(double, (4,), None, warmups=1)
    sampler.warmup(guidance_scale=guidance_scale)
    captured = sampler.run([0, 1, 2], [3, 5, 7], guidance_scale=guidance_scale)
    assert (eager.backend, captured.backend) == ("eager", "graph")
    torch.testing.assert_close(captured.images, eager.images, rtol=1e-5, atol=1e-5)
