"""Networks trained on discrete steps of a variance-preserving process: noise, v and data prediction.

The network sees x_in = x/sqrt(1 + sigma²) = alpha·x0 + s·n with alpha² + s² = 1, and a step that may be fractional.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.adapters.family import Coefficients, Family
from amed_engine.adapters.fingerprint import summary
from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import bare
from amed_engine.solvers.schedule import DiscreteTime

BETAS = ("scaled_linear", "linear", "cosine")
RANGES = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}  # of Stable Diffusion and of DDPM
PREDICTS = {"epsilon": "the noise", "v": "v = alpha·n - s·x0", "x0": "the clean data"}


def alphas_cumprod(betas: str, steps: int = 1000, start: float | None = None, end: float | None = None) -> Tensor:
    """The cumulative product of 1 - beta, (steps,) float64.

    scaled_linear: sqrt(beta) equally spaced (0.00085 to 0.012); linear: beta equally spaced (0.0001 to 0.02); cosine:
    beta = min(1 - f(t + 1/steps)/f(t), 0.999), f(t) = cos²(π/2 (t + 0.008)/1.008), no ends. Raises ConfigError.
    """
    if betas not in BETAS:
        raise ConfigError(f"betas must be one of {', '.join(BETAS)} or a tensor alphas_cumprod, got {betas!r}")
    if betas == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - (1 - f[1:] / f[:-1]).clamp_max(0.999)).cumprod(0)
    own_start, own_end = RANGES[betas]
    low, high = own_start if start is None else start, own_end if end is None else end
    if not 0 < low <= high < 1:
        raise ConfigError(f"betas must stay or grow inside (0, 1), got {low} to {high}")
    if betas == "linear":
        return (1 - torch.linspace(low, high, steps, dtype=torch.float64, device="cpu")).cumprod(0)
    return (1 - torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64, device="cpu") ** 2).cumprod(0)


def family_of(network: Any) -> Family | None:
    """What a network that `wrap` adapted is of, inside guidance too; None for others."""
    network = bare(network)
    if not isinstance(network, nn.Module):
        return None
    family = getattr(network, "family", None)
    return family if isinstance(family, Family) else family_of(getattr(network, "denoiser", None))


def alphas_of(network: Any) -> Tensor | None:
    """alphas_cumprod of a network's own training steps, (steps,) float64 on the CPU; None for one without, or unknown ones.

    A traced or exported network has them in the buffers of what `wrap` made.
    """
    network = bare(network)
    if not isinstance(network, nn.Module):
        return None
    table = getattr(getattr(network, "family", None), "log_alpha", None)
    if isinstance(table, Tensor):
        return (2 * table.detach().cpu()).exp()
    return alphas_of(getattr(network, "denoiser", None))


class DiscreteSteps(Family):
    """time = steps·t(sigma) - 1 with log alpha piecewise linear in t; a whole number on the trained noise levels.

        epsilon:  D = x - sigma·F                  x0:  D = F
        v:        D = x/(1 + sigma²) - sigma/sqrt(1 + sigma²)·F       (Salimans & Ho 2022, arXiv:2202.00512)

    Beyond the trained levels the outer segments are continued.
    """

    log_alpha: Tensor

    fixed = ("name", "steps")

    def __init__(self, prediction: str, alphas: Any, *, log_alpha: Tensor | None = None):
        super().__init__()
        self.name = prediction
        self._table = DiscreteTime.of(alphas).log_alpha if log_alpha is None else log_alpha
        self.register_buffer("log_alpha", self._table.clone(), persistent=False)
        self.steps = len(self._table)
        ends = torch.expm1(-2 * self._table[[0, -1]]).sqrt()
        self.sigma_min, self.sigma_max = ends.tolist()

    @classmethod
    def of_table(cls, prediction: str, log_alpha: Tensor) -> DiscreteSteps:
        """Of log sqrt(alphas_cumprod), (steps,) float64, as a file holds it. Raises ConfigError."""
        if prediction not in PREDICTS:
            raise ConfigError(f"discrete steps predict {', '.join(PREDICTS)}, got {prediction!r}")
        DiscreteTime.of((2 * log_alpha.double()).exp())
        return cls(prediction, None, log_alpha=log_alpha.double())

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # .half() and .to(dtype) are meant for the network: the table keeps its precision.
        self.log_alpha = self._table.to(self.log_alpha.device)
        return self

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level of a step, (B,) -> (B,) float64; steps may be fractional."""
        return DiscreteTime(self.log_alpha).sigma((time.double() + 1) / self.steps)

    def time(self, sigma: Tensor) -> Tensor:
        """The step of a noise level, (B,) -> (B,) float64; the inverse of `sigma`."""
        return DiscreteTime(self.log_alpha).time(sigma) * self.steps - 1

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha² of each training step, (steps,) float64 on the CPU."""
        return (2 * self.log_alpha.cpu()).exp()

    def forward(self, sigma: Tensor) -> Coefficients:
        return Coefficients(*self.mix(sigma), self.time(sigma).to(sigma.dtype))

    def whole(self, time: Tensor) -> Tensor:
        """The nearest trained step, 0 to steps - 1; the other coefficients stay those of the level itself."""
        return time.round().clamp(0, self.steps - 1)

    def mix(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """skip, out, scale"""
        variance, one = 1 + sigma**2, torch.ones_like(sigma)
        skip, out = {
            "epsilon": (one, -sigma),
            "v": (1 / variance, -sigma / variance.sqrt()),
            "x0": (torch.zeros_like(sigma), one),
        }[self.name]
        return skip, out, 1 / variance.sqrt()

    def describe(self) -> str:
        return f"{PREDICTS[self.name]}; told one of {self.steps} steps, fractions allowed"

    def settings(self) -> dict[str, Any]:
        return {"predicts": self.name, "sigmas": summary(torch.expm1(-2 * self._table).sqrt())}
