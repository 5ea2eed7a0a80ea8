"""Flux: a transformer of diffusers on packed latents, called like any network on (B, C, H, W)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.facts import as_tuple
from amed_engine.adapters.fingerprint import Settled
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import is_tracing
from amed_engine.sampling.modules import bare


class Flux(Settled):
    """(x (B, C, H, W), time (B,), encoder_hidden_states (B, L, D), pooled_projections (B, P)) -> velocity (B, C, H, W).

    transformer: diffusers' FluxTransformer2DModel. It sees every 2 x 2 pixels as one token of 4C numbers, told its row and
    column (img_ids); tokens of text are at 0 (txt_ids). Time is 1000·t, as for `Flow`. guidance: what a guidance-distilled
    model is told, None for one that is not. Raises ConfigError where the transformer and guidance do not fit.
    """

    fixed = ("guidance",)

    def __init__(self, transformer: Any, guidance: float | None = 3.5):
        super().__init__()
        config = bare(transformer).config
        if config.in_channels % 4 or config.out_channels not in (None, config.in_channels):
            raise ConfigError(
                f"the transformer takes {config.in_channels} channels and predicts {config.out_channels}; expected the same "
                "number, four for each channel of the latents"
            )
        if guidance is not None and not math.isfinite(guidance):
            raise ConfigError(f"guidance must be a finite number or None, got {guidance}")
        self.transformer, self.channels = transformer, config.in_channels // 4
        self._form = as_tuple(transformer)
        self.guidance = guidance if config.guidance_embeds else None
        if config.guidance_embeds and guidance is None:
            raise ConfigError("this Flux is distilled for guidance and must be told one; pass guidance=3.5, say")

    def forward(self, x: Tensor, time: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor) -> Tensor:
        if not is_tracing() and (x.dim() != 4 or x.shape[1] != self.channels or x.shape[2] % 2 or x.shape[3] % 2):
            raise ConfigError(
                f"latents of Flux must be (B, {self.channels}, H, W) with even H and W, got {tuple(x.shape)}"
            )
        height, width = x.shape[2:]
        output = self.transformer(
            hidden_states=pack(x),
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=(time / 1000).expand(x.shape[0]),
            guidance=None if self.guidance is None else x.new_full((x.shape[0],), self.guidance),
            img_ids=positions(height // 2, width // 2, x),
            txt_ids=x.new_zeros(encoder_hidden_states.shape[1], 3),
            **self._form,
        )
        output = getattr(output, "sample", output)
        return unpack(output[0] if isinstance(output, tuple) else output, height, width)


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 · W/2, 4C), row by row; the numbers of a token in the order channel, row, column."""
    return torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows · columns, 3): 0, row, column of each token."""
    row = torch.arange(rows, device=like.device, dtype=like.dtype).repeat_interleave(columns)
    column = torch.arange(columns, device=like.device, dtype=like.dtype).repeat(rows)
    return torch.stack([torch.zeros_like(row), row, column], dim=1)
