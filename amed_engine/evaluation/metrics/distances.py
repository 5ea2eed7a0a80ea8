"""How far two sets of images are from each other, image by image: samples of two solvers from equal latents."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from amed_engine.errors import ConfigError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PEAK = 2.0  # the range of pixels in [-1, 1]


def per_image_rmse(images: Tensor, truth: Tensor) -> Tensor:
    """sqrt(mean over an image's values of (x - truth)²), (B,) float64. images, truth: (B, ...), equal in shape."""
    if images.shape != truth.shape or not images.numel():
        raise ConfigError(
            f"distances need two sets of equal shape (B, C, H, W), B at least 1, got {tuple(images.shape)} and "
            f"{tuple(truth.shape)}; draw both from the same latents"
        )
    return (images.double() - truth.double()).flatten(1).square().mean(1).sqrt()


def rmse(images: Tensor, truth: Tensor) -> float:
    """sqrt(mean over all images and values of (x - truth)²)"""
    return per_image_rmse(images, truth).square().mean().sqrt().item()


def psnr(error: float, peak: float = PEAK) -> float:
    """20 log10(peak / error) decibels of an RMSE, infinite for none; peak: the range of the values, 2 for [-1, 1]."""
    return 20 * math.log10(peak / error) if error > 0 else math.inf


@dataclass(frozen=True)
class Distances:
    """A set against the truth. rmse, psnr: over all values. quantiles: of the images' own RMSE, by probability."""

    rmse: float
    psnr: float | None  # None for equal sets: JSON has no infinity
    quantiles: dict[str, float]

    @classmethod
    def of(cls, errors: Tensor, peak: float = PEAK) -> Distances:
        """From the images' RMSE (B,) of `per_image_rmse`, of one batch or of many concatenated."""
        total = errors.double().square().mean().sqrt().item()
        at = torch.quantile(errors.double(), torch.tensor(QUANTILES, dtype=torch.float64, device=errors.device))
        decibels = psnr(total, peak)
        quantiles = {f"{q:g}": value for q, value in zip(QUANTILES, at.tolist(), strict=True)}
        return cls(total, decibels if math.isfinite(decibels) else None, quantiles)

    @property
    def median(self) -> float:
        return self.quantiles["0.5"]

    def to_json(self) -> dict:
        return asdict(self)
