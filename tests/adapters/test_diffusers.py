"""Networks and schedulers of diffusers, tiny and with random weights."""

import pytest
import torch

import amed_engine
from amed_engine.adapters import wrap
from amed_engine.errors import ConfigError

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SHAPES = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def unconditional(**options):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(**SHAPES | BLOCKS | blocks | {"attention_head_dim": 8} | options).eval()


def conditional(**options):
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "cross_attention_dim": 16, "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(**SHAPES | BLOCKS | blocks | options).eval()


def dit():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}
    return diffusers.DiTTransformer2DModel(**SHAPES | heads | {"out_channels": 8, "num_embeds_ada_norm": 5}).eval()


def sd3():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "pos_embed_max_size": 8}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 6}
    return diffusers.SD3Transformer2DModel(**SHAPES | heads | widths).eval()


def stepped(scheduler, t, raw, x_in):
    """The estimate of the clean data that diffusers itself makes of a prediction."""
    return scheduler.step(raw, t, x_in).pred_original_sample


# ---- networks, against what their own scheduler makes of them


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_unet_gives_what_its_scheduler_estimates(prediction, betas):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=betas, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(1000)
    network, t = unconditional(), 600
    denoiser = wrap(network, scheduler=scheduler)
    alpha = scheduler.alphas_cumprod[t]
    expected = stepped(scheduler, t, network(X, t).sample, X)
    got = denoiser(X / alpha.sqrt(), ((1 - alpha) / alpha).sqrt().expand(2))
    torch.testing.assert_close(got.x0, expected, rtol=1e-3, atol=1e-3)
    assert got.features.shape == (2, 16, 4, 4)


@torch.no_grad()
def test_the_bottleneck_of_a_conditional_unet_is_its_mid_block():
    network, text, seen = conditional(), torch.randn(2, 7, 16), []
    network.mid_block.register_forward_hook(lambda m, i, o: seen.append(o))
    denoised = wrap(network, "epsilon", conditions=["encoder_hidden_states"])(
        X, torch.ones(2), encoder_hidden_states=text
    )
    torch.testing.assert_close(denoised.features, seen[0])


@torch.no_grad()
def test_dit_has_no_bottleneck_drops_variances_and_knows_no_class():
    network = dit()
    denoiser = wrap(network)
    sigma, labels = denoiser.family.sigma(torch.tensor([600, 30])).float(), torch.tensor([4, 0])
    column = sigma.reshape(-1, 1, 1, 1)
    x_in = X / (1 + column**2).sqrt()
    x0, features = denoiser(X, sigma, labels)
    noise = network(x_in, timestep=torch.tensor([600.0, 30.0]), class_labels=labels).sample[:, :4]
    torch.testing.assert_close(x0, X - column * noise, rtol=1e-4, atol=1e-4)
    assert features is None
    none = network(x_in, timestep=torch.tensor([600.0, 30.0]), class_labels=torch.tensor([5, 5])).sample[:, :4]
    torch.testing.assert_close(denoiser(X, sigma).x0, X - column * none, rtol=1e-4, atol=1e-4)
    images = amed_engine.Sampler(denoiser).run(2, class_labels=[1, 2], guidance_scale=1.5).images
    assert images.isfinite().all()


@torch.no_grad()
def test_a_flow_matching_transformer_gives_what_its_scheduler_steps_to():
    network, scheduler = sd3(), diffusers.FlowMatchEulerDiscreteScheduler()
    text, pooled = torch.randn(2, 7, 12), torch.randn(2, 6)
    scheduler.set_timesteps(1)  # from its first noise level straight to the data
    t = scheduler.timesteps[0] * 0.999
    scheduler.sigmas, scheduler.timesteps = torch.tensor([0.999, 0.0]), t[None]
    velocity = network(X, text, pooled, t.expand(2)).sample
    expected = scheduler.step(velocity, t, X).prev_sample
    denoiser = wrap(network, scheduler=scheduler, conditions=["encoder_hidden_states", "pooled_projections"])
    sigma = torch.full((2,), 0.999 / 0.001)
    x0, features = denoiser(X / 0.001, sigma, encoder_hidden_states=text, pooled_projections=pooled)
    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-3)
    assert features is None


@torch.no_grad()
def test_class_conditional_unet_gets_integers():
    network = unconditional(num_class_embeds=3)
    denoiser, labels, t = wrap(network, "epsilon"), torch.tensor([2, 0]), 600
    sigma = denoiser.family.sigma(torch.tensor([t, t])).float()
    noise = network(X / (1 + sigma[0] ** 2).sqrt(), t, class_labels=labels).sample
    torch.testing.assert_close(denoiser(X, sigma, labels).x0, X - sigma[0] * noise, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sdxl_conditions_reach_the_network():
    options = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    network = conditional(**options, projection_class_embeddings_input_dim=6 + 24)
    given = {"text_embeds": torch.randn(2, 6), "time_ids": torch.ones(2, 6)}
    text, sigma = torch.randn(2, 7, 16), torch.ones(2)
    names = ["encoder_hidden_states", *given]
    x0 = wrap(network, "epsilon", conditions=names)(X, sigma, encoder_hidden_states=text, **given).x0
    t = wrap(network, "epsilon").family.time(sigma).float()
    noise = network(X / 2**0.5, t, text, added_cond_kwargs=given).sample
    torch.testing.assert_close(x0, X - noise, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_networks(dtype):
    full, low = (wrap(network, "epsilon")(X, torch.ones(2)) for network in (unconditional(), unconditional().to(dtype)))
    assert low.x0.dtype == torch.float32
    torch.testing.assert_close(low.x0, full.x0, rtol=0, atol=0.1)


@torch.no_grad()
def test_a_unet_survives_export_with_its_bottleneck():
    denoiser, sigma = wrap(unconditional(), "epsilon"), torch.tensor([0.5, 2.0])
    program = torch.export.export(denoiser, (X, sigma))
    for got, expected in zip(program.module()(-X, sigma), denoiser(-X, sigma), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_networks_that_cannot_be_wrapped_are_refused():
    with pytest.raises(ConfigError, match="has width 12, the network takes 16"):
        wrap(conditional(), "epsilon", conditions={"encoder_hidden_states": torch.zeros(1, 7, 12)})
    with pytest.raises(ConfigError, match="takes 9 channels and predicts 4"):
        wrap(conditional(in_channels=9), "epsilon")
    with pytest.raises(ConfigError, match="class_embed_type='timestep' is not supported"):
        wrap(unconditional(class_embed_type="timestep"), "epsilon")
    with pytest.raises(ConfigError, match="needs encoder_hidden_states"):
        amed_engine.Sampler(wrap(conditional(), "epsilon"))
    with pytest.raises(ConfigError, match="'epsilon' was asked for, but the scheduler says 'flow'"):
        wrap(sd3(), "epsilon", scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ConfigError, match="takes 4 channels, got shape"):
        wrap(unconditional(), "epsilon", shape=(3, 8, 8))
