"""Every autoencoder of diffusers: decoded as the pipelines that it comes with decode it, or refused by name."""

import importlib
import inspect

import pytest
import torch

from amed_engine.adapters import decode_latents
from amed_engine.adapters.autoencoders import KNOWN
from amed_engine.errors import ConfigError

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

MODELS = importlib.import_module("diffusers.models.autoencoders")
CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(MODELS, inspect.isclass)
    if hasattr(kind, "decode") and hasattr(kind, "load_config")
}
MEAN, STD = [1.0, -1.0, 0.5, 0.0], [2.0, 0.5, 1.0, 3.0]
MOMENTS = {"latents_mean": MEAN, "latents_std": STD}
ONE = {"latent_channels": 4, "block_out_channels": (8,), "norm_num_groups": 4}
TWO = {"latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
TINY = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "num_encoder_blocks": (1,) * 4}
ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",), "down_block_out_channels": (8,), "up_block_types": ("UpDecoderBlock2D",),
    "up_block_out_channels": (8,), "latent_channels": 4, "norm_num_groups": 4,
}  # fmt: skip
DEEP = {
    "latent_channels": 4, "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock", "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
}  # fmt: skip
CONSISTENCY = {
    "latent_channels": 4, "encoder_block_out_channels": (32,), "encoder_down_block_types": ("DownEncoderBlock2D",),
    "decoder_block_out_channels": (32,), "decoder_down_block_types": ("ResnetDownsampleBlock2D",),
    "decoder_up_block_types": ("ResnetUpsampleBlock2D",), "decoder_num_train_timesteps": 1024,
}  # fmt: skip
COG = TWO | {"down_block_types": ("CogVideoXDownBlock3D",) * 2, "up_block_types": ("CogVideoXUpBlock3D",) * 2}
PICTURE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1,
    "spatial_compression_ratio": 2, "sample_size": 16,
}  # fmt: skip
HUNYUAN = {"latent_channels": 4, "block_out_channels": (32,) * 4, "layers_per_block": 1}
HUNYUAN_15 = HUNYUAN | {"block_out_channels": (32,) * 5}
MAGVIT = TWO | {"down_block_types": ("SpatialDownBlock3D",) * 2, "up_block_types": ("SpatialUpBlock3D",) * 2}
LTX = {
    "latent_channels": 4, "patch_size": 1, "block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4,
    "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "spatio_temporal_scaling": (False,) * 4,
    "decoder_spatio_temporal_scaling": (False,) * 4, "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4,
}  # fmt: skip
LTX_2 = LTX | {
    "decoder_block_out_channels": (4,) * 3, "decoder_layers_per_block": (1,) * 4, "upsample_factor": (1,) * 3,
    "decoder_spatio_temporal_scaling": (False,) * 3, "decoder_inject_noise": (False,) * 4, "upsample_residual": (False,) * 3,
}  # fmt: skip
MOCHI = {
    "latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
    "layers_per_block": (1,) * 5,
}  # fmt: skip


def plain(z):
    return z / 0.4


def shifted(z):
    return z / 0.4 + 0.2


def normal(z):
    mean, std = (torch.tensor(value).view(1, -1, *[1] * (z.dim() - 2)) for value in (MEAN, STD))
    return z * std / 0.4 + mean


# (class, its smallest configuration, what a pipeline of it decodes, the shape of the latents)
IMAGES, VIDEOS = (2, 4, 8, 8), (1, 4, 1, 4, 4)
CASES = [
    ("AutoencoderKL", ONE, plain, IMAGES),
    ("AutoencoderKL", ONE | {"shift_factor": 0.2}, shifted, IMAGES),
    ("AutoencoderKL", ONE | MOMENTS, normal, IMAGES),
    ("AutoencoderTiny", TINY, plain, IMAGES),
    ("AutoencoderTiny", TINY | {"shift_factor": 0.2}, shifted, IMAGES),
    ("AsymmetricAutoencoderKL", ASYMMETRIC, plain, IMAGES),
    ("AutoencoderDC", DEEP, plain, IMAGES),
    ("AutoencoderKLHunyuanImage", PICTURE, plain, IMAGES),
    ("AutoencoderKLTemporalDecoder", {"latent_channels": 4, "block_out_channels": (32,)}, plain, IMAGES),
    ("ConsistencyDecoderVAE", CONSISTENCY, plain, IMAGES),
    ("VQModel", ONE | {"num_vq_embeddings": 16}, plain, IMAGES),
    ("AutoencoderKLCogVideoX", COG, plain, VIDEOS),
    ("AutoencoderKLHunyuanVideo", HUNYUAN, plain, VIDEOS),
    ("AutoencoderKLHunyuanVideo15", HUNYUAN_15, plain, VIDEOS),
    ("AutoencoderKLMagvit", MAGVIT, plain, VIDEOS),
    ("AutoencoderKLLTXVideo", LTX, normal, VIDEOS),
    ("AutoencoderKLLTX2Video", LTX_2, normal, VIDEOS),
    ("AutoencoderKLMochi", MOCHI | MOMENTS, normal, VIDEOS),
]


def made(name, options):
    torch.manual_seed(0)
    vae = CLASSES[name](**options, scaling_factor=0.4).eval().requires_grad_(False)
    if name == "AutoencoderTiny":
        vae.decoder.layers[-1].bias.fill_(0.5)  # grey: it has black where others have grey
    if "latents_mean" in vae._buffers:
        vae.latents_mean.copy_(torch.tensor(MEAN))
        vae.latents_std.copy_(torch.tensor(STD))
    return vae


@pytest.mark.parametrize(("name", "options", "formula", "shape"), CASES)
def test_latents_are_decoded_as_the_pipelines_of_a_class_do(name, options, formula, shape):
    vae = made(name, options)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    frames = {"num_frames": len(z)} if name == "AutoencoderKLTemporalDecoder" else {}

    def drawn(decode, latents, **told):
        torch.manual_seed(1)  # one of them draws noise
        return decode(latents, **told)

    expected, unscaled = (drawn(vae.decode, latents, **frames).sample.clamp(-1, 1) for latents in (formula(z), z))
    assert (unscaled - expected).abs().max() > 1e-4
    torch.testing.assert_close(drawn(lambda z: decode_latents(vae, z), z), expected, rtol=1e-4, atol=1e-6)


def test_the_cases_are_all_that_is_known():
    assert {name for name, *_ in CASES} == set(KNOWN)


class Unknown(torch.nn.Module):
    """Not of diffusers."""

    config = diffusers.configuration_utils.FrozenDict(scaling_factor=0.5, latent_channels=4)

    def decode(self, z, return_dict=True):
        raise AssertionError("decoded")


@pytest.mark.parametrize("name", [*sorted(set(CLASSES) - set(KNOWN)), "Unknown"])
def test_other_classes_are_refused_by_name(name):
    """Whatever their configurations say: AutoencoderRAE, say, undoes all of it itself."""
    vae = Unknown()
    if name != "Unknown":
        vae = CLASSES[name].__new__(CLASSES[name])
        torch.nn.Module.__init__(vae)
        vae.register_to_config(scaling_factor=0.5, latent_channels=4, **MOMENTS)
    with pytest.raises(ConfigError, match=rf"latents of {name} are scaled is not known; pass one of .*decode yourself"):
        decode_latents(vae, torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "VQModel",
            ONE | {"num_vq_embeddings": 16, "norm_type": "spatial", "block_out_channels": (32,)},
            "VQModel has norm_type='spatial'",
        ),
        ("AutoencoderKLLTXVideo", LTX | {"timestep_conditioning": True}, "LTXVideo has timestep_conditioning=True"),
        (
            "AutoencoderKLCogVideoX",
            COG | {"shift_factor": 0.2},
            "None in shift_factor, which its pipelines do not read",
        ),
        ("AutoencoderKLCogVideoX", COG | MOMENTS, "None in latents_mean, latents_std, which its pipelines do not read"),
    ],
)
def test_known_classes_that_are_decoded_otherwise_are_refused(name, options, match):
    with pytest.raises(ConfigError, match=match):
        decode_latents(made(name, options), torch.zeros(VIDEOS if "Video" in name else IMAGES))


@pytest.mark.parametrize(
    ("name", "options", "shape", "match"),
    [
        ("AutoencoderKL", ONE, VIDEOS, r"AutoencoderKL decodes latents \(B, C, h, w\), got \(1, 4, 1, 4, 4\)"),
        ("AutoencoderKLHunyuanVideo", HUNYUAN, IMAGES, r"latents \(B, C, F, h, w\), got \(2, 4, 8, 8\)"),
    ],
)
def test_latents_of_another_shape_are_refused(name, options, shape, match):
    with pytest.raises(ConfigError, match=match):
        decode_latents(made(name, options), torch.zeros(shape))


def test_a_compiled_autoencoder_is_the_one_inside():
    """Its means are in buffers, which the wrapper does not have."""
    vae, z = made("AutoencoderKLLTXVideo", LTX), torch.randn(VIDEOS, generator=torch.Generator().manual_seed(3))
    assert torch.equal(decode_latents(torch.compile(vae, backend="eager"), z), decode_latents(vae, z))


def test_a_class_made_of_a_known_one_is_decoded_like_it():
    class Own(diffusers.AutoencoderKL):
        pass

    torch.manual_seed(0)
    own, z = Own(**ONE, scaling_factor=0.4).eval().requires_grad_(False), torch.ones(IMAGES)
    torch.testing.assert_close(decode_latents(own, z), own.decode(plain(z)).sample.clamp(-1, 1))
