"""A batch of samples on its way to a file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Samples:
    """Seeds, arrays and labels of a batch, a row each.

    arrays: (N, H, W, C) uint8 for pictures, else (N, C, ...) float32 or float16. labels: (N,) int64 or (N, L) float32, None
    for a model without.
    """

    seeds: list[int]
    arrays: np.ndarray
    labels: np.ndarray | None = None
