"""What networks of diffusers for sounds and videos say of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amed_engine.errors import ConfigError


def _unet_1d(network: Any) -> dict[str, Any]:
    config = network.config
    return {"shape": (config.in_channels, config.sample_size) if config.sample_size else None, "axes": "CL"}


def _unet_3d(network: Any) -> dict[str, Any]:
    refuse(network, time_cond_proj_dim=None)
    known = {"conditions": text(network.config.cross_attention_dim), "betas": "scaled_linear"}
    return {"axes": "CFHW", "folds_frames": True, **known}


def _cogvideox(network: Any) -> dict[str, Any]:
    config = network.config
    # What it must be told of places otherwise depends on the size of the video.
    refuse(network, use_rotary_positional_embeddings=False, ofs_embed_dim=None, patch_size_t=None)
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    shape = (frames, config.in_channels, config.sample_height, config.sample_width)
    return {"shape": shape, "axes": "FCHW", "conditions": text(config.text_embed_dim)}


def _latte(network: Any) -> dict[str, Any]:
    config = network.config
    shape = (config.in_channels, config.video_length, config.sample_size, config.sample_size)
    return {"shape": shape, "axes": "CFHW", "conditions": text(config.caption_channels), "betas": "linear"}


def _wan(network: Any) -> dict[str, Any]:
    refuse(network, image_dim=None, added_kv_proj_dim=None)
    return {"axes": "CFHW", "conditions": text(network.config.text_dim), "prediction": "flow"}


def text(width: Any) -> dict[str, int | None]:
    """Of a network that is told a text, of this width where it says one."""
    return {"encoder_hidden_states": width if isinstance(width, int) else None}


def refuse(network: Any, **expected: Any) -> None:
    """Raise ConfigError where the configuration of a network of diffusers is another one."""
    for name, value in expected.items():
        if (got := getattr(network.config, name, value)) != value:
            raise ConfigError(
                f"{type(network).__name__} with {name}={got!r} is not supported, only {value!r}; wrap a function "
                "(x, t) -> prediction that calls it instead"
            )


# Read into `NetworkFacts`, by the name of the class.
SEQUENCES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "UNet1DModel": _unet_1d,
    "UNet3DConditionModel": _unet_3d,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LatteTransformer3DModel": _latte,
    "WanTransformer3DModel": _wan,
}
