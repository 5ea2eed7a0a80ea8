"""AMEDPipeline round the components of SDXL: two encoders, pooled embeddings and sizes, with prediction per sample."""

import pytest
import torch

from amed_engine import ConfigError, Sampler, make_plan
from amed_engine.adapters import wrap_pipeline
from amed_engine.engine.measure import paired_latents
from amed_engine.solvers.mean import Mean

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers, which prompts need, is not installed")

from amed_engine.integrations.diffusers import AMEDPipeline  # noqa: E402

WORDS = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefgh")]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ONE = pytest.mark.parametrize("predictor", [5], indirect=True, ids=["NFE5-AFS"])


def make_encoder(kind):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": 12}
    return kind(transformers.CLIPTextConfig(vocab_size=len(WORDS), max_position_embeddings=8, **sizes, **ends)).eval()


@pytest.fixture(scope="module")
def xl():
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(WORDS)}, merges=[], model_max_length=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + 6 * 8,
        ).eval()
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        vae = diffusers.AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, **blocks).eval()
        encoders = make_encoder(transformers.CLIPTextModel), make_encoder(transformers.CLIPTextModelWithProjection)
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae, *encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(xl, predictor):
    predictor.plan = make_plan(predictor.plan.nfe, solver="amed", sigma_min=0.03, sigma_max=14.0, guidance_scale=4.0)
    pipe = AMEDPipeline.from_pipe(xl, predictor=predictor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def close(one, two):
    assert one.isfinite().all()
    return (one - two).abs().max() < 1e-4 * two.abs().max()


def test_prompts_draw_what_the_engine_draws_of_the_wrapped_pipeline(xl, pipe, predictor, latents):
    """And this pipeline can be wrapped like the original."""
    for wrapped in (xl, pipe):
        sampler = Sampler(wrap_pipeline(wrapped, ["a b", "c"], negative_prompt="h"), predictor)
        expected = sampler.run(latents, class_labels=[0, 1], guidance_scale=4.0).images
        asked = {"negative_prompt": "h", "guidance_scale": 4.0, "latents": latents, "output_type": "latent"}
        assert close(pipe(["a b", "c"], **asked).images, expected)
        assert not close(pipe(["a b", "d"], **asked).images, expected)


@torch.no_grad()
def test_prompts_start_about_their_own_mean_answers(xl, about_mean, latents):
    """To the pooled embeddings too: as the engine does with those of two classes, which are these prompts."""
    options = {"sigma_min": 0.03, "sigma_max": 14.0, "guidance_scale": 4.0}
    about_mean.plan = make_plan(5, solver="amed", afs="mean", **options)
    pipe = AMEDPipeline.from_pipe(xl, predictor=about_mean)
    pipe.set_progress_bar_config(disable=True)
    asked = {"negative_prompt": "h", "guidance_scale": 4.0, "latents": latents, "output_type": "latent"}
    drawn = pipe(["a b", "c"], **asked).images
    denoiser = wrap_pipeline(xl, ["a b", "c"], negative_prompt="h")
    x, labels = torch.cat([paired_latents(1, (4, 8, 8)) * 14] * 3), torch.eye(3, 2).roll(1, 0)
    rows = denoiser(x, torch.full((3,), 14.0), labels).x0
    about_mean.plan = about_mean.plan.about(Mean.of(rows, classes=2, sigma=14.0, latents=1))
    expected = Sampler(denoiser, about_mean).run(latents, class_labels=[0, 1], guidance_scale=4.0).images
    assert close(drawn, expected)
    shared = {f"{name}prompt_embeds": torch.ones(2, 8, 32) for name in ("", "negative_")}
    pooled = {"pooled_prompt_embeds": torch.eye(2, 12), "negative_pooled_prompt_embeds": torch.zeros(2, 12)}
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    pipe(**shared, **pooled, **{name: asked[name] for name in ("guidance_scale", "latents", "output_type")})
    handle.remove()
    assert calls == [4] * 6  # two prompts by their pooled embeddings alone


@ONE
def test_embeddings_are_the_same_as_their_prompts(xl, pipe, latents):
    asked = {"guidance_scale": 4.0, "latents": latents, "output_type": "latent"}
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for negative in (None, "h"):  # without one, SDXL leads away from zeros
        drawn = pipe(["a", "b"], negative_prompt=negative, **asked).images
        texts = None if negative is None else [negative] * 2
        encoded = dict(zip(names, xl.encode_prompt(["a", "b"], negative_prompt=texts), strict=True))
        assert close(pipe(**encoded, **asked).images, drawn)
        few = {name: rows[:1] if name.startswith("negative") else rows for name, rows in encoded.items()}
        assert close(pipe(**few, **asked).images, drawn)
    two = pipe("a", num_images_per_prompt=2, **asked).images
    assert close(two[1:], pipe("a", **{**asked, "latents": latents[1:]}).images)


@ONE
def test_the_pipeline_saves_and_reloads_itself(pipe, latents, tmp_path):
    asked = {"prompt": "a", "guidance_scale": 4.0, "latents": latents[:1], "output_type": "pt"}
    pipe.save_pretrained(tmp_path)
    again = AMEDPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    drawn = again(**asked).images
    assert drawn.shape == (1, 3, 16, 16)
    assert close(drawn, pipe(**asked).images)


@ONE
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompt_embeds": torch.zeros(1, 8, 32)}, "needs pooled_prompt_embeds"),
        ({"prompt": "a", "pooled_prompt_embeds": torch.zeros(1, 12)}, "pass both, or neither"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, "got 2 negative prompts for 3 prompts"),
        ({"prompt_embeds": torch.zeros(2, 8, 32), "pooled_prompt_embeds": torch.zeros(1, 12)}, "needs negative_prompt"),
    ],
)
def test_calls_that_cannot_work_are_refused(pipe, options, match):
    with pytest.raises(ConfigError, match=match):
        pipe(**options, guidance_scale=4.0)


@ONE
def test_rows_of_pooled_embeddings_are_counted(pipe):
    rows = {"prompt_embeds": torch.zeros(2, 8, 32), "negative_prompt_embeds": torch.zeros(1, 8, 32)}
    with pytest.raises(ConfigError, match=r"pooled_prompt_embeds must have shape \(2, P\), got \(1, 12\)"):
        pipe(**rows, pooled_prompt_embeds=torch.zeros(1, 12), guidance_scale=4.0)
    with pytest.raises(ConfigError, match="needs negative_pooled_prompt_embeds"):
        pipe(**rows, pooled_prompt_embeds=torch.zeros(2, 12), guidance_scale=4.0)


def test_the_network_is_told_the_size_that_is_drawn(xl):
    denoiser = wrap_pipeline(xl, ["a", "b"], shape=(4, 4, 12))
    size = 4 * xl.vae_scale_factor, 12 * xl.vae_scale_factor
    expected = xl._get_add_time_ids(size, (0, 0), size, torch.float32, 12)
    assert torch.equal(denoiser.conditions.table_time_ids, expected.expand(3, -1))  # of both prompts and of none
    own = 8 * xl.vae_scale_factor
    assert wrap_pipeline(xl, "a").conditions.table_time_ids[0].tolist() == [own, own, 0, 0, own, own]


def test_without_a_negative_prompt_it_leads_away_from_what_the_pipeline_does(xl):
    """Zeros; an empty prompt that is given is encoded."""
    encode = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    for negative in (None, "", "bad"):
        conditions = wrap_pipeline(xl, "a b", negative_prompt=negative).conditions
        _, embeds, _, pooled = xl.encode_prompt("a b", negative_prompt=negative, **encode)
        assert torch.equal(conditions.table_encoder_hidden_states[-1], embeds[0])
        assert torch.equal(conditions.table_text_embeds[-1], pooled[0])
        assert bool(embeds.any()) is (negative is not None)


def test_a_network_that_is_told_an_aesthetic_score_is_refused(xl):
    refiner = diffusers.UNet2DConditionModel.from_config(
        {**xl.unet.config, "projection_class_embeddings_input_dim": 12 + 5 * 8}
    )
    parts = {**xl.components, "unet": refiner, "image_encoder": None, "feature_extractor": None}
    pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    with pytest.raises(ConfigError, match="told 5 numbers of 8, expected the 6 of SDXL's sizes; the Refiner"):
        wrap_pipeline(pipe, "a")
