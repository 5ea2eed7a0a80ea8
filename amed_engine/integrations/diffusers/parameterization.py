"""How a diffusers model is asked and understood at a noise level: EDM's networks, and those of discrete steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.discrete import DiscreteSteps, alphas_cumprod
from amed_engine.adapters.karras import EDM
from amed_engine.adapters.schedulers import NAMES
from amed_engine.errors import ConfigError
from amed_engine.solvers.plan import own_range
from amed_engine.solvers.schedule import logsnr, polynomial

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}  # here: there
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Parameterization:
    """Between a network F(scale·x; timestep) and D = skip·x + out·F, at noise levels () or (B,), as its family has them.

    EDM's networks of v_prediction have the other sign of out; D = F for sample.
    """

    prediction_type: str
    family: EDM | DiscreteSteps

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Parameterization:
        """From a scheduler's configuration; one with a beta_schedule or trained_betas is of discrete steps."""
        told = config["prediction_type"]
        if told not in PREDICTIONS:
            raise ConfigError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {told!r}")
        alphas = _alphas(config)
        return cls(told, EDM(float(config["sigma_data"])) if alphas is None else DiscreteSteps(NAMES[told], alphas))

    def range(self, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
        """The wished range of noise levels, inside that of a discrete model."""
        low, high = self.family.sigma_min, self.family.sigma_max
        if isinstance(self.family, EDM):
            return own_range(low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)
        return max(low, sigma_min or low), min(high, sigma_max or high)

    def levels(self, schedule: str, count: int, low: float, high: float, rho: float) -> Tensor:
        """`count` noise levels, (count,) float64: "karras" or "exponential"."""
        if schedule not in ("karras", "exponential"):
            raise ConfigError(f"sigma_schedule must be karras or exponential, got {schedule!r}; pass sigmas for others")
        return polynomial(count, low, high, rho) if schedule == "karras" else logsnr(count, low, high)

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told of a noise level."""
        return self.family.to(sigma.device).time(sigma).to(sigma.dtype)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level of a timestep, float64."""
        return self.family.cpu().sigma(timestep.cpu())

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's input scale·x."""
        return x * self.family.mix(_like(sigma, x))[2]

    def denoised(self, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """D from the network's output at x, in memory of its own."""
        if self.prediction_type == "sample":
            return output.clone()
        skip, out, _ = self.family.mix(_like(sigma, x))
        opposite = isinstance(self.family, EDM) and self.prediction_type == "v_prediction"
        return skip * x + (-out if opposite else out) * output


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    """Ready to multiply x: one level for all stays a scalar on the host, in its own precision, and is never copied."""
    return sigma if sigma.dim() == 0 else sigma.to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def translated(config: Any, parameters: Mapping[str, inspect.Parameter]) -> Any:
    """A scheduler's configuration for a class with these parameters. Raises ConfigError where it would mean something else.

    diffusers puts the defaults of the new class in the place of those of the old one. These say, too, what a network was
    trained for, so only those that agree may be replaced. What is no configuration is for diffusers to refuse.
    """
    if not isinstance(config, Mapping):
        return config
    if "shift" in config or config.get("use_flow_sigmas"):
        raise ConfigError(
            "this configuration is of a flow-matching model, AMEDScheduler is for epsilon, v and x0 prediction: sample it "
            "with amed_engine.adapters.wrap_pipeline and Sampler"
        )
    if config.get("rescale_betas_zero_snr"):
        raise ConfigError(
            "a zero terminal signal-to-noise ratio has no highest noise level; pass trained_betas instead"
        )
    defaults = config.get("_use_default_values", [])
    agree = [name for name in defaults if name not in parameters or config.get(name) == parameters[name].default]
    return {**config, "_use_default_values": agree}


def _alphas(config: Mapping[str, Any]) -> Tensor | None:
    """alphas_cumprod of the training steps, (num_train_timesteps,) float64; None for a model without steps."""
    name = config["beta_schedule"]
    if config["trained_betas"] is not None:
        return (1 - torch.as_tensor(config["trained_betas"], dtype=torch.float64)).cumprod(0)
    if name is None:
        return None
    if name not in BETA_SCHEDULES:
        raise ConfigError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)} or None, got {name!r}")
    steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    return alphas_cumprod(BETA_SCHEDULES[name], steps, start, end)
