"""From tensors to pictures: EDM's rounding, contact sheets, PNG files written whole or not at all."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amed_engine.checkpoints import atomic_write
from amed_engine.errors import ConfigError

LEGIBLE = 64  # pixels; images of at most half as many are enlarged on a contact sheet


def check_pictures(shape: Sequence[int] | None) -> None:
    """Raise ConfigError unless samples of this shape (C, H, W) can be shown; None, not known yet, passes."""
    if shape is not None and (len(shape) != 3 or shape[0] not in (1, 3)):
        remedy = "decode latents to pixels" if len(shape) == 3 else "draw them with amed_engine.Sampler(...).run"
        raise ConfigError(f"pictures need samples of shape (1 or 3, H, W), got {tuple(shape)}; {remedy} and save those")


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] as (B, H, W, C) bytes, rounded as EDM does.

    Raises ConfigError unless C is 1 or 3.
    """
    check_pictures(images.shape[1:])
    return rounded(images).permute(0, 2, 3, 1).cpu().numpy()


def rounded(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, in their shape and on their device: clip(127.5 x + 128, 0, 255), cut to an integer."""
    return (images.detach() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def magnification(height: int, width: int) -> int:
    """Whole factor that makes an image of at most 32 pixels legible, at least 4; 1 for larger ones."""
    size = max(height, width)
    return 1 if size > 32 else max(4, LEGIBLE // size)


def grid(pictures: np.ndarray, columns: int | None = None, gap: int = 4) -> np.ndarray:
    """One picture (H', W', C) of all (B, H, W, C), row by row, small ones enlarged smoothly, on grey.

    columns: as many as make it square unless given. gap: pixels between neighbours, and round the edge.
    """
    count, height, width, channels = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    factor = magnification(height, width)
    down, across = height * factor + gap, width * factor + gap
    sheet = np.full((math.ceil(count / columns) * down + gap, columns * across + gap, channels), 128, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * down + gap, index % columns * across + gap
        sheet[top : top + down - gap, left : left + across - gap] = _enlarged(picture, factor)
    return sheet


def _enlarged(picture: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return picture
    height, width, channels = picture.shape
    size = (width * factor, height * factor)
    return np.asarray(_image(picture).resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], channels)


def _image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)


def png(picture: np.ndarray) -> bytes:
    """(H, W, 1 or 3) bytes as a PNG file."""
    buffer = io.BytesIO()
    _image(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def seed_path(folder: str | os.PathLike, seed: int, subdirs: bool) -> Path:
    """Where EDM's tools put, and look for, the image of a seed: folder[/000000]/000042.png, a thousand to a folder."""
    folder = Path(folder) / f"{seed - seed % 1000:06d}" if subdirs else Path(folder)
    return folder / f"{seed:06d}.png"


def save_grid(path: str | os.PathLike, pictures: Sequence[np.ndarray]) -> None:
    """Write all pictures (H, W, C) as one PNG. Raises OSError."""
    atomic_write(path, png(grid(np.stack(pictures))))


def save_each(
    folder: str | os.PathLike, pictures: Sequence[np.ndarray], seeds: Sequence[int], subdirs: bool = False
) -> None:
    """Write every picture (H, W, C) as the PNG of its seed, in its own size. Raises OSError."""
    for picture, seed in zip(pictures, seeds, strict=True):
        atomic_write(seed_path(folder, seed, subdirs), png(picture))
