"""Blocks of the U-Nets of guided-diffusion and the consistency models, under their published parameter names.

Every layer casts its weights to the dtype of its input: one set of float32 weights serves a float16 run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amed_engine.errors import ConfigError
from amed_engine.networks.layers import cos_sin

GROUPS = 32


class Conv(nn.Conv2d):
    """nn.Conv2d in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)


class Pointwise(nn.Conv1d):
    """Convolution of kernel 1 over a sequence, x (B, C, T), in its input's dtype.

    guided-diffusion stores its weight as (C', C, 1), the consistency models as (C', C, 1, 1): both load.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv1d(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.dim() == 4 and tuple(weight.shape[2:]) == (1, 1):
            state_dict[f"{prefix}weight"] = weight.flatten(2)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Dense(nn.Linear):
    """nn.Linear in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Norm(nn.GroupNorm):
    """Group normalisation in 32 groups, computed in float32 (float64 for float64)."""

    def __init__(self, channels: int):
        if channels % GROUPS:
            raise ConfigError(
                f"{channels} channels cannot be normalised in {GROUPS} groups; choose model_channels and channel_mult whose "
                f"products are multiples of {GROUPS}"
            )
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.group_norm(x.to(wide), GROUPS, weight, bias, self.eps).to(x.dtype)


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """(B,) -> (B, channels): [cos(t·w), sin(t·w)], w_k = 10000^(-k / (channels // 2)), float32; a zero pads an odd width."""
    half = channels // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    return F.pad(cos_sin(t, exponents.exp().to(t.dtype)), (0, channels % 2))


class Style(NamedTuple):
    """What the residual and attention blocks of one network have in common, by the names of its arguments."""

    emb_channels: int
    dropout: float = 0.0
    use_scale_shift_norm: bool = False  # the embedding scales and shifts the second norm, else it is added before it
    resblock_updown: bool = False  # residual blocks resample; otherwise layers of their own do
    conv_resample: bool = True  # those layers convolve
    num_head_channels: int = -1  # per attention head; -1: `num_heads` decides
    num_heads: int = 1
    use_new_attention_order: bool = False

    def count_heads(self, channels: int) -> int:
        """Attention heads of a layer. Raises ConfigError where the channels do not divide."""
        heads = self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels
        if heads < 1 or channels % heads or self.num_head_channels not in (-1, channels // heads):
            raise ConfigError(
                f"{channels} channels cannot be split among attention heads with num_heads={self.num_heads}, "
                f"num_head_channels={self.num_head_channels}; choose a divisor"
            )
        return heads


def upsample(x: Tensor) -> Tensor:
    """Each pixel becomes four."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """The mean of every four pixels."""
    return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Nearest neighbours by two, then a convolution (absent for `conv=False`)."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        return upsample(x) if self.conv is None else self.conv(upsample(x))


class Downsample(nn.Module):
    """By two, with a strided convolution or (`conv=False`) as the mean of four pixels."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.op = Conv(channels, channels, 3, stride=2, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        return downsample(x) if self.op is None else self.op(x)


class ResBlock(nn.Module):
    """Residual block with an embedding of time and class.

        h = conv(resample(silu(norm(x));  h = conv(dropout(silu(modulate(norm(h), emb))));  y = skip(resample(x)) + h

    x (B, channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W'); resample: "up", "down" or None.
    """

    def __init__(self, channels: int, out_channels: int, style: Style, resample: str | None = None):
        super().__init__()
        self.scale_shift = style.use_scale_shift_norm
        self.resample = {None: nn.Identity(), "up": Upsample(0, False), "down": Downsample(0, False)}[resample]
        self.in_layers = nn.Sequential(Norm(channels), nn.SiLU(), Conv(channels, out_channels, 3, padding=1))
        width = out_channels * (2 if style.use_scale_shift_norm else 1)
        self.emb_layers = nn.Sequential(nn.SiLU(), Dense(style.emb_channels, width))
        last = zero(Conv(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(Norm(out_channels), nn.SiLU(), nn.Dropout(style.dropout), last)
        self.skip_connection = nn.Identity() if out_channels == channels else Conv(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h, x = conv(self.resample(silu(norm(x)))), self.resample(x)
        params = self.emb_layers(emb)[:, :, None, None].to(h.dtype)
        norm, silu, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = params.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + params)
        return self.skip_connection(x) + conv(dropout(silu(h)))


class AttentionBlock(nn.Module):
    """x + proj_out(attention(qkv(norm(x)))) over all pixels, x (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = Norm(channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.proj_out = zero(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return (flat + self.proj_out(attend(self.qkv(self.norm(flat)), self.heads, self.new_order))).view_as(x)


def attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """(B, 3C, T) -> (B, C, T). The old order of channels is (head, q/k/v, c), the new one (q/k/v, head, c)."""
    parts = (3, heads, -1) if new_order else (heads, 3, -1)
    q, k, v = qkv.unflatten(1, parts).transpose(3, 4).unbind(1 if new_order else 2)  # (B, heads, T, c)
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


def zero(layer: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """The layer with its parameters at zero, as published training starts."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Stack(nn.Sequential):
    """Layers in sequence; the residual blocks among them get the embedding."""

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        # Kept by place: a block may be wrapped later (compiled, sharded, checkpointed).
        self.residual = [isinstance(layer, ResBlock) for layer in self]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer, residual in zip(self, self.residual, strict=True):
            x = layer(x, emb) if residual else layer(x)
        return x


class AttentionPool(nn.Module):
    """One query, the mean of all pixels, attends to all of them: (B, C, H, W) -> (B, out_channels)."""

    def __init__(self, size: int, channels: int, heads: int, out_channels: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = Pointwise(channels, 3 * channels)
        self.c_proj = Pointwise(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2) + self.positional_embedding.to(x.dtype)
        return self.c_proj(attend(self.qkv_proj(x), self.heads, new_order=True))[:, :, 0]
