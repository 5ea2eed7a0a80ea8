"""run.py CHECKOUT checkpoints.py FOLDER: small random networks of kinds that ComfyUI tells by their weights.

unet.safetensors: Stable Diffusion 1's U-Net with one block on each of two levels, 4 latent channels, a table of noise levels.
dit.safetensors: Stable Diffusion 3's transformer of two blocks, 16 latent channels, a flow model.
"""

import sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

COMMON = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.manual_cast}


def unet() -> torch.nn.Module:
    depths = {"transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1}
    channels = {"in_channels": 4, "model_channels": 320, "out_channels": 4, "channel_mult": [1, 1]}
    heads = {"num_heads": 8, "context_dim": 768, "use_spatial_transformer": True, "legacy": False}
    return UNetModel(image_size=32, num_res_blocks=[1, 1], **channels, **depths, **heads, **COMMON)


def dit() -> torch.nn.Module:
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    sizes = {"num_patches": 64, "pos_embed_max_size": 8, "adm_in_channels": 64, "in_channels": 16, "depth": 2}
    return MMDiT(input_size=None, patch_size=2, context_embedder_config=context, **sizes, **COMMON)


def filled(network: torch.nn.Module, seed: int, last: str) -> dict[str, torch.Tensor]:
    """Weights that keep an input's variance, biases of a tenth; the last layer's answer is small."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, weight in network.state_dict().items():
        drawn = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            weights[name] = drawn / weight[0].numel() ** 0.5 * (0.3 if name == last else 1)
        else:
            weights[name] = 0.1 * drawn + (name.endswith("weight"))
    return weights


folder.mkdir(parents=True, exist_ok=True)
save_file(filled(unet(), 1, "out.2.weight"), folder / "unet.safetensors")
save_file(filled(dit(), 2, "final_layer.linear.weight"), folder / "dit.safetensors")
