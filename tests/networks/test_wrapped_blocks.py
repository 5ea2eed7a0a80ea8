"""U-Nets whose blocks are wrapped one by one, as compilation, checkpointing and sharding leave them."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from amed_engine.networks import EDMPrecond, OpenAIClassifier, OpenAIUNet
from amed_engine.networks.layers import UNetBlock
from amed_engine.networks.openai_layers import ResBlock

EDM = {"img_resolution": 8, "img_channels": 2, "label_dim": 3, "channel_mult": [1, 2], "num_blocks": 1}
EDM |= {"attn_resolutions": [4]}
SKIP = {"model_type": "SongUNet", "model_channels": 8, "encoder_type": "skip", "decoder_type": "skip"}
OPENAI = {"image_size": 8, "in_channels": 2, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}
OPENAI |= {"attention_resolutions": [2]}
NETWORKS = {
    "SongUNet": lambda: EDMPrecond(**EDM, model_type="SongUNet", model_channels=8),
    "SongUNet, skip": lambda: EDMPrecond(**EDM, **SKIP),
    "SongUNet, residual": lambda: EDMPrecond(**EDM, **SKIP | {"encoder_type": "residual"}),
    "DhariwalUNet": lambda: EDMPrecond(**EDM, model_type="DhariwalUNet", model_channels=32),
    "OpenAIUNet": lambda: OpenAIUNet(**OPENAI, out_channels=2),
    "OpenAIUNet, updown": lambda: OpenAIUNet(**OPENAI, out_channels=2, resblock_updown=True),
    "OpenAIClassifier": lambda: OpenAIClassifier(**OPENAI, out_channels=5),
}


class Opaque(nn.Module):
    """A wrapper that tells nothing of what it wraps."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        return self.block(*inputs)


def is_block(module):
    return isinstance(module, (UNetBlock, ResBlock))


def wrap_each(network, wrapper):
    for name, part in list(network.named_modules()):
        if is_block(part):
            owner, _, own = name.rpartition(".")
            network.get_submodule(owner)._modules[own] = wrapper(part)
    return network


WRAPPINGS = {
    "opaque": lambda network: wrap_each(network, Opaque),
    "compiled": lambda network: wrap_each(network, lambda block: torch.compile(block, backend="eager")),
    "checkpointed": lambda network: apply_activation_checkpointing(network, check_fn=is_block) or network,
}


def drawn(network):
    """Random weights in every layer: some are zero as training starts."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_wrapped_blocks_answer_as_the_plain_ones(name, wrapping):
    plain = drawn(NETWORKS[name]())
    wrapped = WRAPPINGS[wrapping](copy.deepcopy(plain))
    assert sum(map(is_block, plain.modules())) >= 4
    assert [type(part) for part in wrapped.modules()] != [type(part) for part in plain.modules()]
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wrapped(x, torch.tensor([0.3, 2.0])), plain(x, torch.tensor([0.3, 2.0])))
    if not isinstance(plain, OpenAIClassifier):
        assert wrapped.bottleneck_shape == plain.bottleneck_shape
