"""Mean and covariance of features, gathered batch by batch, and the Frechet distance between two of them."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amed_engine.checkpoints.archives import UNPACKED
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.files import write_or_stream

MAX_BYTES = 1 << 30  # a covariance of 11,000 features; Inception's 2048 need 32 MiB
ASYMMETRY = 1e-6  # of the largest entry, in a file


@dataclass
class Statistics:
    """Mean and scatter of the features seen so far, in float64.

    update(features) merges a batch of n with mean m and scatter S = Σ (x - m)(x - m)ᵀ into N, mean, scatter:

        d = m - mean;  scatter += S + d dᵀ N n / (N + n);  mean += d n / (N + n);  N += n

    Chan, Golub and LeVeque 1983. Nothing is ever the difference of two large sums, so a mean far from zero costs no
    digits, and the order and size of batches changes the last ones only. Statistics read from a file have no count,
    their scatter is the covariance, and nothing can be added to them.
    """

    mean: Tensor | None = None  # (F,)
    scatter: Tensor | None = None  # (F, F)
    count: int | None = 0

    @property
    def mu(self) -> Tensor:
        """The mean, (F,) float64."""
        if self.mean is None:
            raise ConfigError("no features were seen: statistics need at least 2 images")
        return self.mean

    @property
    def sigma(self) -> Tensor:
        """The unbiased covariance, scatter / (N - 1), (F, F) float64."""
        if self.scatter is not None and self.count is None:
            return self.scatter
        if self.scatter is None or self.count is None or self.count < 2:
            raise ConfigError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> Statistics:
        """Add a batch of features (n, F) of any floating dtype; returns itself. Raises ConfigError."""
        if features.dim() != 2 or not features.is_floating_point():
            raise ConfigError(f"features must be floats (B, F), got {features.dtype} of shape {tuple(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            raise ConfigError(
                "features hold NaN or infinite values; look at the images and at the extractor's precision"
            )
        if not len(features):
            return self
        features = features.detach().double()
        mean = features.mean(0)
        centred = features - mean
        return self.merge(Statistics(mean, centred.T @ centred, len(features)))

    def merge(self, other: Statistics) -> Statistics:
        """Add everything another has seen; returns itself. Raises ConfigError."""
        if other.mean is None or other.scatter is None:
            return self
        if self.count is None or other.count is None:
            raise ConfigError(
                "statistics read from a file cannot be merged: it does not say how many images are behind it"
            )
        if self.mean is None or self.scatter is None:
            self.mean, self.scatter, self.count = other.mean.clone(), other.scatter.clone(), other.count
            return self
        check_same_features(self, other)
        total = self.count + other.count
        shift = other.mean.to(self.mean) - self.mean
        self.scatter = self.scatter + other.scatter.to(self.scatter)
        self.scatter += shift.outer(shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write EDM's reference format, an .npz of mu (F,) and sigma (F, F) in float64, whole or not at all."""
        if Path(path).suffix != ".npz":
            raise ConfigError(f"statistics are saved as .npz, got {str(path)!r}")
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mu.cpu().numpy(), sigma=self.sigma.cpu().numpy())
        write_or_stream(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Statistics:
        """Read EDM's reference format. Raises FileFormatError."""
        arrays = _read_npz(Path(path))
        mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
        _check(path, mu, sigma)
        return cls(mu, (sigma + sigma.T) / 2, None)


def check_same_features(a: Statistics, b: Statistics) -> None:
    if a.mu.shape != b.mu.shape:
        raise ConfigError(
            f"statistics of {len(a.mu)} and {len(b.mu)} features cannot be compared; use one extractor for both"
        )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Between the normal distributions of two statistics, after Heusel et al. 2017 (arXiv:1706.08500):

        |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    With S = L Lᵀ the last trace is the sum of the singular values of L_aᵀ L_b, whatever the factors. They are taken
    from the eigenvectors above the rounding error, so covariances of few images, which are singular, do no harm: no
    square root of a matrix without one, no imaginary part to drop. Raises ConfigError.
    """
    check_same_features(a, b)
    overlap = _factor(a.sigma).T @ _factor(b.sigma).to(a.mu.device)
    shift = (a.mu - b.mu.to(a.mu)).square().sum()
    distance = shift + a.sigma.trace() + b.sigma.trace().to(shift) - 2 * torch.linalg.svdvals(overlap).sum()
    return max(distance.item(), 0.0)  # of equal ones, a rounding error of either sign


def _factor(sigma: Tensor) -> Tensor:
    """L (F, rank) with L Lᵀ = sigma."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(sigma.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is not a file; pass an .npz of mu and sigma")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        limit = min(MAX_BYTES, max(UNPACKED, path.stat().st_size))
        if size > limit:
            raise FileFormatError(f"{path} unpacks to {size} bytes, more than the {limit} statistics may have")
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in ("mu", "sigma")}
    except KeyError as error:
        raise FileFormatError(f"{path} lacks {error.args[0]}; expected arrays mu (F,) and sigma (F, F)") from error
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, MemoryError, NotImplementedError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"{path} is not a readable .npz file: {str(error)[:300]}; it is damaged or of another kind"
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise FileFormatError(f"{path}: {name} has dtype {array.dtype}, expected real numbers")
    return arrays


def _check(path: Any, mu: Tensor, sigma: Tensor) -> None:
    if mu.dim() != 1 or not len(mu) or tuple(sigma.shape) != (len(mu), len(mu)):
        raise FileFormatError(
            f"{path}: expected mu (F,) and sigma (F, F), got {tuple(mu.shape)} and {tuple(sigma.shape)}"
        )
    if not bool(torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        raise FileFormatError(f"{path} holds NaN or infinite values")
    largest = sigma.abs().max()
    if (sigma - sigma.T).abs().max() > ASYMMETRY * largest or sigma.diagonal().min() < -ASYMMETRY * largest:
        raise FileFormatError(f"{path}: sigma is no covariance: not symmetric, or with a negative variance")
