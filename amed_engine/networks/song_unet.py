"""DDPM++ and NCSN++, the U-Nets of Song et al. 2021 (arXiv:2011.13456) as published with EDM (arXiv:2206.00364)."""

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
    ConvThenDown,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    drop_labels,
    width,
)
from amed_engine.sampling.denoiser import one_hot

INIT = Init("xavier_uniform")
INIT_ZERO = Init("xavier_uniform", weight=1e-5)
INIT_ATTN = Init("xavier_uniform", weight=math.sqrt(0.2))


class SongUNet(nn.Module):
    """U-Net F(x, c_noise, labels) -> (F, bottleneck).

    DDPM++: positional embedding, standard encoder, filter (1, 1). NCSN++: Fourier embedding, residual (or skip)
    encoder, channel_mult_noise 2, filter (1, 3, 3, 1). Encoder ``skip`` adds a 1x1 convolution of the downsampled
    input at every lower resolution, ``residual`` a chain of strided convolutions of it; decoder ``skip`` sums an
    image predicted at every resolution. ``attn_resolutions`` are widths of feature maps.
    Raises ConfigError for an argument of another type or out of its range.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        check_arguments("SongUNet", {name: value for name, value in locals().items() if name != "self"})
        check_levels("SongUNet", "img_resolution", img_resolution, len(channel_mult))
        super().__init__()
        self.label_dim, self.label_dropout = label_dim, label_dropout
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self.num_blocks, self.attn_resolutions = num_blocks, tuple(attn_resolutions)
        self.style = BlockStyle(
            emb_channels=model_channels * channel_mult_emb,
            dropout=dropout,
            init=INIT,
            init_zero=INIT_ZERO,
            init_attn=INIT_ATTN,
            adaptive_scale=False,
            resample_proj=True,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=tuple(resample_filter),
        )
        self._build_mapping(model_channels * channel_mult_noise, label_dim, augment_dim, embedding_type)
        # (resolution, channels), finest level first.
        levels = [(img_resolution >> i, model_channels * mult) for i, mult in enumerate(channel_mult)]
        self.enc = self._build_encoder(levels, in_channels, model_channels)
        self.bottleneck_channels = width(list(self.enc.values())[-1])
        self.dec = self._build_decoder(levels, out_channels)

    def _build_mapping(self, channels: int, label_dim: int, augment_dim: int, embedding_type: str) -> None:
        positional = embedding_type == "positional"
        self.map_noise = PositionalEmbedding(channels, endpoint=True) if positional else FourierEmbedding(channels)
        self.map_label = Linear(label_dim, channels, INIT) if label_dim else None
        self.map_augment = Linear(augment_dim, channels, INIT, bias=False) if augment_dim else None
        self.map_layer0 = Linear(channels, self.style.emb_channels, INIT)
        self.map_layer1 = Linear(self.style.emb_channels, self.style.emb_channels, INIT)

    def _build_encoder(self, levels: list[tuple[int, int]], in_channels: int, cout: int) -> nn.ModuleDict:
        enc, aux_channels = nn.ModuleDict(), in_channels
        for level, (res, channels) in enumerate(levels):
            at = f"{res}x{res}"
            if level == 0:
                enc[f"{at}_conv"] = Conv2d(in_channels, cout, 3, INIT)
            else:
                enc[f"{at}_down"] = UNetBlock(cout, cout, self.style, "down")
                enc.update(self._aux_encoder(at, aux_channels, cout))
                aux_channels = cout if self.encoder_type == "residual" else aux_channels
            for i in range(self.num_blocks):
                enc[f"{at}_block{i}"] = UNetBlock(cout, channels, self.style, heads=int(res in self.attn_resolutions))
                cout = channels
        return enc

    def _aux_encoder(self, at: str, aux_channels: int, cout: int) -> dict[str, nn.Module]:
        taps = self.style.resample_filter
        if self.encoder_type == "residual":
            return {f"{at}_aux_residual": ConvThenDown(aux_channels, cout, 3, INIT, taps)}
        if self.encoder_type == "skip":
            down = Conv2d(aux_channels, aux_channels, 0, resample="down", resample_filter=taps)
            return {f"{at}_aux_down": down, f"{at}_aux_skip": Conv2d(aux_channels, cout, 1, INIT)}
        return {}

    def _build_decoder(self, levels: list[tuple[int, int]], out_channels: int) -> nn.ModuleDict:
        skips = [width(layer) for name, layer in self.enc.items() if "aux" not in name]
        dec, cout = nn.ModuleDict(), levels[-1][1]
        for level, (res, channels) in reversed(list(enumerate(levels))):
            at = f"{res}x{res}"
            if level == len(levels) - 1:
                dec[f"{at}_in0"] = UNetBlock(cout, cout, self.style, heads=1)
                dec[f"{at}_in1"] = UNetBlock(cout, cout, self.style)
            else:
                dec[f"{at}_up"] = UNetBlock(cout, cout, self.style, "up")
            for i in range(self.num_blocks + 1):
                heads = int(i == self.num_blocks and res in self.attn_resolutions)
                dec[f"{at}_block{i}"] = UNetBlock(cout + skips.pop(), channels, self.style, heads=heads)
                cout = channels
            if level == 0 or self.decoder_type == "skip":
                dec.update(self._aux_decoder(at, cout, out_channels, lowest=level == len(levels) - 1))
        return dec

    def _aux_decoder(self, at: str, cout: int, out_channels: int, lowest: bool) -> dict[str, nn.Module]:
        taps, head = self.style.resample_filter, {}
        if self.decoder_type == "skip" and not lowest:
            head[f"{at}_aux_up"] = Conv2d(out_channels, out_channels, 0, resample="up", resample_filter=taps)
        head[f"{at}_aux_norm"] = GroupNorm(cout, eps=1e-6)
        head[f"{at}_aux_conv"] = Conv2d(cout, out_channels, 3, INIT_ZERO)
        return head

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
        skips = self._encode(x, emb)
        return self._decode(skips, emb), skips[-1]

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if self.map_label is not None:
            labels = drop_labels(one_hot(class_labels, self.label_dim, emb), self.label_dropout, self.training)
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if name.endswith("aux_down"):
                aux = block(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + block(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + block(aux)) * math.sqrt(0.5)
            else:
                # By name: a block may be wrapped since (compiled, sharded, checkpointed).
                x = block(x) if name.endswith("_conv") else block(x, emb)
                skips.append(x)
        return skips

    def _decode(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        skips, x = list(skips), skips[-1]
        image: Tensor | None = None  # sum of the images predicted at the resolutions so far
        head = x
        for name, block in self.dec.items():
            if name.endswith("aux_up"):
                image = block(image)
            elif name.endswith("aux_norm"):
                head = F.silu(block(x))
            elif name.endswith("aux_conv"):
                image = block(head) if image is None else image + block(head)
            else:
                x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
                x = block(x, emb)
        assert image is not None
        return image
