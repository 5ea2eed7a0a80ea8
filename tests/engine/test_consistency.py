"""`Sampler(solver="consistency")`: the noise that is added belongs to the seed; who cannot carry it says so."""

import pytest
import torch

import amed_engine
from amed_engine import ConfigError, Sampler, make_solver, sample
from amed_engine.engine.graphs import GraphCache, Stats
from amed_engine.engine.seeds import draw, draw_all
from amed_engine.evaluation.quality import evaluate
from amed_engine.integrations.diffusers import AMEDScheduler
from amed_engine.integrations.serving.hosted import Hosted

SHAPE = (1, 8, 8)


def wave(x, sigma, labels=None):
    """Any function of x and sigma that is not linear in x."""
    shift = 0 if labels is None else 0.3 * labels.argmax(1).view(-1, 1, 1, 1)
    return (x / (1 + sigma.view(-1, 1, 1, 1))).sin() + shift


def walker(model=wave, nfe=3, **options):
    return Sampler(model, solver="consistency", nfe=nfe, shape=SHAPE, **options)


# ---- seeds


def test_fresh_noise_comes_after_latent_and_label_which_stay():
    noise, labels, more = draw_all([7, 8], SHAPE, 10, 3)
    plain, classes = draw([7, 8], SHAPE, 10)
    assert torch.equal(noise, plain)
    assert torch.equal(labels, classes)
    generator = torch.Generator().manual_seed(8)
    torch.randn(SHAPE, generator=generator), torch.randint(10, (), generator=generator)
    assert torch.equal(more[1], torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(3)]))
    assert torch.equal(draw_all([7, 8], SHAPE, 10, 1)[2], more[:, :1])


def test_fresh_noise_of_seeds_is_independent_of_all_other_noise():
    noise, _, more = draw_all(range(4096), (4,), 0, 2)
    every = torch.cat([noise[:, None], more], 1).flatten(1)  # (4096, 12)
    assert (every.T.corrcoef() - torch.eye(12)).abs().max() < 0.08  # five times 1 / sqrt(4096)
    assert abs(every.std() - 1) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_seed_is_the_same_sample_to_the_last_bit_in_any_batch(dtype):
    sampler = walker(dtype=dtype)
    together = sampler.run([4, 0, 2**32 - 1, 17]).images
    assert torch.equal(sampler.run([17, 2**32 - 1, 0, 4]).images.flip(0), together)
    for row, seed in enumerate((4, 0, 2**32 - 1, 17)):
        assert torch.equal(sampler.run([seed]).images[0], together[row])


def test_a_run_is_the_walk_over_the_noises_of_its_seeds():
    sampler = walker()
    noise, _, more = draw_all([3, 1], SHAPE, 0, 2)
    levels = sampler.plan.levels
    expected = sample(wave, noise * levels[0].float(), levels, make_solver("consistency"), noises=more)
    assert torch.equal(sampler.run([3, 1]).images, expected)


def test_pieces_of_a_batch_have_their_own_noise():
    """Memory for two samples at once and no more."""

    def short(x, sigma):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return wave(x, sigma)

    with pytest.warns(RuntimeWarning, match="smaller chunks"):
        drawn = walker(short).run(range(7))
    assert drawn.chunks == 4
    assert torch.equal(drawn.images, walker().run(range(7)).images)


def test_labels_and_guidance_as_elsewhere():
    sampler = walker(label_dim=4)
    assert torch.equal(sampler.run([1, 2], class_labels=[3, 0]).images, sampler.run([2, 1], [0, 3]).images.flip(0))
    (one,) = sampler.run([1], 2, guidance_scale=1.0).images
    assert torch.allclose(one, sampler.run([1], 2).images[0], atol=1e-6)
    assert not torch.allclose(one, sampler.run([1], 2, guidance_scale=3.0).images[0], atol=1e-2)


def test_a_callback_sees_the_state_with_its_noise_and_then_the_sample():
    seen, sampler = [], walker()
    images = sampler.run([5, 6], callback=seen.append).images
    assert [step.sigma for step in seen] == list(sampler.plan.sigmas[1:])
    assert torch.equal(seen[-1].x, images)
    middle = seen[0].x - wave(draw([5, 6], SHAPE, 0)[0] * 80, torch.full((2,), 80.0))
    level = (sampler.plan.sigmas[1] ** 2 - sampler.plan.sigmas[-1] ** 2) ** 0.5
    torch.testing.assert_close(middle, level * draw_all([5, 6], SHAPE, 0, 2)[2][:, 0], rtol=1e-5, atol=1e-5)


# ---- graphs


@pytest.mark.parametrize("nfe", [1, 3])
def test_graphs_take_the_noises_as_inputs_and_give_the_eager_samples(nfe, double):
    sampler = walker(nfe=nfe, label_dim=4)
    sampler._runner.cache = GraphCache(double, (1, 4), None, stats=sampler._runner.stats)
    eager = walker(nfe=nfe, label_dim=4)
    for count in (1, 3, 4, 6, 11):  # padded, exact and split
        drawn = sampler.run(range(count))
        assert drawn.backend == "graph"
        assert torch.equal(drawn.images, eager.run(range(count)).images)
    assert sampler.stats() == Stats(captures=2, replays=1 + 1 + 1 + 2 + 3, eager_runs=0)


def test_warm_up_captures_what_runs_replay(double):
    sampler = walker()
    sampler._runner.cache = GraphCache(double, (1, 4), None, stats=sampler._runner.stats)
    assert [bucket.batch for bucket in sampler.warmup().buckets] == [4, 1]
    assert torch.equal(sampler.run([3]).images, walker().run([3]).images)
    assert sampler.stats() == Stats(captures=2, replays=1)


# ---- who cannot carry it


def test_latents_have_no_seeds_to_draw_noise_from():
    latents = torch.randn(2, *SHAPE)
    with pytest.raises(ConfigError, match=r"adds fresh noise to each sample, drawn from its seed.*amed_engine.sample"):
        walker().run(latents)
    drawn = walker(nfe=1).run(latents).images  # which adds none
    torch.testing.assert_close(drawn, wave(latents * 80, torch.full((2,), 80.0)))


@pytest.mark.parametrize("format", ["pt2", "exported", "onnx", "plan", "schedule"])
def test_files_have_no_input_for_it(format, tmp_path):
    path = tmp_path / f"loop.{ {'onnx': 'onnx', 'plan': 'json', 'schedule': 'json'}.get(format, 'pt2') }"
    with pytest.raises(
        ConfigError, match=r"adds fresh noise between its evaluations.*sample with Sampler, write a single"
    ):
        walker().export(path, format)
    assert not path.exists()


@pytest.mark.parametrize("format", ["exported", "plan"])
def test_a_one_step_generator_adds_none_and_is_written(format, tmp_path):
    sampler, latents = walker(nfe=1), torch.randn(2, *SHAPE)
    path = tmp_path / ("loop.json" if format == "plan" else "loop.pt2")
    sampler.export(path, format)
    if format == "exported":
        images = amed_engine.load_package(path).run(latents).images
    else:
        stepper = amed_engine.Stepper(amed_engine.read_plan(path), (latents * 80).numpy())
        while not stepper.done:
            answer = wave(torch.from_numpy(stepper.points), torch.from_numpy(stepper.sigma))
            stepper.advance(answer.numpy())
        images = torch.from_numpy(stepper.result)
    torch.testing.assert_close(images, sampler.run(latents).images, rtol=1e-5, atol=1e-5)


def test_what_follows_an_ode_refuses_what_follows_none():
    common = {"nfe": 4, "shape": SHAPE, "progress": False}
    with pytest.raises(ConfigError, match="no solution of an ODE to be near to"):
        amed_engine.search_schedule(wave, solver="consistency", **common)
    with pytest.raises(ConfigError, match="teacher 'consistency' adds fresh noise and has no solution to teach"):
        amed_engine.distill(wave, teacher="consistency", **common)
    for learn in (amed_engine.distill, lambda *a, **k: amed_engine.fit(*a, variant="constants", **k)):
        with pytest.raises(ConfigError, match="solver 'consistency' takes no predictor"):
            learn(wave, solver="consistency", **common)
    with pytest.raises(ConfigError, match="AMEDScheduler needs a solver of two evaluations per interval"):
        AMEDScheduler(solver="consistency")


def test_a_fine_solution_is_no_reference_for_it(tmp_path):
    with pytest.raises(ConfigError, match="draws from a consistency function, of which 'deis-fine' is no solution"):
        evaluate(walker(), range(4))
    assert evaluate(walker(), range(4), reference=_folder(tmp_path)).samples == 4


def _folder(path):
    from amed_engine.engine import images

    images.save_each(path, list(images.to_uint8(walker().run(range(4)).images)), range(4), False)
    return str(path)


def test_servers_answer_a_seed_with_its_sample_whoever_else_asks():
    hosted = Hosted(wave, solver="consistency", nfe=3, shape=SHAPE)
    asked = [hosted.submit({"seeds": seeds}) for seeds in ([7, 9], [5])]
    first, second = (future.result(60).images for future in asked)
    torch.testing.assert_close(first, walker().run([7, 9]).images)
    torch.testing.assert_close(second, walker().run([5]).images)
    assert torch.equal(hosted.submit({"seeds": [5]}).result(60).images, second)
    hosted.close()
