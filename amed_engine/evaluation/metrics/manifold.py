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


class Manifold(NamedTuple):
    """Points (N, F) float64 and the radii (N,) of their balls; kept where many sets are held against one."""

    points: Tensor
    radii: Tensor

    @classmethod
    def of(cls, features: Tensor, k: int = 3, chunk: int = CHUNK) -> Manifold:
        """Radius: distance to the k-th nearest neighbour, the point itself not counted. Raises ConfigError."""
        if features.dim() != 2 or k < 1 or chunk < 1 or len(features) <= k:
            raise ConfigError(
                f"a manifold of k={k} neighbours, in chunks of {chunk}, needs features (N, F) of more than k points, got "
                f"{tuple(features.shape)}"
            )
        points = features.double()
        rows = _distances(points, points, chunk)
        return cls(points, torch.cat([row.topk(k + 1, dim=1, largest=False).values[:, -1] for row in rows]))

    def part_inside(self, features: Tensor, chunk: int = CHUNK) -> float:
        """The part of these features (M, F) that lie in one ball at least. Raises ConfigError."""
        if features.dim() != 2 or features.shape[1] != self.points.shape[1] or not len(features):
            raise ConfigError(
                f"features must be (M, {self.points.shape[1]}) as the manifold's, got {tuple(features.shape)}; use one "
                "extractor for both"
            )
        rows = _distances(features.to(self.points), self.points, chunk)
        return torch.cat([(row <= self.radii).any(1) for row in rows]).double().mean().item()


def precision_recall(samples: Tensor, data: Tensor, k: int = 3, chunk: int = CHUNK) -> PrecisionRecall:
    """Precision and recall of features (N, F) against features (M, F), N and M above k.

    Distances are taken in float64, where the expansion |a|² - 2ab + |b|² has digits to spare; in float32 its cancellation
    would move points over a ball's edge. chunk: rows at once, for memory alone. Raises ConfigError.
    """
    ours, theirs = Manifold.of(samples, k, chunk), Manifold.of(data, k, chunk)
    return PrecisionRecall(theirs.part_inside(samples, chunk), ours.part_inside(data, chunk))


def _distances(points: Tensor, others: Tensor, chunk: int) -> Iterator[Tensor]:
    for rows in points.split(chunk):
        yield torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist")
