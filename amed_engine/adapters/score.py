"""Networks that predict the score, the gradient of log p_sigma: D = x + sigma²·score (Tweedie's formula)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.family import Coefficients, Family
from amed_engine.adapters.fingerprint import summary
from amed_engine.errors import ConfigError

TIMES = {"sigma": "sigma", "log": "log(sigma)", "edm": "log(sigma)/4"}


class Score(Family):
    """F = ∇_x log p_sigma(x) of x = x0 + sigma·n, so that D = x + sigma²·F(x; time).

    time: what the network is told, "sigma", "log" (its logarithm) or "edm" (a quarter of that). Vincent 2011; Song et al. 2021
    (arXiv:2011.13456), the VE process. Raises ConfigError.
    """

    name = "score"
    fixed = ("told",)

    def __init__(self, time: str = "sigma", sigma_min: float = 0.002, sigma_max: float = math.inf):
        super().__init__()
        if time not in TIMES:
            raise ConfigError(f"time must be what the network is told, one of {', '.join(TIMES)}; got {time!r}")
        self.told, self.sigma_min, self.sigma_max = time, sigma_min, sigma_max

    def forward(self, sigma: Tensor) -> Coefficients:
        one = torch.ones_like(sigma)
        time = {"sigma": sigma, "log": sigma.log(), "edm": sigma.log() / 4}[self.told]
        return Coefficients(one, sigma**2, one, time)

    def describe(self) -> str:
        return f"the score, D = x + sigma² F; told {TIMES[self.told]}"

    def settings(self) -> dict[str, Any]:
        return {"time": self.told}


class VPScore(Family):
    """F = ∇_y log p_t(y) of y = x/sqrt(1 + sigma²), so that D = x + sigma²/sqrt(1 + sigma²)·F(y; steps·t).

    1 + sigma(t)² = exp(beta_d t²/2 + beta_min t), t up to `horizon`. Song et al. 2021 (arXiv:2011.13456), the VP process.
    """

    name = "vp-score"
    fixed = ("betas", "steps")

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, steps: float = 1, horizon: float = 1.0):
        super().__init__()
        if not (beta_d >= 0 and beta_min >= 0 and beta_d + beta_min > 0 and steps > 0 and 0 < horizon < math.inf):
            raise ConfigError(
                f"need beta_d, beta_min >= 0, not both 0, steps and horizon > 0; got {beta_d}, {beta_min}, {steps}, {horizon}"
            )
        self.betas, self.steps = (float(beta_d), float(beta_min)), steps
        self.sigma_min = math.sqrt(math.expm1(self._log_variance(1e-5 * horizon)))
        self.sigma_max = math.sqrt(math.expm1(self._log_variance(horizon)))

    def _log_variance(self, t: float) -> float:
        return self.betas[0] * t**2 / 2 + self.betas[1] * t

    def time(self, sigma: Tensor) -> Tensor:
        """t of a noise level, float64: the root of the quadratic without its difference, which would cancel."""
        (beta_d, beta_min), grown = self.betas, torch.log1p(sigma.double() ** 2)
        return 2 * grown / (beta_min + (beta_min**2 + 2 * beta_d * grown).sqrt())

    def forward(self, sigma: Tensor) -> Coefficients:
        scale = 1 / (1 + sigma**2).sqrt()
        time = (self.steps * self.time(sigma)).to(sigma.dtype)
        return Coefficients(torch.ones_like(sigma), sigma**2 * scale, scale, time)

    def whole(self, time: Tensor) -> Tensor:
        return super().whole(time) if self.steps <= 1 else time.round()

    def describe(self) -> str:
        return f"the score of x/sqrt(1 + sigma²); told {self.steps:g}·t, beta {self.betas[1]:g} + {self.betas[0]:g}·t"

    def settings(self) -> dict[str, Any]:
        return {"betas": list(self.betas), "steps": float(self.steps)}


def _as_table(levels: Any) -> Tensor:
    try:
        return torch.as_tensor(levels, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"levels must be the noise levels (L,) as numbers, got {levels!r}") from error


class IndexedScore(Family):
    """The score of x, told the whole number of the nearest of `levels` (L,), counted in their order, int64:

        D = x + sigma·levels[i]·F(x; i),   i = argmin |log sigma - log levels|

    -levels[i]·F estimates n. On the levels D is Tweedie's. NCSN, Song and Ermon 2019 (arXiv:1907.05600) and 2020
    (arXiv:2006.09011), whose levels fall. Raises ConfigError.
    """

    name = "score"
    levels: Tensor

    def __init__(self, levels: Any):
        super().__init__()
        table = _as_table(levels)
        steps = table.diff() if table.dim() == 1 else table
        good = table.dim() == 1 and len(table) > 1 and bool((table > 0).all() and table.isfinite().all())
        if not good or not bool((steps < 0).all() or (steps > 0).all()):
            raise ConfigError(
                f"levels must be the noise levels (L,) that the network was trained on, positive, in the order of its steps, "
                f"falling or growing; got {tuple(table.shape)}: {table.flatten()[:4].tolist()}"
            )
        self._table = table
        self.register_buffer("levels", table.clone(), persistent=False)
        self.sigma_min, self.sigma_max = table.min().item(), table.max().item()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.levels = self._table.to(self.levels.device)  # .half() is meant for the network
        return self

    def nearest(self, sigma: float) -> float:
        """The level whose index the network is told at sigma."""
        return self._table[(math.log(sigma) - self._table.log()).abs().argmin()].item()

    def forward(self, sigma: Tensor) -> Coefficients:
        index = (sigma.double().log()[:, None] - self.levels.log()).abs().argmin(dim=1)
        one = torch.ones_like(sigma)
        return Coefficients(one, sigma * self.levels[index].to(sigma.dtype), one, index)

    def whole(self, time: Tensor) -> Tensor:
        return time

    def describe(self) -> str:
        return f"the score, D = x + sigma·level F; told the index of the nearest of {len(self._table)} levels"

    def settings(self) -> dict[str, Any]:
        return {"levels": summary(self._table)}
