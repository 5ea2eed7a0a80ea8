"""What a bare state dict of guided-diffusion's U-Net says about the network: all of it but the heads and the image's size.

Such files (guided-diffusion, consistency models, the unconditional latent-diffusion networks) hold parameters and nothing
else. Dhariwal & Nichol 2021 (arXiv:2105.05233), Song et al. 2023 (arXiv:2303.01469).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from amed_engine.errors import FileFormatError

# Of published files, what is neither in the tensors nor the same for all.
KNOWN_FILES: dict[str, dict[str, Any]] = {
    "64x64_diffusion.pt": {"use_new_attention_order": True},
    "128x128_diffusion.pt": {"num_heads": 4, "num_head_channels": -1},
}
POSITIONS = "out.2.positional_embedding"
SIZES = re.compile(r"(?<!\d)(32|64|128|256|512)(?!\d)")


def is_unet(tensors: Mapping[str, Any]) -> bool:
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= tensors.keys() and any(
        name.startswith("output_blocks.") for name in tensors
    )


def is_classifier(tensors: Mapping[str, Any]) -> bool:
    """The noisy classifiers of guided-diffusion, all of which pool by attention."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", POSITIONS} <= tensors.keys()


def infer_config(tensors: Mapping[str, Tensor], path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the published constructor of a U-Net or a classifier. `settings` go first, then what is known of a file
    of this name.

    The image's size is taken from the file's name where it is in it (256x256_diffusion.pt, edm_bedroom256_ema.pt); heads
    have 64 channels, as published. Raises FileFormatError where the size is not known.
    """
    given = {"image_size": None, **named_size(path), **KNOWN_FILES.get(path.name, {}), **settings}
    try:
        own = _classifier(tensors, given["image_size"], path) if is_classifier(tensors) else _unet(tensors)
    except (KeyError, IndexError) as error:
        raise FileFormatError(
            f"{path} is like a network of guided-diffusion, but lacks tensor {error}; it is damaged or another network's"
        ) from error
    except (ValueError, ArithmeticError) as error:  # of a name that has no number, of a width of zero
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"{path} is like a network of guided-diffusion, but its names and shapes are not: {str(error)[:200]}"
        ) from error
    if given["image_size"] is None:
        raise FileFormatError(f"{path} does not say for which images its network is; pass it: --set image_size=256")
    return {**own, **given}


def named_size(path: Path) -> dict[str, int]:
    """{"image_size": ...} where a file's name has one size of images; a folder's has the number of a step."""
    sizes = set() if path.is_dir() else set(SIZES.findall(path.name))
    return {"image_size": int(sizes.pop())} if len(sizes) == 1 else {}


def _unet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    labels = tensors.get("label_emb.weight")
    return {
        **_encoder(tensors, *_levels(tensors)),
        "out_channels": tensors["out.2.weight"].shape[0],
        "num_classes": None if labels is None else labels.shape[0],
    }


def _classifier(tensors: Mapping[str, Tensor], size: int | None, path: Path) -> dict[str, Any]:
    """It has no way up to count; the positions of its pooling tell the size of the bottom, one more for the mean."""
    bottom = math.isqrt(tensors[POSITIONS].shape[1] - 1)
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks."))
    levels = 0 if size is None or not bottom else 1 + round(math.log2(max(size / bottom, 1)))
    if not levels or size != bottom << (levels - 1) or blocks % levels:
        raise FileFormatError(
            f"{path} pools {bottom}x{bottom} positions after {blocks} blocks, which does not fit images of {size}; pass their "
            f"size: --set image_size=64"
        )
    own = _encoder(tensors, levels, blocks // levels - 1)
    return {**own, "out_channels": tensors["out.2.c_proj.weight"].shape[0], "pool": "attention"}


def _encoder(tensors: Mapping[str, Tensor], levels: int, per_level: int) -> dict[str, Any]:
    """What the half that both networks have tells."""
    channels = tensors["time_embed.0.weight"].shape[1]
    # Blocks of a level: its residual blocks, then one that goes down.
    first = [1 + level * (per_level + 1) for level in range(levels)]
    widths = [tensors[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in first]
    embedding = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    return {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "model_channels": channels,
        "num_res_blocks": per_level,
        "attention_resolutions": [2**k for k, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in tensors],
        "channel_mult": [w // channels if w % channels == 0 else w / channels for w in widths],
        "num_head_channels": 64,
        "use_scale_shift_norm": embedding == 2 * widths[0],
        "resblock_updown": not any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name) for name in tensors),
        "use_new_attention_order": False,
    }


def _levels(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(levels, residual blocks in each). The way up has one more block per level, the last of which also goes up."""
    up = re.compile(r"output_blocks\.(\d+)\.[12]\.(?:in_layers\.0|conv)\.weight")
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("output_blocks.")}
    levels = 1 + len({found[1] for name in tensors if (found := up.fullmatch(name))})
    return levels, len(blocks) // levels - 1
