"""What a data set draws from: samples of seeds as they are stored, and what decides their bytes."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amed_engine.datasets.samples import Samples
from amed_engine.engine.images import to_uint8
from amed_engine.engine.seeds import check_seeds
from amed_engine.errors import ConfigError, NonFiniteError

logger = logging.getLogger("amed_engine")

_CUT = (
    "more than a tenth of the values lie outside [-1, 1] and are cut, as those of pictures in bytes are: if these samples are "
    "latents, or data of another range, store them as 'float32'"
)
FLOATS = {"float32": torch.float32, "float16": torch.float16}
STORED = ("uint8", *FLOATS)


@dataclass(frozen=True, eq=False)
class Source(ABC):
    """Draws the samples of seeds. A sample is its seed and label: whatever else is in the batch has no say in it.

    Its last bits depend on the size of the batch, on `device` and on the number of threads.
    shape: of one sample as it is stored, (H, W, C) of pictures in uint8, else (C, ...). stored: "uint8", "float32" or
    "float16". identity: JSON-able, what decides the bytes. device: "cpu: " or "cuda: " and the name of the processor.
    """

    shape: tuple[int, ...]
    stored: str
    identity: dict[str, Any]
    device: str
    _warned: list[str] = field(default_factory=list, init=False, repr=False)

    def draw(self, seeds: Sequence[int], labels: np.ndarray | None, size: int | None = None) -> Samples:
        """The samples of these seeds. labels: their rows of what `check_labels` returned, None for those that seeds draw.

        size: of the batch that the model is asked for, len(seeds) unless given; a seed alone is padded to it. Consecutive seeds
        are one batch, others may take several, see `batches_of`. Raises NonFiniteError naming seeds, and ConfigError where the
        batch does not fit into memory.
        """
        seeds = check_seeds(seeds)
        batches, places = batches_of(seeds, labels, size or len(seeds))
        drawn = [self._drawn([seeds[i] for i in batch], None if labels is None else labels[batch]) for batch in batches]
        arrays = np.stack([drawn[batch][0][row] for batch, row in places])
        told = [own for _, own in drawn if own is not None]
        return Samples(seeds, arrays, np.stack([told[batch][row] for batch, row in places]) if told else None)

    def _drawn(self, seeds: list[int], labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        images, told = self._run(seeds, labels)
        if self.stored == "uint8" and not self._warned and _share_cut(images) > 0.1:
            self._warned.append(_CUT)
            logger.warning(_CUT)
        return as_stored(images, self.stored, seeds), told

    @abstractmethod
    def _run(self, seeds: list[int], labels: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        """Samples (B, C, ...), pictures in [-1, 1], and their labels, a row for each seed."""

    @abstractmethod
    def check_labels(self, labels: Any, count: int) -> np.ndarray | None:
        """Labels of `count` samples, one for all allowed, as (count,) int64 or (count, L) float32.

        None where there are none, or where the seeds draw them. Raises ConfigError.
        """


@contextmanager
def nothing_global(what: str, remedy: str, device: torch.device) -> Iterator[None]:
    """Raise ConfigError where torch's global generators are drawn from, which are left as they were."""
    watched = {
        torch.default_generator,
        *([torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []),
    }
    before = [(generator, generator.get_state()) for generator in watched]
    used = []
    try:
        yield
    finally:
        used += [(generator, state) for generator, state in before if not torch.equal(generator.get_state(), state)]
        for generator, state in used:
            generator.set_state(state)
    if used:
        raise ConfigError(
            f"{what} draws from torch's global generator, so no seed gives the same sample twice: {remedy}"
        )


def batches_of(
    seeds: Sequence[int], labels: np.ndarray | None, size: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Batches of `size` entries each, seed s in row s mod size; and of each entry, in which batch and row it is drawn.

    Matrix products round a row by where it stands among the others. Rows that are left over hold any entry; what is asked for
    twice is drawn once.
    """
    drawn: dict[Any, tuple[int, int]] = {}
    filled: list[dict[int, int]] = []
    for entry, key in enumerate(keys := _keys(seeds, labels)):
        if key in drawn:
            continue
        row = seeds[entry] % size
        number = next((i for i, rows in enumerate(filled) if row not in rows), len(filled))
        filled.extend([{}] if number == len(filled) else [])
        filled[number][row] = entry
        drawn[key] = number, row
    return [[rows.get(row, 0) for row in range(size)] for rows in filled], [drawn[key] for key in keys]


def _keys(seeds: Sequence[int], labels: np.ndarray | None) -> list[tuple[int, bytes]]:
    return [(seed, b"" if labels is None else labels[i].tobytes()) for i, seed in enumerate(seeds)]


def stored_kind(stored: Any, shape: Sequence[int]) -> str:
    """How samples of this shape (C, ...) are stored: as asked, else pictures in bytes and all else in float32.

    Raises ConfigError for what cannot be stored so.
    """
    picture = len(shape) == 3 and shape[0] in (1, 3)
    if stored is None:
        return "uint8" if picture else "float32"
    if stored not in STORED:
        raise ConfigError(f"stored must be one of {', '.join(STORED)}, or None for the usual one; got {stored!r}")
    if stored == "uint8" and not picture:
        raise ConfigError(
            f"stored='uint8' is for pictures, samples of shape (1 or 3, H, W); these have {tuple(shape)}: store them as "
            "'float32' (or 'float16'), or decode latents to pictures"
        )
    return stored


def stored_shape(stored: str, shape: Sequence[int]) -> tuple[int, ...]:
    """(C, H, W) as (H, W, C) where bytes are stored, any other as it is."""
    return (*shape[1:], shape[0]) if stored == "uint8" else tuple(shape)


def as_stored(images: Tensor, stored: str, seeds: Sequence[int]) -> np.ndarray:
    """Samples (B, C, ...), pictures in [-1, 1], as they are stored. Raises NonFiniteError naming seeds."""
    _check_finite(images, seeds, "came out NaN or infinite; draw in bfloat16 or float32 instead of float16")
    if stored == "uint8":
        return np.ascontiguousarray(to_uint8(images))
    values = images.detach().to(FLOATS[stored])
    _check_finite(values, seeds, f"are too large for {stored}; store them as 'float32'")
    return np.ascontiguousarray(values.cpu().numpy())


def _share_cut(images: Tensor) -> float:
    return (images.detach().abs() > 1.05).float().mean().item()


def _check_finite(images: Tensor, seeds: Sequence[int], why: str) -> None:
    finite = torch.isfinite(images).flatten(1).all(1)
    if not bool(finite.all()):
        broken = [seed for seed, fine in zip(seeds, finite.tolist(), strict=True) if not fine]
        raise NonFiniteError(f"the samples of seeds {broken} {why}", 0, broken)


def check_options(kind: str, options: dict[str, Any], remedy: str) -> None:
    """Raise ConfigError for options that are another kind of source's."""
    if options:
        raise ConfigError(
            f"{kind} takes no {', '.join(options)}: {remedy}; leave that out (labels are class_labels=, how samples are "
            "stored is stored=)"
        )
