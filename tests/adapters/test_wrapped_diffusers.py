"""Networks of diffusers in wrappers of a caller's, which may take their answers apart."""

import pytest
import torch
from torch import nn

from amed_engine.adapters import wrap
from amed_engine.adapters.fingerprint import fingerprint

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SHAPES = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = {"encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 6)}


def unet():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4}
    return diffusers.UNet2DModel(**SHAPES, **blocks, block_out_channels=(8, 16), num_class_embeds=3)


def sd3():
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "pos_embed_max_size": 8}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 6}
    return diffusers.SD3Transformer2DModel(**SHAPES, **heads, **widths)


def flux():
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1}
    widths = {"joint_attention_dim": 12, "pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 4)}
    return diffusers.FluxTransformer2DModel(in_channels=16, guidance_embeds=True, **heads, **widths)


class Asks(nn.Module):
    """Counts its calls, and is asked as the network is."""

    def __init__(self, network, calls=0):
        super().__init__()
        self.network, self.calls = network, calls

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.network(*args, **kwargs)


class Takes(Asks):
    """The tensor alone."""

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs).sample


class TakesOfATuple(Asks):
    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs, return_dict=False)[0]


CASES = {
    "unet": (unet, {"prediction": "epsilon", "shape": (4, 8, 8)}, {"class_labels": torch.tensor([2, 0])}),
    "sd3": (sd3, {"shape": (4, 8, 8)}, TEXT),
    "flux": (flux, {"shape": (4, 8, 8)}, TEXT),
}


@torch.no_grad()
@pytest.mark.parametrize("wrapper", [Asks, Takes, TakesOfATuple, nn.DataParallel])
@pytest.mark.parametrize("case", CASES)
def test_a_wrapper_is_asked_as_it_is_written(case, wrapper):
    make, known, given = CASES[case]
    torch.manual_seed(0)
    network = make().eval().requires_grad_(False)
    plain, wrapped = wrap(network, **known), wrap(wrapper(network), **known)
    sigma = torch.tensor([0.5, 3.0])
    torch.testing.assert_close(wrapped(X, sigma, **given).x0, plain(X, sigma, **given).x0)
    assert (fingerprint(wrapped) == fingerprint(plain)) is (wrapper is nn.DataParallel)
