"""AMEDPipeline, and AMEDScheduler inside Stable Diffusion's pipelines, on tiny random models."""

import numpy as np
import pytest
import torch
from PIL import Image

from amed_engine import ConfigError, FileFormatError, Sampler, make_plan, sample, save_predictor
from amed_engine.checkpoints import hashes
from amed_engine.solvers import make_solver

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from amed_engine.integrations.diffusers import AMEDPipeline, AMEDPredictorModel, AMEDScheduler  # noqa: E402

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_unet(seed=0, channels=1, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            **options,
        )
    return unet.eval()


@pytest.fixture
def unet():
    return make_unet()


@pytest.fixture
def pipe(unet, predictor):
    pipe = AMEDPipeline(unet, AMEDScheduler(), predictor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edm(unet, **conditions):
    """EDM's preconditioning of the network, written out: (x, sigma) -> (D, bottleneck)."""

    def denoise(x, sigma):
        seen = []
        handle = unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        sigma = sigma.view(-1, 1, 1, 1)
        out = unet(x / (sigma**2 + 0.25).sqrt(), sigma.flatten().log() / 4, **conditions).sample
        handle.remove()
        return 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * out, seen[0]

    return denoise


def draw(pipe, latents, **options):
    return pipe(latents=latents, **{"output_type": "latent"} | options).images


def test_the_pipeline_draws_what_the_engine_draws(pipe, unet, predictor, latents):
    expected = Sampler(edm(unet), predictor, shape=(1, 8, 8)).run(latents).images
    assert (draw(pipe, latents) - expected).abs().max() < 1e-5
    without = Sampler(lambda x, s: edm(unet)(x, s)[0], predictor, shape=(1, 8, 8)).run(latents).images
    assert (without - expected).abs().max() > 1e-3


def test_classes_reach_the_model(predictor, latents):
    unet, labels = make_unet(num_class_embeds=10), torch.tensor([3, 1, 4])
    pipe = AMEDPipeline(unet, AMEDScheduler(), predictor)
    pipe.set_progress_bar_config(disable=True)
    expected = Sampler(edm(unet, class_labels=labels), predictor, shape=(1, 8, 8)).run(latents).images
    assert (draw(pipe, latents, class_labels=[3, 1, 4]) - expected).abs().max() < 1e-5


def test_without_a_predictor_the_scheduler_s_constants_decide(unet, latents):
    mids = [[0.4, 1.02, 0.99], [0.6, 1.0, 1.0]]
    scheduler = AMEDScheduler(midpoints=mids, final_sigmas_type="sigma_min")
    pipe = AMEDPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    drawn = draw(pipe, latents, num_inference_steps=2)
    x, levels = latents * 80, scheduler.levels
    with torch.no_grad():
        expected = sample(edm(unet), x, levels, make_solver("amed"), [tuple(m) for m in mids])
    assert (drawn - expected).abs().max() < 1e-5


def test_a_model_of_discrete_steps_keeps_its_scheduler_s_word(unet, predictor, latents):
    predictor.plan = make_plan(4, solver="amed", sigma_min=0.03, sigma_max=14.0)
    ddim = diffusers.DDIMScheduler(**SD, prediction_type="v_prediction")
    pipe = AMEDPipeline(unet, ddim, predictor)
    pipe.set_progress_bar_config(disable=True)
    alphas = ddim.alphas_cumprod.double()
    log_alphas, steps = alphas.log().flip(0), torch.arange(1000.0, dtype=torch.float64).flip(0)

    def denoise(x, sigma):
        log_alpha = -torch.log1p(sigma.double() ** 2)
        t = torch.from_numpy(np.interp(log_alpha.numpy(), log_alphas.numpy(), steps.numpy())).float()
        sigma, seen = sigma.view(-1, 1, 1, 1), []
        handle = unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        v = unet(x / (sigma**2 + 1).sqrt(), t).sample
        handle.remove()
        return x / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * v, seen[0]

    expected = Sampler(denoise, predictor, shape=(1, 8, 8)).run(latents).images
    assert (draw(pipe, latents) - expected).abs().max() < 1e-4


def test_outputs_of_every_type(pipe, latents):
    raw = draw(pipe, latents)
    unit = (raw / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(pipe, latents, output_type="pt"), unit)
    array = draw(pipe, latents, output_type="np")
    assert array.shape == (3, 8, 8, 1)
    np.testing.assert_allclose(array, unit.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pictures = draw(pipe, latents, output_type="pil")
    assert all(isinstance(picture, Image.Image) and picture.size == (8, 8) for picture in pictures)
    levels = (raw[:, 0] * 127.5 + 128).clip(0, 255).to(torch.uint8).numpy()
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), levels)
    assert torch.equal(pipe(latents=latents, output_type="latent", return_dict=False)[0], raw)


def test_colour_pictures_are_in_colour(predictor):
    pipe = AMEDPipeline(make_unet(channels=3), AMEDScheduler(), predictor)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(batch_size=2, generator=torch.Generator().manual_seed(0)).images
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (8, 8))] * 2


def test_one_generator_per_image_means_one_seed_per_image(pipe):
    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    three = pipe(batch_size=3, generator=seeded(5, 6, 7), output_type="latent").images
    one = pipe(batch_size=1, generator=seeded(6), output_type="latent").images
    assert (three[1:2] - one).abs().max() < 1e-4
    again = pipe(batch_size=3, generator=seeded(5, 6, 7), output_type="latent").images
    assert torch.equal(three, again)


def test_callbacks_see_and_change_each_interval(pipe, predictor, latents):
    seen = []

    def look(pipe, i, t, given):
        seen.append((i, float(t), given["latents"].clone()))
        return given

    plain = draw(pipe, latents, callback_on_step_end=look)
    assert [i for i, _, _ in seen] == list(range(predictor.plan.intervals))
    assert seen[0][1] == pytest.approx(np.log(80.0) / 4, rel=1e-6)
    assert torch.equal(seen[-1][2], plain)

    def zero_last(pipe, i, t, given):
        return {"latents": given["latents"] * 0} if i == predictor.plan.intervals - 1 else {}

    assert draw(pipe, latents, callback_on_step_end=zero_last).abs().max() == 0


def test_a_callback_can_stop_the_pipeline(pipe, latents):
    seen = []

    def stop(pipe, i, t, given):
        seen.append(given["latents"])
        pipe._interrupt = True
        return {}

    stopped = draw(pipe, latents, callback_on_step_end=stop)
    assert len(seen) == 1
    assert torch.equal(stopped, seen[0])
    assert (draw(pipe, latents) - stopped).abs().max() > 1e-3


def test_the_pipeline_saves_and_reloads_itself(pipe, predictor, latents, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "predictor" / "diffusion_pytorch_model.safetensors").is_file()
    again = AMEDPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.predictor.predictor.plan == predictor.plan
    assert torch.equal(draw(again, latents), draw(pipe, latents))


@pytest.mark.parametrize("changed", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_saved_predictor_and_its_plan_are_of_one_save(pipe, predictor, tmp_path, changed, monkeypatch):
    monkeypatch.setattr(hashes, "SECONDS", 0.05)
    component = AMEDPredictorModel.of(predictor)
    component.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        component.predictor.fc_r.bias += 1
    component.register_to_config(plan={**component.config["plan"], "guidance_scale": 3.0})
    component.save_pretrained(tmp_path / "b")
    again = AMEDPredictorModel.from_pretrained(tmp_path, subfolder="b")
    assert torch.equal(again.predictor.fc_r.bias, component.predictor.fc_r.bias)
    assert again.config["_name_or_path"] == str(tmp_path / "b")
    (tmp_path / "a" / changed).write_bytes((tmp_path / "b" / changed).read_bytes())
    with pytest.raises(FileFormatError, match="not of one save"):
        AMEDPredictorModel.from_pretrained(tmp_path / "a")


def test_a_predictor_may_come_from_a_file(unet, predictor, latents, pipe, tmp_path):
    save_predictor(predictor, tmp_path / "p.safetensors")
    other = AMEDPipeline(unet, AMEDScheduler(), tmp_path / "p.safetensors")
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other, latents), draw(pipe, latents))
    assert AMEDPredictorModel.of(predictor).predictor.config == predictor.config


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"num_inference_steps": 50}, "steps, got num_inference_steps=50"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"latents must have shape \(2, 1, 8, 8\)"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "got 1 generators for 2 images"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "may name latents, got noise"),
    ],
)
def test_calls_that_cannot_work_are_refused(pipe, options, match):
    with pytest.raises(ConfigError, match=match):
        pipe(**options)


@pytest.fixture(scope="module")
def stable_diffusion():
    """Stable Diffusion's pipeline without text: tiny U-Net and autoencoder, prompts as embeddings."""
    pytest.importorskip("transformers", reason="transformers, which Stable Diffusion needs, is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    rest = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(vae, unet=unet, scheduler=scheduler, **rest, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def prompt():
    generator = torch.Generator().manual_seed(3)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(2, 7, 16, generator=generator) for name in names}


def guided(unet, prompt, scale):
    """Classifier-free guidance of an epsilon model, written out."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    log_alphas, steps = alphas.log().flip(0).numpy(), np.arange(999, -1, -1.0)

    def denoise(x, sigma):
        t = np.interp(-np.log1p(sigma.double().numpy() ** 2), log_alphas, steps)
        t, sigma = torch.from_numpy(t).float(), sigma.view(-1, 1, 1, 1)
        scaled = x / (sigma**2 + 1).sqrt()
        cond, uncond = (unet(scaled, t, encoder_hidden_states=prompt[n]).sample for n in prompt)
        return x - sigma * (uncond + scale * (cond - uncond))

    return denoise


def test_stable_diffusion_draws_what_the_engine_draws(stable_diffusion, predictor, prompt, tmp_path):
    """And, saved and loaded by diffusers alone, it still does."""
    predictor.plan = make_plan(predictor.plan.nfe, solver="amed", sigma_min=0.03, sigma_max=14.0)
    pipe = stable_diffusion
    pipe.scheduler = AMEDScheduler.from_predictor(predictor, pipe.scheduler.config)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {
        **prompt,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "num_inference_steps": predictor.plan.intervals,
    }
    drawn = pipe(latents=latents, **options).images
    denoiser = guided(pipe.unet, prompt, 4.0)
    expected = Sampler(lambda x, s: denoiser(x, s).detach(), predictor, shape=(4, 8, 8)).run(latents).images
    assert (drawn - expected).abs().max() < 1e-4 * expected.abs().max()
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, AMEDScheduler)
    assert torch.equal(again(latents=latents, **options).images, drawn)


def test_stable_diffusion_from_an_image_starts_in_the_middle(stable_diffusion, prompt):
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(stable_diffusion, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = AMEDScheduler.from_config({**SD, "final_sigmas_type": "sigma_min"})
    steps = []
    pipe(
        image=torch.rand(2, 3, 16, 16),
        **prompt,
        strength=0.5,
        num_inference_steps=4,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, given: steps.append(float(t)) or given,
    )
    assert len(steps) == 4
    assert steps == pytest.approx(pipe.scheduler.timesteps[4:].tolist())


def afs_from_image(stable_diffusion):
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(stable_diffusion, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = AMEDScheduler.from_config({**SD, "final_sigmas_type": "sigma_min", "afs": True})
    return pipe


def test_an_analytic_first_step_is_taken_from_the_highest_level_only(stable_diffusion, prompt):
    """At full strength the noised image is where it would be at sigma_max; below that there is no analytic step."""
    pipe, options = afs_from_image(stable_diffusion), {**prompt, "output_type": "latent", "num_inference_steps": 3}
    image, noises = torch.rand(2, 3, 16, 16), []
    scheduler = pipe.scheduler
    plain = scheduler.add_noise

    def keep(samples, noise, timesteps):
        noises.append((samples, noise))
        return plain(samples, noise, timesteps)

    scheduler.add_noise = keep
    drawn = pipe(image=image, strength=1.0, guidance_scale=4.0, **options).images
    samples, noise = noises[0]
    denoiser = guided(pipe.unet, prompt, 4.0)
    x, levels = samples + noise * float(scheduler.levels[0]), scheduler.levels
    with torch.no_grad():
        expected = sample(denoiser, x, levels, make_solver("amed"), [(0.5, 1.0, 1.0)] * 3, afs=True)
    assert (drawn - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ConfigError, match="set afs=False: image-to-image"):
        pipe(image=image, strength=0.5, **options)


def test_a_scheduler_with_afs_may_start_at_a_later_interval(unet, latents):
    """Without its analytic step: as the same levels without afs."""
    with_afs, without = (AMEDScheduler(final_sigmas_type="sigma_min", afs=afs) for afs in (True, False))
    ends = []
    for scheduler, begin in ((with_afs, 3), (without, 4)):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(begin)
        x = latents * scheduler.sigmas[begin].float()
        for t in scheduler.timesteps[begin:]:
            with torch.no_grad():
                output = unet(scheduler.scale_model_input(x, t), t.expand(len(x))).sample
            x = scheduler.step(output, t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)
