"""From tensors to pictures: EDM's rounding, contact sheets, PNG files written whole or not at all."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from amed_engine.engine.seeds import check_distinct
from amed_engine.errors import ConfigError
from amed_engine.solvers.files import atomic_write, write_or_stream
from amed_engine.solvers.targets import resolved

OWN = ("seed", "class")  # notes of an image alone
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


def png(picture: np.ndarray, notes: Mapping[str, str] | None = None) -> bytes:
    """(H, W, 1 or 3) bytes as a PNG file, with notes as text chunks before the pixels."""
    buffer, texts = io.BytesIO(), PngInfo()
    for keyword, text in (notes or {}).items():
        texts.add_text(keyword, text)
    _image(picture).save(buffer, format="PNG", pnginfo=texts)
    return buffer.getvalue()


def read_notes(path: str | os.PathLike) -> dict[str, str] | None:
    """The text chunks before the pixels of a PNG file; none of a file of another kind, None where there is no file.

    Raises ConfigError for what is no regular file.
    """
    if not (file := resolved(path)).exists():
        return None
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return {str(keyword): text for keyword, text in image.info.items() if isinstance(text, str)}
    except Exception:  # PIL raises all kinds of errors for damaged bytes
        return {}


def seed_path(folder: str | os.PathLike, seed: int, subdirs: bool) -> Path:
    """Where EDM's tools put, and look for, the image of a seed: folder[/000000]/000042.png, a thousand to a folder."""
    folder = Path(folder) / f"{seed - seed % 1000:06d}" if subdirs else Path(folder)
    return folder / f"{seed:06d}.png"


def sheet(pictures: Sequence[np.ndarray], notes: Mapping[str, str] | None = None) -> bytes:
    """All pictures (H, W, C) as one PNG file."""
    return png(grid(np.stack(pictures)), notes)


def save_grid(path: str | os.PathLike, pictures: Sequence[np.ndarray], notes: Mapping[str, str] | None = None) -> None:
    """Write all pictures (H, W, C) as one PNG, or stream it to a device or a FIFO. Raises ConfigError, OSError."""
    write_or_stream(path, sheet(pictures, notes))


def save_each(
    folder: str | os.PathLike,
    pictures: Sequence[np.ndarray],
    seeds: Sequence[int],
    subdirs: bool = False,
    *,
    notes: Sequence[Mapping[str, str]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write every picture (H, W, C) as the PNG of its seed, in its own size, with its notes; without any, its seed.

    A file that is there is replaced where it is of the same seed, class and `job`, which notes of `Origin` name, or the same
    bytes; others only to overwrite. Raises ConfigError, before anything is written, for one of those, for what is no
    regular file and for a seed named twice; and OSError.
    """
    check_distinct(seeds)
    told = [{"seed": str(seed)} for seed in seeds] if notes is None else notes
    files = [png(picture, own) for picture, own in zip(pictures, told, strict=True)]
    paths = [seed_path(folder, seed, subdirs) for seed in seeds]
    for path, own, data in zip(paths, told, files, strict=True):
        theirs = None if overwrite else read_notes(path)
        if theirs is None or path.read_bytes() == data:
            continue
        if (found := difference(theirs, own)) is not None or "job" not in own:
            refuse(path, found)
    for path, data in zip(paths, files, strict=True):
        atomic_write(path, data)


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """The first of our notes that an image's are not; None for the same, and for those of the same job in other words."""
    same = "job" in ours and theirs.get("job") == ours["job"]
    for name, text in ours.items():
        if theirs.get(name) == text or (same and name not in OWN):
            continue
        if name == "job" and name in theirs:
            return "a number of the plan or of the predictor is another one"
        return f"{name}: {theirs.get(name, 'not said')[:80]} there, {text[:80]} here"
    return None


def refuse(path: Path, found: str | None) -> NoReturn:
    raise ConfigError(
        f"{path} is another image: {found or 'its pixels differ'}; choose another folder, or overwrite what is there "
        "(--overwrite, overwrite=True)"
    )


def npz(pictures: Sequence[np.ndarray], seeds: Sequence[int], labels: Tensor | None, notes: Mapping[str, str]) -> bytes:
    """An .npz of arr_0 (B, H, W, C) uint8, seeds (B,) int64, labels where there are any, and each note as a text."""
    told = {} if labels is None else {"labels": labels.cpu().numpy()}
    texts = {name: np.array(text) for name, text in notes.items()}
    arrays: dict[str, Any] = {"arr_0": np.stack(pictures), "seeds": np.array(seeds, np.int64), **told, **texts}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
