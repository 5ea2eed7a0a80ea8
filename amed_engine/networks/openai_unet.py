"""The U-Net of guided-diffusion (ADM) and of the consistency models, and the classifier made of its first half.

Dhariwal & Nichol 2021 (arXiv:2105.05233), Song et al. 2023 (arXiv:2303.01469). Constructor arguments and parameter names
are the published ones, and ``load_state_dict(..., strict=True)`` of a published checkpoint works; `config` keeps the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError
from amed_engine.networks.arguments import check_arguments, check_levels
from amed_engine.networks.openai_layers import (
    AttentionBlock,
    AttentionPool,
    Conv,
    Dense,
    Downsample,
    Norm,
    ResBlock,
    Stack,
    Style,
    Upsample,
    timestep_embedding,
    zero,
)
from amed_engine.sampling.denoiser import one_hot
from amed_engine.solvers.arguments import is_whole, one_of, plain, told

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
HIDDEN = 2048  # of the classifier's head over spatial means


@dataclass(eq=False, repr=False)
class _Encoder(nn.Module):
    """What both networks share: arguments, the embedding of time, the descending half and the middle."""

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    dropout: float = 0.0
    channel_mult: Sequence[float] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    use_checkpoint: bool = False
    use_fp16: bool = False
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False

    def __post_init__(self):
        super().__init__()  # the arguments are plain attributes, which may be there before it
        self.config: dict[str, Any] = {each.name: plain(getattr(self, each.name)) for each in fields(self)}
        check_arguments(type(self).__name__, self.config)
        check_levels(type(self).__name__, "image_size", self.image_size, len(self.channel_mult))
        if not is_whole(self.dims, 2, 2):
            raise ConfigError(f"dims must be 2 (images), got {told(self.dims)}")
        width = 4 * self.model_channels
        self.style = Style(width, **{name: getattr(self, name) for name in Style._fields[1:]})
        self.widths = [int(mult * self.model_channels) for mult in self.channel_mult]
        self.time_embed = nn.Sequential(Dense(self.model_channels, width), nn.SiLU(), Dense(width, width))
        self._build_descent()
        bottom = self.skips[-1]
        self.middle_block = Stack(
            ResBlock(bottom, bottom, self.style), self._attention(bottom), ResBlock(bottom, bottom, self.style)
        )

    def _build_descent(self) -> None:
        self.input_blocks = nn.ModuleList([Stack(Conv(self.in_channels, self.widths[0], 3, padding=1))])
        self.skips = [self.widths[0]]  # channels that each input block puts out
        for level, channels in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                self._push(ResBlock(self.skips[-1], channels, self.style), channels, 2**level)
            if level != len(self.widths) - 1:
                self._push(_resampler(channels, self.style, "down"), channels)

    def _push(self, layer: nn.Module, channels: int, factor: int = 0) -> None:
        attention = [self._attention(channels)] if factor in self.attention_resolutions else []
        self.input_blocks.append(Stack(layer, *attention))
        self.skips.append(channels)

    def _attention(self, channels: int, style: Style | None = None) -> AttentionBlock:
        style = style or self.style
        return AttentionBlock(channels, style.count_heads(channels), style.use_new_attention_order)

    @property
    def bottleneck_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the middle block's output."""
        size = self.image_size >> (len(self.widths) - 1)
        return self.skips[-1], size, size

    @property
    def _stored(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    def _embed(self, timesteps: Tensor) -> Tensor:
        """(B,) or (1,) -> (B or 1, emb_channels)"""
        emb = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(emb.to(self._stored))

    def _compute(self, x: Tensor) -> Tensor:
        """x in the dtype of the network's arithmetic; half precision is worth nothing on a CPU."""
        return x.to(torch.float16 if self.use_fp16 and x.is_cuda else self._stored)

    def _finish(self, head: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        """The head of h in the wider dtype of x and the parameters; in x's dtype."""
        return head(h.to(torch.promote_types(x.dtype, self._stored))).to(x.dtype)

    def _check(self, x: Tensor) -> None:
        if not torch.jit.is_tracing() and (x.dim() != 4 or x.shape[1] != self.in_channels):  # pyright: ignore
            raise ConfigError(f"x must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")


@dataclass(eq=False, repr=False)
class OpenAIUNet(_Encoder):
    """U-Net F(x, timesteps, y) -> (F, bottleneck), the bottleneck being the output of the middle block.

    attention_resolutions: factors of downsampling, not widths. out_channels: twice in_channels for learned variances.
    num_classes: None for an unconditional network. num_head_channels: channels per attention head, -1 to give num_heads
    (num_heads_upsample in the ascending half, -1 for the same). use_new_attention_order: q, k and v outside the heads.
    use_fp16: the blocks run in float16 on a GPU. use_checkpoint concerns memory in training and has no effect here.
    Raises ConfigError for channels that do not divide.
    """

    num_classes: int | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes, self.style.emb_channels)
        same = self.num_heads_upsample == -1
        self.output_blocks = self._build_ascent(
            self.style if same else self.style._replace(num_heads=self.num_heads_upsample)
        )
        first = self.widths[0]
        self.out = nn.Sequential(Norm(first), nn.SiLU(), zero(Conv(first, self.out_channels, 3, padding=1)))

    def _build_ascent(self, style: Style) -> nn.ModuleList:
        skips, blocks, current = list(self.skips), nn.ModuleList(), self.skips[-1]
        for level, channels in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(current + skips.pop(), channels, style)]
                current = channels
                if 2**level in self.attention_resolutions:
                    layers.append(self._attention(channels, style))
                if level and i == self.num_res_blocks:
                    layers.append(_resampler(channels, style, "up"))
                blocks.append(Stack(*layers))
        return blocks

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, in_channels, H, W); timesteps (B,), fractions allowed; y for a class-conditional network: integers (B,), or
        one-hot rows (B, num_classes), a zero row adding nothing. Returns F (B, out_channels, H, W) and the bottleneck
        (B, C, h, w). Raises ConfigError for a wrong shape, or y missing or unasked for.
        """
        self._check(x)
        emb = self._embed(timesteps)
        emb = emb if (classes := self._embed_classes(y, emb)) is None else emb + classes
        h, skips = self._compute(x), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = bottleneck = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self._finish(self.out, h, x), bottleneck.to(x.dtype)

    def _embed_classes(self, y: Tensor | None, emb: Tensor) -> Tensor | None:
        if (y is None) != (self.num_classes is None):
            need = "needs class labels" if y is None else "is unconditional and takes no class labels"
            raise ConfigError(f"this network {need} (num_classes={self.num_classes})")
        if y is None or self.num_classes is None:
            return None
        if y.dim() == 1 and not y.is_floating_point():
            return self.label_emb(y)
        return one_hot(y, self.num_classes, emb) @ self.label_emb.weight


@dataclass(eq=False, repr=False)
class OpenAIClassifier(_Encoder):
    """Classifier of noisy images: the first half of `OpenAIUNet` under a head, (x, timesteps) -> logits.

    pool: how pixels become logits, "adaptive" (their mean), "attention", "spatial" or "spatial_v2" (the means after every
    block under a small network). The other arguments are `OpenAIUNet`'s; num_heads_upsample has no meaning here.
    """

    pool: str = field(default="adaptive", kw_only=True)

    def __post_init__(self):
        one_of("OpenAIClassifier", "pool", self.pool, POOLS)
        if self.pool == "attention" and self.num_head_channels == -1:
            raise ConfigError(
                "OpenAIClassifier: pool 'attention' needs num_head_channels, got -1; give the channels of each head, e.g. 64"
            )
        super().__post_init__()
        self.out = self._build_head(self.out_channels)

    def _build_head(self, out_channels: int) -> nn.Sequential:
        channels, size, _ = self.bottleneck_shape
        if self.pool == "adaptive":
            last = zero(Conv(channels, out_channels, 1))
            return nn.Sequential(Norm(channels), nn.SiLU(), nn.AdaptiveAvgPool2d(1), last, nn.Flatten())
        if self.pool == "attention":
            heads = self.style.count_heads(channels)
            return nn.Sequential(Norm(channels), nn.SiLU(), AttentionPool(size, channels, heads, out_channels))
        means = sum(self.skips) + channels
        between = [nn.ReLU()] if self.pool == "spatial" else [Norm(HIDDEN), nn.SiLU()]
        return nn.Sequential(Dense(means, HIDDEN), *between, Dense(HIDDEN, out_channels))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x (B, in_channels, H, W); timesteps (B,). Returns logits (B, out_channels) in x's dtype."""
        self._check(x)
        emb, h, means = self._embed(timesteps), self._compute(x), []
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
            means.append(h.mean(dim=(2, 3)))
        h = torch.cat(means, dim=1) if self.pool.startswith("spatial") else h
        return self._finish(self.out, h, x)


def _resampler(channels: int, style: Style, direction: str) -> nn.Module:
    if style.resblock_updown:
        return ResBlock(channels, channels, style, direction)
    return (Upsample if direction == "up" else Downsample)(channels, style.conv_resample)
