"""Recipes of latent models: what `amed reproduce` draws, against every part called by hand. Small random networks."""

import json
import math
import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from amed_engine import ConfigError, FileFormatError, Sampler, networks
from amed_engine.adapters import alphas_cumprod, decode_latents, wrap, wrap_pipeline
from amed_engine.checkpoints import convert
from amed_engine.evaluation.published.recipes import load_recipe, recipe_names
from amed_engine.evaluation.published.reproduce import draw, prepare
from amed_engine.evaluation.published.text_to_image import find_pipeline, read_prompts
from amed_engine.zoo.catalogue import CATALOGUE

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

LSUN, SD = "ldm-lsun-bedroom-256x256", "sd-v1-5"
LEVELS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
UNET = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
UNET |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32}
CAPTIONS = ["a cat", "dogs", "the sea", "two cats"]


def randomised(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


def pixels(images: torch.Tensor) -> np.ndarray:
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def written(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))])


# ---- numbers


def test_the_tables_are_there():
    assert {name for name in recipe_names() if "-ldm-" in name} == {
        f"lsun-bedroom-ldm-{row}-{nfe}" for row in ("dpmpp", "unipc", "ipndm") for nfe in (4, 5, 6, 7)
    }
    assert load_recipe("lsun-bedroom-ldm-ipndm-5").fid == 6.38
    assert load_recipe("lsun-bedroom-ipndm-5").fid == 26.65  # in pixels
    assert load_recipe("sd-coco-dpmpp-8").fid == 14.84
    assert load_recipe("sd-coco-ipndm-5").guidance == 7.5


@pytest.mark.parametrize(("name", "steps"), [("lsun-bedroom-ldm-ipndm-5", 5), ("sd-coco-dpmpp-4", 4)])
def test_levels_are_uniform_in_the_models_own_time(name, steps):
    """NFE counts solver steps, also where guidance doubles the work in each."""
    plan = load_recipe(name).plan()
    ends = CATALOGUE[load_recipe(name).model].betas
    betas = np.linspace(math.sqrt(ends["start"]), math.sqrt(ends["end"]), 1000) ** 2
    log_alpha = np.log(np.cumprod(1 - betas)) / 2
    t = np.linspace(1, 1 / 1000, steps + 1)
    expected = np.sqrt(np.expm1(-2 * np.interp(t, np.arange(1, 1001) / 1000, log_alpha)))
    np.testing.assert_allclose(plan.sigmas, expected, rtol=1e-9)
    assert (plan.nfe, plan.intervals) == (steps, steps)


# ---- LSUN Bedroom in latents


@pytest.fixture
def bedroom(monkeypatch, tmp_path):
    """(U-Net, first stage, folder with both, as `amed convert` leaves them)"""
    entry = replace(CATALOGUE[LSUN], arguments=UNET, shape=(3, 8, 8))
    monkeypatch.setitem(CATALOGUE, LSUN, entry)
    network = randomised(networks.OpenAIUNet(**UNET))
    codes = {"num_vq_embeddings": 16, "vq_embed_dim": 3, "latent_channels": 3, "scaling_factor": 1.0}
    vae = randomised(diffusers.VQModel(block_out_channels=[32, 32], layers_per_block=1, **codes, **LEVELS))
    folder = tmp_path / "weights"
    folder.mkdir()
    state = {f"model.diffusion_model.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state}, folder / entry.file)
    convert(folder / entry.file, folder / LSUN, image_size=8)
    (folder / entry.file).unlink()
    vae.save_pretrained(folder / f"{LSUN}-vae")
    return network, vae, folder


@pytest.mark.parametrize("name", ["lsun-bedroom-ldm-ipndm-4", "lsun-bedroom-ldm-dpmpp-5", "lsun-bedroom-ldm-unipc-6"])
def test_latents_become_the_images_of_their_first_stage(bedroom, amed, tmp_path, name):
    network, vae, folder = bedroom
    common = ("--device", "cpu", "--json", "--outdir", tmp_path / "o")
    code, out, error = amed("reproduce", name, "--images", 3, "--batch", 2, "--weights", folder, *common)
    assert code == 0, error
    recipe, facts = load_recipe(name), json.loads(out)
    assert (facts["published_fid"], facts["images"], facts["guidance_scale"]) == (recipe.fid, 3, None)
    betas = alphas_cumprod("scaled_linear", 1000, 0.0015, 0.0195)
    levels = torch.tensor(recipe.plan().sigmas, dtype=torch.float64)
    denoiser = wrap(network, "epsilon", shape=(3, 8, 8), betas=betas)
    sampler = Sampler(denoiser, solver=recipe.solver, solver_options=recipe.options, schedule=levels, afs=False)
    with torch.no_grad():
        expected = vae.decode(sampler.run([0, 1, 2]).images).sample
    assert expected.shape == (3, 3, 16, 16)
    assert np.abs(written(tmp_path / "o").astype(int) - pixels(expected)).max() <= 1
    assert pixels(expected).std() > 1
    with torch.no_grad():
        next(vae.parameters()).flatten()[0] += 1e-3
    vae.save_pretrained(folder / f"{LSUN}-vae")
    code, _, error = amed("reproduce", name, "--images", 3, "--batch", 2, "--weights", folder, *common)
    assert code == 2
    assert "is another image: decoder: " in error


def test_without_its_first_stage_it_says_where_to_get_it(bedroom, tmp_path):
    folder = bedroom[2]
    (folder / f"{LSUN}-vae").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"ldm-lsun-bedroom-256x256-vae; `amed convert`"):
        prepare(load_recipe("lsun-bedroom-ldm-ipndm-5"), weights=folder)
    with pytest.raises(ConfigError, match="takes no prompts"):
        prepare(load_recipe("lsun-bedroom-ldm-ipndm-5"), weights=folder, prompts="x.csv")


# ---- Stable Diffusion


@pytest.fixture
def stable(monkeypatch, tmp_path):
    """Stable Diffusion in miniature, saved as the directory of a pipeline, and captions; (pipeline, folder, captions)"""
    transformers = pytest.importorskip("transformers", reason="needs pip install 'amed-engine[diffusers]'")
    small = {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 16, "sample_size": 8}
    small |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 4}
    small |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "in_channels": 4, "out_channels": 4}
    monkeypatch.setitem(CATALOGUE, SD, replace(CATALOGUE[SD], arguments=small, shape=(4, 8, 8)))
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=[32, 32], latent_channels=4, scaling_factor=0.3, sample_size=16, **LEVELS
        ).eval(),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8),
        unet=diffusers.UNet2DConditionModel(**small).eval(),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "weights" / SD)
    captions = tmp_path / "captions.csv"
    captions.write_text("image_id,caption\n" + "".join(f'{i},"{line}"\n' for i, line in enumerate(CAPTIONS)))
    return pipeline, tmp_path / "weights", captions


@pytest.mark.parametrize("name", ["sd-coco-ipndm-4", "sd-coco-dpmpp-6"])
def test_every_seed_has_its_caption(stable, amed, tmp_path, name):
    """In batches of 2, 2 and 1 of the command; by hand all at once, with diffusers' own encoding of the captions."""
    pipeline, folder, captions = stable
    captions.write_text(captions.read_text() + "9,ships\n")
    arguments = ("--weights", folder, "--prompts", captions, "--images", 5, "--batch", 2, "--device", "cpu", "--json")
    code, out, error = amed("reproduce", name, *arguments, "--outdir", tmp_path / "o")
    assert code == 0, error
    recipe = load_recipe(name)
    assert json.loads(out)["guidance_scale"] == 7.5
    sampler = Sampler(
        wrap_pipeline(pipeline, [*CAPTIONS, "ships"]), solver=recipe.solver, solver_options=recipe.options,
        schedule=torch.tensor(recipe.plan().sigmas, dtype=torch.float64), afs=False,
    )  # fmt: skip
    result = sampler.run(range(5), list(range(5)), guidance_scale=7.5)
    assert result.nfe == recipe.nfe
    expected = pixels(decode_latents(pipeline.vae, result.images))
    assert np.abs(written(tmp_path / "o").astype(int) - expected).max() <= 1
    other = sampler.run(range(5), [0] * 5, guidance_scale=7.5).images
    assert (other[1:] - result.images[1:]).abs().max() > 1e-3  # the captions matter


def test_what_is_missing_is_named_before_sampling(stable, tmp_path, monkeypatch):
    _, folder, captions = stable
    recipe = load_recipe("sd-coco-ipndm-4")
    with pytest.raises(
        ConfigError, match=r"needs prompts: pass the file published as MS-COCO_val2014_30k_captions\.csv"
    ):
        prepare(recipe, weights=folder)
    with pytest.raises(ConfigError, match=r"neither .* has unet, vae, text_encoder, tokenizer"):
        prepare(recipe, weights=tmp_path, prompts=captions)
    monkeypatch.delenv("AMED_WEIGHTS", raising=False)
    with pytest.raises(ConfigError, match="AMED_WEIGHTS is not set"):
        find_pipeline(SD)
    drawing = prepare(recipe, weights=folder / SD, prompts=captions, batch=2)
    with pytest.raises(ConfigError, match="5 images need as many prompts, there are 4"):
        next(draw(drawing, range(5), batch=2))
    with pytest.raises(ConfigError, match="room for 2 prompts, got 3"):
        next(draw(drawing, range(3), batch=3))
    (folder / SD / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match="no text encoder"):
        prepare(recipe, weights=folder, prompts=captions)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.csv", "id,words\n1,a\n", "columns id, words"),
        ("p.csv", "caption\n", "no prompts"),
        ("p.txt", "a\n\nb\n", "empty line"),
        ("p.txt", "", "no prompts"),
    ],
)
def test_a_file_of_no_prompts_is_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileFormatError, match=said):
        read_prompts(tmp_path / name)


def test_prompts_are_lines_or_a_column(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\ndogs \n")
    (tmp_path / "p.csv").write_text('id,text\n1,"a cat, asleep"\n2,dogs\n')
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "dogs"]
    assert read_prompts(tmp_path / "p.csv") == ["a cat, asleep", "dogs"]
