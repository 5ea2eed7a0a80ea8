"""The first stage of a latent-diffusion checkpoint: the autoencoder whose latents the network draws, as diffusers' own class.

Rombach et al. 2022 (arXiv:2112.10752). Its architecture is read from names and shapes; diffusers' converter renames them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from amed_engine.checkpoints.diffusers_folder import load_diffusers
from amed_engine.checkpoints.files import parse_config
from amed_engine.checkpoints.native import restore
from amed_engine.errors import FileFormatError, require

PREFIX, CODEBOOK = "first_stage_model.", "quantize.embedding.weight"
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")  # losses and averages are for training
SCALE_KL, SCALE_VQ = 0.18215, 1.0  # of latents, where the file has no scale_factor: Stable Diffusion's, and none
HOW_TO_LEAVE_OUT = "--set first_stage=false converts the network alone"


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The first stage's tensors under its own names; empty where the file has none."""
    named = {str(name).removeprefix(PREFIX): value for name, value in state.items() if str(name).startswith(PREFIX)}
    return {name: value for name, value in named.items() if name.startswith(PARTS) and isinstance(value, Tensor)}


def build(tensors: Mapping[str, Tensor], scale: Any, path: Path) -> nn.Module:
    """diffusers' AutoencoderKL of these tensors, or its VQModel where there is a codebook.

    scale: what latents are multiplied by for the network, a number or a tensor of one; None for the published custom.
    Raises FileFormatError naming what does not fit, ConfigError without diffusers.
    """
    vector_quantized = CODEBOOK in tensors
    classes, rename = _diffusers()
    try:
        config = {**_config(tensors), **(_codebook(tensors) if vector_quantized else {})}
    except (KeyError, IndexError, ValueError) as error:  # of a name, of a shape, of a level
        raise FileFormatError(
            f"{path}: its first stage is no autoencoder of latent diffusion ({error} is missing); {HOW_TO_LEAVE_OUT}"
        ) from error
    config["scaling_factor"] = _scale(scale, SCALE_VQ if vector_quantized else SCALE_KL, path)
    kept = {CODEBOOK: tensors[CODEBOOK]} if vector_quantized else {}
    renamed = {**rename(dict(tensors), config), **kept}
    try:
        return restore(classes[vector_quantized], config, renamed, path).eval()
    except FileFormatError as error:
        raise FileFormatError(f"{error}; it is in the first stage: {HOW_TO_LEAVE_OUT}") from error


def _config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Levels, widths and channels, in the words of diffusers."""
    found = {int(found[1]) for name in tensors if (found := re.match(r"decoder\.up\.(\d+)\.", name))}
    levels = 1 + max(found, default=-1)
    blocks = {name.split(".")[4] for name in tensors if name.startswith("encoder.down.0.block.")}
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": len(blocks),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _codebook(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    entries, width = tensors[CODEBOOK].shape
    return {"num_vq_embeddings": entries, "vq_embed_dim": width}


def _scale(scale: Any, custom: float, path: Path) -> float:
    if scale is None:
        return custom
    single = isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)
    value = float(scale) if single else 0.0
    if not 0 < value < 1e6:
        raise FileFormatError(f"{path}: its scale_factor is {scale}, expected one positive number")
    return value


def folder_beside(network: Path) -> Path:
    """Where the first stage goes: beside the network's file or directory, with -vae at the end of its name."""
    return network.with_name(f"{network.name.removesuffix('.safetensors')}-vae")


def load(folder: Path) -> nn.Module:
    """The autoencoder in a directory that `convert` or diffusers wrote; safetensors only, nothing from the network."""
    config, classes = folder / "config.json", _diffusers()[0]
    if not config.is_file():
        raise FileFormatError(f"{folder} holds no autoencoder of diffusers: it has no config.json")
    vector_quantized = parse_config(config.read_text("utf-8"), config).get("_class_name") == "VQModel"
    return load_diffusers(classes[vector_quantized], folder, "autoencoder")


def _diffusers() -> tuple[tuple[Any, Any], Any]:
    """((AutoencoderKL, VQModel), the converter of names)"""
    library = require("diffusers", "diffusers", "the first stage of a latent-diffusion checkpoint", HOW_TO_LEAVE_OUT)
    names = require("diffusers.loaders.single_file_utils", "diffusers")
    return (library.AutoencoderKL, library.VQModel), names.convert_ldm_vae_checkpoint
