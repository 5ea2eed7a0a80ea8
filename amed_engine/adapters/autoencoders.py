"""Latents back to images through the autoencoders of diffusers, each class as the pipelines that it comes with use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import bare

MOMENTS = ("latents_mean", "latents_std")
FIELDS = ("shift_factor", *MOMENTS)


class Convention(NamedTuple):
    """How latents of a class are scaled. reads: of `FIELDS` those that its pipelines read beside scaling_factor; those that
    they do not must be unset. shape: of the latents. is_frames: decode is told how many rows there are, frames of one video.
    """

    reads: tuple[str, ...] = ()
    shape: str = "BChw"
    is_frames: bool = False


IMAGES, VIDEOS = Convention(), Convention(shape="BCFhw")
KNOWN = {
    "AutoencoderKL": Convention(FIELDS),
    "AutoencoderTiny": Convention(("shift_factor",)),
    "AsymmetricAutoencoderKL": IMAGES,
    "AutoencoderDC": IMAGES,
    "AutoencoderKLHunyuanImage": IMAGES,
    "ConsistencyDecoderVAE": IMAGES,
    "VQModel": IMAGES,
    "AutoencoderKLTemporalDecoder": Convention(shape="FChw", is_frames=True),
    "AutoencoderKLCogVideoX": VIDEOS,
    "AutoencoderKLHunyuanVideo": VIDEOS,
    "AutoencoderKLHunyuanVideo15": VIDEOS,
    "AutoencoderKLMagvit": VIDEOS,
    "AutoencoderKLLTXVideo": VIDEOS._replace(reads=MOMENTS),
    "AutoencoderKLLTX2Video": VIDEOS._replace(reads=MOMENTS),
    "AutoencoderKLMochi": VIDEOS._replace(reads=MOMENTS),
}
# Settings with which a known class is decoded otherwise: Kandinsky's MOVQ is not scaled, LTX's decoder is told a time.
OTHERWISE = (
    ("VQModel", "norm_type", "spatial"),
    *((f"AutoencoderKL{kind}", "timestep_conditioning", True) for kind in ("LTXVideo", "LTX2Video")),
)


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in -1 .. 1 from latents (B, C, h, w) in the scale that the network was trained in.

        z/scaling_factor + shift_factor,   or   z·latents_std/scaling_factor + latents_mean

    vae: an autoencoder of diffusers that `KNOWN` names, in its own dtype, but one in float16 with force_upcast in float32, as
    SDXL's overflows. Of videos the latents are (B, C, F, h, w), of Stable Video Diffusion (F, C, h, w), the frames of one.
    Raises ConfigError for another class, which may scale its latents otherwise, for a configuration that does, and for latents
    of another shape.
    """
    if not hasattr(vae, "decode") or not hasattr(vae, "config"):
        raise ConfigError(f"vae must be an autoencoder of diffusers, got {type(vae).__name__}")
    kind, convention = _convention(vae)
    if latents.dim() != len(convention.shape):
        shape = ", ".join(convention.shape)
        raise ConfigError(f"{kind} decodes latents ({shape}), got {tuple(latents.shape)}; bring them into this shape")
    check_latent_channels(vae, latents.shape[1], "the latents have")
    scale, shift = _scaling(vae, kind, convention.reads, latents)
    told = {"num_frames": len(latents)} if convention.is_frames else {}
    scaled = latents * scale + shift
    with _upcast(vae):
        images = vae.decode(scaled.to(vae.dtype), **told, return_dict=False)[0]
    return images.to(latents.dtype).clamp(-1, 1)


def check_latent_channels(vae: Any, channels: int, who: str) -> None:
    """Raise ConfigError for an autoencoder of other latents; who: the subject of the sentence."""
    expected = getattr(vae.config, "latent_channels", channels)
    if expected != channels:
        raise ConfigError(f"{who} {channels} channels, the VAE {expected}: they belong to different models")


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """A VAE that overflows in float16 in float32, and back, which changes no number of it."""
    forced = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if forced:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if forced:
            vae.to(torch.float16)


def _convention(vae: Any) -> tuple[str, Convention]:
    """The known class that it is, and how that is decoded. Raises ConfigError."""
    names = [ancestor.__name__ for ancestor in type(bare(vae)).__mro__]
    known = next((name for name in names if name in KNOWN), None)
    if known is None:
        raise ConfigError(
            f"how latents of {names[0]} are scaled is not known; pass one of {', '.join(KNOWN)}, or scale them as its own "
            "pipeline does and call its decode yourself"
        )
    for name, field, value in OTHERWISE:
        if known == name and getattr(vae.config, field, None) == value:
            raise ConfigError(
                f"{known} has {field}={value!r}, with which its pipelines decode otherwise than by its configuration's scale; "
                "do as its own pipeline does, and call its decode yourself"
            )
    return known, KNOWN[known]


def _scaling(vae: Any, kind: str, reads: tuple[str, ...], latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What latents (B, C, ...) are multiplied with, and what is added. Raises ConfigError."""
    factor = getattr(vae.config, "scaling_factor", None)
    if not factor:
        raise ConfigError(
            f"{kind} has scaling_factor={factor!r}, expected a number: how its latents are scaled is not known; call its "
            "decode yourself"
        )
    buffers = getattr(bare(vae), "_buffers", {})  # where those of videos have them
    given = {name: getattr(vae.config, name, buffers.get(name)) for name in FIELDS}
    _check_fields(kind, reads, given, latents.shape[1])
    shift, mean, std = given.values()
    if mean is None:
        return 1 / factor, shift or 0.0
    mean, std = (
        torch.as_tensor(value, device="cpu").to(latents).reshape(-1, *[1] * (latents.dim() - 2))
        for value in (mean, std)
    )
    return std / factor, mean


def _check_fields(kind: str, reads: tuple[str, ...], given: dict[str, Any], channels: int) -> None:
    """Raise ConfigError for fields that its pipelines do not read, or that contradict each other."""
    unread = [name for name, value in given.items() if name not in reads and value not in (None, 0)]
    shift, *moments = given.values()
    lengths = [len(value) for value in moments if value is not None]
    if unread:
        expected = f"None in {', '.join(unread)}, which its pipelines do not read"
    elif lengths and (shift or lengths != [channels] * 2):
        expected = f"{channels} numbers in both latents_mean and latents_std and no shift_factor, or neither of the two"
    else:
        return
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    raise ConfigError(f"{kind} has {said}; expected {expected}: call its decode yourself")
