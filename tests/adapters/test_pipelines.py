"""Pipelines of diffusers, tiny and with random weights: from a text to an image, as they make it themselves."""

import functools

import pytest
import torch

import amed_engine
from amed_engine.adapters import ClassifierFree, decode_latents, flow_levels, shift_of, wrap, wrap_pipeline
from amed_engine.adapters.flux import pack, unpack
from amed_engine.errors import ConfigError

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")
pytest.importorskip("transformers", reason="needs pip install 'amed-engine[diffusers]'")

from tiny_pipelines import autoencoder, make_flux, stable_diffusion, t5, unet  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def pipeline():
    return stable_diffusion()


def test_text_to_image_in_five_evaluations(pipeline):
    denoiser = wrap_pipeline(pipeline, ["a cat", "dogs"])
    result = amed_engine.Sampler(denoiser, nfe=5).run([1, 1, 2], class_labels=[0, 1, 1], guidance_scale=7.5)
    assert result.nfe == 5
    images = decode_latents(pipeline.vae, result.images)
    assert images.shape == (3, 3, 16, 16)
    assert images.abs().max() <= 1
    assert (images[0] - images[1]).abs().max() > 1e-4  # the same noise, another prompt
    assert "encoder_hidden_states, 2 bound, with null" in repr(denoiser)


@torch.no_grad()
def test_text_to_image_is_what_the_pipeline_itself_makes(pipeline):
    """Euler on the same noise levels, with guidance and a negative prompt: every number from diffusers but ours."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = pipeline(
        ["a cat", "dogs"], negative_prompt=["bad", "bad"], num_inference_steps=5, guidance_scale=4.0, latents=latents,
        output_type="latent",
    ).images  # fmt: skip
    guided = ClassifierFree(wrap_pipeline(pipeline, ["a cat", "dogs"], negative_prompt="bad"), 4.0)
    sigmas = pipeline.scheduler.sigmas[:-1].double()
    got = amed_engine.sample(
        lambda x, sigma: guided(x, sigma, torch.tensor([0, 1])),
        latents * pipeline.scheduler.init_noise_sigma,
        sigmas,
        amed_engine.make_solver("euler"),
        denoise_to_zero=True,
    )
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    decoded = pipeline.vae.decode(expected / 0.3).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(pipeline.vae, got), decoded, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module", params=[True, False], ids=["distilled", "plain"])
def flux(request):
    return make_flux(guidance_embeds=request.param)


def test_flux_makes_an_image_of_a_text_in_five_evaluations(flux):
    denoiser = wrap_pipeline(flux, ["a cat", "dogs"], shape=(4, 8, 6))
    levels = flow_levels(5, shift=shift_of(flux.scheduler, denoiser.sample_shape))
    result = amed_engine.Sampler(denoiser, solver="euler", schedule=levels, afs=False).run([1, 1], class_labels=[0, 1])
    assert result.nfe == 5
    images = decode_latents(flux.vae, result.images)
    assert images.shape == (2, 3, 16, 12)
    assert images.isfinite().all()
    assert (result.images[0] - result.images[1]).abs().max() > 1e-4  # the same noise, another prompt
    assert wrap_pipeline(flux, "a cat").sample_shape == (4, 128, 128)


@torch.no_grad()
def test_flux_makes_what_its_own_pipeline_makes(flux):
    """Euler on the same shifted times, with a negative prompt: every number from diffusers but ours."""
    shape, times = (4, 8, 6), torch.linspace(0.999, 0.2, 5, dtype=torch.float64)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    expected = flux(
        ["a cat", "dogs"], negative_prompt=["bad", "bad"], true_cfg_scale=4.0, guidance_scale=2.0, height=16, width=12,
        latents=pack(latents), sigmas=times.tolist(), output_type="latent",
    ).images  # fmt: skip
    guided = ClassifierFree(
        wrap_pipeline(flux, ["a cat", "dogs"], negative_prompt="bad", shape=shape, guidance=2.0), 4.0
    )
    sigmas = shift_of(flux.scheduler, shape) * times / (1 - times)
    got = amed_engine.sample(
        lambda x, sigma: guided(x, sigma, torch.tensor([0, 1])),
        (latents * (1 + sigmas[0])).float(),  # x = x_t/(1 - t)
        sigmas,
        amed_engine.make_solver("euler"),
        denoise_to_zero=True,
    )
    torch.testing.assert_close(got, unpack(expected, 8, 6), rtol=1e-3, atol=1e-3)
    decoded = flux.vae.decode(got / 0.3 + 0.1).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(flux.vae, got), decoded, rtol=1e-4, atol=1e-4)


def test_shifts_are_those_of_the_scheduler():
    assert shift_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), (16, 128, 128)) == 3.0
    with pytest.raises(ConfigError, match="flow-matching scheduler of diffusers, got DDIMScheduler"):
        shift_of(diffusers.DDIMScheduler(), (4, 8, 8))
    linear = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    with pytest.raises(ConfigError, match="need an exponential shift"):
        shift_of(linear, (4, 8, 8))


def test_pipelines_that_do_not_fit_together_are_refused(pipeline):
    with pytest.raises(ConfigError, match="must be a text-to-image pipeline"):
        wrap_pipeline(pipeline.unet, "a cat")
    with pytest.raises(ConfigError, match=r"is not told a guidance; pass guidance_scale=2\.0 to"):
        wrap_pipeline(pipeline, "a cat", guidance=2.0)
    with pytest.raises(ConfigError, match="prompts are empty"):
        wrap_pipeline(pipeline, [])
    with pytest.raises(ConfigError, match="the latents have 3 channels, the VAE 4"):
        decode_latents(pipeline.vae, torch.zeros(1, 3, 8, 8))


def controlnet(net):
    return diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(4, 8))


def test_parts_that_the_denoiser_would_not_ask_are_refused(pipeline):
    made = diffusers.StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=controlnet(pipeline.unet))
    with pytest.raises(ConfigError, match=r"ControlNetPipeline has controlnet, .*StableDiffusionPipeline\.from_pipe"):
        wrap_pipeline(made, "a cat")
    plain = wrap_pipeline(diffusers.StableDiffusionPipeline.from_pipe(made), "a cat")
    x, sigma = torch.randn(1, 4, 8, 8), torch.tensor([2.0])
    expected = wrap_pipeline(pipeline, "a cat")(x, sigma, torch.tensor([0])).x0
    assert torch.equal(plain(x, sigma, torch.tensor([0])).x0, expected)


def test_networks_that_are_not_known_are_refused_by_name():
    encoder, tokenizer = t5()
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=8,
        sample_size=8, caption_channels=12,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    made = diffusers.PixArtAlphaPipeline(tokenizer, encoder, autoencoder(), network, scheduler)
    with pytest.raises(ConfigError, match="has a PixArtTransformer2DModel, known are UNet2DConditionModel"):
        wrap_pipeline(made, "a cat")


@torch.no_grad()
def test_a_compiled_transformer_is_the_one_inside(flux):
    x, sigma, first = torch.randn(1, 4, 8, 6), torch.tensor([2.0]), torch.tensor([0])
    expected = wrap_pipeline(flux, "a cat", shape=(4, 8, 6))(x, sigma, first).x0
    inside = flux.transformer
    flux.transformer = torch.compile(inside, backend="eager")
    try:
        compiled = wrap_pipeline(flux, "a cat", shape=(4, 8, 6))
        torch.testing.assert_close(compiled(x, sigma, first).x0, expected, rtol=1e-4, atol=1e-4)
    finally:
        flux.transformer = inside


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_unet_runs_without_a_bottleneck(in_place):
    """As the message says that refuses to read one."""
    made, (x, sigma, first) = stable_diffusion(), (torch.randn(1, 4, 8, 8), torch.tensor([2.0]), torch.tensor([0]))
    plain = wrap_pipeline(made, "a cat")
    expected = plain(x, sigma, first).x0
    assert plain.bottleneck == "mid_block"
    if in_place:
        made.unet.compile(backend="eager")
    else:
        made.unet = torch.compile(made.unet, backend="eager")
    with pytest.raises(ConfigError, match="or pass bottleneck=None"):
        wrap_pipeline(made, "a cat")
    denoised = wrap_pipeline(made, "a cat", bottleneck=None)(x, sigma, first)
    assert denoised.features is None
    torch.testing.assert_close(denoised.x0, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_network_that_is_told_a_picture_asks_for_it(pipeline):
    """As `load_ip_adapter` leaves it; what it is told then comes from conditions, or from functools.partial."""
    embeddings = diffusers.models.embeddings
    net = unet()
    projection = embeddings.ImageProjection(image_embed_dim=6, cross_attention_dim=16, num_image_text_embeds=2)
    net.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection([projection])
    net.config.encoder_hid_dim_type = "ip_image_proj"
    net.set_attn_processor({name: ip_processor(net, name) for name in net.attn_processors})
    made = diffusers.StableDiffusionPipeline(**{**pipeline.components, "unet": net}, requires_safety_checker=False)
    with pytest.raises(ConfigError, match=r"needs image_embeds.*unload_ip_adapter"):
        wrap_pipeline(made, "a cat")
    text, picture = torch.randn(1, 8, 16), torch.randn(1, 1, 6)
    x, sigma = torch.randn(1, 4, 8, 8), torch.tensor([2.0])
    given = functools.partial(net, added_cond_kwargs={"image_embeds": [picture]})
    told = wrap(given, scheduler=pipeline.scheduler, conditions={"encoder_hidden_states": text}, bottleneck=None)
    c = told.family(sigma)
    raw = given(c.scale * x, c.time, encoder_hidden_states=text).sample
    torch.testing.assert_close(told(x, sigma, torch.tensor([0])).x0, x - sigma * raw)
    with pytest.raises(ConfigError, match="conditions lack image_embeds"):
        wrap(net, scheduler=pipeline.scheduler, conditions={"encoder_hidden_states": text})


def ip_processor(net, name):
    """Attention to text and picture where a block attends to texts."""
    if not name.endswith("attn2.processor"):
        return net.attn_processors[name]
    torch.manual_seed(0)
    width = net.get_submodule(name.removesuffix(".processor")).to_q.out_features
    return diffusers.models.attention_processor.IPAdapterAttnProcessor2_0(width, 16, num_tokens=(2,))
