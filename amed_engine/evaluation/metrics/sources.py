"""Where images come from: folders, tensors, samplers. And where they go, batch by batch: features and statistics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from amed_engine.datasets.reading import ARRAY, format_of, is_dataset, members, open_samples, read_arrays
from amed_engine.datasets.samples import Samples
from amed_engine.engine.sampler import Sampler
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.evaluation.metrics.features import Extractor, extractor
from amed_engine.evaluation.metrics.statistics import Statistics, frechet_distance

# A folder of PNG (searched through), a dataset or a shard of one, an .npz with images in arr_0, a tensor (N, C, H, W), or
# anything that yields batches (B, C, H, W).
Images = str | os.PathLike | Tensor | Iterable[Tensor]
BATCH = 64


def generate(
    sampler: Sampler,
    seeds: Sequence[int],
    class_labels: int | float | Sequence | Tensor | None = None,
    guidance_scale: float | None = None,
    batch: int = BATCH,
) -> Iterator[Tensor]:
    """The samples of these seeds, at most `batch` at a time: a stream, nothing is kept or written.

    class_labels: one class for all, one per seed, or None for those the seeds draw. Raises what `Sampler.run` raises.
    """
    if batch < 1 or not (
        class_labels is None or isinstance(class_labels, (int, float)) or len(class_labels) == len(seeds)
    ):
        raise ConfigError(f"batch must be at least 1 and labels one per seed, got batch={batch}, {len(seeds)} seeds")
    for start in range(0, len(seeds), batch):
        rows = slice(start, start + batch)
        labels = class_labels if class_labels is None or isinstance(class_labels, (int, float)) else class_labels[rows]
        yield sampler.run(seeds[rows], labels, guidance_scale).images


def batches(source: Images, batch: int = BATCH) -> Iterator[Tensor]:
    """Image batches (B, C, H, W) of any source; of files as they are stored, bytes mostly, in the order of their names.

    Raises ConfigError and FileFormatError.
    """
    if isinstance(source, (str, os.PathLike)):
        yield from _read_path(Path(source), batch)
    elif isinstance(source, Tensor):
        yield from (_checked(part) for part in source.split(batch))
    elif isinstance(source, Iterable):
        yield from map(_checked, source)
    else:
        raise ConfigError(
            f"images must be a folder, a dataset, a tensor or an iterable of batches, got {type(source).__name__}; for a "
            "Sampler pass generate(sampler, seeds)"
        )


def read_features(source: Images, features: str | Extractor, device: torch.device | str = "cpu") -> Tensor:
    """Features (N, F) of all images: for precision and recall, which compare image with image. Raises as `batches`."""
    extract = extractor(features, device)
    # Copies, of what a source or an extractor may give the next time in the same memory, or write to.
    found = [extract(images.clone()).clone() for images in batches(source)]
    if not found:
        raise ConfigError("the source has no images")
    return torch.cat(found)


def gather(source: Images | Statistics, features: str | Extractor, device: torch.device | str = "cpu") -> Statistics:
    """Statistics of any source, one batch in memory at a time; those of an .npz file, or given, as they are."""
    if isinstance(source, Statistics):
        return source
    if holds_statistics(source):
        return Statistics.load(source)
    extract, statistics = extractor(features, device), Statistics()
    for images in batches(source):
        statistics.update(extract(images.clone()))  # an extractor may write to what it is given
    return statistics


def frechet(
    a: Images | Statistics,
    b: Images | Statistics,
    features: str | Extractor = "inception",
    device: torch.device | str = "cpu",
) -> float:
    """Frechet distance of two sets of images by their features: FID, where these are Inception's.

    a, b: each a folder of PNG, a dataset of `amed generate` or a shard of one, an .npz with images in arr_0 or of EDM's
    reference format (whose statistics must be of the same features), a tensor, an iterable of batches such as
    `generate(sampler, seeds)`, or a Statistics. features: "inception", "pixels", "digits" or a callable; device: where it runs.
    Raises ConfigError, FileFormatError, and AmedError without torch-fidelity.
    """
    given = extractor(features, device)
    return frechet_distance(gather(a, given), gather(b, given))


def holds_statistics(source: Images | Statistics) -> TypeGuard[str | os.PathLike]:
    """Whether it is an .npz that is to be taken for mu and sigma: any that has them, or no images."""
    if not isinstance(source, (str, os.PathLike)) or Path(source).suffix != ".npz":
        return False
    return {"mu.npy", "sigma.npy"} <= (names := members(Path(source))) or ARRAY not in names


def as_images(samples: Samples) -> Tensor:
    """Images (B, C, H, W): pictures are kept as (B, H, W, C) bytes, all else as it was drawn."""
    arrays = samples.arrays.transpose(0, 3, 1, 2) if samples.arrays.dtype == np.uint8 else samples.arrays
    return _checked(torch.from_numpy(arrays.copy()))


def _read_path(path: Path, batch: int) -> Iterator[Tensor]:
    if is_dataset(path) or format_of(path):
        yield from map(as_images, open_samples(path).batches(batch))
    elif path.suffix == ".npz" and path.is_file():
        for pictures in read_arrays(path, batch):
            yield torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2)
    else:
        yield from _read_folder(path, batch)


def png_files(folder: Path) -> list[Path]:
    """Those of a folder and of its folders, in the order of their names. Raises FileFormatError where there are none."""
    if not folder.is_dir():
        raise FileFormatError(f"{folder} is not a folder; pass one of PNG files, a dataset, or an .npz")
    files = sorted(
        file for file in folder.rglob("*.png") if file.is_file() and not _is_hidden(file.relative_to(folder))
    )
    if not files:
        raise FileFormatError(f"{folder} has no PNG files, nor have its folders")
    return files


def _read_folder(folder: Path, batch: int) -> Iterator[Tensor]:
    files = png_files(folder)
    first = _read_png(files[0])
    for start in range(0, len(files), batch):
        pictures = [_read_png(file, first.shape) for file in files[start : start + batch]]
        yield torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _is_hidden(path: Path) -> bool:
    """As what is still being written."""
    return any(part.startswith(".") for part in path.parts)


def _read_png(file: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """(H, W, 1 or 3) bytes."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            if picture.mode not in ("L", "RGB"):
                raise FileFormatError(f"{file} has mode {picture.mode}, expected 8-bit grey (L) or RGB")
            pixels = np.array(picture)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileFormatError(f"{file} is not a readable PNG file: {error}") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if shape is not None and pixels.shape != shape:
        raise FileFormatError(f"{file} has shape {pixels.shape}, expected that of the folder's first file, {shape}")
    return pixels


def _checked(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(f"a batch of images must be a tensor (B, C, H, W), got {got}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ConfigError(f"images must be uint8 (0 .. 255) or floats (-1 .. 1), got {images.dtype}")
    return images
