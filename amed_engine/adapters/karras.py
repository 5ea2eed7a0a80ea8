"""Preconditionings of table 1 of Karras et al. 2022 (arXiv:2206.00364), and that of the consistency models."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.family import Coefficients, Family
from amed_engine.adapters.fingerprint import summary
from amed_engine.errors import ConfigError
from amed_engine.solvers.schedule import VPTime


class Denoising(Family):
    """A network that is a denoiser already: D = F(x; sigma)."""

    name = "denoised"
    sigma_min, sigma_max = 0.002, math.inf

    def forward(self, sigma: Tensor) -> Coefficients:
        one = torch.ones_like(sigma)
        return Coefficients(torch.zeros_like(sigma), one, one, sigma)

    def describe(self) -> str:
        return "the clean data from x and sigma; no preconditioning"


class ConsistencyFunction(Denoising):
    """A network that is a consistency function already: F(x; sigma) is a sample. Song et al. 2023 (arXiv:2303.01469)."""

    name = "consistency"
    consistency = True

    def describe(self) -> str:
        return f"a sample from x and sigma; {_ONE_STEP}"


_ONE_STEP = "a one-step generator: Sampler(..., solver='consistency')"


class EDM(Family):
    """skip = sd²/(sigma² + sd²), out = sigma·sd/sqrt(sigma² + sd²), scale = 1/sqrt(sigma² + sd²), time = log(sigma)/4.

    v_prediction: out has the other sign, as diffusers means it by that name; with sd = 1 F is v = alpha·n - s·x0. Raises
    ConfigError for a sigma_data that is no standard deviation.
    """

    name = "edm"
    time_scale = 0.25

    fixed = ("sigma_data", "v_prediction")

    def __init__(
        self, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0, *, v_prediction: bool = False
    ):
        super().__init__()
        if not (isinstance(sigma_data, (Real, Tensor)) and 0 < float(sigma_data) < math.inf):
            raise ConfigError(
                f"sigma_data must be a positive number, the standard deviation of the data, got {sigma_data!r}"
            )
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.v_prediction = v_prediction

    def forward(self, sigma: Tensor) -> Coefficients:
        return Coefficients(*self.mix(sigma), self.time(sigma))

    def mix(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """skip, out, scale"""
        variance, sd = sigma**2 + self.sigma_data**2, self.sigma_data
        sign = -1 if self.v_prediction else 1
        return sd**2 / variance, sign * sigma * sd / variance.sqrt(), 1 / variance.sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return self.time_scale * sigma.log()

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level of a time, float64; the inverse of `time`."""
        return (time.double() / self.time_scale).exp()

    def describe(self) -> str:
        sign = " of v" if self.v_prediction else ""
        return f"EDM preconditioning{sign}, sigma_data {self.sigma_data:g}; told {self.time_scale:g}·log(sigma)"

    def settings(self) -> dict[str, Any]:
        return {"sigma_data": float(self.sigma_data)} | ({"v_prediction": True} if self.v_prediction else {})


class Consistency(EDM):
    """EDM's coefficients with time = 1000·log(sigma)/4. Song et al. 2023 (arXiv:2303.01469).

    boundary: a consistency function, which is the identity at sigma_min (their appendix C), and no denoiser:
    skip = sd²/((sigma - sigma_min)² + sd²), out = (sigma - sigma_min)·sd/sqrt(sigma² + sd²). The networks that they distilled
    or trained from nothing (cd, ct) are, those that they distilled from (edm) are denoisers.
    """

    name = "cm"
    time_scale = 250.0
    fixed = (*EDM.fixed, "boundary")

    def __init__(
        self, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0, *, boundary: bool = False
    ):
        super().__init__(sigma_data, sigma_min, sigma_max)
        self.boundary, self.consistency = float(sigma_min) if boundary else None, boundary

    def mix(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.boundary is None:
            return super().mix(sigma)
        variance, sd, beyond = sigma**2 + self.sigma_data**2, self.sigma_data, sigma - self.boundary
        return sd**2 / (beyond**2 + sd**2), beyond * sd / variance.sqrt(), 1 / variance.sqrt()

    def describe(self) -> str:
        told = "" if self.boundary is None else f", the identity at sigma {self.boundary:g}; {_ONE_STEP}"
        return super().describe() + told

    def settings(self) -> dict[str, Any]:
        return super().settings() | ({} if self.boundary is None else {"boundary": self.boundary})


class VP(Family):
    """Noise prediction in continuous VP time: D = x - sigma·F(x/sqrt(1 + sigma²); (M - 1)·t(sigma)).

    sigma(t)² = exp(beta_d t²/2 + beta_min t) - 1. Song et al. 2021 (arXiv:2011.13456).
    """

    name = "vp"

    fixed = ("vp", "steps")

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, steps: int = 1000, epsilon_t: float = 1e-5):
        super().__init__()
        self.vp, self.steps = VPTime(beta_d, beta_min), steps
        ends = self.vp.sigma(torch.tensor([epsilon_t, 1.0], dtype=torch.float64, device="cpu"))
        self.sigma_min, self.sigma_max = ends.tolist()

    def forward(self, sigma: Tensor) -> Coefficients:
        # In float64: t(sigma) subtracts nearly equal numbers where sigma is small.
        time = (self.steps - 1) * self.vp.time(sigma.double())
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (1 + sigma**2).sqrt(), time.to(sigma.dtype))

    def whole(self, time: Tensor) -> Tensor:
        return time.round()

    def describe(self) -> str:
        return f"the noise, VP preconditioning; told {self.steps - 1}·t, beta_d {self.vp.beta_d:g}"

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "betas": [float(beta) for beta in self.vp]}


class VE(Family):
    """D = x + sigma·F(x; log(sigma/2)). Song et al. 2021 (arXiv:2011.13456)."""

    name = "ve"
    sigma_min, sigma_max = 0.02, 100.0

    def forward(self, sigma: Tensor) -> Coefficients:
        one = torch.ones_like(sigma)
        return Coefficients(one, sigma, one, (sigma / 2).log())

    def describe(self) -> str:
        return "the score times sigma, VE preconditioning; told log(sigma/2)"


class IDDPM(Family):
    """Noise prediction on the M + 1 levels u_j of a cosine schedule: time = M - 1 - j, u_j the level nearest to sigma.

        u_M = 0,  u_{j-1}² = (u_j² + 1) / max(a(j - 1)/a(j), C_1) - 1,  a(j) = sin²(π/2 · j / (M (C_2 + 1)))

    Nichol & Dhariwal 2021 (arXiv:2102.09672).
    """

    name = "iddpm"
    levels: Tensor

    fixed = ("steps",)

    def __init__(self, steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008):
        super().__init__()
        self.steps = steps
        alpha = [math.sin(0.5 * math.pi * j / steps / (c_2 + 1)) ** 2 for j in range(steps + 1)]
        levels = [0.0]
        for j in range(steps, 0, -1):
            levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(alpha[j - 1] / alpha[j], c_1) - 1))
        self.register_buffer("levels", torch.tensor(levels[::-1], dtype=torch.float32, device="cpu"), persistent=False)
        self.sigma_min, self.sigma_max = levels[1], levels[-1]

    def forward(self, sigma: Tensor) -> Coefficients:
        nearest = (sigma[:, None] - self.levels.to(sigma.dtype)).abs().argmin(dim=1)
        time = (self.steps - 1 - nearest).to(sigma.dtype)
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (1 + sigma**2).sqrt(), time)

    def whole(self, time: Tensor) -> Tensor:
        return time

    def describe(self) -> str:
        return f"the noise, iDDPM preconditioning; told the nearest of {self.steps} steps"

    def settings(self) -> dict[str, Any]:
        return {"sigmas": summary(self.levels)}
