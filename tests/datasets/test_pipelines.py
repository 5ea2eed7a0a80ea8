"""Data sets drawn from pipelines of diffusers: a generator for every sample, and nothing else that noise comes from."""

import copy
import json

import numpy as np
import pytest
import torch

from amed_engine import AMEDPredictor, ConfigError, NonFiniteError, make_plan
from amed_engine.datasets.sources import open_source

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
tiny_pipelines = pytest.importorskip("tiny_pipelines")

STEPS = {"num_inference_steps": 3}


def pixels(scheduler=None, channels=1, **options):
    """DDPM's pipeline on a U-Net of (1, 8, 8)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
            **options,
        )  # fmt: skip
    return diffusers.DDPMPipeline(unet.eval(), scheduler or diffusers.DDPMScheduler())


def classes():
    """DiT in miniature: latents of (4, 8, 8), a thousand classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
            patch_size=2, norm_num_groups=4, num_embeds_ada_norm=1000,
        )  # fmt: skip
        for parameter in transformer.parameters():
            if parameter.dim() > 1 and parameter.abs().max() < 1e-6:
                torch.nn.init.normal_(parameter, std=0.2)
        return diffusers.DiTPipeline(transformer.eval(), tiny_pipelines.autoencoder(), diffusers.DDIMScheduler())


@pytest.fixture(scope="module")
def texts():
    return tiny_pipelines.stable_diffusion()


def check_order(source, labels=None):
    """Two batches in another order and company give equal samples."""
    ones = source.draw([4, 7, 2], labels)
    others = source.draw([2, 9, 4], None if labels is None else labels[[2, 1, 0]])
    assert np.array_equal(ones.arrays[[0, 2]], others.arrays[[2, 0]])
    assert not np.array_equal(ones.arrays[0], ones.arrays[1])
    return ones


# ---- what is drawn


def test_pictures_of_a_pipeline_are_those_it_shows(texts):
    source = open_source(texts, prompt="a cat", **STEPS)
    assert (source.shape, source.stored) == ((16, 16, 3), "uint8")
    drawn = check_order(source)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 7, 2)]
    shown = texts(["a cat"] * 3, generator=generators, **STEPS).images
    apart = np.abs(drawn.arrays.astype(int) - np.stack([np.asarray(picture) for picture in shown]))
    assert apart.max() <= 1
    assert drawn.labels is None


def test_latents_of_a_pipeline_are_stored_in_float32(texts):
    source = open_source(texts, prompt="a cat", output_type="latent", **STEPS)
    assert (source.shape, source.stored) == ((4, 8, 8), "float32")
    drawn = check_order(source)
    generator = [torch.Generator().manual_seed(4)]
    alone = texts(["a cat"], generator=generator, output_type="latent", **STEPS).images
    assert np.allclose(drawn.arrays[0], alone[0].numpy(), atol=1e-4)


def test_pictures_in_floating_point_are_between_minus_one_and_one(texts):
    bytes_, floats = (open_source(texts, prompt="a cat", stored=kind, **STEPS) for kind in ("uint8", "float32"))
    assert floats.shape == (3, 16, 16)
    drawn = floats.draw([3, 5], None).arrays
    assert -1 <= drawn.min() < 0 < drawn.max() <= 1
    again = np.clip(np.moveaxis(drawn, 1, -1) * 127.5 + 128, 0, 255).astype(np.uint8)
    assert np.array_equal(again, bytes_.draw([3, 5], None).arrays)


def test_labels_choose_prompts(texts):
    source = open_source(texts, prompt=["a cat", "the dog", "zzz"], guidance_scale=3.0, stored="float32", **STEPS)
    drawn = check_order(source, source.check_labels([2, 0, 1], 3))
    assert drawn.labels.tolist() == [2, 0, 1]
    assert drawn.labels.dtype == np.int64
    alone = open_source(texts, prompt="zzz", guidance_scale=3.0, stored="float32", **STEPS)
    assert np.allclose(alone.draw([4, 7, 2], None).arrays[0], drawn.arrays[0], atol=1e-4)


def test_without_labels_each_seed_draws_its_prompt(texts):
    source = open_source(texts, prompt=["a cat", "the dog", "zzz"], **STEPS)
    labels = source.draw(range(40), None).labels
    assert set(labels.tolist()) == {0, 1, 2}
    assert source.draw([3, 30], None, 40).labels.tolist() == labels[[3, 30]].tolist()


def test_embeddings_and_negative_prompts_go_with_their_prompts(texts):
    embeds, negative = texts.encode_prompt(["a cat", "the dog"], "cpu", 1, True, ["zzz", "qqq"])
    options = {"guidance_scale": 3.0, "stored": "float32", **STEPS}
    told = open_source(texts, prompt=["a cat", "the dog"], negative_prompt=["zzz", "qqq"], **options)
    embedded = open_source(texts, prompt_embeds=embeds, negative_prompt_embeds=negative, **options)
    labels = np.array([1, 0])
    assert np.allclose(told.draw([0, 1], labels).arrays, embedded.draw([0, 1], labels).arrays, atol=1e-4)
    assert told.identity != embedded.identity == json.loads(json.dumps(embedded.identity))


def test_classes_of_a_pipeline():
    pipeline = classes()
    source = open_source(pipeline, stored="float32", **STEPS)
    drawn = check_order(source, source.check_labels([7, 300, 7], 3))
    assert drawn.labels.tolist() == [7, 300, 7]
    assert not np.array_equal(source.draw([4, 7, 2], source.check_labels(8, 3)).arrays, drawn.arrays)
    drawn = source.draw([1, 2, 3], None)
    assert len(set(drawn.labels.tolist())) > 1
    assert np.array_equal(source.draw([1, 2, 3], drawn.labels).arrays, drawn.arrays)


def test_a_pipeline_of_a_consistency_model_takes_noise_and_classes_from_the_seeds():
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    pipeline = diffusers.ConsistencyModelPipeline(pixels(num_class_embeds=3).unet, scheduler)
    source = open_source(pipeline, stored="float32", num_inference_steps=2)
    drawn = check_order(source, source.check_labels([0, 2, 1], 3))
    assert not np.array_equal(source.draw([4, 7, 2], source.check_labels(1, 3)).arrays[:2], drawn.arrays[:2])


@pytest.mark.parametrize("make", ["stable_diffusion_3", "make_flux"])
@pytest.mark.parametrize("output_type", ["latent", "pil"])
def test_pipelines_of_flow_matching(make, output_type):
    options = {"height": 16, "width": 16, "output_type": output_type, "max_sequence_length": 8}
    pipeline = getattr(tiny_pipelines, make)()
    pipeline.register_modules(vae=tiny_pipelines.autoencoder(shift_factor=0.1))
    source = open_source(pipeline, prompt=["a cat", "the dog"], **options, **STEPS)
    labels = source.check_labels([0, 1, 0], 3)
    assert check_order(source, labels).arrays.dtype == ("float32" if output_type == "latent" else "uint8")


def test_this_package_s_pipeline():
    from amed_engine.integrations.diffusers import AMEDPipeline, AMEDScheduler

    def source(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            predictor = AMEDPredictor(0.1, 0.05, bottleneck=(4, 4))
        predictor.plan = make_plan(4, solver="amed")
        return open_source(AMEDPipeline(pixels(num_class_embeds=3).unet, AMEDScheduler(), predictor))

    one = source(0)
    drawn = check_order(one)
    assert drawn.arrays.shape == (3, 8, 8, 1)
    assert set(one.draw(range(30), None).labels.tolist()) == {0, 1, 2}
    assert one.identity["plan"]["solver"] == "amed"
    assert one.identity == source(0).identity != source(1).identity


def test_a_pipeline_with_the_scheduler_of_this_package(texts):
    from amed_engine.integrations.diffusers import AMEDScheduler

    pipeline = copy.copy(texts)
    pipeline.scheduler = AMEDScheduler.from_config(texts.scheduler.config)
    source = open_source(pipeline, prompt="a cat", **STEPS)
    check_order(source)
    assert source.identity["components"]["scheduler"]["class"] == "AMEDScheduler"


# ---- a sample is its seed


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_schedulers_that_add_noise_take_it_from_the_seed(texts, name):
    pipeline = copy.copy(texts)
    pipeline.scheduler = getattr(diffusers, name).from_config(texts.scheduler.config)
    check_order(open_source(pipeline, prompt="a cat", **STEPS))


def test_ddim_with_eta_takes_its_noise_from_the_seed(texts):
    pipeline = copy.copy(texts)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(texts.scheduler.config)
    source, without = (open_source(pipeline, prompt="a cat", eta=eta, **STEPS) for eta in (1.0, 0.0))
    drawn = check_order(source)
    assert not np.array_equal(drawn.arrays, without.draw([4, 7, 2], None).arrays)
    assert source.identity != without.identity


class Noisy(diffusers.DDIMScheduler):
    """Adds noise that no seed draws, as told."""

    how = staticmethod(lambda sample, generator: torch.zeros_like(sample))

    def step(self, output, t, sample, eta=0.0, generator=None, **options):
        noise = type(self).how(sample, generator)
        answer = super().step(output, t, sample, **{**options, "return_dict": False})[0]
        return (answer + noise, None)


NOISES = {
    "global": (lambda sample, generator: torch.randn_like(sample), "global generator"),
    "by its row": (
        lambda sample, generator: torch.randn(sample.shape, generator=torch.Generator().manual_seed(5)),
        "depend on what is drawn with them",
    ),
    "of the first seed": (
        lambda sample, generator: torch.randn(sample.shape, generator=generator[0]),
        "depend on what is drawn with them",
    ),
    "of one generator": (
        lambda sample, generator: torch.randn(sample.shape, generator=generator),
        "takes no list of generators",
    ),
    "numpy's": (
        lambda sample, generator: torch.from_numpy(np.random.randn(*sample.shape)).float(),  # noqa: NPY002
        "depend on what is drawn with them",
    ),
}


@pytest.mark.parametrize("kind", NOISES)
def test_noise_that_comes_of_no_seed_is_refused(texts, kind):
    class Own(Noisy):
        how = staticmethod(NOISES[kind][0])

    pipeline = copy.copy(texts)
    pipeline.scheduler = Own.from_config(texts.scheduler.config)
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=NOISES[kind][1]):
        open_source(pipeline, prompt="a cat", **STEPS)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_and_the_caller_s_modes_change_nothing(texts):
    pipeline = pixels(dropout=0.5)
    source = open_source(pipeline, **STEPS)
    expected = source.draw([0, 1], None).arrays
    pipeline.unet.train()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert np.array_equal(source.draw([0, 1], None).arrays, expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert pipeline.unet.training


def test_the_progress_bar_is_off_while_samples_are_drawn_and_as_it_was_afterwards(capfd):
    pipeline = pixels()
    pipeline.set_progress_bar_config(desc="steps")
    open_source(pipeline, **STEPS).draw([0], None)
    assert capfd.readouterr().err == ""
    pipeline(num_inference_steps=1)
    assert "steps" in capfd.readouterr().err


# ---- what cannot be stored


def test_nan_in_decoded_pictures_is_named_by_its_seeds():
    class Broken(diffusers.DDIMScheduler):
        def step(self, output, t, sample, **options):
            answer = super().step(output, t, sample, return_dict=False)[0]
            broken = self.broken and sample[:, 0, 0, 0] > 0
            return diffusers.schedulers.scheduling_ddim.DDIMSchedulerOutput(
                torch.where(torch.as_tensor(broken).reshape(-1, 1, 1, 1), answer * torch.nan, answer)
            )

        broken = False

    pipeline = pixels(Broken())
    source = open_source(pipeline, num_inference_steps=1)
    Broken.broken = True
    first = [float(torch.randn(64, generator=torch.Generator().manual_seed(seed))[0]) for seed in range(6)]
    expected = [seed for seed in range(6) if first[seed] > 0]
    with pytest.raises(NonFiniteError) as caught:
        source.draw(range(6), None)
    assert caught.value.seeds == expected
    assert 0 < len(expected) < 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_in_half_precision_are_stored_exactly(texts, dtype):
    pipeline = tiny_pipelines.stable_diffusion().to(dtype)
    source = open_source(pipeline, prompt="a cat", output_type="latent", **STEPS)
    drawn = source.draw([4, 7, 2], None).arrays
    assert drawn.dtype == np.float32
    assert torch.equal(torch.from_numpy(drawn).to(dtype).float(), torch.from_numpy(drawn))
    assert source.identity != open_source(texts, prompt="a cat", output_type="latent", **STEPS).identity


def test_a_pipeline_that_decodes_no_bfloat16_is_refused():
    with pytest.raises(ConfigError, match="decodes no pictures in bfloat16"):
        open_source(pixels().to(torch.bfloat16), **STEPS)


def test_a_safety_checker_is_refused_but_for_latents(texts):
    pipeline = copy.copy(texts)
    pipeline.safety_checker = texts.text_encoder  # any module
    with pytest.raises(ConfigError, match="safety_checker = None"):
        open_source(pipeline, prompt="a cat", **STEPS)
    open_source(pipeline, prompt="a cat", output_type="latent", **STEPS)


def test_latents_are_no_pictures_and_pixels_no_latents(texts):
    with pytest.raises(ConfigError, match="'float32'"):
        open_source(texts, prompt="a cat", output_type="latent", stored="uint8", **STEPS)
    with pytest.raises(ConfigError, match="gives no latents"):
        open_source(pixels(), output_type="latent", **STEPS)


# ---- what is asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass prompt="),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "as many of each kind"),
        ({"prompt": []}, "at least one"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": ["a", 3]}, "prompt must be a text"),
        ({"prompt": "a", "generator": None}, "generator is not an option"),
        ({"prompt": "a", "latents": torch.zeros(1)}, "latents is not an option"),
        ({"prompt": "a", "num_images_per_prompt": 2}, "num_images_per_prompt is not an option"),
        ({"prompt": "a", "callback_on_step_end": print}, "callback_on_step_end is not an option"),
        ({"prompt": "a", "steps": 3}, "takes no steps; its options are prompt"),
        ({"prompt": "a", "output_type": "png"}, "output_type must be"),
        ({"prompt": "a", "timesteps": object()}, "timesteps must be a number"),
    ],
)
def test_options_that_cannot_be_are_refused(texts, options, message):
    with pytest.raises(ConfigError, match=message):
        open_source(texts, **options)


def test_guidance_and_labels_that_a_pipeline_has_not_are_refused(texts):
    with pytest.raises(ConfigError, match="has no guidance"):
        open_source(pixels(), guidance_scale=2.0, **STEPS)
    with pytest.raises(ConfigError, match="neither classes nor prompts"):
        open_source(pixels(), **STEPS).check_labels([0], 1)
    source = open_source(texts, prompt=["a", "b"], **STEPS)
    assert source.check_labels(1, 10_000_000).strides == (0,)
    for labels in ([0, 2], [0, -1], [0.0, 1.0], [[0, 1]], [0, 1, 1], ["a", "b"], [True, False]):
        with pytest.raises(ConfigError, match="labels must be"):
            source.check_labels(labels, 2)


# ---- identity


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 4},
        {"prompt": "the dog"},
        {"guidance_scale": 2.0},
        {"output_type": "latent"},
        {"eta": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_change_the_identity(texts, options):
    own = {"prompt": "a cat", "output_type": "pil", **STEPS}
    identity = open_source(texts, **own).identity
    assert open_source(texts, **own | options).identity != identity == open_source(texts, **own).identity
    assert identity == json.loads(json.dumps(identity))
    assert len(json.dumps(identity)) < 20_000


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_every_component_is_part_of_the_identity(texts, part):
    identity, other = open_source(texts, prompt="a cat", **STEPS).identity, copy.copy(texts)
    if part == "scheduler":
        other.scheduler = diffusers.DDIMScheduler.from_config(texts.scheduler.config)
    elif part == "tokenizer":
        other.tokenizer = copy.deepcopy(texts.tokenizer)
        other.tokenizer.add_tokens(["<word>"])
    else:
        setattr(other, part, changed := copy.deepcopy(getattr(texts, part)))
        with torch.no_grad():
            next(changed.parameters()).flatten()[0] += 1
    assert open_source(other, prompt="a cat", **STEPS).identity != identity


def test_many_prompts_are_told_by_their_hash(texts):
    prompts = [f"cat number {number}" for number in range(1000)]
    source = open_source(texts, prompt=prompts, **STEPS)
    assert source.identity["options"]["prompt"].startswith("sha256:")
    assert source.check_labels(np.arange(1000), 1000)[-1] == 999


class Adapted(torch.nn.Module):
    """A layer with an adapter of LoRA, as the library peft puts them."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scaling = base, {"default": 1.0}
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.scaling["default"] * self.up(self.down(x))


def adapted(pipeline):
    other = copy.deepcopy(pipeline)
    other.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q = Adapted(
        other.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    )
    return other


SWITCHES = {
    "FreeU": lambda pipeline: pipeline.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "slices": lambda pipeline: pipeline.vae.enable_slicing(),
    "tiles": lambda pipeline: pipeline.vae.enable_tiling(),
    "attention": lambda pipeline: pipeline.enable_attention_slicing(1),
    "table": lambda pipeline: pipeline.scheduler.alphas_cumprod.mul_(0.5),
    "length": lambda pipeline: setattr(pipeline.tokenizer, "model_max_length", 6),
    "activation": lambda pipeline: setattr(pipeline.unet, "conv_act", torch.nn.GELU()),
    "attribute": lambda pipeline: setattr(pipeline.scheduler, "limit", np.float32("inf")),
    "adapter": lambda pipeline: adapter_of(pipeline).scaling.update(default=0.5),
    "text encoder": lambda pipeline: setattr(pipeline.text_encoder.config, "layer_norm_eps", 1e-3),
}


def adapter_of(pipeline):
    return next(part for part in pipeline.unet.modules() if isinstance(part, Adapted))


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_switched_is_part_of_the_identity(texts, switch):
    """Neither weights nor configurations tell it."""
    pipeline = adapted(texts)
    identity = open_source(pipeline, prompt="a cat", **STEPS).identity
    assert open_source(copy.deepcopy(pipeline), prompt="a cat", **STEPS).identity == identity
    SWITCHES[switch](pipeline)
    other = open_source(pipeline, prompt="a cat", **STEPS).identity
    assert json.loads(json.dumps(other, allow_nan=False)) == other != identity


class Counting(diffusers.UNet2DModel):
    def forward(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(*args, **kwargs)


def test_what_a_network_counts_is_no_setting():
    pipeline = pixels()
    pipeline.unet.__class__ = Counting
    source = open_source(pipeline, **STEPS)
    source.draw([3, 4], None)
    assert open_source(pipeline, **STEPS).identity == source.identity


def test_the_settings_of_a_pipeline_as_it_comes_are_few(texts):
    settings = open_source(copy.deepcopy(texts), prompt="a cat", **STEPS).identity["settings"]
    assert settings.keys() == {"", "tokenizer", "scheduler"}
    assert not any(name.startswith("_use_default") for name in settings[""]["image_processor"][1])  # in no order


def test_a_pipeline_that_was_saved_is_the_same_wherever_it_lies(texts, tmp_path):
    identity = open_source(texts, prompt="a cat", **STEPS).identity
    for name in ("one", "other"):
        texts.save_pretrained(tmp_path / name)
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / name, safety_checker=None)
        assert open_source(loaded, prompt="a cat", **STEPS).identity == identity
