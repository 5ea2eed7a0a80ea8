"""AMEDPipeline with a predictor that starts about a mean answer: of all data, of a class, or of a prompt."""

import pytest
import torch
from mean_answers import make_mean

from amed_engine import ConfigError, Sampler, make_plan
from amed_engine.adapters import wrap
from amed_engine.engine.measure import paired_latents
from amed_engine.solvers.mean import Mean

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from amed_engine.integrations.diffusers import AMEDPipeline, AMEDScheduler, means  # noqa: E402

SHAPE, SIGMA = (4, 8, 8), 14.0
BLOCKS = {"sample_size": 8, "in_channels": 4, "norm_num_groups": 4}
DOWN, UP = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
UNET = {**BLOCKS, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1}


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def unet_of_classes():
    kinds = {"down_block_types": DOWN, "up_block_types": UP, "num_class_embeds": 5}
    return seeded(lambda: diffusers.UNet2DModel(**UNET, **kinds))


def dit():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_embeds_ada_norm": 5}
    return seeded(lambda: diffusers.DiTTransformer2DModel(**BLOCKS, out_channels=8, **sizes))


def unet_of_prompts():
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return seeded(
        lambda: diffusers.UNet2DConditionModel(**UNET, **blocks, cross_attention_dim=16, attention_head_dim=4)
    )


@pytest.fixture
def latents():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def plan_for(mean, guidance_scale=None):
    options = {"sigma_min": 0.03, "sigma_max": SIGMA, "guidance_scale": guidance_scale}
    return make_plan(5, solver="amed", afs="mean", mean=mean, **options)


def quiet(network, predictor, **options):
    pipe = AMEDPipeline(network, diffusers.DDIMScheduler(beta_schedule="linear"), predictor, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(one, two):
    assert one.isfinite().all()
    return (one - two).abs().max() < 1e-4 * two.abs().max()


def mean_rows(rows, classes):
    return make_mean(rows, classes, shape=SHAPE, sigma=SIGMA)


@pytest.mark.parametrize("rows", [6, 2], ids=["each class", "any class"])
@pytest.mark.parametrize("guidance_scale", [None, 2.5])
@pytest.mark.parametrize(("make", "null"), [(unet_of_classes, 4), (dit, None)], ids=["U-Net", "DiT"])
def test_classes_start_about_their_own_means(make, null, about_mean, latents, rows, guidance_scale):
    network, about_mean.plan = make(), plan_for(mean_rows(rows, 5), guidance_scale)
    pipe = quiet(network, about_mean, null_class=null)
    options = {"class_labels": [3, 1], "guidance_scale": guidance_scale}
    drawn = pipe(**options, latents=latents, output_type="latent").images
    wrapped = wrap(network, "epsilon", scheduler=diffusers.DDIMScheduler(beta_schedule="linear"), null_class=null)
    assert close(drawn, Sampler(wrapped, about_mean).run(latents, **options).images)
    about_mean.plan = plan_for(mean_rows(1, 0), guidance_scale)
    assert not close(
        drawn, quiet(network, about_mean, null_class=null)(**options, latents=latents, output_type="latent").images
    )


def test_one_class_is_for_all_images(about_mean, latents):
    about_mean.plan = plan_for(mean_rows(6, 5))
    pipe = quiet(unet_of_classes(), about_mean)
    one, two = (pipe(class_labels=labels, latents=latents, output_type="latent").images for labels in (3, [3, 3]))
    assert torch.equal(one, two)


def test_one_mean_of_the_plan_is_for_all(about_mean):
    """A model without classes, and the constants of a scheduler in its place."""
    unet = seeded(lambda: diffusers.UNet2DModel(**UNET, down_block_types=DOWN, up_block_types=UP))
    about_mean.plan = plan_for(mean_rows(1, 0))
    latents = torch.randn(2, *SHAPE)
    ddim = diffusers.DDIMScheduler(beta_schedule="linear")
    wrapped = wrap(unet, "epsilon", scheduler=ddim)
    drawn = quiet(unet, about_mean)(latents=latents, output_type="latent").images
    assert close(drawn, Sampler(wrapped, about_mean).run(latents).images)
    pipe = AMEDPipeline(unet, AMEDScheduler.from_predictor(about_mean, ddim.config))
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(latents=latents, num_inference_steps=3, output_type="latent").images
    deaf = Sampler(lambda x, sigma: wrapped(x, sigma).x0, about_mean, shape=SHAPE)
    assert close(drawn, deaf.run(latents).images)


# Prompts


def embeddings(seed, count=2):
    return torch.randn(count, 7, 16, generator=torch.Generator().manual_seed(seed))


PROMPTS, NEGATIVE = embeddings(1), embeddings(2, 1)


def guided(pipe, embeds, scale):
    """D_u + scale (D_c - D_u) with its bottleneck, written out with the pipeline's own network."""

    def denoise(x, sigma):
        parts = []
        for told in (NEGATIVE.expand_as(embeds), embeds):
            rows, seen = told.repeat(len(x) // len(told), 1, 1), []
            handle = pipe.unet.mid_block.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append(output)
            )
            parts.append((pipe.denoiser(prompt_embeds=rows)(x, sigma).x0, seen[0]))
            handle.remove()
        (none, _), (told, features) = parts
        return none + scale * (told - none), features

    return denoise


@pytest.fixture
def pipe(about_mean):
    # Means of what it was trained with, which say nothing of other prompts.
    about_mean.plan = plan_for(mean_rows(3, 2), 4.0)
    return quiet(unet_of_prompts(), about_mean)


@pytest.fixture
def counted(pipe):
    """Rows that the network sees, call by call."""
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


def ask(pipe, latents, embeds=PROMPTS, **options):
    texts = {"prompt_embeds": embeds, "negative_prompt_embeds": NEGATIVE}
    return pipe(**texts, guidance_scale=4.0, latents=latents, output_type="latent", **options).images


@torch.no_grad()
def test_prompts_start_about_the_guided_answers_to_one_latent(pipe, about_mean, latents):
    """As the engine does with the same mean answers for two classes, which are these prompts."""
    x = torch.cat([paired_latents(1, SHAPE) * SIGMA] * 2)
    rows = guided(pipe, PROMPTS, 4.0)(x, torch.full((2,), SIGMA))[0]
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    drawn = ask(pipe, latents)
    for k in range(2):
        mean = Mean.of(rows[k : k + 1], classes=0, sigma=SIGMA, latents=1)
        about_mean.plan = plan_for(mean)
        denoiser = guided(pipe, PROMPTS[k : k + 1], 4.0)
        expected = Sampler(denoiser, about_mean, shape=SHAPE).run(latents[k : k + 1]).images
        assert close(drawn[k : k + 1], expected)


def test_a_prompt_costs_one_evaluation_once(pipe, counted, latents):
    """In no generator of anyone's; another prompt, and other weights, cost one again."""
    state = torch.get_rng_state()
    first = ask(pipe, latents)
    assert counted == [4] * 6  # two new prompts and five evaluations, each guided: two rows
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ask(pipe, latents), first)
    assert counted[6:] == [4] * 5
    ask(pipe, latents, torch.cat([PROMPTS[:1], embeddings(3, 1)]))
    assert counted[11:] == [2] + [4] * 5
    with torch.no_grad():
        pipe.unet.conv_in.bias += 0.1
    ask(pipe, latents)
    assert counted[17:] == [4] * 6


def test_images_of_one_prompt_share_its_evaluation(pipe, counted, latents):
    four, same = torch.cat([latents] * 2), PROMPTS[:1]
    drawn = ask(pipe, four, same, num_images_per_prompt=4)
    assert counted == [2] + [8] * 5
    assert close(drawn, ask(pipe, four, same))  # one row for all images


def test_the_last_prompts_are_remembered(pipe, counted, latents, monkeypatch):
    monkeypatch.setattr(means, "KEPT", 2)
    ask(pipe, latents)
    ask(pipe, latents[:1], PROMPTS[:1])  # now the later of the two
    ask(pipe, latents[:1], embeddings(3, 1))
    counted.clear()
    ask(pipe, latents[:1], PROMPTS[:1])
    assert counted == [2] * 5
    ask(pipe, latents[:1], PROMPTS[1:])
    assert counted[5:] == [2] * 6


def test_what_cannot_work_is_refused(pipe, about_mean, latents):
    with pytest.raises(ConfigError, match="got 2 prompts or class_labels for 1 images"):
        ask(pipe, latents[:1])
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ConfigError, match="answers to these prompts at sigma 14 are not finite"):
        ask(pipe, latents)
    about_mean.plan = plan_for(mean_rows(4, 3))
    with pytest.raises(ConfigError, match="mean answers for 3 classes, got class 3"):
        quiet(unet_of_classes(), about_mean)(class_labels=[3, 1], latents=latents)
    about_mean.plan = plan_for(None)
    with pytest.raises(ConfigError, match="yet to be measured"):
        quiet(unet_of_classes(), about_mean)(class_labels=[3, 1], latents=latents)
    about_mean.plan = plan_for(make_mean(sigma=SIGMA))
    with pytest.raises(ConfigError, match=r"of shape \(1, 1, 8, 8\), got samples of \(2, 4, 8, 8\)"):
        quiet(unet_of_classes(), about_mean)(class_labels=[3, 1], latents=latents)
