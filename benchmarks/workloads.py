"""Networks to sample from, with random weights where none are bundled: those cost the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from harness import Unavailable
from torch import Tensor, nn

from amed_engine import AMEDPredictor, zoo
from amed_engine.networks import EDMPrecond

DDPMPP = {
    "img_resolution": 32,
    "img_channels": 3,
    "model_type": "SongUNet",
    "augment_dim": 9,
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.13,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
ADM = {
    "img_resolution": 64,
    "img_channels": 3,
    "label_dim": 1000,
    "model_type": "DhariwalUNet",
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
TINY = DDPMPP | {"img_resolution": 8, "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "augment_dim": 0}
TINY_LATENT = {
    "sample_size": 16,
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "cross_attention_dim": 16,
}


@dataclass(frozen=True)
class Workload:
    """A network to sample from. build raises Unavailable where it cannot be had."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    sigmas: tuple[float, float] = (0.002, 80.0)
    bottleneck: tuple[int, int] | None = (8, 8)  # None: the predictor reads zeros
    classes: int = 0

    def predictor(self, device: torch.device) -> AMEDPredictor:
        """Random weights: they cost the same as trained ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            predictor = AMEDPredictor(scale_dir=0.01, scale_time=0.2, bottleneck=self.bottleneck or (8, 8))
        return predictor.to(device).eval().requires_grad_(False)


def random_network(**config: Any) -> Callable[[], nn.Module]:
    """Random weights, the last layer of every branch included: published initialisations silence those."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = EDMPrecond(**config)
            for parameter in network.parameters():
                if parameter.dim() > 1 and parameter.abs().max() < 1e-3:
                    nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
        return network.eval().requires_grad_(False)

    return build


def digits() -> nn.Module:
    if "digits" not in zoo.names():
        raise Unavailable("the model 'digits' is not bundled in this checkout")
    return zoo.load("digits").eval().requires_grad_(False)


class LatentUNet(nn.Module):
    """A U-Net of Stable Diffusion 1's size from diffusers, random weights, predicting noise; D = x - sigma·F.

    config replaces arguments of diffusers' UNet2DConditionModel, whose defaults are that size.
    """

    label_dim = 0

    def __init__(self, **config: Any):
        super().__init__()
        if find_spec("diffusers") is None:
            raise Unavailable("diffusers is not installed")
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(**({"sample_size": 64, "cross_attention_dim": 768} | config))
        self.register_buffer("context", torch.randn(1, 77, self.unet.config["cross_attention_dim"]))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1, 1, 1)
        # With random weights any increasing map from noise level to timestep will do.
        timestep = 999 * (sigma.log() - math.log(0.03)) / math.log(15 / 0.03)
        context = self.context.to(x.dtype).expand(x.shape[0], -1, -1)
        noise = self.unet(x / (level**2 + 1).sqrt(), timestep, context, return_dict=False)[0]
        return x - level * noise


def latent(**config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LatentUNet(**config).eval().requires_grad_(False)

    return build


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("digits", digits, (1, 8, 8), bottleneck=(4, 4), classes=10),
        Workload("cifar10", random_network(**DDPMPP), (3, 32, 32)),
        Workload("imagenet64", random_network(**ADM), (3, 64, 64), classes=1000),
        Workload("latent", latent(), (4, 64, 64), sigmas=(0.03, 14.6), bottleneck=None),
        # For trying the benchmarks out.
        Workload("tiny", random_network(**TINY), (3, 8, 8), bottleneck=(4, 4)),
        Workload("tiny-labels", random_network(**TINY, label_dim=10), (3, 8, 8), bottleneck=(4, 4), classes=10),
        Workload("tiny-latent", latent(**TINY_LATENT), (4, 16, 16), sigmas=(0.03, 14.6), bottleneck=None),
    )
}
