"""The nodes under a stand-in that calls them as ComfyUI does: same images as the engine, whatever the order of parts.

The real servers are in test_comfyui_server.py.
"""

import copy
import inspect
import math
from dataclasses import replace

import pytest
import torch
from comfy_standin import CONST, EPS, GUIDANCE, UNCOND, CFGGuider, DualCFGGuider, ImageToImage, Loud, ModelPatcher
from mean_answers import make_mean

from amed_engine import ConfigError, Sampler, make_plan
from amed_engine.integrations.comfyui import NODE_CLASS_MAPPINGS
from amed_engine.integrations.comfyui.webui import sampler_entry, schedule
from amed_engine.sampling.denoiser import Denoised
from amed_engine.sampling.predictors import CoefficientPredictor, ConstantPredictor


@pytest.fixture
def guided(predictor):
    predictor.plan = replace(predictor.plan, guidance_scale=GUIDANCE)
    return predictor


def node(name, *arguments, **named):
    made = NODE_CLASS_MAPPINGS[name]()
    return getattr(made, made.FUNCTION)(*arguments, **named)


def draw(
    network, predictor, latents, batches, sampling=EPS, mask=None, image=None, cfg=GUIDANCE, zero=False, **options
):
    """SamplerCustom, with the three nodes before it."""
    patcher = ModelPatcher(network, sampling)
    model, sampler = node("AMEDSampler", patcher, predictor, **options)
    (sigmas,) = node("AMEDSchedule", predictor, patcher)
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]) if zero else sigmas
    guider, steps = CFGGuider(model.clone()), []  # nodes that follow clone
    guider.batches = batches
    guider.set_cfg(cfg)
    image = torch.zeros_like(latents) if image is None else image
    drawn = guider.sample(latents, image, sampler, sigmas, mask, lambda *step: steps.append(step), True)
    assert [step[0] for step in steps] == list(range(predictor.plan.intervals))
    assert all(x0.shape == x.shape == latents.shape and total == len(sigmas) - 1 for _, x0, x, total in steps)
    return drawn


def as_flow(network, noise_scale=1.0):
    """The same network as a flow model: x_t = (1 - t) x0 + t s noise is (1 - t) x of sigma = s t / (1 - t)."""

    def flow(x, t, labels):
        assert (t < 1).all()
        rest = (1 - t.double()).reshape(-1, 1, 1, 1)
        sigma = (noise_scale * t.double() / (1 - t.double())).float()
        return network((x / rest).float(), sigma, labels)

    return flow


ASKED = {"class_labels": [3, 1, 4], "guidance_scale": GUIDANCE}
ORDERS = [[[0, 1]], [[1, 0]], [[0], [1]], [[1], [0]], [[1, 0, 0]], [[0], [1, 0]]]


@pytest.mark.parametrize("batches", ORDERS, ids=str)
def test_the_nodes_draw_what_the_engine_draws_in_any_order(comfy, tiny_conditional, guided, latents, batches):
    expected = Sampler(tiny_conditional, guided).run(latents, **ASKED).images
    drawn = draw(tiny_conditional, guided, latents, batches)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_unconditional_half_would_draw_something_else(comfy, tiny_conditional, guided, latents, monkeypatch):
    right = draw(tiny_conditional, guided, latents, [[0, 1]])
    monkeypatch.setattr("amed_engine.integrations.comfyui.features.CONDITIONAL", UNCOND)
    assert (draw(tiny_conditional, guided, latents, [[0, 1]]) - right).abs().max() > 1e-3


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("sampling", [CONST, Loud])
def test_a_flow_model_draws_the_same_by_its_own_times(comfy, tiny_conditional, guided, latents, zero, sampling):
    """To t = 0.9 of a network that takes sigma of t: nearer to 1, float32 loses the digits of 1 - t on its way in."""
    guided.plan = make_plan(4, solver="amed", afs=False, sigma_max=9.0, guidance_scale=GUIDANCE)
    expected = Sampler(tiny_conditional, guided).run(latents, **ASKED).images
    flow = as_flow(tiny_conditional, sampling.noise_scale)
    drawn = draw(flow, guided, latents, [[1, 0]], sampling, zero=zero)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_flow_model_is_told_the_plan_s_own_times(comfy, guided, latents):
    """To t = 0.9998: SIGMAS have four digits of sigma left there, and what is told has all that a float32 t can hold."""
    told = []

    def flow(x, t, labels):
        told.append(t[0])
        return Denoised(0.5 * x, torch.zeros(len(x), 1, 4, 4))

    guided.plan = make_plan(4, solver="amed", afs=False, sigma_max=5000.0, guidance_scale=GUIDANCE)
    draw(flow, guided, latents, [[1, 0]], CONST)
    levels = guided.plan.levels
    assert torch.stack(told[::2]).tolist() == (levels / (1 + levels))[:2].float().tolist()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_first_step_about_a_mean_is_guided_as_the_images_are(comfy, tiny_conditional, about_mean, latents, rows):
    """One for all, or one for no class and one for any, which guidance makes one."""
    mean = make_mean(rows, 10 * (rows - 1))
    about_mean.plan = make_plan(5, solver="amed", afs="mean", mean=mean, guidance_scale=GUIDANCE)
    drawn = draw(tiny_conditional, about_mean, latents, [[1, 0]])
    if rows == 1:  # the engine wants one for no class beside it
        about_mean.plan = about_mean.plan.about(replace(mean, data=mean.data * 2, classes=10))
    expected = Sampler(tiny_conditional, about_mean).run(latents, **ASKED).images
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_flow_model_starts_about_the_same_mean(comfy, tiny_conditional, about_mean, latents):
    options = {"sigma_max": 9.0, "guidance_scale": GUIDANCE}
    about_mean.plan = make_plan(5, solver="amed", afs="mean", mean=make_mean(2, 10, sigma=9.0), **options)
    expected = Sampler(tiny_conditional, about_mean).run(latents, **ASKED).images
    drawn = draw(as_flow(tiny_conditional), about_mean, latents, [[1, 0]], CONST)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_mean_for_each_class_is_refused_when_the_sampler_is_made(comfy, tiny_conditional, about_mean):
    about_mean.plan = about_mean.plan.about(make_mean(11, 10))
    match = "a mean answer for each of 10 classes, and no class is seen here; use Sampler or AMEDPipeline"
    with pytest.raises(ConfigError, match=match):
        node("AMEDSampler", ModelPatcher(tiny_conditional), about_mean)
    with pytest.raises(ConfigError, match=match):
        sampler_entry(about_mean)
    about_mean.plan = replace(about_mean.plan, mean=None)
    with pytest.raises(ConfigError, match="yet to be measured"):
        sampler_entry(about_mean)


def test_latents_of_another_shape_than_the_mean_s_are_refused(comfy, tiny_conditional, about_mean, latents):
    about_mean.plan = replace(about_mean.plan, guidance_scale=GUIDANCE)
    with pytest.raises(ConfigError, match="a mean image with latents of 1 x 8 x 8, got 1 x 16 x 16; set width and"):
        draw(tiny_conditional, about_mean, torch.zeros(3, 1, 16, 16), [[1, 0]])


def sample(patcher, sampler, sigmas, latents, guider=CFGGuider):
    return guider(patcher).sample(latents, torch.zeros_like(latents), sampler, sigmas, None, lambda *step: None, True)


def test_the_model_that_samples_decides_what_kind_it_is(comfy, tiny_conditional, guided, latents):
    """A node such as ModelSamplingSD3 may come after ours."""
    patcher = ModelPatcher(tiny_conditional)
    model, sampler = node("AMEDSampler", patcher, guided)
    model.model.model_sampling = CONST()
    with pytest.raises(ConfigError, match="connect AMED Schedule with this MODEL"):
        sample(model, sampler, *node("AMEDSchedule", guided), latents)
    guided.plan = make_plan(4, solver="amed", afs=False, sigma_max=9.0, guidance_scale=GUIDANCE)
    expected = Sampler(tiny_conditional, guided).run(latents, **ASKED).images
    model, sampler = node("AMEDSampler", patcher, guided)
    model.network = as_flow(tiny_conditional)
    drawn = sample(model, sampler, *node("AMEDSchedule", guided, model), latents)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()
    model.model.model_sampling = ImageToImage()
    with pytest.raises(ConfigError, match="does not start from noise"):
        sample(model, sampler, *node("AMEDSchedule", guided), latents)


@pytest.fixture
def image(latents):
    """One whose sum with the noise, 80 times the latents, is exact: these are rounded to a grid too."""
    latents.copy_((latents * 2**16).round() / 2**16)
    return 80 * torch.randint(0, 2**10, latents.shape, generator=torch.Generator().manual_seed(2)) / 2**16


def test_sampling_starts_from_an_image(comfy, tiny_conditional, guided, latents, image):
    shifted = latents + image / 80
    expected = Sampler(tiny_conditional, guided).run(shifted, **ASKED).images
    drawn = draw(tiny_conditional, guided, latents, [[1, 0]], image=image)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()
    assert draw(tiny_conditional, guided, torch.zeros_like(latents), [[1, 0]], image=image).isfinite().all()


def test_a_mask_keeps_the_image_as_it_does_for_the_engine(comfy, tiny_conditional, guided, latents, image):
    mask = torch.zeros_like(latents)
    mask[..., 4:] = 1
    masked = copy.deepcopy(tiny_conditional)

    def forward(x, sigma, labels):
        count = len(x) // len(latents)
        keep, noised = mask.repeat(count, 1, 1, 1), image + sigma[:3].reshape(-1, 1, 1, 1) * latents
        x0, features = tiny_conditional(x * keep + noised.repeat(count, 1, 1, 1) * (1 - keep), sigma, labels)
        return Denoised(x0 * keep + image.repeat(count, 1, 1, 1) * (1 - keep), features)

    masked.forward = forward
    shifted = latents + image / 80
    expected = Sampler(masked, guided).run(shifted, **ASKED).images
    drawn = draw(tiny_conditional, guided, latents, [[0, 1]], image=image, mask=mask)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_part_that_is_not_the_last_of_the_levels_is_refused(comfy, tiny_conditional, guided, latents):
    """The first of what SplitSigmas gives."""
    model, sampler = node("AMEDSampler", ModelPatcher(tiny_conditional), guided)
    (sigmas,) = node("AMEDSchedule", guided)
    with pytest.raises(ConfigError, match="this predictor was trained for"):
        sample(model, sampler, sigmas[:-1], latents)


def test_another_guidance_than_the_predictor_s_is_refused(comfy, tiny_conditional, guided, latents):
    with pytest.raises(ConfigError, match=r"trained with cfg 2\.5, got 8; set cfg to that"):
        draw(tiny_conditional, guided, latents, [[1, 0]], cfg=8.0)
    model, sampler = node("AMEDSampler", ModelPatcher(tiny_conditional), guided)
    with pytest.raises(ConfigError, match="and DualCFGGuider puts other parts together: use CFG Guider"):
        sample(model, sampler, *node("AMEDSchedule", guided), latents, DualCFGGuider)


def test_a_model_that_is_not_heard_is_refused(comfy, tiny_conditional, guided, latents):
    patcher = ModelPatcher(tiny_conditional)
    model, sampler = node("AMEDSampler", patcher, guided)
    (sigmas,) = node("AMEDSchedule", guided)
    with pytest.raises(ConfigError, match="connect the MODEL output of AMED Sampler"):
        sample(patcher, sampler, sigmas, latents)
    model.model_options["context_handler"] = object()
    with pytest.raises(ConfigError, match="an evaluation is split"):
        sample(model, sampler, sigmas, latents)


def test_a_predictor_beyond_the_model_s_levels_is_refused(comfy, tiny_conditional, guided, latents):
    class Table(EPS):
        sigma_min, sigma_max = torch.tensor(0.03), torch.tensor(14.6)

    with pytest.raises(ConfigError, match=r"from noise level 80 to 0\.002, and this MODEL \(not a flow model\) knows"):
        draw(tiny_conditional, guided, latents, [[1, 0]], Table)


def test_predictors_that_read_nothing_leave_the_model_alone(comfy, tiny_conditional, guided):
    """Nor do they ask for a middle block."""
    patcher = ModelPatcher(tiny_conditional)
    patcher.model.diffusion_model.middle_block = None
    constant, row = ConstantPredictor(guided.plan.intervals), CoefficientPredictor(guided.plan.intervals, 80.0)
    for predictor in (constant, row):
        predictor.plan = guided.plan
        assert node("AMEDSampler", patcher, predictor)[0] is patcher
    reading = CoefficientPredictor(guided.plan.intervals, 80.0, codes=2, inputs=17)
    reading.plan = guided.plan
    for predictor in (guided, reading):
        with pytest.raises(ConfigError, match=r"this MODEL \(SimpleNamespace\) has none; set bottleneck to none"):
            node("AMEDSampler", patcher, predictor)


def test_a_model_without_a_middle_block_needs_the_choice_none(comfy, tiny_conditional, guided, latents):
    def bare(x, sigma, labels):
        return tiny_conditional(x, sigma, labels).x0, torch.zeros(0)

    assert draw(bare, guided, latents, [[0, 1]], bottleneck="none").isfinite().all()
    with pytest.raises(ConfigError, match="must be middle_block or none"):
        draw(bare, guided, latents, [[0, 1]], bottleneck="input")


def test_the_caller_s_model_is_not_patched(comfy, tiny_conditional, guided):
    patcher = ModelPatcher(tiny_conditional)
    model, _ = node("AMEDSampler", patcher, guided)
    assert patcher.model_options == {"transformer_options": {}}
    assert model is not patcher


@pytest.mark.parametrize("first", ["the predictor's own", "about a mean"])
def test_webui_entries_draw_the_same(comfy, tiny_model, predictor, about_mean, latents, first):
    """Called as A1111 and Forge call: sigmas by name, the function's parameters looked up by inspection."""
    predictor, seen = about_mean if first == "about a mean" else predictor, []
    expected = Sampler(tiny_model, predictor).run(latents).images

    def model(x, sigma, **conditions):
        x0, features = tiny_model(x, sigma)
        seen.append(features)
        return x0

    label, function, aliases, options = sampler_entry(predictor, lambda: seen[-1])
    assert (label, aliases, options) == ("AMED", ["amed"], {})
    assert "sigmas" in inspect.signature(function).parameters
    assert math.isclose(predictor.plan.sigmas[0], 80)
    sigmas = schedule(predictor)(predictor.plan.intervals, 0.002, 80.0, "cpu")
    drawn = function(model, latents * sigmas[0], extra_args={}, disable=True, callback=lambda d: None, sigmas=sigmas)
    assert (drawn - expected).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="set the steps to that"):
        schedule(predictor)(20, 0.002, 80.0)
