"""Whole-loop capture: what replays give, what they cost in memory, and what cannot disturb them.

What a double of the GPU can show runs on that too, so that these tests themselves are run where there is no GPU.
"""

import copy
import gc
import random
import threading

import pytest
import torch

from amed_engine import AMEDPredictor, Midpoint, Sampler, StaleGraphError, make_schedule, make_solver
from amed_engine.adapters import load_package, save_package
from amed_engine.engine.capture import CudaDevice
from amed_engine.engine.graphs import GraphCache, graph_key
from amed_engine.networks import EDMPrecond
from amed_engine.sampling.denoiser import as_denoised
from amed_engine.sampling.loop import integrate
from amed_engine.solvers.program import Program

CUDA = torch.device("cuda", 0)
SIZES = (8, 4, 1)
TRAINING_FREE = ("euler", "heun", "dpm", "ipndm", "deis", "dpmpp", "unipc")
PLUGINS = ("amed", "euler", "dpm", "ipndm", "deis", "dpmpp", "unipc")


class Place:
    """Where graphs are captured: a GPU, or its double on the CPU."""

    def __init__(self, double=None):
        self.double, self.device = double, CUDA if double is None else torch.device("cpu")

    def capture(self):
        return CudaDevice(CUDA) if self.double is None else self.double

    def graphed(self, model, *arguments, **options):
        settings = {"nfe": 4, "batch_sizes": SIZES, "check_finite": False, "device": self.device}
        if not arguments and "solver" not in options:
            settings["solver"] = "ipndm"
        settings |= {"backend": "graph" if self.double is None else "eager"} | options
        sampler = Sampler(model, *arguments, **settings)
        if self.double is not None and "backend" not in options:
            runner = sampler._runner
            runner.cache = GraphCache(
                self.double, settings["batch_sizes"], runner.model.module, warmups=1, stats=runner.stats
            )
        return sampler

    def eager(self, model, *arguments, **options):
        return self.graphed(model, *arguments, **({"backend": "eager"} | options))

    def noise(self, batch, shape=(1, 8, 8), seed=None):
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        return torch.randn(batch, *shape, device=self.device, generator=generator)

    def times(self, count):
        """How often to repeat what is random on a GPU alone."""
        return range(count if self.double is None else 2)

    def poison(self):
        """Fill what the allocator calls free with NaN, small blocks and large ones."""
        if self.double is None:
            junk = [torch.full((2**k,), float("nan"), device=CUDA) for k in range(7, 24) for _ in range(16)]
            torch.cuda.synchronize()
            del junk


@pytest.fixture(params=["double", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request):
    return Place(request.getfixturevalue("double") if request.param == "double" else None)


GPU = Place()
graphed, eager, noise, poison = GPU.graphed, GPU.eager, GPU.noise, GPU.poison


@pytest.fixture
def device(request):
    """Of the models: the place's, where the test has one."""
    return request.getfixturevalue("place").device if "place" in request.fixturenames else CUDA


@pytest.fixture
def model(tiny_model, device):
    return tiny_model.to(device).requires_grad_(False)


@pytest.fixture
def conditional(tiny_conditional, device):
    return tiny_conditional.to(device).requires_grad_(False)


@pytest.fixture
def predictor():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AMEDPredictor(scale_dir=0.05, scale_time=0.2, bottleneck=(4, 4))


@pytest.fixture(scope="module")
def wide_model():
    """Large enough for its activations to decide the memory, not the allocator's granularity."""
    torch.manual_seed(0)
    network = EDMPrecond(32, 3, model_type="SongUNet", model_channels=64, num_blocks=1, sigma_min=0.002, sigma_max=80.0)
    return network.to(CUDA).eval().requires_grad_(False)


def assert_near(images, expected):
    """Up to the rounding of kernels chosen for another batch size."""
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def in_buckets(plain, x):
    """What an eager sampler makes of the pieces, padded as they are for graphs.

    Other batch sizes have other kernels, whose rounding some solvers make hundreds of times larger.
    """
    images = []
    for part in x.split(max(SIZES)):
        missing = min(size for size in SIZES if size >= len(part)) - len(part)
        padded = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
        images.append(plain.run(padded).images[: len(part)])
    return torch.cat(images)


# ---- the same samples


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("learned", [False, True], ids=["ipndm", "amed"])
def test_a_hundred_replays_equal_eager_runs_to_the_last_bit(place, model, predictor, batch, learned):
    arguments = (predictor,) if learned else ()
    options = {"nfe": 5 if learned else 4}
    graph, plain = place.graphed(model, *arguments, **options), place.eager(model, *arguments, **options)
    rounds = place.times(100)
    for _ in rounds:
        x = place.noise(batch)
        assert torch.equal(graph.run(x).images, plain.run(x).images)
    assert graph.stats().replays == len(rounds)


@pytest.mark.parametrize("solver", TRAINING_FREE)
def test_every_solver_is_captured(place, model, solver):
    graph, plain = place.graphed(model, solver=solver), place.eager(model, solver=solver)
    for batch in (1, 3, 8, 11):
        x = place.noise(batch)
        result = graph.run(x)
        assert result.backend == "graph"
        assert torch.equal(result.images, in_buckets(plain, x))


@pytest.mark.parametrize("solver", PLUGINS)
def test_every_learned_program_is_captured(place, model, predictor, solver):
    """Coefficients are made on the device then: nothing in them may come from the host."""
    graph, plain = (
        place.graphed(model, predictor, solver=solver, nfe=5),
        place.eager(model, predictor, solver=solver, nfe=5),
    )
    for batch in (1, 3, 8, 11):
        x = place.noise(batch)
        assert torch.equal(graph.run(x).images, in_buckets(plain, x))


@pytest.mark.parametrize("points", [1, 2])
def test_static_midpoints_are_captured(place, model, points):
    """EPD: several points in one batched call, coefficients known beforehand."""
    middle = Midpoint(*(torch.tensor(values[:points]).squeeze() for values in ([0.3, 0.6], [0.5, 0.49], [0.9, 1.0])))
    levels = make_schedule("time_uniform", 4, 0.002, 80.0)
    program = Program.build(make_solver("amed", points=points), levels, [middle] * 3, afs=True)
    program = program.on(place.device, torch.float32)
    cache = GraphCache(place.capture(), SIZES, model)

    def loop(latents, labels):
        return integrate(program, lambda x, sigma: as_denoised(model(x, sigma)), latents * program.sigmas[0])[-1]

    with torch.no_grad():
        for batch in SIZES:
            x = place.noise(batch)
            images = cache.run(graph_key(None, x, None, model), loop, x, None)
            assert images is not None
            assert torch.equal(images, loop(x, None))


@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_mean_of_each_class_is_captured(place, conditional, scale):
    """Which mean a sample starts about follows from the labels of the replay."""
    graph, plain = (made(conditional, solver="ipndm", afs="mean") for made in (place.graphed, place.eager))
    assert graph.plan == plain.plan
    for k in place.times(5):
        x, labels = place.noise(4), torch.randint(10, (4,))
        drawn = graph.run(x, labels, guidance_scale=scale)
        assert drawn.backend == "graph"
        assert torch.equal(drawn.images, plain.run(x, labels, guidance_scale=scale).images), k


@pytest.mark.parametrize("guidance", [None, 1.0, 2.5])
def test_labels_and_guidance_are_captured(place, conditional, guidance):
    graph, plain = place.graphed(conditional), place.eager(conditional)
    for k in place.times(20):
        x, labels = place.noise(4), torch.randint(10, (4,))
        images = graph.run(x, class_labels=labels, guidance_scale=guidance).images
        assert torch.equal(images, plain.run(x, class_labels=labels, guidance_scale=guidance).images), k


def assert_captured(place, program, model, *arguments, batches=(8, 4, 1, 3), **options):
    facts = {"shape": (1, 8, 8), "sigma_min": 0.002, "sigma_max": 80.0}
    graph = place.graphed(program, *arguments, **options, **facts)
    options.pop("compile", None)
    plain = place.eager(model, *arguments, **options, **facts)
    for batch in batches:
        x = place.noise(batch)
        result = graph.run(x)
        assert result.backend == "graph"
        torch.testing.assert_close(result.images, plain.run(x).images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["torchscript", "exported"])
def test_programs_of_torch_are_captured(place, model, kind):
    x, sigma = place.noise(4), torch.ones(4, device=place.device)
    if kind == "torchscript":
        program = torch.jit.trace(model, (x, sigma))
    else:
        batch = {0: torch.export.Dim("batch", min=1)}
        program = torch.export.export(model, (x, sigma), dynamic_shapes=(batch, batch))
    assert_captured(place, program, model, solver="ipndm")


@pytest.mark.gpu
@pytest.mark.parametrize("learned", [False, True], ids=["ipndm", "amed"])
def test_compiled_networks_are_captured(model, predictor, learned):
    options = {"nfe": 5} if learned else {"solver": "ipndm"}
    assert_captured(GPU, model, model, *([predictor] if learned else []), compile="default", **options)


@pytest.mark.gpu
def test_packages_of_aotinductor_are_captured(model, predictor, tmp_path):
    """Their device is "cuda" without a number: latents of cuda:0 are for it all the same."""
    package = load_package(save_package(model, tmp_path / "model.pt2", max_batch=8))
    assert_captured(GPU, package, model, solver="ipndm", device=None)
    assert_captured(GPU, package, model, predictor, nfe=5, verify=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_the_arithmetic_but_not_the_state(place, model, dtype):
    x, solver = place.noise(4), "euler"  # the others make more of the network's rounding
    narrow = place.graphed(model, solver=solver, autocast=dtype).run(x).images
    wide = place.eager(model, solver=solver).run(x).images
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0.1 * wide.abs().max().item())
    assert torch.equal(narrow, place.eager(model, solver=solver, autocast=dtype).run(x).images)


def test_autocast_of_the_caller_keeps_no_stale_copies_of_weights(place, model):
    """Autocast caches its casts of weights that want gradients; a graph must not read that cache."""
    model.requires_grad_(True)
    graph, plain = place.graphed(model), place.eager(model)
    x = place.noise(4)
    for _ in range(3):
        with torch.autocast(place.device.type, torch.bfloat16):
            images = graph.run(x).images
        with torch.autocast(place.device.type, torch.bfloat16):
            assert torch.equal(images, plain.run(x).images)
        place.poison()
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)


# ---- the cache


def test_each_batch_size_is_captured_once(place, conditional):
    sampler = place.graphed(conditional)
    for batch in range(1, 20):
        sampler.run(place.noise(batch), class_labels=1)
    assert sampler.stats().captures == len(SIZES)
    for batch in range(1, 20):
        sampler.run(place.noise(batch), class_labels=1, guidance_scale=2.0)
    assert sampler.stats().captures == 2 * len(SIZES)
    assert sampler.stats().eager_runs == 0


def test_a_result_is_not_changed_by_later_runs(place, model):
    sampler = place.graphed(model)
    results = [sampler.run(place.noise(4)).images for _ in range(10)]
    kept = [images.clone() for images in results]
    for batch in (1, 4, 8, 20):
        sampler.run(place.noise(batch))
    assert all(torch.equal(images, copied) for images, copied in zip(results, kept, strict=True))


def test_weights_changed_in_place_are_seen(place, model):
    graph, plain, x = place.graphed(model), place.eager(model), place.noise(4)
    before = graph.run(x).images
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    after = graph.run(x).images
    assert not torch.equal(before, after)
    assert torch.equal(after, plain.run(x).images)


@pytest.mark.parametrize("change", ["assign", "move", "load"])
def test_weights_that_left_their_place_raise_instead_of_replaying(place, model, change):
    sampler, old = place.graphed(model), []
    sampler.run(place.noise(2))
    name, parameter = next(iter(model.named_parameters()))
    if change == "assign":
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(parameter.detach().clone()))
    elif change == "move":
        old += [parameter.data for parameter in model.parameters()]  # kept: the allocator may hand out its place again
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    else:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(StaleGraphError):
        sampler.run(place.noise(2))
    sampler.clear_graphs()
    x = place.noise(2)
    assert_near(sampler.run(x).images, place.eager(model).run(x).images)


@pytest.mark.gpu
def test_a_sampler_that_was_placed_on_cuda_takes_latents_from_there(model):
    assert graphed(model, device="cuda").run(noise(2)).backend == "graph"


@pytest.mark.gpu
def test_constants_of_a_program_outlive_the_run_that_made_them():
    """With guidance the bundled predictor steps aside for a program made on the spot; its graph reads those numbers."""
    graph, plain = (Sampler("digits", nfe=5, device=CUDA, backend=backend) for backend in ("graph", "eager"))
    for seed in range(5):
        images = graph.run([seed], guidance_scale=2.0).images
        poison()
        assert_near(images, plain.run([seed], guidance_scale=2.0).images)


# ---- memory


def reserved_by(model, sizes):
    torch.cuda.synchronize()
    gc.collect()  # a capture collects too: what earlier tests left must not go then
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    sampler = graphed(model, batch_sizes=sizes)
    report = sampler.warmup()
    assert [bucket.batch for bucket in report.buckets] == sorted(sizes, reverse=True)
    torch.cuda.empty_cache()
    return sampler, torch.cuda.memory_reserved() - before


@pytest.mark.gpu
def test_small_batch_sizes_share_the_memory_of_the_largest(wide_model):
    sampler, alone = reserved_by(wide_model, (64,))
    sampler.clear_graphs()
    del sampler
    _, shared = reserved_by(wide_model, (64, 8, 1))
    assert shared <= 1.1 * alone


@pytest.mark.gpu
def test_clearing_gives_the_memory_back(wide_model):
    # Large beside the workspaces of libraries, which stay: other graphs may use them.
    sampler, used = reserved_by(wide_model, (256, 8))
    with_graphs = torch.cuda.memory_reserved()
    sampler.clear_graphs()
    assert torch.cuda.memory_reserved() <= with_graphs - 0.9 * used


@pytest.mark.gpu
def test_a_thousand_mixed_runs_do_not_grow_memory(conditional):
    sampler, shuffled = graphed(conditional), random.Random(0)

    gc.collect()

    def some(runs):
        for _ in range(runs):
            guidance = shuffled.choice([None, 2.0])
            sampler.run(noise(shuffled.randint(1, 20)), class_labels=3, guidance_scale=guidance)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = some(200)
    assert some(1000) == before


@pytest.mark.gpu
def test_out_of_memory_during_capture_leaves_the_engine_usable(wide_model):
    sampler = graphed(wide_model, batch_sizes=(64,))
    device, total = sampler._runner.cache.device, torch.cuda.get_device_properties(CUDA).total_memory
    stream, record = torch.cuda.current_stream(), device.record

    def starved(work):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        return record(work)

    device.record = starved
    try:
        with pytest.raises(torch.OutOfMemoryError):
            sampler.run(noise(8, (3, 32, 32)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        device.record = record
    assert torch.cuda.current_stream() == stream
    x = noise(64, (3, 32, 32))
    result = sampler.run(x)
    assert result.backend == "graph"
    assert torch.equal(result.images, eager(wide_model).run(x).images)


# ---- the host, threads and streams


@pytest.mark.gpu
def test_a_wait_for_the_device_is_an_error_where_none_is_allowed():
    """What the three tests below stand on: they assert nothing else."""
    x = noise(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("learned", [False, True], ids=["ipndm", "amed"])
def test_a_run_never_waits_for_the_device(model, predictor, learned):
    arguments = (predictor,) if learned else ()
    sampler = graphed(model, *arguments, nfe=5)
    inputs = [noise(batch) for batch in (1, 3, 8, 20)]
    out = torch.empty_like(inputs[2])
    sampler.warmup()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in inputs:
            sampler.run(x)
        sampler.run(inputs[2], out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_labels_from_the_host_do_not_wait_for_the_device(conditional):
    sampler, x, labels = graphed(conditional), noise(4), torch.randint(10, (4,))
    sampler.run(x, class_labels=labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.run(x, class_labels=labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_an_eager_learned_run_never_waits_for_the_device_either(model, predictor):
    """The condition for being captured, told apart from capture itself."""
    sampler, x = eager(model, predictor, nfe=5), noise(4)
    sampler.run(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_threads(*works):
    """Run them at once; the first exception of any is raised here."""
    failures = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.gpu
@pytest.mark.parametrize("own_streams", [False, True], ids=["one-stream", "own-streams"])
def test_eight_threads_get_what_one_thread_gets(model, own_streams):
    sampler = graphed(model)
    inputs = [[noise(1 + (t + k) % 10, seed=100 * t + k) for k in range(25)] for t in range(8)]
    expected = [[sampler.run(x).images for x in part] for part in inputs]
    got = [[] for _ in inputs]
    torch.cuda.synchronize()

    def work(t):
        stream = torch.cuda.Stream() if own_streams else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            got[t].extend(sampler.run(x).images for x in inputs[t])
            stream.synchronize()

    in_threads(*(lambda t=t: work(t) for t in range(8)))
    for mine, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert sampler.stats().captures == len(SIZES)


@pytest.mark.gpu
def test_streams_that_take_turns_do_not_overtake_each_other(model):
    sampler, streams = graphed(model), [torch.cuda.Stream() for _ in range(2)]
    inputs = [noise(4) for _ in range(50)]
    expected = [sampler.run(x).images for x in inputs]
    torch.cuda.synchronize()
    got = []
    for k, x in enumerate(inputs):
        with torch.cuda.stream(streams[k % 2]):
            got.append(sampler.run(x).images)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_two_samplers_on_two_streams_do_not_disturb_each_other(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    pair = [(graphed(net), eager(net), torch.cuda.Stream()) for net in (model, other)]
    inputs = [noise(8) for _ in range(30)]
    torch.cuda.synchronize()
    got = [[], []]
    for x in inputs:
        for results, (sampler, _, stream) in zip(got, pair, strict=True):
            with torch.cuda.stream(stream):
                results.append(sampler.run(x).images)
    torch.cuda.synchronize()
    for results, (_, plain, _) in zip(got, pair, strict=True):
        assert all(torch.equal(images, plain.run(x).images) for images, x in zip(results, inputs, strict=True))


@pytest.mark.gpu
def test_two_samplers_may_capture_at_the_same_time(model):
    samplers, plain, x = [graphed(model), graphed(copy.deepcopy(model))], eager(model), noise(4)
    for _ in range(5):
        in_threads(*(sampler.warmup for sampler in samplers))
        for sampler in samplers:
            assert torch.equal(sampler.run(x).images, plain.run(x).images)
            sampler.clear_graphs()


@pytest.mark.gpu
def test_another_thread_may_allocate_during_capture(model):
    sampler, plain, x, done = graphed(model), eager(model), noise(4), threading.Event()

    def allocate():
        k = 0
        while not done.is_set():
            k += 1
            torch.empty(1 + k % 64, 2**17, device=CUDA).fill_(float("nan"))

    def capture():
        try:
            for _ in range(5):
                sampler.clear_graphs()
                sampler.warmup()
        finally:
            done.set()

    in_threads(allocate, capture)
    assert torch.equal(sampler.run(x).images, plain.run(x).images)


@pytest.mark.gpu
def test_clearing_one_sampler_leaves_another_intact(model, predictor):
    """Both may use library workspaces that one of them would free."""
    kept, cleared = graphed(model, predictor, nfe=5), graphed(copy.deepcopy(model), predictor, nfe=5)
    plain, x = eager(model, predictor, nfe=5), noise(8)
    kept.run(x)
    cleared.run(x)
    cleared.clear_graphs()
    poison()
    for _ in range(10):
        x = noise(8)
        assert torch.equal(kept.run(x).images, plain.run(x).images)


@pytest.mark.gpu
def test_workspaces_that_others_clear_are_not_the_graphs(model, predictor):
    """torch.compile's own graphs clear those of all matrix products whenever they are made."""
    sampler, plain = graphed(model, predictor, nfe=5), eager(model, predictor, nfe=5)
    sampler.warmup()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    poison()
    for _ in range(10):
        x = noise(8)
        assert torch.equal(sampler.run(x).images, plain.run(x).images)


@pytest.mark.gpu
def test_inside_a_capture_of_the_caller_the_loop_is_recorded_into_it(model):
    sampler, x = graphed(model), noise(4)
    sampler.warmup()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager(model).run(x)  # what will be recorded, not a replay: it makes workspaces of this stream
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        result = sampler.run(x)
    assert result.backend == "eager"
    fresh = noise(4)
    x.copy_(fresh)
    graph.replay()
    assert torch.equal(result.images, eager(model).run(fresh).images)


@pytest.mark.gpu
def test_the_global_generators_are_not_touched(model):
    sampler = graphed(model)
    sampler.warmup()
    before = torch.cuda.get_rng_state(CUDA)
    sampler.run([1, 2, 3])
    assert torch.equal(torch.cuda.get_rng_state(CUDA), before)
