"""Flow matching (rectified flow): straight lines from data to noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amed_engine.adapters.coefficients import Coefficients, Family


class Flow(Family):
    """x_t = (1 - t)·x0 + t·n and F = n - x0, so with sigma = t/(1 - t) and x = x_t/(1 - t):

        D = (x - sigma·F)/(1 + sigma),   scale = 1/(1 + sigma),   time = steps·t

    Liu et al. 2022 (arXiv:2209.03003), Lipman et al. 2022 (arXiv:2210.02747). steps: 1000, or 1 for networks told t itself.
    """

    name = "flow"
    sigma_min, sigma_max = 0.001, 999.0  # t from 0.001 to 0.999

    fixed = ("steps",)

    def __init__(self, steps: float = 1000):
        super().__init__()
        self.steps = steps

    def forward(self, sigma: Tensor) -> Coefficients:
        scale = 1 / (1 + sigma)
        t = sigma * scale
        return Coefficients(scale, -t, scale, self.steps * t)

    def describe(self) -> str:
        return f"the velocity n - x0 of flow matching; told {self.steps:g}·t, t = sigma/(1 + sigma)"

    def settings(self) -> dict[str, Any]:
        return {"steps": float(self.steps)}
