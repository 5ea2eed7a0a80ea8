"""Flow matching (rectified flow): straight lines from data to noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.family import Coefficients, Family
from amed_engine.errors import ConfigError


class Flow(Family):
    """x_t = (1 - t)·x0 + t·n and F = n - x0, so with sigma = t/(1 - t) and x = x_t/(1 - t):

        D = (x - sigma·F)/(1 + sigma),   scale = 1/(1 + sigma),   time = steps·t

    Liu et al. 2022 (arXiv:2209.03003), Lipman et al. 2022 (arXiv:2210.02747). steps: 1000, or 1 for networks told t itself.
    """

    name = "flow"
    sigma_min, sigma_max = 0.0, math.inf  # t from 0 to 1

    fixed = ("steps",)

    def __init__(self, steps: float = 1000):
        super().__init__()
        self.steps = steps

    def forward(self, sigma: Tensor) -> Coefficients:
        return Coefficients(*self.mix(sigma), self.time(sigma))

    def mix(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """skip, out, scale"""
        scale = 1 / (1 + sigma)
        return scale, -(sigma * scale), scale

    def time(self, sigma: Tensor) -> Tensor:
        return self.steps * (sigma * (1 / (1 + sigma)))

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level of a time below `steps`, float64; the inverse of `time`."""
        t = time.double() / self.steps
        return t / (1 - t)

    def whole(self, time: Tensor) -> Tensor:
        return super().whole(time) if self.steps <= 1 else time.round()

    def describe(self) -> str:
        return f"the velocity n - x0 of flow matching; told {self.steps:g}·t, t = sigma/(1 + sigma)"

    def settings(self) -> dict[str, Any]:
        return {"steps": float(self.steps)}


def flow_levels(intervals: int, shift: float = 1.0, t_min: float = 0.001, t_max: float = 0.999) -> Tensor:
    """Noise levels for `Sampler(schedule=...)`, (intervals + 1,) float64: t equally spaced, then shifted towards the noise.

        t' = shift·t / (1 + (shift - 1)·t),   that is sigma' = shift·sigma with sigma = t/(1 - t)

    Esser et al. 2024 (arXiv:2403.03206). Raises ConfigError for ends outside (0, 1) or a shift that is not positive.
    """
    if not 0 < t_min < t_max < 1 or not (shift > 0 and math.isfinite(shift)) or intervals < 1:
        raise ConfigError(
            f"need 0 < t_min < t_max < 1, a positive shift and an interval, got {t_min}, {t_max}, {shift}, {intervals}"
        )
    t = torch.linspace(t_max, t_min, intervals + 1, dtype=torch.float64, device="cpu")
    return shift * t / (1 - t)
