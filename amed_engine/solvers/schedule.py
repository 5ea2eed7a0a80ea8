"""Noise levels: plain float64 tensors on the host, decreasing, with nothing else attached.

A schedule of N levels has N - 1 intervals. The variance-preserving (VP) parameterisation used by `time_uniform`
and by DEIS is

    sigma(t) = sqrt(exp(beta_d t²/2 + beta_min t) - 1),        t in [1e-3, 1]

with beta_d and beta_min fitted so that sigma(1e-3) = sigma_min and sigma(1) = sigma_max.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers.arguments import told

logger = logging.getLogger("amed_engine")

EPSILON_T = 1e-3  # smallest VP time, as in Song et al. 2021


class VPTime(NamedTuple):
    """The VP noise schedule fitted to a range of noise levels."""

    beta_d: float
    beta_min: float

    @classmethod
    def fitted(cls, sigma_min: float = 0.002, sigma_max: float = 80.0) -> VPTime:
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / EPSILON_T - high) / (EPSILON_T - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return ((self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt() - self.beta_min) / self.beta_d


class DiscreteTime(NamedTuple):
    """Noise levels of a model trained on discrete steps: log alpha is piecewise linear in t = (k + 1) / len.

    sigma² = (1 - alphas_cumprod) / alphas_cumprod. Beyond both ends the outer segments are continued.
    """

    log_alpha: Tensor  # log sqrt(alphas_cumprod), decreasing

    @classmethod
    def of(cls, alphas_cumprod: Tensor) -> DiscreteTime:
        alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device=getattr(alphas_cumprod, "device", "cpu"))
        if alphas.dim() != 1 or len(alphas) < 2 or not bool(((alphas > 0) & (alphas < 1)).all()):
            raise ConfigError(
                f"alphas_cumprod must be a vector of at least 2 numbers inside (0, 1), got shape {tuple(alphas.shape)}; "
                "pass the model's cumulative product of 1 - beta"
            )
        if not bool((alphas.diff() < 0).all()):
            raise ConfigError(
                "alphas_cumprod must decrease; pass the cumulative product of 1 - beta, least noisy first"
            )
        return cls(alphas.log() / 2)

    def grid(self) -> Tensor:  # not a property, which torch.compile of torch 2.10 cannot trace
        n = self.log_alpha.shape[0]  # not len(): jit.trace warns of it
        return torch.arange(1, n + 1, dtype=self.log_alpha.dtype, device=self.log_alpha.device) / n

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(-2 * _interpolate(t.to(self.log_alpha), self.grid(), self.log_alpha)).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        log_alpha = -torch.log1p(sigma.to(self.log_alpha) ** 2) / 2
        return _interpolate(log_alpha, self.log_alpha.flip(0), self.grid().flip(0))


def _interpolate(at: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs increasing, the outer segments continued."""
    # Counted, not torch.searchsorted, which ONNX does not have.
    k = (at.unsqueeze(-1) > xs).sum(-1).clamp(1, xs.shape[0] - 1)
    x0, x1, y0, y1 = xs[k - 1], xs[k], ys[k - 1], ys[k]
    return y0 + (at - x0) / (x1 - x0) * (y1 - y0)


def polynomial(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """sigma_i^(1/rho) equally spaced. Karras et al. 2022 (arXiv:2206.00364), equation 5."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + _unit(num_steps) * (low - high)) ** rho


def logsnr(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """log sigma equally spaced. Lu et al. 2022 (arXiv:2206.00927)."""
    low, high = math.log(sigma_min), math.log(sigma_max)
    return (high + _unit(num_steps) * (low - high)).exp()


def time_uniform(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """t^(1/rho) equally spaced in VP time from 1 to 1e-3. Zhou et al. 2024 (arXiv:2312.00094).

    A fit to a large sigma_min falls before t = 1; beta is constant then, and t ends at log(1 + sigma_min²)/log(1 + sigma_max²).
    """
    vp, last = VPTime.fitted(sigma_min, sigma_max), EPSILON_T
    if vp.beta_d + vp.beta_min < 0:
        vp = VPTime(0.0, math.log1p(sigma_max**2))
        last = math.log1p(sigma_min**2) / vp.beta_min
    t = (1 + _unit(num_steps) * (last ** (1 / rho) - 1)) ** rho
    return vp.sigma(t)


def discrete(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0, *, alphas_cumprod: Tensor) -> Tensor:
    """t^(1/rho) equally spaced on the time axis of a discrete-step model (latent and Stable Diffusion)."""
    time = DiscreteTime.of(alphas_cumprod)
    t_max, t_min = time.time(torch.tensor([sigma_max, sigma_min], dtype=torch.float64, device="cpu")).tolist()
    t = (t_max ** (1 / rho) + _unit(num_steps) * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho
    return time.sigma(t)


def _unit(num_steps: int) -> Tensor:
    return torch.arange(num_steps, dtype=torch.float64, device="cpu") / (num_steps - 1)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
    "discrete": discrete,
}


def make_schedule(
    name: str,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float | None = None,
    alphas_cumprod: Tensor | None = None,
) -> Tensor:
    """Decreasing noise levels from sigma_max to sigma_min.

    name: polynomial (rho 7 unless given), logsnr (no rho), time_uniform (rho 1) or discrete (rho 1, needs alphas_cumprod).
    num_steps: how many levels, at least 2; one more than there are intervals.
    Returns (num_steps,) float64 on the CPU. Raises ConfigError.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}; valid names: {', '.join(SCHEDULES)}")
    if not isinstance(num_steps, Integral) or num_steps < 2:
        raise ConfigError(f"num_steps counts noise levels and must be at least 2 (one interval), got {num_steps!r}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ConfigError(
            f"need 0 < sigma_min < sigma_max, both finite; got sigma_min={sigma_min}, sigma_max={sigma_max}"
        )
    if rho is not None and not (isinstance(rho, (int, float)) and 0 < rho <= sys.float_info.max):
        raise ConfigError(f"rho must be a positive number or None, got {told(rho)}")
    options = {} if rho is None or name == "logsnr" else {"rho": float(rho)}
    if name == "discrete":
        if alphas_cumprod is None:
            raise ConfigError("schedule 'discrete' needs alphas_cumprod, the model's cumulative product of 1 - beta")
        options["alphas_cumprod"] = alphas_cumprod  # type: ignore[assignment]
    try:
        levels = SCHEDULES[name](num_steps, float(sigma_min), float(sigma_max), **options)
    except OverflowError:  # of x^(1/rho)
        levels = torch.full((num_steps,), math.inf, dtype=torch.float64, device="cpu")
    if rho is not None and not bool((levels.isfinite() & (levels > 0)).all() and (levels.diff() < 0).all()):
        raise ConfigError(f"rho must leave {num_steps} noise levels apart in float64, got {rho!r}; 1 to 10 are usual")
    return levels


def check_sigmas(sigmas: Tensor) -> Tensor:
    """The noise levels as a float64 vector on the CPU, or a ConfigError that names the first bad one.

    k-diffusion and its relatives append a level 0. Dividing by it is undefined, and no solver here evaluates there, so
    a trailing zero is dropped, with a note in the log.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    if sigmas.dim() == 1 and len(sigmas) > 2 and sigmas[-1] == 0:
        logger.warning("dropped the trailing sigma = 0; sampling ends at sigmas[-2] = %g", sigmas[-2])
        sigmas = sigmas[:-1]
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ConfigError(f"sigmas must be a vector of at least 2 noise levels, got shape {tuple(sigmas.shape)}")
    levels = sigmas.tolist()
    for i, sigma in enumerate(levels):
        if not math.isfinite(sigma):
            raise ConfigError(f"sigmas must be finite, got sigmas[{i}]={sigma}")
        if sigma <= 0:
            raise ConfigError(f"sigmas must be positive, got sigmas[{i}]={sigma:g}; end at the model's sigma_min")
        if i and sigma >= levels[i - 1]:
            raise ConfigError(
                f"sigmas must decrease, got sigmas[{i - 1}]={levels[i - 1]:g} <= sigmas[{i}]={sigma:g}; "
                "pass make_schedule(...) or sort descending"
            )
    return sigmas
