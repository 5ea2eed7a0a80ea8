"""Improved precision and recall: how much of one set lies in the other's manifold.

Kynkäänniemi et al. 2019 (arXiv:1904.06991). The manifold of a set of features is the union of the balls round each of
them that reach its k-th nearest neighbour in the set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError

CHUNK = 1024  # rows whose distances are held at once


class PrecisionRecall(NamedTuple):
    """precision: the part of the samples in the data's manifold. recall: of the data in the samples' manifold."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, data: Tensor, k: int = 3, chunk: int = CHUNK) -> PrecisionRecall:
    """Precision and recall of features (N, F) against features (M, F), N and M above k.

    Distances are taken in float64 without the expansion |a|² - 2ab + |b|², whose cancellation would move points over a
    ball's edge. chunk: rows at once, for memory alone. Raises ConfigError.
    """
    _check(samples, data, k, chunk)
    samples, data = samples.double(), data.double().to(samples.device)
    return PrecisionRecall(
        _inside(samples, data, _radii(data, k, chunk), chunk), _inside(data, samples, _radii(samples, k, chunk), chunk)
    )


def _radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Distance of every point to its k-th nearest neighbour, itself not counted."""
    nearest = [rows.topk(k + 1, dim=1, largest=False).values[:, -1] for rows in _distances(points, points, chunk)]
    return torch.cat(nearest)


def _inside(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    hits = [(rows <= radii).any(1) for rows in _distances(points, centres, chunk)]
    return torch.cat(hits).double().mean().item()


def _distances(points: Tensor, others: Tensor, chunk: int) -> Iterator[Tensor]:
    for rows in points.split(chunk):
        yield torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def _check(samples: Tensor, data: Tensor, k: int, chunk: int) -> None:
    if samples.dim() != 2 or data.dim() != 2 or samples.shape[1] != data.shape[1]:
        raise ConfigError(
            f"features must be (N, F) and (M, F), got {tuple(samples.shape)} and {tuple(data.shape)}; use one extractor"
        )
    if k < 1 or chunk < 1 or min(len(samples), len(data)) <= k:
        raise ConfigError(
            f"k={k} neighbours and chunks of {chunk} need more than k points on both sides, got {len(samples)} and {len(data)}"
        )
