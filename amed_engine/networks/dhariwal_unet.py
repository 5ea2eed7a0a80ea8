"""ADM, the U-Net of Dhariwal & Nichol 2021 (arXiv:2105.05233) as published with EDM (arXiv:2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amed_engine.networks.arguments import check_arguments, check_levels
from amed_engine.networks.layers import (
    BlockStyle,
    Conv2d,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    drop_labels,
    width,
)
from amed_engine.sampling.denoiser import one_hot

INIT = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
INIT_ZERO = Init("kaiming_uniform", weight=0.0, bias=0.0)
CHANNELS_PER_HEAD = 64


class DhariwalUNet(nn.Module):
    """U-Net F(x, c_noise, labels) -> (F, bottleneck), with 64 channels per attention head.

    A layer at one of ``attn_resolutions`` (widths of feature maps) with fewer than 64 channels has no attention.
    Raises ConfigError for an argument of another type or out of its range.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        check_arguments("DhariwalUNet", {name: value for name, value in locals().items() if name != "self"})
        check_levels("DhariwalUNet", "img_resolution", img_resolution, len(channel_mult))
        super().__init__()
        self.label_dim, self.label_dropout = label_dim, label_dropout
        self.num_blocks, self.attn_resolutions = num_blocks, tuple(attn_resolutions)
        self.style = BlockStyle(
            emb_channels=model_channels * channel_mult_emb,
            dropout=dropout,
            init=INIT,
            init_zero=INIT_ZERO,
            init_attn=INIT,
            adaptive_scale=True,
        )
        self._build_mapping(model_channels, label_dim, augment_dim)
        # (resolution, channels), finest level first.
        levels = [(img_resolution >> i, model_channels * mult) for i, mult in enumerate(channel_mult)]
        self.enc = self._build_encoder(levels, in_channels)
        self.bottleneck_channels = width(list(self.enc.values())[-1])
        self.dec = self._build_decoder(levels)
        self.out_norm = GroupNorm(levels[0][1])
        self.out_conv = Conv2d(levels[0][1], out_channels, 3, INIT_ZERO)

    def _build_mapping(self, channels: int, label_dim: int, augment_dim: int) -> None:
        width = self.style.emb_channels
        init_label = Init("kaiming_normal", weight=math.sqrt(label_dim))
        self.map_noise = PositionalEmbedding(channels)
        self.map_augment = Linear(augment_dim, channels, INIT_ZERO, bias=False) if augment_dim else None
        self.map_layer0 = Linear(channels, width, INIT)
        self.map_layer1 = Linear(width, width, INIT)
        self.map_label = Linear(label_dim, width, init_label, bias=False) if label_dim else None

    def _heads(self, res: int, channels: int) -> int:
        return channels // CHANNELS_PER_HEAD if res in self.attn_resolutions else 0

    def _build_encoder(self, levels: list[tuple[int, int]], in_channels: int) -> nn.ModuleDict:
        enc, cout = nn.ModuleDict(), levels[0][1]
        for level, (res, channels) in enumerate(levels):
            at = f"{res}x{res}"
            if level == 0:
                enc[f"{at}_conv"] = Conv2d(in_channels, cout, 3, INIT)
            else:
                enc[f"{at}_down"] = UNetBlock(cout, cout, self.style, "down")
            for i in range(self.num_blocks):
                enc[f"{at}_block{i}"] = UNetBlock(cout, channels, self.style, heads=self._heads(res, channels))
                cout = channels
        return enc

    def _build_decoder(self, levels: list[tuple[int, int]]) -> nn.ModuleDict:
        skips = [width(layer) for layer in self.enc.values()]
        dec, cout = nn.ModuleDict(), levels[-1][1]
        for level, (res, channels) in reversed(list(enumerate(levels))):
            at = f"{res}x{res}"
            if level == len(levels) - 1:
                dec[f"{at}_in0"] = UNetBlock(cout, cout, self.style, heads=cout // CHANNELS_PER_HEAD)
                dec[f"{at}_in1"] = UNetBlock(cout, cout, self.style)
            else:
                dec[f"{at}_up"] = UNetBlock(cout, cout, self.style, "up")
            for i in range(self.num_blocks + 1):
                block = UNetBlock(cout + skips.pop(), channels, self.style, heads=self._heads(res, channels))
                dec[f"{at}_block{i}"] = block
                cout = channels
        return dec

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, in_channels, R, R); noise_labels (B,) or (1,); class_labels as `one_hot` takes them; augment_labels
        (B, augment_dim). Returns F (B, out_channels, R, R) and the output of the last encoder block (B, C, h, w).
        """
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        for name, block in self.enc.items():
            # By name: a block may be wrapped since (compiled, sharded, checkpointed).
            x = block(x) if name.endswith("_conv") else block(x, emb)
            skips.append(x)
        bottleneck = x
        for name, block in self.dec.items():
            x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x))), bottleneck

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            labels = one_hot(class_labels, self.label_dim, emb)
            emb = emb + self.map_label(drop_labels(labels, self.label_dropout, self.training))
        return F.silu(emb)
