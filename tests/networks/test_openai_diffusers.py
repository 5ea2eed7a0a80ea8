"""The U-Net of guided-diffusion against diffusers' own implementation of the same architecture, weights renamed."""

import pytest
import torch

from amed_engine.networks import OpenAIUNet

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
BLOCKS = 2  # residual blocks per level, of two levels; attention on the lower one
CASES = {
    "convolutions resample": {},
    "residual blocks resample": {"resblock_updown": True, "use_scale_shift_norm": True},
    "new attention order": {"use_new_attention_order": True},
    "scale and shift": {"use_scale_shift_norm": True, "num_head_channels": 16},
    "classes": {"num_classes": 3},
}


def places():
    """(name of one of our blocks, name of its resnet, attention or resampler in diffusers)."""
    yield from [("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0")]
    yield "middle_block.2", "mid_block.resnets.1"
    for level in range(2):
        for i in range(BLOCKS):
            block = 1 + level * (BLOCKS + 1) + i
            yield f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}"
            yield f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{i}"
        for i in range(BLOCKS + 1):
            block = level * (BLOCKS + 1) + i
            yield f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{i}"
            yield f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{i}"
    yield f"input_blocks.{BLOCKS + 1}.0", "down_blocks.0.downsamplers.0"
    yield f"output_blocks.{BLOCKS}.2", "up_blocks.0.upsamplers.0"


def renamed(network, heads):
    """The state dict of our network under diffusers' names."""
    state, out = network.state_dict(), {}
    names = dict(TOP)
    for ours, theirs in places():
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESNET.items()}
        names |= {f"{ours}.norm": f"{theirs}.group_norm", f"{ours}.proj_out": f"{theirs}.to_out.0"}
        names |= {f"{ours}.op": f"{theirs}.conv", f"{ours}.conv": f"{theirs}.conv"}
        for kind in ("weight", "bias"):
            if f"{ours}.qkv.{kind}" in state:
                for name, part in zip("qkv", split(state[f"{ours}.qkv.{kind}"], network, heads), strict=True):
                    out[f"{theirs}.to_{name}.{kind}"] = part.flatten(1) if kind == "weight" else part
    for key, value in state.items():
        owner, _, kind = key.rpartition(".")
        if owner == "label_emb":
            out[f"class_embedding.{kind}"] = value
        elif not owner.endswith("qkv"):
            out[f"{names[owner]}.{kind}"] = (
                value.flatten(1) if owner.endswith("proj_out") and kind == "weight" else value
            )
    return out


def split(qkv, network, heads):
    if network.style.use_new_attention_order:
        return qkv.chunk(3)
    by_head = qkv.unflatten(0, (heads, 3, -1))  # (head, q/k/v, channel, ...)
    return [by_head[:, k].flatten(0, 1) for k in range(3)]


def theirs(options):
    updown = options.get("resblock_updown", False)
    down = ("ResnetDownsampleBlock2D" if updown else "DownBlock2D", "AttnDownBlock2D")
    up = ("AttnUpBlock2D", "ResnetUpsampleBlock2D" if updown else "UpBlock2D")
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=BLOCKS,
        down_block_types=down, up_block_types=up, attention_head_dim=options.get("num_head_channels", 32),
        resnet_time_scale_shift="scale_shift" if options.get("use_scale_shift_norm") else "default",
        upsample_type="resnet" if updown else "conv", downsample_type="resnet" if updown else "conv",
        num_class_embeds=options.get("num_classes"), norm_num_groups=32, attn_norm_num_groups=32,
    ).eval()  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_same_weights_give_the_same_output(name):
    torch.manual_seed(0)
    options = CASES[name]
    shared = {"num_head_channels": 32} | options
    ours = OpenAIUNet(8, 3, 32, 3, BLOCKS, [2], channel_mult=[1, 2], **shared).eval()
    for parameter in ours.parameters():  # nothing silenced by its initialisation, norms included
        torch.nn.init.normal_(parameter, std=(1 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.5)
    network = theirs(options)
    network.load_state_dict(renamed(ours, heads=64 // shared["num_head_channels"]), strict=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([7.0, 640.0])
    labels = torch.tensor([2, 0]) if "num_classes" in options else None
    expected = network(x, t, class_labels=labels).sample
    torch.testing.assert_close(ours(x, t, labels)[0], expected, rtol=1e-4, atol=1e-4)
