"""AMEDScheduler in further pipelines of diffusers, and which networks and schedulers AMEDPipeline takes for its own."""

from dataclasses import replace

import pytest
import torch

from amed_engine import ConfigError, ConstantPredictor, Sampler, make_plan
from amed_engine.adapters import wrap, wrap_pipeline
from amed_engine.adapters.fingerprint import fingerprint

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers, which Stable Diffusion needs, is not installed")

from amed_engine.integrations.diffusers import AMEDPipeline, AMEDScheduler  # noqa: E402

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BLOCKS = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
TEXTLESS = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
MIDS = [[0.4, 1.01, 1.0], [0.5, 0.98, 1.02], [0.6, 1.0, 0.99]]

# One predictor, where what is shown is not of the solver.
ONE = pytest.mark.parametrize("predictor", [4], indirect=True, ids=["NFE4"])


def make_unet(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.UNet2DConditionModel(
            **BLOCKS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            **options,
        ).eval()


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        return diffusers.AutoencoderKL(
            block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=16, **blocks
        )


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(kind, vae, unet, **more):
    scheduler = AMEDScheduler(**SD, midpoints=MIDS, final_sigmas_type="sigma_min")
    return quiet(kind(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **TEXTLESS, **more))


@pytest.fixture
def asked():
    """Embeddings of two prompts and their negatives, latents, and what all pipelines are told."""
    generator = torch.Generator().manual_seed(3)
    rows = {name: torch.randn(2, 7, 16, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")}
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return {**rows, "latents": latents, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}


def close(one, two):
    assert one.isfinite().all()
    return (one - two).abs().max() < 1e-4 * two.abs().max()


def test_inpainting_draws_all_of_a_full_mask_and_nothing_of_an_empty_one(vae, asked):
    unet = make_unet()
    drawn = build(diffusers.StableDiffusionPipeline, vae, unet)(**asked).images
    pipe = build(diffusers.StableDiffusionInpaintPipeline, vae, unet)
    given = {**asked, "image": torch.rand(2, 3, 16, 16), "strength": 1.0, "height": 16, "width": 16}
    assert torch.equal(pipe(**given, mask_image=torch.ones(2, 1, 16, 16)).images, drawn)
    kept = pipe(**given, mask_image=torch.zeros(2, 1, 16, 16), generator=torch.Generator().manual_seed(0)).images
    posterior = vae.encode(2 * given["image"] - 1).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(0)) * vae.config.scaling_factor
    assert torch.equal(kept, expected)
    left = torch.ones(2, 1, 16, 16)
    left[..., 8:] = 0
    half = pipe(**given, mask_image=left, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(half[..., 4:], expected[..., 4:])
    assert (half - expected)[..., :4].abs().max() > 0.1


def test_a_controlnet_that_learned_nothing_changes_nothing_and_another_does(vae, asked):
    unet = make_unet()
    drawn = build(diffusers.StableDiffusionPipeline, vae, unet)(**asked).images
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    pipe = build(diffusers.StableDiffusionControlNetPipeline, vae, unet, controlnet=controlnet)
    edges = torch.rand(2, 3, 16, 16)
    assert close(pipe(image=edges, **asked).images, drawn)
    with torch.no_grad():
        controlnet.controlnet_mid_block.bias.fill_(0.5)
    assert not close(pipe(image=edges, **asked).images, drawn)


@ONE
def test_stable_diffusion_xl_draws_what_the_engine_draws(vae, predictor, asked):
    """Its pooled embeddings and sizes are the pipeline's to tell; the scheduler needs to know nothing of them."""
    options = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = make_unet(**options, projection_class_embeddings_input_dim=12 + 6 * 8)
    predictor.plan = make_plan(4, solver="amed", sigma_min=0.03, sigma_max=14.0)
    scheduler = AMEDScheduler.from_predictor(predictor, diffusers.EulerDiscreteScheduler(**SD).config)
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = quiet(diffusers.StableDiffusionXLPipeline(vae, unet=unet, scheduler=scheduler, **texts))
    pooled, embeds = torch.randn(2, 12), asked["prompt_embeds"]
    told = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0, "output_type": "latent"}
    drawn = pipe(**told, latents=asked["latents"], num_inference_steps=2, height=16, width=16).images
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).expand(2, -1)
    bound = {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": sizes}
    denoiser = wrap(unet, scheduler=diffusers.EulerDiscreteScheduler(**SD), conditions=bound, bottleneck=None)
    assert close(drawn, Sampler(denoiser, predictor).run(asked["latents"], class_labels=[0, 1]).images)


@ONE
def test_the_network_must_be_the_predictor_s(vae, predictor, tmp_path):
    """By the fingerprint of what `wrap_pipeline` returned when it was distilled, and nothing stays on the network."""
    euler, unet = diffusers.EulerDiscreteScheduler(**SD), make_unet()
    distilled_on = wrap(unet, scheduler=euler)
    predictor.plan = make_plan(4, solver="amed", sigma_min=0.03, sigma_max=14.0)
    predictor.plan = replace(predictor.plan, model=fingerprint(distilled_on))
    fresh = make_unet()
    pipe = AMEDPipeline(fresh, euler, predictor)
    assert not fresh.mid_block._forward_hooks
    pipe.save_pretrained(tmp_path)
    AMEDPipeline.from_pretrained(tmp_path)
    for other, scheduler in ((make_unet(seed=5), euler), (unet.half(), euler), (make_unet(), AMEDScheduler())):
        with pytest.raises(ConfigError, match="trained for another model"):
            AMEDPipeline(other, scheduler, predictor)
        AMEDPipeline(other, scheduler, predictor, verify=False)
    with pytest.raises(ConfigError, match="trained for another model"):
        AMEDPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert AMEDPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16, verify=False).config.verify is False


def test_predictors_of_other_kinds_are_for_the_scheduler_or_the_engine():
    """Constants give there what the engine draws with them."""
    euler, unet = diffusers.EulerDiscreteScheduler(**SD), make_unet()
    constants = ConstantPredictor(2)
    constants.plan = make_plan(4, solver="amed", sigma_min=0.03, sigma_max=14.0)
    for given in (constants, MIDS):
        with pytest.raises(ConfigError, match=r"takes an AMEDPredictor, got a .*AMEDScheduler\.from_predictor"):
            AMEDPipeline(unet, euler, given)
    latents, embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    pipe = quiet(AMEDPipeline(unet, AMEDScheduler.from_predictor(constants, euler.config)))
    drawn = pipe(prompt_embeds=embeds, latents=latents, num_inference_steps=2, output_type="latent").images
    denoiser = wrap(unet, scheduler=euler, conditions={"encoder_hidden_states": embeds})
    assert close(drawn, Sampler(denoiser, constants).run(latents, class_labels=[0, 1]).images)


def test_networks_of_other_samples_than_images_are_refused():
    blocks = {"down_block_types": ("DownBlock3D",) * 2, "up_block_types": ("UpBlock3D",) * 2}
    video = diffusers.UNet3DConditionModel(8, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    with pytest.raises(ConfigError, match=r"draws images, UNet3DConditionModel takes samples \(4, F, H, W\): .*wrap"):
        AMEDPipeline(video, AMEDScheduler())


@ONE
def test_a_predictor_distilled_on_the_wrapped_pipeline_is_its_own(vae, predictor):
    kind = diffusers.StableDiffusionPipeline
    pipe = AMEDPipeline.from_pipe(build(kind, vae, make_unet()), scheduler=diffusers.DDIMScheduler(**SD))
    pipe.encode_prompt = lambda **_: (torch.zeros(1, 7, 16), torch.zeros(1, 7, 16))
    predictor.plan = replace(
        make_plan(4, solver="amed", sigma_min=0.03, sigma_max=14.0), model=fingerprint(wrap_pipeline(pipe, "a cat"))
    )
    assert AMEDPipeline.from_pipe(pipe, predictor=predictor).config.verify


@ONE
def test_edm_networks_are_compared_as_wrap_makes_them(predictor):
    unet = diffusers.UNet2DModel(
        **BLOCKS,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    predictor.plan = replace(predictor.plan, model=fingerprint(wrap(unet, "edm")))
    AMEDPipeline(unet, AMEDScheduler(), predictor)
    with pytest.raises(ConfigError, match="another wrapping"):
        AMEDPipeline(unet, AMEDScheduler(sigma_data=1.0), predictor)


@ONE
def test_the_guidance_of_a_predictor_stays_with_its_scheduler(vae, predictor, asked, tmp_path):
    predictor.plan = make_plan(4, solver="amed", sigma_min=0.03, sigma_max=14.0, guidance_scale=4.0)
    scheduler = AMEDScheduler.from_predictor(predictor, diffusers.DDIMScheduler(**SD).config)
    scheduler.save_pretrained(tmp_path)
    assert AMEDScheduler.from_pretrained(tmp_path).config.guidance_scale == 4.0
    pipe = quiet(AMEDPipeline(make_unet(), scheduler))
    given = {name: asked[name] for name in ("prompt_embeds", "negative_prompt_embeds", "latents", "output_type")}
    assert pipe(**given, guidance_scale=4.0).images.isfinite().all()
    with pytest.raises(ConfigError, match=r"trained with guidance_scale=4\.0, got 7\.5"):
        pipe(**given, guidance_scale=7.5)


@pytest.mark.parametrize(
    ("present", "match"),
    [
        (lambda: diffusers.FlowMapEulerDiscreteScheduler(), "of a flow-matching model"),
        (lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "of a flow-matching model"),
        (lambda: diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type='continuous'"),
    ],
)
def test_schedulers_that_mean_something_else_are_refused(predictor, present, match):
    config = present().config
    for make in (
        lambda: AMEDScheduler.from_config(config),
        lambda: AMEDScheduler.from_predictor(predictor, config),
        lambda: AMEDPipeline(make_unet(), present(), predictor),
    ):
        with pytest.raises(ConfigError, match=match):
            make()


@pytest.mark.parametrize(
    ("present", "match"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, "FlowMatchEulerDiscreteScheduler is of a flow-matching model"),
        (lambda: diffusers.DDIMScheduler(thresholding=True), "DDIMScheduler has thresholding or clip_sample set"),
        (lambda: AMEDScheduler(clip_sample=True), "AMEDScheduler has thresholding or clip_sample set"),
    ],
)
def test_what_the_pipeline_s_own_loop_does_not_do_is_refused(present, match):
    with pytest.raises(ConfigError, match=match):
        AMEDPipeline(make_unet(), present())


KINDS = ("DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "KDPM2Discrete", "PNDM", "UniPCMultistep")


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_of_the_present_scheduler_are_kept(predictor, kind):
    """Here diffusers would put other defaults in their place: those of a model without steps."""
    present = getattr(diffusers, f"{kind}Scheduler")()
    scheduler = AMEDScheduler.from_config(present.config)
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), present.alphas_cumprod, rtol=1e-5, atol=0)
    own = AMEDScheduler.from_predictor(predictor, present.config)
    assert own.alphas_cumprod is not None
    assert own.settings["final_sigmas_type"] == "sigma_min"
    own.set_timesteps()
    assert own.levels.tolist() == list(predictor.plan.sigmas)
