"""Two of every kind that a folder holds, by their number, and what is equal where they are; also for other processes."""

import json
from collections.abc import Callable

import torch

from amed_engine import make_plan
from amed_engine.adapters import wrap
from amed_engine.adapters.fingerprint import digest
from amed_engine.networks import EDMPrecond, OpenAIUNet
from amed_engine.sampling.predictors.amed import AMEDPredictor


def predictor(seed: int) -> AMEDPredictor:
    torch.manual_seed(seed)
    made = AMEDPredictor(0.02, 0.1, bottleneck=(4, 4), hidden_dim=16)
    made.plan = make_plan(5, solver="amed", guidance_scale=2.0 + seed)
    return made.eval()


def network(seed: int) -> EDMPrecond:
    torch.manual_seed(seed)
    return EDMPrecond(
        8, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], sigma_data=0.5 + seed
    )


def wrapped(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    unet = OpenAIUNet(8, 1, 32, 1, num_res_blocks=1, attention_resolutions=[], channel_mult=[1], num_head_channels=32)
    return wrap(unet.eval(), ("epsilon", "v")[seed], shape=(1, 8, 8), verify=False)


def content(item: torch.nn.Module) -> tuple:
    """All that changes what is drawn."""
    plan = getattr(item, "plan", None)
    tensors = dict(item.named_parameters()) | dict(item.named_buffers())
    said = json.dumps(getattr(item, "config", None), sort_keys=True), repr(getattr(item, "sample_shape", None))
    return digest(tensors), plan, *said


def diffusers(seed: int) -> torch.nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    channels = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = UNet2DModel(
        8, **channels, layers_per_block=1, down_block_types=down, up_block_types=up, norm_eps=(1 + seed) / 1e5
    )
    return wrap(unet.eval(), "epsilon", verify=False)


KINDS: dict[str, Callable[[int], torch.nn.Module]] = {
    "predictor": predictor,
    "network": network,
    "wrapped": wrapped,
    "diffusers": diffusers,
}
