"""AMEDScheduler that starts about a mean answer: a pipeline's latents lack it until they are first seen."""

import json

import pytest
import torch
from mean_answers import make_mean

from amed_engine import ConfigError, Sampler, make_plan, make_schedule, sample
from amed_engine.sampling.denoiser import analytic_first_step
from amed_engine.solvers import make_solver

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from amed_engine.integrations.diffusers import AMEDScheduler  # noqa: E402

MIDS = [[0.4, 1.02, 0.99], [0.6, 1.0, 1.0], [0.5, 0.98, 1.01]]
PLUGIN = {"midpoint": True, "afs": "mean", "mean": make_mean()}
PLANS = {
    "amed": make_plan(5, solver="amed", afs="mean", mean=make_mean()),
    "ipndm": make_plan(5, solver="ipndm", options={"max_order": 2}, **PLUGIN),
    "unipc": make_plan(7, solver="unipc", options={"max_order": 2}, **PLUGIN),
    "dpmpp": make_plan(5, solver="dpmpp", options={"max_order": 2}, schedule="polynomial", **PLUGIN),
}


def walk(scheduler, network, latents):
    """Every sample that a pipeline meets: its first latents, and what each step returns."""
    samples = [latents * scheduler.init_noise_sigma]
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(samples[-1], t), t.expand(len(latents)))
        samples.append(scheduler.step(output, t, samples[-1], return_dict=False)[0])
    return samples


def about(mean, **options):
    return AMEDScheduler(afs="mean", mean=mean.to_json(), **options)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_predictor_s_scheduler_draws_what_the_engine_draws(network, denoiser, about_mean, latents, plan):
    about_mean.plan = plan
    scheduler = AMEDScheduler.from_predictor(about_mean)
    scheduler.set_timesteps(plan.intervals)
    assert len(scheduler.timesteps) == plan.nfe
    expected = Sampler(denoiser, about_mean, shape=(1, 8, 8)).run(latents).images
    drawn = walk(scheduler, network, latents)[-1]
    assert (drawn - expected).abs().max() < 5e-5
    zero = AMEDScheduler.from_config({**scheduler.config, "afs": True, "mean": None})
    zero.set_timesteps(plan.intervals)
    assert (walk(zero, network, latents)[-1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_what_step_returns_is_the_whole_state(network, denoiser, latents, final):
    """From the first on, as a pipeline's callback sees it; and at both ends of the schedule."""
    scheduler, zero = about(make_mean(), final_sigmas_type=final, midpoints=MIDS), final == "zero"
    scheduler.set_timesteps(4 if zero else 3)
    samples = walk(scheduler, network, latents)
    levels, mids = make_schedule("polynomial", 4, 0.002, 80.0), [tuple(m) for m in MIDS]
    how = {"afs": "mean", "mean": make_mean().rows(), "denoise_to_zero": zero, "trajectory": True}
    states = sample(denoiser, latents * 80, levels, make_solver("amed"), mids, **how)
    for state, x in zip(states[1:], [samples[1], samples[3], samples[5], *samples[6:]], strict=True):
        assert (x - state).abs().max() < 5e-5


def test_a_callback_may_change_the_sample_after_the_first_step(network, denoiser, latents):
    scheduler = about(make_mean(), midpoints=MIDS, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(3)
    x = latents * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
        x = x.flip(0) if i == 0 else x
    levels, solver, how = scheduler.levels, make_solver("amed"), {"afs": "mean", "mean": make_mean().rows()}
    halfway = sample(denoiser, latents * 80, levels[:2], solver, [tuple(MIDS[0])], **how).flip(0)
    expected = sample(denoiser, halfway, levels[1:], solver, [tuple(m) for m in MIDS[1:]])
    assert (x - expected).abs().max() < 5e-5


def test_the_first_evaluation_is_after_the_analytic_step(latents):
    """Asked once or twice, with both halves of a guided batch, before any step."""
    scheduler = about(make_mean(), midpoints=[[0.4]] * 3, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(3)
    x, t = latents * 80, scheduler.timesteps[0]
    sigma, inner = scheduler.levels[0], scheduler.sigmas[0]
    d = analytic_first_step(x.double(), sigma, make_mean().rows().double()).x0
    y = x + (inner - sigma) * (x - d) / sigma  # Euler to the midpoint
    expected = (y / (inner**2 + 0.25).sqrt()).float()
    for _ in range(2):
        scaled = scheduler.scale_model_input(torch.cat([latents * scheduler.init_noise_sigma] * 2), t)
        torch.testing.assert_close(scaled, torch.cat([expected] * 2), rtol=1e-5, atol=1e-5)


def test_it_is_saved_and_read_again(network, latents, about_mean, tmp_path):
    scheduler = AMEDScheduler.from_predictor(about_mean)
    scheduler.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (said["afs"], said["mean"]) == ("mean", about_mean.plan.mean.to_json())
    drawn = []
    for made in (scheduler, AMEDScheduler.from_pretrained(tmp_path), AMEDScheduler.from_config(scheduler.config)):
        made.set_timesteps(3)
        drawn.append(walk(made, network, latents)[-1])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("guidance_scale", [None, 2.5])
def test_no_class_and_any_class_are_one_mean_under_guidance(about_mean, guidance_scale):
    mean = make_mean(2, 10)
    about_mean.plan = make_plan(5, solver="amed", afs="mean", mean=mean, guidance_scale=guidance_scale)
    scheduler = AMEDScheduler.from_predictor(about_mean)
    scheduler.set_timesteps()
    none, any_class = mean.rows()
    expected = none + (guidance_scale or 1) * (any_class - none)
    torch.testing.assert_close(scheduler.program(scheduler.levels).mean, expected[None])
    assert scheduler.config.mean["classes"] == 0


def test_half_precision_samples_are_shifted_in_half_precision(latents):
    scheduler = about(make_mean(), midpoints=MIDS, final_sigmas_type="sigma_min")
    samples = []
    for dtype in (torch.float32, torch.float16):
        scheduler.set_timesteps(3)
        x, t = (latents * scheduler.init_noise_sigma).to(dtype), scheduler.timesteps[0]
        samples += [scheduler.scale_model_input(x, t), scheduler.step(0.1 * x, t, x).prev_sample]
        assert samples[-2].dtype == samples[-1].dtype == dtype
    for one, two in zip(samples[:2], samples[2:], strict=True):
        assert (one - two).abs().max() < 2e-3 * one.abs().max()


def test_noise_at_the_start_of_a_pipeline_is_shifted_as_its_latents_are(network, denoiser, latents):
    """As image-to-image at full strength does it."""
    scheduler = about(make_mean(), midpoints=MIDS, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(0)
    clean = torch.full_like(latents, 0.3)
    x = scheduler.add_noise(clean, latents, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
    how = {"afs": "mean", "mean": make_mean().rows()}
    start, mids = clean + latents * 80, [tuple(m) for m in MIDS]
    expected = sample(denoiser, start, scheduler.levels, make_solver("amed"), mids, **how)
    assert (x - expected).abs().max() < 5e-5


def test_a_pipeline_may_start_at_a_later_interval(network, latents):
    """Where there is no analytic step, and nothing to shift; inside the first interval it is refused as with any afs."""
    options = {"midpoints": MIDS, "final_sigmas_type": "sigma_min"}
    ends = []
    for scheduler, begin in ((about(make_mean(), **options), 3), (AMEDScheduler(**options), 4)):
        scheduler.set_timesteps(3)
        scheduler.set_begin_index(begin)
        x = latents * scheduler.sigmas[begin].float()
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)
    scheduler = about(make_mean(), **options)
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(2)
    with pytest.raises(ConfigError, match="set afs=False: image-to-image"):
        scheduler.scale_model_input(latents, scheduler.timesteps[2])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"afs": "mean"}, "afs='mean' with mean=None: a mean answer goes with"),
        ({"mean": make_mean().to_json()}, r"afs=False with mean=\.\.\."),
        ({"afs": "mean", "mean": make_mean(11, 10).to_json()}, "which of 10 classes an image is of.* use AMEDPipeline"),
        ({"afs": "mean", "mean": {"data": ""}}, "must be an object of"),
        ({"afs": "zero"}, "afs must be True, False, 'mean'"),
        (
            {
                "afs": "mean",
                "mean": make_mean().to_json(),
                "solver": "unipc",
                "solver_options": {"thresholding": True},
            },
            "afs cannot be folded",
        ),
    ],
)
def test_configurations_that_cannot_work_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        AMEDScheduler(**options)


def test_calls_that_cannot_work_are_refused(about_mean):
    scheduler = about(make_mean(), midpoints=MIDS, final_sigmas_type="sigma_min")
    with pytest.raises(ConfigError, match="measured at sigma 80, these noise levels start from 50"):
        scheduler.set_timesteps(sigmas=[50.0, 3.0, 1.0, 0.1])
    scheduler.set_timesteps(3)
    x, t = torch.zeros(2, 1, 4, 4), scheduler.timesteps[0]
    for call in (lambda: scheduler.scale_model_input(x, t), lambda: scheduler.step(x, t, x)):
        with pytest.raises(ConfigError, match=r"of shape \(1, 1, 8, 8\), got samples of \(2, 1, 4, 4\)"):
            call()
    about_mean.plan = about_mean.plan.about(make_mean(11, 10))
    with pytest.raises(ConfigError, match="for each of 10 classes, and no class is seen here; use Sampler or AMED"):
        AMEDScheduler.from_predictor(about_mean)
