"""The published models by name: what they are, where their weights are published, and what the files must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from amed_engine.adapters import alphas_cumprod

_EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
_DDPMPP = {
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 128,
}
_NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "model_channels": 128,
}


@dataclass(frozen=True)
class Entry:
    """A published model.

    url: where its weights are. form: what that file is. file: the name that `load` looks for.
    shape: (C, R, R) of a sample. bottleneck: (C', h, w) that a predictor reads. sigma_min, sigma_max: the noise levels it is
    sampled between. prediction: "denoised" where the network brings its preconditioning, else one of `wrap`'s.
    betas: of the 1000 steps of a discrete-time model, as `alphas_cumprod` takes them. arguments: the constructor arguments of
    `network` that tell this model from others; a file that says otherwise is refused.
    """

    url: str
    form: str
    shape: tuple[int, int, int]
    bottleneck: tuple[int, int, int]
    label_dim: int = 0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    prediction: str = "denoised"
    betas: Mapping[str, Any] | None = None
    network: str = "EDMPrecond"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""

    def __post_init__(self):
        if not self.file:
            object.__setattr__(self, "file", self.url.rsplit("/", 1)[-1])

    def alphas_cumprod(self) -> Tensor | None:
        """Of its 1000 steps, float64; None for a model of continuous time."""
        return None if self.betas is None else alphas_cumprod(steps=1000, **self.betas)


def _edm(name: str, *, size: int, label_dim: int, network: Mapping[str, Any], channel_mult: list[int]) -> Entry:
    facts = {"img_resolution": size, "img_channels": 3, "label_dim": label_dim}
    return Entry(
        url=f"{_EDM}{name}.pkl",
        form="a pickle of EDM, its network under 'ema'",
        shape=(3, size, size),
        bottleneck=(channel_mult[-1] * network["model_channels"], 8, 8),
        label_dim=label_dim,
        arguments={**facts, **network, "channel_mult": channel_mult},
    )


def _edm_models() -> dict[str, Entry]:
    models = {}
    for form, network in (("vp", _DDPMPP), ("ve", _NCSNPP)):
        for kind, labels in (("cond", 10), ("uncond", 0)):
            name = f"edm-cifar10-32x32-{kind}-{form}"
            models[name] = _edm(name, size=32, label_dim=labels, network=network, channel_mult=[2, 2, 2])
        for data in ("ffhq", "afhqv2"):
            name = f"edm-{data}-64x64-uncond-{form}"
            models[name] = _edm(name, size=64, label_dim=0, network=network, channel_mult=[1, 2, 2, 2])
    name = "edm-imagenet-64x64-cond-adm"
    adm = {"model_type": "DhariwalUNet", "model_channels": 192}
    return {**models, name: _edm(name, size=64, label_dim=1000, network=adm, channel_mult=[1, 2, 3, 4])}


CATALOGUE: dict[str, Entry] = {
    **_edm_models(),
    "edm-lsun-bedroom-256x256": Entry(
        url="https://openaipublic.blob.core.windows.net/consistency/edm_bedroom256_ema.pt",
        form="a state dict of the consistency models",
        shape=(3, 256, 256),
        bottleneck=(1024, 8, 8),
        prediction="cm",
        network="OpenAIUNet",
        arguments={
            "image_size": 256,
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 256,
            "num_res_blocks": 2,
            "attention_resolutions": [8, 16, 32],
            "channel_mult": [1, 1, 2, 2, 4, 4],
            "num_classes": None,
            "num_head_channels": 64,
            "use_scale_shift_norm": False,
            "resblock_updown": True,
        },
    ),
    "ldm-lsun-bedroom-256x256": Entry(
        url="https://ommer-lab.com/files/latent-diffusion/lsun_bedrooms.zip",
        file="ldm-lsun-bedroom-256x256.ckpt",
        form="model.ckpt of that archive; samples are latents of its first stage, vq-f4",
        shape=(3, 64, 64),
        bottleneck=(896, 8, 8),
        sigma_min=0.03876,
        sigma_max=83.82,
        prediction="epsilon",
        betas={"betas": "scaled_linear", "start": 0.0015, "end": 0.0195},
        network="OpenAIUNet",
        arguments={
            "image_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 224,
            "num_res_blocks": 2,
            "attention_resolutions": [2, 4, 8],
            "channel_mult": [1, 2, 3, 4],
            "num_classes": None,
            "num_head_channels": 32,
        },
    ),
    "sd-v1-5": Entry(
        url="https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/v1-5-pruned-emaonly.ckpt",
        form="a checkpoint of Stable Diffusion 1.x, or diffusers' directory of its U-Net; samples are latents",
        shape=(4, 64, 64),
        bottleneck=(1280, 8, 8),
        sigma_min=0.0292,
        sigma_max=14.6146,
        prediction="epsilon",
        betas={"betas": "scaled_linear", "start": 0.00085, "end": 0.012},
        network="UNet2DConditionModel",
        arguments={"in_channels": 4, "cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]},
    ),
}
