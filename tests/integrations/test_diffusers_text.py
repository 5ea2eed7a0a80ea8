"""AMEDPipeline with prompts, classes, guidance and an autoencoder, against the engine and against diffusers itself."""

import copy
import string

import numpy as np
import pytest
import torch

from amed_engine import ConfigError, Sampler, make_plan
from amed_engine.adapters import wrap, wrap_pipeline

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers, which prompts need, is not installed")

from amed_engine.integrations.diffusers import AMEDPipeline, AMEDScheduler  # noqa: E402

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RANGE = {"sigma_min": 0.03, "sigma_max": 14.0}
BLOCKS = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
LETTERS = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase), "<|startoftext|>"]

# One predictor, where what is shown is not of the solver.
ONE = pytest.mark.parametrize("predictor", [5], indirect=True, ids=["NFE5-AFS"])


def components():
    """Stable Diffusion's, every one of its own class, tiny and random."""
    vocabulary = {word: i for i, word in enumerate([*LETTERS, "<|endoftext|>"])}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            **BLOCKS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            scaling_factor=0.3,
        )
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        ends = {"bos_token_id": 52, "eos_token_id": 53}
        config = transformers.CLIPTextConfig(vocab_size=54, max_position_embeddings=8, **sizes, **ends)
        encoder = transformers.CLIPTextModel(config)
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    return {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": encoder.eval(), "tokenizer": tokenizer}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stable_diffusion():
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)
    return quiet(diffusers.StableDiffusionPipeline(**components(), scheduler=scheduler, **rest))


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def plan_for(guidance_scale, nfe=4):
    return make_plan(nfe, solver="amed", **RANGE, guidance_scale=guidance_scale)


@pytest.fixture
def pipe(stable_diffusion, predictor):
    predictor.plan = plan_for(4.0, predictor.plan.nfe)
    return quiet(AMEDPipeline.from_pipe(stable_diffusion, predictor=predictor))


def close(one, two):
    assert one.isfinite().all()
    return (one - two).abs().max() < 1e-4 * two.abs().max()


def test_guided_prompts_draw_what_the_engine_draws_of_the_wrapped_pipeline(stable_diffusion, pipe, predictor, latents):
    """The engine's own adapter of a Stable Diffusion pipeline, its guidance, and each sample's own midpoints."""
    prompts = ["a cat", "dogs"]
    denoiser = wrap_pipeline(stable_diffusion, prompts, negative_prompt="bad")
    sampler = Sampler(denoiser, predictor)
    expected = sampler.run(latents, class_labels=[0, 1], guidance_scale=4.0).images
    asked = {"negative_prompt": "bad", "guidance_scale": 4.0, "latents": latents}
    drawn = pipe(prompts, **asked, output_type="latent").images
    assert close(drawn, expected)
    # Neither the prompt nor the bottleneck is idle.
    other = sampler.run(latents, class_labels=[1, 1], guidance_scale=4.0).images
    deaf = Sampler(lambda x, sigma, labels: denoiser(x, sigma, labels).x0, predictor, shape=(4, 8, 8), label_dim=2)
    assert not close(other, expected)
    assert not close(deaf.run(latents, class_labels=[0, 1], guidance_scale=4.0).images, expected)


@ONE
def test_without_guidance_only_the_prompt_counts(stable_diffusion, pipe, predictor, latents):
    pipe.predictor.predictor.plan = predictor.plan = plan_for(None)
    expected = Sampler(wrap_pipeline(stable_diffusion, "a cat"), predictor).run(latents, class_labels=[0, 0]).images
    assert close(pipe("a cat", latents=latents, output_type="latent").images, expected)
    assert close(pipe("a cat", latents=latents, guidance_scale=1.0, output_type="latent").images, expected)


@pytest.mark.parametrize("shift", [None, 0.4])
def test_constants_draw_the_pictures_of_stable_diffusion_itself(stable_diffusion, latents, shift):
    """diffusers' loop, guidance, decoder and image processor, with the same scheduler; shift_factor by the formula."""
    scheduler = AMEDScheduler.from_config(
        {**SD, "midpoints": [[0.4, 1.02, 0.99]] * 2, "final_sigmas_type": "sigma_min"}
    )
    theirs = quiet(
        diffusers.StableDiffusionPipeline(
            **{**stable_diffusion.components, "scheduler": scheduler}, requires_safety_checker=False
        )
    )
    pipe = quiet(AMEDPipeline.from_pipe(theirs))
    asked = {"negative_prompt": ["bad", "worse"], "guidance_scale": 4.0, "num_inference_steps": 2, "latents": latents}
    raw = theirs(["a cat", "dogs"], **asked, output_type="latent").images
    assert close(pipe(["a cat", "dogs"], **asked, output_type="latent").images, raw)
    pipe.vae.register_to_config(shift_factor=shift)
    decoded = pipe.vae.decode(raw / 0.3 + (shift or 0.0)).sample.detach()
    expected = {kind: theirs.image_processor.postprocess(decoded, kind) for kind in ("pt", "np", "pil")}
    drawn = {kind: pipe(["a cat", "dogs"], **asked, output_type=kind).images for kind in expected}
    torch.testing.assert_close(drawn["pt"], expected["pt"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(drawn["np"], expected["np"], rtol=0, atol=1e-4)
    for one, two in zip(drawn["pil"], expected["pil"], strict=True):
        assert (one.mode, one.size) == ("RGB", (16, 16))
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int)).max() <= 1


@ONE
def test_prompts_and_their_embeddings_are_the_same(stable_diffusion, pipe):
    """In the order of diffusers: the images of one prompt stand together. And each image has a generator of its own."""
    seeds = [[torch.Generator().manual_seed(seed) for seed in range(4)] for _ in range(2)]
    options = {"guidance_scale": 4.0, "num_images_per_prompt": 2, "output_type": "latent"}
    texts = pipe(["a cat", "dogs"], negative_prompt=["bad", "worse"], generator=seeds[0], **options).images
    encode = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    told = stable_diffusion.encode_prompt(["a cat", "dogs"], **encode, negative_prompt=["bad", "worse"])
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), told, strict=True))
    assert torch.equal(texts, pipe(**given, generator=seeds[1], **options).images)
    assert len(texts) == 4
    alone = pipe(
        "dogs",
        negative_prompt="worse",
        generator=[torch.Generator().manual_seed(2)],
        **{**options, "num_images_per_prompt": 1},
    )
    assert close(texts[2:3], alone.images)


@ONE
def test_a_learned_word_may_be_several_tokens(stable_diffusion, predictor):
    """As textual inversion leaves tokenizer and encoder; here of copies."""
    own = {name: copy.deepcopy(getattr(stable_diffusion, name)) for name in ("tokenizer", "text_encoder")}
    own["tokenizer"].add_tokens(["<cat>", "<cat>_1"])
    own["text_encoder"].resize_token_embeddings(len(own["tokenizer"]))
    learned = type(stable_diffusion)(**{**stable_diffusion.components, **own}, requires_safety_checker=False)
    made = AMEDPipeline.from_pipe(learned, predictor=predictor, verify=False)
    encode = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    torch.testing.assert_close(made.encode_prompt("a <cat>", **encode), learned.encode_prompt("a <cat>", **encode))


@ONE
def test_a_callback_may_change_guided_latents(pipe, latents):
    asked = {"guidance_scale": 4.0, "latents": latents, "output_type": "latent"}
    seen = []

    def zero_last(pipe, i, t, given):
        seen.append(given["latents"].shape)
        return {"latents": given["latents"] * 0} if i + 1 == pipe.num_timesteps else {}

    assert pipe("a cat", **asked, callback_on_step_end=zero_last).images.abs().max() == 0
    assert seen == [latents.shape] * pipe.num_timesteps


# Classes


def unet_of_classes():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
        kinds = {"down_block_types": down, "up_block_types": up, "num_class_embeds": 5}
        return diffusers.UNet2DModel(**BLOCKS, in_channels=4, out_channels=4, **kinds).eval()


def dit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}
        sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 5}
        return diffusers.DiTTransformer2DModel(**sizes, **heads).eval()


@pytest.mark.parametrize(("make", "null"), [(unet_of_classes, 4), (dit, None)], ids=["U-Net", "DiT"])
def test_guided_classes_draw_what_the_engine_draws(make, null, predictor, latents):
    """A U-Net is told which class means none; a DiT has a row for it, and no bottleneck."""
    network, predictor.plan = make(), plan_for(2.5, predictor.plan.nfe)
    ddim = diffusers.DDIMScheduler(beta_schedule="linear")
    pipe = quiet(AMEDPipeline(network, ddim, predictor, null_class=null))
    options = {"class_labels": [3, 1], "guidance_scale": 2.5}
    drawn = pipe(**options, latents=latents, output_type="latent").images
    expected = (
        Sampler(wrap(network, "epsilon", scheduler=ddim, null_class=null), predictor).run(latents, **options).images
    )
    assert close(drawn, expected)


@ONE
def test_one_class_is_for_all_images(predictor, latents):
    predictor.plan = plan_for(None)
    pipe = quiet(AMEDPipeline(unet_of_classes(), diffusers.DDIMScheduler(), predictor))
    one, two = (pipe(class_labels=labels, latents=latents, output_type="latent").images for labels in (3, [3, 3]))
    assert torch.equal(one, two)
    assert len(pipe(class_labels=3, batch_size=3).images) == 3


# Saving


@ONE
def test_the_whole_pipeline_saves_and_reloads_itself(pipe, predictor, latents, tmp_path):
    """By its own name, and by diffusers' own: with its predictor, encoder and decoder."""
    asked = {"prompt": "a cat", "guidance_scale": 4.0, "latents": latents, "output_type": "pt"}
    drawn = pipe(**asked).images
    pipe.save_pretrained(tmp_path)
    for loader in (AMEDPipeline, diffusers.DiffusionPipeline):
        again = quiet(loader.from_pretrained(tmp_path))
        assert type(again) is AMEDPipeline
        assert again.predictor.predictor.plan == predictor.plan
        assert torch.equal(again(**asked).images, drawn)


@ONE
def test_the_class_that_means_none_is_saved(predictor, tmp_path):
    predictor.plan = plan_for(2.5)
    AMEDPipeline(unet_of_classes(), diffusers.DDIMScheduler(), predictor, null_class=4).save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert again.config.null_class == 4
    assert again.vae is None
    assert len(quiet(again)(class_labels=[1, 2, 3], guidance_scale=2.5, output_type="pt").images) == 3


@ONE
def test_the_pipeline_can_be_wrapped_for_the_engine(stable_diffusion, pipe):
    """So that a predictor is distilled for it: as the pipeline it came from."""
    x, sigma = torch.ones(1, 4, 8, 8), torch.ones(1)
    one, two = (wrap_pipeline(p, "a cat")(x, sigma).x0 for p in (pipe, stable_diffusion))
    assert close(one, two)  # the other scheduler's table is rounded to float32


# Refusals


@ONE
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompt": "a"}, "trained with guidance_scale=4.0, got None"),
        ({"prompt": "a", "guidance_scale": 7.5}, "trained with guidance_scale=4.0, got 7.5"),
        ({"prompt": "a", "guidance_scale": 0.0}, "at least 1, or None"),
        ({"prompt": "a", "guidance_scale": "4"}, "must be a number"),
        ({"prompt": 4, "guidance_scale": 4.0}, "a text or a list of texts, got 4"),
        ({"guidance_scale": 4.0}, "needs class_labels, a prompt or prompt_embeds"),
        ({"prompt": "a", "class_labels": 1, "guidance_scale": 4.0}, "prompts or class_labels, not both"),
        (
            {"prompt": "a", "prompt_embeds": torch.zeros(1, 8, 16), "guidance_scale": 4.0},
            "either prompt or prompt_embeds",
        ),
        ({"negative_prompt": "a", "guidance_scale": 4.0}, "either prompt or prompt_embeds"),
        ({"prompt_embeds": [[0.0]], "guidance_scale": 4.0}, "must be tensors"),
        ({"prompt_embeds": torch.zeros(1, 8, 12), "guidance_scale": 4.0}, r"shape \(B, L, 16\)"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3, "guidance_scale": 4.0}, "the shape of prompt_embeds"),
        ({"prompt": ["a", "b"], "batch_size": 3, "guidance_scale": 4.0}, "got 2 prompts or class_labels for 3 images"),
    ],
)
def test_calls_that_cannot_work_are_refused(pipe, options, match):
    with pytest.raises(ConfigError, match=match):
        pipe(**options)


@ONE
def test_pipelines_that_lack_what_is_asked_are_refused(stable_diffusion, predictor):
    predictor.plan = plan_for(2.5)
    classes = quiet(AMEDPipeline(unet_of_classes(), diffusers.DDIMScheduler(), predictor))
    for options, match in (
        ({"class_labels": 3, "guidance_scale": 2.5}, "null_class="),
        ({"class_labels": 5, "guidance_scale": 2.5}, r"integers in 0 \.\. 4, got \[5\]"),
        (
            {
                "prompt_embeds": torch.zeros(1, 8, 16),
                "negative_prompt_embeds": torch.zeros(1, 8, 16),
                "guidance_scale": 2.5,
            },
            "takes none",
        ),
    ):
        with pytest.raises(ConfigError, match=match):
            classes(**options)
    deaf = quiet(AMEDPipeline(stable_diffusion.unet, stable_diffusion.scheduler, predictor))
    with pytest.raises(ConfigError, match="need the pipeline's tokenizer and text_encoder"):
        deaf("a cat", guidance_scale=2.5)
    with pytest.raises(ConfigError, match="needs negative_prompt_embeds"):
        deaf(prompt_embeds=torch.zeros(1, 8, 16), guidance_scale=2.5)
    with pytest.raises(ConfigError, match="latents of 4 channels, the network takes 3"):
        AMEDPipeline(
            diffusers.UNet2DModel(**BLOCKS, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
            stable_diffusion.scheduler,
            vae=stable_diffusion.vae,
        )
