"""The measured mean answer of a model, about which an analytic first step starts: numbers that travel with a plan."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from amed_engine.errors import ConfigError

# False: the first evaluation is the network's. True: analytic, for data about zero. "mean": about the measured mean answer.
FirstStep = bool | Literal["mean"]
NAMES: dict[FirstStep, bool | str] = {False: False, True: "zero", "mean": "mean"}  # in files
MAX_VALUES = 1 << 20  # of all rows: 4 MiB


@dataclass(frozen=True)
class Mean:
    """m = E[D(sigma_0 z; sigma_0)], z of unit variance: what a network answers to noise alone, on average.

    data: (rows, *shape) float32, little-endian. One row without classes; else that of no class, then one for each of
    `classes`, or a single one for any. sigma: sigma_0. latents: how many a row is the mean over. model, dtype: fingerprint of
    the denoiser and dtype of its arithmetic, None where unknown.
    """

    data: bytes = field(repr=False)
    shape: tuple[int, ...]
    classes: int
    sigma: float
    latents: int
    model: str | None = None
    dtype: str | None = None

    def __post_init__(self):
        size = math.prod(self.shape)
        count = len(self.data) // (4 * size)
        if len(self.data) != 4 * size * count or count not in {1 + self.classes, 1 + min(self.classes, 1)}:
            raise ConfigError(
                f"a mean of shape {self.shape} for {self.classes} classes has {len(self.data)} bytes, expected 4 for each "
                "number of its rows: one without classes, else one for no class and one for each or for any"
            )
        if size * count > MAX_VALUES:
            raise ConfigError(
                f"a mean of {count} x {size} numbers is more than the {MAX_VALUES} that are kept; use afs=False"
            )

    @classmethod
    def of(cls, rows: Tensor, **facts: Any) -> Mean:
        """From rows (R, *shape); facts: the other fields. Raises ConfigError where there are too many numbers."""
        data = rows.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()
        return cls(data, tuple(rows.shape[1:]), **facts)

    def rows(self) -> Tensor:
        """(R, *shape) float32 on the CPU."""
        numbers = numpy.frombuffer(self.data, "<f4").astype(numpy.float32)
        return torch.from_numpy(numbers).reshape(-1, *self.shape)

    def is_for(self, sigma: float, model: str | None, dtype: str | None) -> bool:
        """Whether it was measured at this noise level, of this model in this dtype; what is unknown contradicts nothing."""
        same = math.isclose(self.sigma, sigma, rel_tol=1e-6)
        pairs = ((self.model, model), (self.dtype, dtype))
        return same and all(None in pair or pair[0] == pair[1] for pair in pairs)

    def without_numbers(self) -> str:
        """For people."""
        per = "" if not self.classes else " and class" if self._each else ", one for all classes"
        return f"mean of {self.latents} latents{per}"

    @property
    def _each(self) -> bool:
        return len(self.data) == 4 * math.prod(self.shape) * (1 + self.classes)

    def to_json(self) -> dict:
        return {**asdict(self), "shape": list(self.shape), "data": base64.b64encode(self.data).decode()}

    @classmethod
    def from_json(cls, data: Any) -> Mean:
        """The mean that `to_json` wrote; anything else raises ConfigError."""
        names = {entry.name for entry in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise ConfigError(f"plan entry 'mean' must be an object of {', '.join(sorted(names))}")
        shape, told = data["shape"], (data["model"], data["dtype"])
        if not isinstance(shape, list) or not shape or not all(_whole(n, 1) for n in shape) or len(shape) > 8:
            raise ConfigError(f"plan entry 'mean.shape' must be a list of sizes, got {str(shape)[:40]}")
        if math.prod(shape) > MAX_VALUES or not (_whole(data["classes"], 0) and _whole(data["latents"], 1)):
            raise ConfigError(f"plan entry 'mean' must have at most {MAX_VALUES} numbers, whole classes and latents")
        sigma = data["sigma"]
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma < 1e9:
            raise ConfigError(f"plan entry 'mean.sigma' must be a noise level, got {str(sigma)[:40]}")
        if not all(entry is None or isinstance(entry, str) for entry in told) or not isinstance(data["data"], str):
            raise ConfigError("plan entries 'mean.model', 'mean.dtype' and 'mean.data' must be texts")
        try:
            numbers = base64.b64decode(data["data"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ConfigError(f"plan entry 'mean.data' is no base64: {error}") from error
        mean = cls(**{**data, "data": numbers, "shape": tuple(shape), "sigma": float(sigma)})
        if not bool(mean.rows().isfinite().all()):
            raise ConfigError("plan entry 'mean.data' holds NaN or infinite numbers")
        return mean


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= 1 << 30


def check_first_step(afs: Any) -> None:
    """Raises ConfigError unless it is None or a `FirstStep`."""
    if afs is not None and not isinstance(afs, bool) and afs != "mean":
        told = "; files' and commands' zero is True here" if afs == "zero" else ""
        raise ConfigError(f"afs must be True, False, 'mean' or None, got {afs!r}{told}")


def read_first_step(entry: Any) -> FirstStep:
    """The first step of a file's entry. Raises ConfigError."""
    for step, name in NAMES.items():
        if type(entry) is type(name) and entry == name:
            return step
    raise ConfigError(f'plan entry \'afs\' must be false, "zero" or "mean", got {json.dumps(entry, default=str)[:40]}')
