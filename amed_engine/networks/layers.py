"""Building blocks of the U-Nets of EDM: linear and convolution layers, normalisation, embeddings, the residual block.

Parameters carry the published names, so that a converted checkpoint loads with ``strict=True``. Every layer casts its
weights to the dtype of its input: one set of float32 weights serves a float16 and a float32 run.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv:2206.00364).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amed_engine.errors import ConfigError

Resample = Literal["up", "down"]


class Init(NamedTuple):
    """Law of the initial weights: a unit-gain draw times ``weight`` (``bias`` for biases)."""

    mode: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"] = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        if self.mode == "kaiming_normal":
            return torch.randn(shape) * math.sqrt(1 / fan_in)
        fan = fan_in if self.mode == "kaiming_uniform" else (fan_in + fan_out) / 2
        return (torch.rand(shape) * 2 - 1) * math.sqrt(3 / fan)


class Linear(nn.Module):
    """y = x Wᵀ + b; x (..., in_features)."""

    def __init__(self, in_features: int, out_features: int, init: Init, bias: bool = True):
        super().__init__()
        fans = (in_features, out_features)
        self.in_features = in_features
        self.weight = nn.Parameter(init.draw((out_features, in_features), *fans) * init.weight)
        self.bias = nn.Parameter(init.draw((out_features,), *fans) * init.bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(nn.Module):
    """Resampling by two with a separable low-pass filter (optional), then a convolution (absent for ``kernel=0``).

    x (B, in_channels, H, W) -> (B, out_channels, H', W'), H' = 2H for ``up``, H / 2 for ``down``, else H.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        init: Init | None = None,
        resample: Resample | None = None,
        resample_filter: tuple[float, ...] = (1, 1),
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.resample = in_channels, out_channels, resample
        self.padding, self.filter_padding = kernel // 2, (len(resample_filter) - 1) // 2
        area, init = kernel * kernel, init or Init()
        fans = (in_channels * area, out_channels * area)
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(init.draw(shape, *fans) * init.weight) if kernel else None
        self.bias = nn.Parameter(init.draw((out_channels,), *fans) * init.bias) if kernel else None
        self.register_buffer("resample_filter", low_pass(resample_filter) if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.resample_filter is not None:
            x = self._resample(x, self.resample_filter.to(x.dtype))
        if self.weight is None or self.bias is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)

    def _resample(self, x: Tensor, taps: Tensor) -> Tensor:
        channels, padding = self.in_channels, self.filter_padding
        if self.resample == "down":
            return F.conv2d(x, taps.expand(channels, 1, -1, -1), stride=2, padding=padding, groups=channels)
        # Zeros between the pixels take away three quarters of the mass: hence the 4.
        taps = (4 * taps).expand(channels, 1, -1, -1)
        return F.conv_transpose2d(x, taps, stride=2, padding=padding, groups=channels)


class ConvThenDown(Conv2d):
    """Convolution, then filtering and subsampling: the residual branch of the NCSN++ encoder.

    Both paddings are spent before the convolution, so the border differs from that of `Conv2d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, init: Init, resample_filter: tuple[float, ...]
    ):
        super().__init__(in_channels, out_channels, kernel, init, resample="down", resample_filter=resample_filter)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.bias is not None
        assert self.resample_filter is not None
        taps = self.resample_filter.to(x.dtype).expand(self.out_channels, 1, -1, -1)
        x = F.conv2d(x, self.weight.to(x.dtype), padding=self.padding + self.filter_padding)
        return F.conv2d(x, taps, self.bias.to(x.dtype), stride=2, groups=self.out_channels)


def low_pass(taps: tuple[float, ...]) -> Tensor:
    """Separable filter (1, 1, K, K) of unit sum from its one-dimensional taps (K,)."""
    taps_1d = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(taps_1d, taps_1d) / taps_1d.sum().square())[None, None]


class GroupNorm(nn.Module):
    """Group normalisation with at most 32 groups of at least 4 channels. Raises ConfigError where they do not fit."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        if not self.groups or channels % self.groups:
            raise ConfigError(
                f"{channels} channels cannot be normalised in {self.groups} equal groups; choose model_channels a multiple "
                "of 4, or of 32 for more than 64"
            )
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PositionalEmbedding(nn.Module):
    """(B,) -> (B, channels): [cos(t·w), sin(t·w)], w_k = 10000^(-k / (channels/2 - endpoint)), rounded to float32."""

    def __init__(self, channels: int, endpoint: bool = False):
        super().__init__()
        self.count, self.endpoint = channels // 2, endpoint

    def forward(self, t: Tensor) -> Tensor:
        # Computed here, not kept as a buffer: a module built on the meta device has nothing to restore it from.
        exponent = torch.arange(self.count, dtype=torch.float32, device=t.device) / (self.count - self.endpoint)
        return cos_sin(t, torch.pow(1 / 10000, exponent).to(t.dtype))


class FourierEmbedding(nn.Module):
    """(B,) -> (B, channels): [cos(2π t·w), sin(2π t·w)] with fixed w ~ N(0, 16²), kept in the state dict."""

    freqs: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, t: Tensor) -> Tensor:
        return cos_sin(t, (2 * math.pi * self.freqs).to(t.dtype))


def cos_sin(t: Tensor, freqs: Tensor) -> Tensor:
    """(B,), (K,) -> (B, 2K)"""
    angle = torch.outer(t, freqs)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True)
class BlockStyle:
    """What sets the residual blocks of one family of networks apart."""

    emb_channels: int
    dropout: float
    init: Init
    init_zero: Init
    init_attn: Init
    adaptive_scale: bool  # embedding scales and shifts norm1's output; otherwise it is added before norm1
    resample_proj: bool = False  # 1x1 convolution on the skip branch even where the channels agree
    skip_scale: float = 1.0  # keeps the variance of a sum of two branches
    eps: float = 1e-5
    resample_filter: tuple[float, ...] = (1, 1)


class UNetBlock(nn.Module):
    """Residual block with noise-level conditioning and optional self-attention.

        h = conv1(dropout(silu(norm1(conv0(silu(norm0(x)))) modulated by affine(emb))))
        y = (h + skip(x)) · skip_scale;   with attention: y = (y + proj(attention(qkv(norm2(y))))) · skip_scale

    x (B, in_channels, H, W), emb (B or 1, emb_channels) -> (B, out_channels, H', W').
    """

    def __init__(
        self, in_channels: int, out_channels: int, style: BlockStyle, resample: Resample | None = None, heads: int = 0
    ):
        super().__init__()
        self.out_channels, self.style, self.heads = out_channels, style, heads
        filtered: Any = {"resample": resample, "resample_filter": style.resample_filter}
        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, style.init, **filtered)
        self.affine = Linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1), style.init)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, style.init_zero)
        self.skip = None
        if resample or in_channels != out_channels:
            kernel = 1 if style.resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, style.init, **filtered)
        if heads:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, style.init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, style.init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self._modulate(h, self.affine(emb)[:, :, None, None].to(h.dtype)))
        h = self.conv1(F.dropout(h, self.style.dropout, self.training))
        x = self._scaled(h + (x if self.skip is None else self.skip(x)))
        return self._scaled(x + self._attend(x)) if self.heads else x

    def _modulate(self, h: Tensor, params: Tensor) -> Tensor:
        if not self.style.adaptive_scale:
            return self.norm1(h + params)
        scale, shift = params.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(h), scale + 1)

    def _attend(self, x: Tensor) -> Tensor:
        # (B, 3C, H, W) -> (B, heads, C/heads, 3, HW): q, k and v alternate along the channels.
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.heads, -1, 3))
        q, k, v = (t.transpose(2, 3) for t in qkv.unbind(3))  # (B, heads, HW, C/heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(2, 3).reshape(x.shape))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.style.skip_scale == 1 else x * self.style.skip_scale


def width(layer: nn.Module) -> int:
    """Number of channels that a block or a convolution puts out."""
    assert isinstance(layer, UNetBlock | Conv2d)
    return layer.out_channels


def drop_labels(labels: Tensor, rate: float, training: bool) -> Tensor:
    """In training, zero whole rows of labels (B, label_dim) with probability `rate` (classifier-free guidance)."""
    if not (training and rate):
        return labels
    return labels * (torch.rand_like(labels[:, :1]) >= rate)
