"""Latent-diffusion checkpoints (.ckpt): their U-Net and its averages; conditional ones through diffusers."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from amed_engine.checkpoints.diffusers_folder import load_diffusers, save_diffusers
from amed_engine.checkpoints.fit import check_numbers, without_memory
from amed_engine.errors import ConfigError, FileFormatError, require

PREFIX, AVERAGED = "model.diffusion_model.", "model_ema.diffusion_model"
COMPILED = re.compile(r"_orig_mod\.?")  # of torch.compile round a part, its dot lost in names of averages
HOW_TO_SET = "pass what differs from Stable Diffusion 1.x, e.g. --set cross_attention_dim=1024"
# The unconditional networks on latents of 64 x 64 (faces, bedrooms): heads of 32 channels.
UNCONDITIONAL = {"image_size": 64, "num_head_channels": 32}
# Of Stable Diffusion 1.x, in the words of diffusers' UNet2DConditionModel.
STABLE_DIFFUSION_1 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def fits(data: Mapping[str, Any]) -> bool:
    state = data.get("state_dict")
    return isinstance(state, dict) and any(str(name).startswith(PREFIX) for name in state)


def unet_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The U-Net's tensors under its own names."""
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def averaged(
    state: Mapping[str, Any], outer: str, tensors: Mapping[str, Tensor], path: Path, trained: bool
) -> dict[str, Tensor]:
    """The averages of a U-Net's tensors, whose names have no dots; none where there are none. outer: prefix of all names.
    trained: they are not asked for. Raises FileFormatError where not all are there."""
    held = {COMPILED.sub("", name): value for name, value in state.items() if name.startswith(f"{outer}model_ema.")}
    keys = {name: f"{COMPILED.sub('', outer)}{AVERAGED}{name.replace('.', '')}" for name in tensors}
    missing = [name for name, key in keys.items() if not isinstance(held.get(key), Tensor)]
    if missing and not trained and any(isinstance(value, Tensor) and value.dim() for value in held.values()):
        raise FileFormatError(
            f"{path} has averages of {len(keys) - len(missing)} of its network's {len(keys)} tensors, none of {missing[0]!r}; "
            "--weights model converts the trained ones"
        )
    return {} if missing else {name: held[key] for name, key in keys.items()}


def beside(state: Mapping[str, Any], outer: str) -> dict[str, Any]:
    """The first stage of the same file, under its published names."""
    inner = {name.removeprefix(outer): value for name, value in state.items() if name.startswith(outer)}
    plain = {COMPILED.sub("", name): value for name, value in inner.items()}
    return {name: plain[name] for name in plain if name.startswith("first_stage_model.") or name == "scale_factor"}


def has_context(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the network attends to a condition, such as text."""
    return any(".attn2." in name for name in tensors)


def build(tensors: dict[str, Tensor], path: Path, settings: Mapping[str, Any]) -> Any:
    """diffusers' UNet2DConditionModel of these tensors. settings: its configuration where it is not that of SD 1.x."""
    model_class, config = _diffusers(), {**STABLE_DIFFUSION_1, **settings}
    _check(tensors, config, path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **config}))
        state: dict[str, Any] = {PREFIX + name: value for name, value in tensors.items()}
        try:
            made = without_memory(lambda: model_class.from_config(config), len(tensors))
            check_numbers(made, [tensor.shape for tensor in tensors.values()])
            return model_class.from_single_file(state, config=folder, local_files_only=True)
        except Exception as error:  # diffusers raises what its converters happen to raise
            raise FileFormatError(
                f"{path} does not fit diffusers' UNet2DConditionModel as configured: {str(error)[:300]}; {HOW_TO_SET}"
            ) from error


def _check(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
    """Before a network of the wrong size is built: its ends and its condition have the configured widths."""
    first, last = tensors.get("input_blocks.0.0.weight"), tensors.get("out.2.weight")
    keys = next((tensor for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    if first is None or last is None or keys is None:
        raise FileFormatError(f"{path}: its network is no U-Net of latent diffusion with a condition")
    found = {
        "in_channels": (config["in_channels"], first.shape[1]),
        "out_channels": (config["out_channels"], last.shape[0]),
        "block_out_channels": (config["block_out_channels"][0], first.shape[0]),
        "cross_attention_dim": (config["cross_attention_dim"], keys.shape[1]),
    }
    for name, (configured, got) in found.items():
        if configured != got:
            raise FileFormatError(f"{path}: its {name} is {got}, configured is {configured}; {HOW_TO_SET}")


def save(unet: Any, out: Path) -> str:
    """Write a directory that diffusers' UNet2DConditionModel loads."""
    if out.suffix == ".safetensors":
        raise ConfigError(f"{out} must be a directory: diffusers keeps a model in one")
    save_diffusers(unet, out)
    return f"U-Net of Stable Diffusion, for diffusers' UNet2DConditionModel.from_pretrained({str(out)!r})"


def load(folder: Path) -> Any:
    """The network in a directory that `save` or diffusers wrote; safetensors only, nothing from the network."""
    return load_diffusers(_diffusers(), folder, "U-Net")


def _diffusers() -> Any:
    return require("diffusers", "diffusers", "a latent-diffusion checkpoint with a condition").UNet2DConditionModel
