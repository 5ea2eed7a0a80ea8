"""Samples as a dataset holds them: seeds, arrays, labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from amed_engine.errors import ConfigError

DTYPES = ("uint8", "float32", "float16")
LARGEST_SEED = (1 << 32) - 1


def name(seed: int) -> str:
    """Of the sample of a seed, in every format."""
    return f"{seed:06d}"


@dataclass(frozen=True)
class Samples:
    """arrays: (N, H, W, 1 or 3) uint8, pictures; or (N, C, ...) float32 or float16. labels: (N,) int64, classes; (N, L)
    float32; or None. Raises ConfigError for arrays of other kinds or lengths."""

    seeds: list[int]
    arrays: np.ndarray
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.arrays.ndim < 2 or str(self.arrays.dtype) not in DTYPES or len(self.arrays) != len(self.seeds):
            raise ConfigError(
                f"samples are (N, ...) of {', '.join(DTYPES)}, one per seed; got {self.arrays.dtype} of shape "
                f"{self.arrays.shape} for {len(self.seeds)} seeds"
            )
        labels = self.labels
        if labels is None:
            return
        kind = labels.ndim, str(labels.dtype)
        if kind not in ((1, "int64"), (2, "float32")) or len(labels) != len(self.seeds):
            raise ConfigError(
                f"labels are (N,) int64 or (N, L) float32, one per seed; got {labels.dtype} of shape {labels.shape} for "
                f"{len(self.seeds)} seeds"
            )

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def names(self) -> list[str]:
        return [name(seed) for seed in self.seeds]

    @cached_property
    def digests(self) -> np.ndarray:
        """SHA-256 of each sample's bytes in C order, (N, 32) uint8."""
        found = b"".join(hashlib.sha256(row).digest() for row in np.ascontiguousarray(self.arrays))
        return np.frombuffer(found, np.uint8).reshape(-1, 32)

    def hashes(self) -> list[str]:
        """SHA-256 of each sample's bytes in C order, hexadecimal."""
        return [digest.tobytes().hex() for digest in self.digests]

    def split(self, batch: int) -> Iterator[Samples]:
        """At most `batch` at a time, in order."""
        for start in range(0, len(self), batch):
            rows = slice(start, start + batch)
            yield Samples(self.seeds[rows], self.arrays[rows], None if self.labels is None else self.labels[rows])
